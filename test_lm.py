"""Every test, grouped as lm.py is, then the scripts, the README and the docs. Run: python -m pytest"""

import ast
import copy
import dataclasses
import io
import json
import math
import os
import pickle
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types
import zipfile
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import convert
import lm
import prepare
import sample
import train

torch.set_num_threads(1)  # as many as the commands that the tests start; sums are then in one order
ROOT = Path(lm.__file__).parent
README = (ROOT / "README.md").read_text()
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NO_GPU)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def same(a, b):
    """Equal to the last bit, however nested."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def tiny(**changes) -> lm.TransformerLM:
    shape = {"vocab_size": 61, "context_length": 16, "d_model": 32, "num_layers": 2, "num_heads": 4}
    return lm.TransformerLM(lm.ModelConfig(**shape | changes))


def with_gradients(f, inputs, parameters=()):
    """[f(*inputs), then the gradient of each input and parameter] for a fixed gradient of f's result."""
    y = f(*inputs)
    upstream = torch.sin(torch.arange(y.numel())).view_as(y).to(y.dtype)
    wanted = [tensor for tensor in (*inputs, *parameters) if tensor.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, upstream)]


# ------------------------------------------------------------------------------------------ Linear, Embedding
def test_linear_without_bias_embedding_and_rmsnorm_are_torchs():
    x = torch.randn(3, 5, 24, requires_grad=True)
    layers = [(lm.Linear(24, 40), torch.nn.Linear(24, 40, bias=False), x)]
    layers += [(lm.Embedding(50, 16), torch.nn.Embedding(50, 16), torch.randint(50, (3, 7)))]
    layers += [(lm.RMSNorm(24, 0.1), torch.nn.RMSNorm(24, 0.1), x)]
    torch.nn.init.uniform_(layers[2][0].weight, 0.5, 2)
    for ours, theirs, inputs in layers:
        theirs.load_state_dict(ours.state_dict())
        close(*[with_gradients(f, [inputs], f.parameters()) for f in (ours, theirs)], 5e-6)


def test_initial_weights_have_the_stated_variances_and_branches_start_smaller():
    tied = tiny(d_model=512, vocab_size=300, num_layers=1, tie_embeddings=True)
    wanted = [(lm.Linear(300, 500).weight, math.sqrt(2 / 800)), (lm.Embedding(300, 500).weight, 1.0)]
    wanted += [(tied.embed_tokens.weight, 1 / math.sqrt(512))]
    for layer in tiny(d_model=400, num_layers=8, d_ff=1000).layers:
        wanted.append((layer.self_attn.o_proj.weight, math.sqrt(2 / 800) / math.sqrt(2 * 8)))
        wanted.append((layer.mlp.down_proj.weight, math.sqrt(2 / 1400) / math.sqrt(2 * 8)))
    for weight, std in wanted:
        assert weight.std().item() == pytest.approx(std, rel=0.01) and abs(weight.mean()) < 0.01 * std


# ---------------------------------------------------------------------------------------------------- RMSNorm
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rmsnorm_computes_in_float32_and_returns_the_dtype_of_its_input(dtype):
    x = (1000 * torch.randn(4, 64)).to(dtype)  # the squares overflow float16
    exact = x.double() / torch.sqrt(x.double().square().mean(-1, keepdim=True) + 1e-5)
    y = lm.RMSNorm(64)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps / 2 + 1e-6, atol=0)


# -------------------------------------------------------------------------------------------------- Attention
def formula(q, k, v):
    """The lines of attention's docstring, after k and v were repeated for the heads of queries."""
    lines = re.search(r" +mask = .*?\n\n", lm.attention.__doc__, re.DOTALL)[0]
    k, v = [x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v)]
    names = {"q": q, "k": k, "v": v, "T": q.shape[2], "K": q.shape[3], "math": math, "torch": torch}
    exec(textwrap.dedent(lines), names)
    return names["y"]


@pytest.mark.parametrize("G", [6, 2, 1])
@pytest.mark.parametrize("S", [1, 7])
def test_attention_is_the_formula_of_its_docstring(G, S):
    q = torch.randn(2, 6, S, 8, requires_grad=True)
    k, v = torch.randn(2, 2, G, S, 8).requires_grad_()
    close(*[with_gradients(f, [q, k, v]) for f in (lm.attention, formula)], 2e-6)
    close(lm.attention(q[:, :, -1:], k, v), formula(q, k, v)[:, :, -1:], 2e-6)  # one query for all keys
    with pytest.raises(ValueError, match=f"2 queries for {S + 2} keys"):
        lm.attention(q.new_zeros(2, 6, 2, 8), *torch.zeros(2, 2, G, S + 2, 8))


# ------------------------------------------------------------------------------------------------------- RoPE
def test_rope_multiplies_pairs_by_complex_phases_so_that_a_score_depends_on_the_distance():
    K, start = 8, 37
    rope, (q, k) = lm.RoPE(K, 41, theta=500.0), torch.randn(2, 3, 4, K)
    angle = torch.arange(start, start + 4)[:, None] * 500.0 ** (-2 * torch.arange(K // 2).double() / K)
    z = torch.complex(q[..., : K // 2].double(), q[..., K // 2 :].double())
    z = z * torch.polar(torch.ones_like(angle), angle)
    close(rope(q, start), torch.cat((z.real, z.imag), dim=-1).float())
    close((rope(q, 9) * rope(k, 2)).sum(-1), (rope(q, 37) * rope(k, 30)).sum(-1))
    with pytest.raises(ValueError, match="42 tokens are more than the context_length of 41"):
        rope(q, start + 1)


# ------------------------------------------------------------------------------------- MultiheadSelfAttention
@pytest.mark.parametrize("G", [4, 2, 1])
def test_multihead_self_attention_is_torchs_with_grouped_heads(G):
    """torch.nn.MultiheadAttention has no RoPE, so ours turns by no angle; its weights are stacked."""
    D, H, K = 32, 4, 8
    ours = lm.MultiheadSelfAttention(D, H, G, lm.RoPE(K, 16))
    theirs = torch.nn.MultiheadAttention(D, H, bias=False, batch_first=True)
    ours.rope.cos[:], ours.rope.sin[:] = 1, 0
    k, v = [proj.weight.view(G, K, D).repeat_interleave(H // G, dim=0) for proj in (ours.k_proj, ours.v_proj)]
    theirs.in_proj_weight.data = torch.cat((ours.q_proj.weight, k.flatten(0, 1), v.flatten(0, 1)))
    theirs.out_proj.weight = ours.o_proj.weight
    x, mask = torch.randn(2, 9, D), torch.nn.Transformer.generate_square_subsequent_mask(9)
    close(ours(x), theirs(x, x, x, attn_mask=mask, need_weights=False)[0], 2e-6)


@pytest.mark.parametrize("path", [n for n, m in tiny().named_modules() if isinstance(m, lm.Linear)])
def test_a_module_in_place_of_a_linear_map_acts_in_training_and_in_generation(path):
    model, calls = tiny(num_kv_heads=2).eval(), []
    merged = copy.deepcopy(model)  # the same model, with one matrix in place of two
    linear = model.get_submodule(path)
    second = lm.Linear(len(linear.weight), len(linear.weight))
    second.register_forward_hook(lambda *_: calls.append(path))
    model.set_submodule(path, torch.nn.Sequential(linear, second))
    merged.get_submodule(path).weight.data = second.weight.data @ linear.weight.data
    tokens, targets = torch.randint(61, (2, 2, 9))
    loss = model(tokens, targets)
    loss.backward()
    close(loss, merged(tokens, targets))
    assert second.weight.grad.abs().sum() > 0
    assert same(model.generate(tokens, 5, temperature=0), merged.generate(tokens, 5, temperature=0))
    assert len(calls) == 1 + 5


# ----------------------------------------------------------------------------------------------------- SwiGLU
def test_swiglu_is_its_formula():
    mlp, x = lm.SwiGLU(16, 40).double(), torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    gate, up, down = weights = list(mlp.parameters())

    def by_formula(x):
        return ((x @ gate.T) / (1 + torch.exp(-x @ gate.T)) * (x @ up.T)) @ down.T

    close(*[with_gradients(f, [x], weights) for f in (mlp, by_formula)], 1e-12)


# ------------------------------------------------------------------------------------------- TransformerBlock
@pytest.mark.parametrize("silent", ["self_attn.o_proj", "mlp.down_proj"])
def test_dropout_acts_on_the_two_branches_and_on_nothing_else(silent):
    block, x = lm.TransformerBlock(32, 4, 4, 64, lm.RoPE(8, 16), dropout=0.5), torch.randn(64, 8, 32)
    block.get_submodule(silent).weight.data.zero_()
    branch, dropped = block.eval()(x) - x, block.train()(x) - x
    zero = dropped == 0
    assert 0.45 < zero.float().mean() < 0.55
    close(dropped[~zero], 2 * branch[~zero])


# ------------------------------------------------------------------------------------- KVCache, sample_token
@pytest.mark.parametrize("chunks", [[16], [9] + 7 * [1], 16 * [1]])
def test_cached_logits_are_the_full_forwards_at_every_position(chunks):
    model, tokens = tiny(num_kv_heads=2), torch.randint(61, (3, 16))
    caches = [lm.KVCache() for _ in model.layers]
    pieces = [model(piece, caches=caches) for piece in tokens.split(chunks, dim=1)]
    close(torch.cat(pieces, dim=1), model(tokens)[:, np.cumsum(chunks) - 1], 5e-6)
    assert caches[1].length == 16 and caches[1].keys.shape == caches[1].values.shape == (3, 2, 16, 8)


@pytest.mark.parametrize(
    "expected,settings",
    [
        ([0.15, 0.5, 0.05, 0.3], {}),
        ([0.15, 0.5, 0.05, 0.3], {"top_k": 9, "top_p": 1.0}),
        ([0.0225 / 0.365, 0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365], {"temperature": 0.5}),
        ([0, 1, 0, 0], {"temperature": 0}),
        ([0, 1, 0, 0], {"top_p": 1e-9}),
        ([0, 0.625, 0, 0.375], {"top_k": 2}),
        ([0, 0.625, 0, 0.375], {"top_p": 0.7}),  # the docstring's example
        ([0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95], {"top_p": 0.81}),
        ([0, 0.625, 0, 0.375], {"top_k": 3, "top_p": 0.6}),  # of the three, 0.526 comes before the second
        ([0, 1, 0, 0], {"temperature": 0.5, "top_k": 3, "top_p": 0.68}),  # 0.25 / 0.3625 = 0.69
    ],
)
def test_tokens_are_drawn_as_often_as_worked_out_by_hand(expected, settings):
    shift = torch.arange(4000)[:, None]  # each row has the probabilities in another place
    probs = torch.tensor([0.15, 0.5, 0.05, 0.3])[(torch.arange(4) - shift) % 4]
    tokens = lm.sample_token(probs.log(), **settings, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount((tokens - shift[:, 0]) % 4, minlength=4)
    for count, p in zip(counts.tolist(), expected, strict=True):
        assert (count == 0) == (p == 0)
        assert abs(count - 4000 * p) <= 4 * math.sqrt(4000 * p * (1 - p))  # four standard deviations


def test_of_tied_tokens_top_k_and_top_p_keep_no_more_than_asked():
    for settings in ({"top_k": 2}, {"top_p": 0.5}):
        assert len(set(lm.sample_token(torch.zeros(400, 4), **settings).tolist())) == 2


@pytest.mark.parametrize("name,value", [("temperature", -0.1), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.1)])
def test_sampling_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value}"):
        lm.sample_token(torch.zeros(1, 5), **{name: value})


# --------------------------------------------------------------------------------- ModelConfig, TransformerLM
def test_a_config_fills_in_its_defaults_and_refuses_impossible_shapes_by_name():
    configs = [lm.ModelConfig(61, 16, d_model, 1, 4) for d_model in (128, 192, 288, 4096)]
    assert [(c.num_kv_heads, c.d_ff) for c in configs] == [(4, 344), (4, 512), (4, 768), (4, 10928)]
    impossible = [("vocab_size", 0), ("context_length", 0), ("num_layers", -1), ("d_ff", 0), ("num_heads", 0)]
    impossible += [("d_model", 30), ("d_model", 12), ("num_kv_heads", 3), ("num_kv_heads", 8)]  # for 4 heads
    for name, value in impossible:
        with pytest.raises(ValueError, match=f"^{name} is {value}"):
            tiny(**{name: value})


def test_the_loss_is_the_mean_cross_entropy_without_the_targets_of_minus_100():
    model, (tokens, targets) = tiny(), torch.randint(61, (2, 3, 16))
    targets[0, 5:] = targets[2, 7] = -100
    kept = targets != -100
    logits = model(tokens)[kept].double()
    chosen = logits.gather(1, targets[kept][:, None]).squeeze(1)
    close(model(tokens, targets).double(), (logits.exp().sum(1).log() - chosen).mean(), 1e-6)
    assert model.bfloat16()(tokens, targets).dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("context_length", [1, 2, 7, 16])
@pytest.mark.parametrize("prompt_length", [1, 5, 40])
@torch.no_grad()
def test_generation_on_cpu_and_gpu_is_the_argmax_of_full_forwards(device, context_length, prompt_length):
    model = tiny(context_length=context_length, num_kv_heads=2).to(device)
    for param in model.parameters():
        param *= 4  # a fresh model looks at little but the last token
    sequence = prompt = torch.randint(61, (8, prompt_length), device=device)
    window = prompt[:, -context_length:]
    for _ in range(60):
        if window.shape[1] > context_length:  # its last half is read again
            window = window[:, -max(1, context_length // 2) :]
        token = model(window)[:, -1].argmax(dim=-1, keepdim=True)
        sequence, window = torch.cat((sequence, token), dim=1), torch.cat((window, token), dim=1)
    assert same(model.generate(prompt, 60, temperature=0), sequence)


def test_generate_is_the_loop_in_its_docstring_and_the_prompt_and_its_stream():
    loop = re.search(r" +tokens = prompt\n.*", lm.TransformerLM.generate.__doc__, re.DOTALL)[0]
    model, prompt, generator = tiny(), torch.randint(61, (3, 4)), torch.Generator()
    names = {**vars(lm), "model": model, "prompt": prompt, "max_new_tokens": 12}
    torch.manual_seed(1)
    exec(textwrap.dedent(loop), names)
    text = model.generate(prompt, 12, generator=generator.manual_seed(1))
    assert same(text, names["tokens"])
    streamed = list(model.stream(prompt, 12, generator=generator.manual_seed(1)))
    assert same(text, torch.cat((prompt, torch.stack(streamed, dim=1)), dim=1))
    assert not same(text, model.generate(prompt, 12, generator=generator.manual_seed(2)))


def test_rows_that_have_ended_repeat_eos_and_generation_ends_when_all_have():
    new = tiny(vocab_size=4).generate(torch.randint(4, (8, 2)), 500, eos_id=0)[:, 2:]
    ends = [row.tolist().index(0) for row in new]
    assert len(set(ends)) > 1 and new.shape[1] == max(ends) + 1
    assert all((row[end:] == 0).all() for row, end in zip(new, ends, strict=True))


# ------------------------------------------------------------------------------------------- Llama 3.1's RoPE
def test_scaled_rope_keeps_fast_pairs_slows_slow_ones_and_mixes_between():
    frequency = torch.tensor([1.0, 0.3, 0.1, 0.04, 0.01])
    turns = 64 * frequency / (2 * math.pi)  # 10.2, 3.1, 1.02, 0.41, 0.10
    mixed = frequency * ((turns - 1) / 3 + (4 - turns) / 3 / 8)
    expected = torch.cat((frequency[:1], mixed[1:3], frequency[3:] / 8))
    close(lm.scale_frequencies(frequency, 8.0, 1.0, 4.0, 64), expected, 1e-6)


# ---------------------------------------------------------------------------------- AdamW, lr_cosine_schedule
PAIRS = [(lm.AdamW, lm.AdamW), (lm.AdamW, torch.optim.AdamW), (torch.optim.AdamW, lm.AdamW)]


@pytest.mark.parametrize("first,second", PAIRS)
def test_adamw_is_torchs_over_100_steps_and_each_goes_on_from_the_others_state(first, second):
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((7, 5), (5,), (), (2,), (3,))]
    expected = copy.deepcopy(params)

    def make(kind, params):
        groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]
        return kind(groups, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)

    optimizer, oracle = make(first, params), make(torch.optim.AdamW, expected)
    for step in range(100):
        if step == 50:
            state = optimizer.state_dict()
            optimizer = make(second, params)
            optimizer.load_state_dict(state)
        for i, (param, twin) in enumerate(zip(params, expected, strict=True)):
            if i < 3 or (i == 3 and step >= 30):  # one begins late, and the last never has a gradient
                param.grad = torch.randn_like(param) * 10 ** (step % 5 - 4)
                twin.grad = param.grad.clone()
        for each in (optimizer, oracle):
            for group in each.param_groups:
                group["lr"] = 1e-2 * (1 + step % 3)
            assert each.step(torch.is_grad_enabled) is True  # in place of a closure that computes the loss
    close(params, expected, 1e-6)


def test_twelve_updates_give_the_golden_losses():
    """Made by lm.py on a CPU, once all other tests had passed; formulas give the weights and the text."""
    golden = [4.15049, 4.11706, 4.11116, 3.93926, 4.03421, 3.88973, 3.81488, 3.84851, 3.82147, 3.77778]
    golden += [3.68865, 3.58283]
    model = tiny(num_kv_heads=2)
    for i, param in enumerate(model.parameters()):
        wave = torch.sin(1.7 * torch.arange(param.numel(), dtype=torch.float64) + i).view_as(param)
        param.data.copy_(1 + 0.3 * wave if param.ndim == 1 else wave / math.sqrt(param.shape[1]))
    optimizer, losses = lm.AdamW(model.parameters(), lr=3e-3), []
    for tokens in (torch.arange(12 * 3 * 17) ** 2 % 61).view(12, 3, 17):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(golden, abs=1e-4)


def test_the_schedule_has_the_values_worked_out_by_hand():
    table = {0: 0.0, 1: 0.1, 5: 0.5, 10: 1.0, 35: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 60: 0.55, 110: 0.1}
    for step, lr in (table | {10**6: 0.1}).items():
        assert lm.lr_cosine_schedule(step, 1.0, 0.1, 10, 110) == pytest.approx(lr, rel=1e-12)
    assert lm.lr_cosine_schedule(0, 1.0, 0.0, 0, 10) == 1.0  # without warm-up
    for step in (4, 7):  # a run shorter than its warm-up
        assert lm.lr_cosine_schedule(step, 1.0, 0.0, 10, 5) == step / 10


# ----------------------------------------------------------------------------------------- MemmapTokenDataset
def dataset(folder, count, context_length=8):
    np.arange(count, dtype="<u2").tofile(folder / "t.bin")
    return lm.MemmapTokenDataset(folder / "t.bin", context_length, "uint16")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_a_dataloader_with_workers_reads_the_windows_in_order_from_little_endian_integers(tmp_path, dtype):
    size, largest = np.dtype(dtype).itemsize, np.iinfo(dtype).max
    (tmp_path / "t.bin").write_bytes(b"".join((largest - i).to_bytes(size, "little") for i in range(90)))
    data = lm.MemmapTokenDataset(tmp_path / "t.bin", 8, dtype)
    loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=2)
    tokens, targets = map(torch.cat, zip(*loader, strict=True))
    expected = int(largest) - torch.arange(89)
    assert len(data) == 11 and same(tokens.flatten(), expected[:-1]) and same(targets.flatten(), expected[1:])
    for index in (-1, 11):
        with pytest.raises(IndexError):
            data[index]


@pytest.mark.parametrize("batch_size", [1, 3, 5, 12])
def test_each_epoch_visits_its_windows_once_in_full_batches_from_a_random_offset(tmp_path, batch_size):
    data = dataset(tmp_path, 13 * 5 + 1, context_length=5)  # the fewest tokens for 13 windows
    steps = data.steps_per_epoch(batch_size)
    assert len(data) == 13 and steps == 12 // batch_size
    offsets, orders = set(), set()
    for epoch in range(40):
        batches = [data.batch(epoch * steps + i, batch_size, seed=1) for i in range(steps)]
        tokens, targets = map(torch.cat, zip(*batches, strict=True))
        offset = tokens[0, 0].item() % 5
        windows = (tokens[:, 0] - offset) / 5
        assert same(tokens, tokens[:, :1] + torch.arange(5)) and same(targets, tokens + 1)
        assert len(set(windows.tolist())) == steps * batch_size and set(windows.tolist()) <= set(range(12))
        offsets.add(offset)
        orders.add(tuple(windows.tolist()))
    assert offsets == set(range(5)) and len(orders) == 40


def test_a_batch_depends_on_step_and_seed_alone_and_is_a_copy(tmp_path):
    data = dataset(tmp_path, 1000)
    in_order = [data.batch(step, 20, seed=1) for step in range(20)]
    for step in (19, 0, 7, 6, 13):  # of several epochs
        assert same(data.batch(step, 20, seed=1), in_order[step])
        assert not same(data.batch(step, 20, seed=2), in_order[step])
        assert same(dataset(tmp_path, 1000).batch(step, 20, seed=1), in_order[step])
    for tokens, targets in (data[2], data.batch(0, 20, seed=1)):
        before = tokens.clone()
        targets.fill_(-100)
        assert same(tokens, before)


def test_too_few_tokens_for_a_window_and_too_few_windows_for_a_batch_are_refused(tmp_path):
    for count in (0, 8):
        with pytest.raises(ValueError):
            dataset(tmp_path, count)
    data = dataset(tmp_path, 5 * 8 + 1)
    assert data.steps_per_epoch(4) == 1
    with pytest.raises(ValueError, match="4 windows, fewer than the batch_size of 5"):
        data.batch(0, 5, seed=0)


# ------------------------------------------------------------------------------ CheckpointHandler, load_model
def test_a_checkpoint_is_a_torch_file_comes_back_as_it_was_and_load_model_makes_its_model(tmp_path):
    model = tiny(num_kv_heads=2, tie_embeddings=True, norm_eps=0.1, dropout=0.3).bfloat16()
    state = {"model": model.state_dict(), "model_config": dataclasses.asdict(model.config)}
    state |= {"best_val_loss": math.inf, "tokenizer": "ü", "config": {"list": [1, (2.5, True, None)]}}
    lm.CheckpointHandler.save(state, tmp_path / "ours.pt")
    torch.save(state, tmp_path / "torchs.pt")
    assert same(lm.CheckpointHandler.load(tmp_path / "ours.pt"), state)
    assert same(lm.CheckpointHandler.load(tmp_path / "torchs.pt"), state)
    assert same(torch.load(tmp_path / "ours.pt"), state)
    for dropout in (0.0, 0.2):
        again, loaded = lm.load_model(tmp_path / "ours.pt", dropout=dropout)
        assert same(loaded, state) and again.layers[1].dropout.p == dropout
        assert again.config == dataclasses.replace(model.config, dropout=dropout)
        assert same(again.state_dict(), copy.deepcopy(model).float().state_dict())


def test_every_flipped_bit_and_every_missing_end_is_noticed_and_the_file_named(tmp_path):
    path, rng, places = tmp_path / "a.pt", np.random.default_rng(0), []
    lm.CheckpointHandler.save({"x": torch.randn(50), "step": 3}, path)
    good = path.read_bytes()
    for record in zipfile.ZipFile(path).infolist():  # the data stand after a header, a name and padding
        begin = record.header_offset + 30 + np.frombuffer(good, "<u2", 2, record.header_offset + 26).sum()
        places += range(begin, begin + record.file_size)
    damaged = [b"", b"abc", good[:-1], *[good[:length] for length in range(1, len(good), 50)]]
    for place in rng.choice(places, 200, replace=False):
        damaged.append(good[:place] + bytes([good[place] ^ 1 << rng.integers(8)]) + good[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.pt: (damaged|not a checkpoint)"):
            lm.CheckpointHandler.load(path)
    with pytest.raises(FileNotFoundError):
        lm.CheckpointHandler.load(tmp_path / "missing.pt")


def test_code_in_a_checkpoint_does_not_run(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("this is code",)

    lm.CheckpointHandler.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(pickle.UnpicklingError):
        lm.CheckpointHandler.load(tmp_path / "evil.pt")
    assert "this is code" not in capsys.readouterr().out


def test_a_save_that_fails_midway_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    path, calls = tmp_path / "a.pt", []
    lm.CheckpointHandler.save({"step": 1}, path)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        lm.CheckpointHandler.save({"step": 2, "function": lambda: None}, path)
    assert lm.CheckpointHandler.load(path) == {"step": 1}
    monkeypatch.setattr("os.fsync", lambda file: calls.append("fsync"))
    monkeypatch.setattr("os.replace", lambda *paths: calls.append("replace"))
    lm.CheckpointHandler.save({"step": 2}, path)
    assert calls == ["fsync", "replace"]  # the new content is on the disk before it has the old name


# ------------------------------------------------------------------------------------------------ convert.py
SHAPE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 16}
LLAMA3 |= {"low_freq_factor": 0.02, "high_freq_factor": 1.5}
LLAMAS = [{}, {"hidden_size": 64, "rope_parameters": LLAMA3}]
LLAMAS += [{"num_key_value_heads": 2, "rms_norm_eps": 0.1, "rope_parameters": {"rope_theta": 500.0}}]
LLAMAS += [{"num_key_value_heads": 1, "tie_word_embeddings": True}]


def make_llama(changes):
    transformers = pytest.importorskip("transformers")
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE | changes, eos_token_id=7))
    for param in llama.parameters():  # gains of 1 would hide a missing one
        noise = torch.randn_like(param)
        param.data = 1 + 0.3 * noise if param.ndim == 1 else noise / math.sqrt(param.shape[1])
    return llama


def in_transformers(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.mark.parametrize("changes", LLAMAS)
def test_the_model_is_transformers_llama_in_logits_loss_and_gradients(tmp_path, changes):
    llama = make_llama(changes)
    older = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # older files hold this too
    llama.save_pretrained(tmp_path, state_dict=llama.state_dict() | older)
    lm.CheckpointHandler.save(convert.from_hf(tmp_path), tmp_path / "llama.pt")
    model, checkpoint = lm.load_model(tmp_path / "llama.pt")
    assert checkpoint["tokenizer"] is None and checkpoint["eos_id"] == 7
    tokens, targets = torch.randint(61, (2, 3, 64))
    close(model(tokens), llama(tokens).logits)
    losses = [model(tokens, targets), llama(tokens, labels=tokens, shift_labels=targets).loss]
    close(*losses)
    for loss in losses:
        loss.backward()
    for name, param in llama.named_parameters():
        close(model.get_parameter(name.removeprefix("model.")).grad, param.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", LLAMAS)
def test_a_llama_in_shards_of_any_dtype_comes_back_from_a_checkpoint_as_it_was(tmp_path, changes, dtype):
    make_llama(changes).to(dtype).save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    assert (tmp_path / "llama/model.safetensors.index.json").exists()
    checkpoint = convert.from_hf(tmp_path / "llama")
    assert {weight.dtype for weight in checkpoint["model"].values()} == {dtype}
    convert.to_hf(checkpoint, tmp_path / "again")  # which spells rope_parameters in the older way
    assert f'"torch_dtype": "{str(dtype)[6:]}"' in (tmp_path / "again/config.json").read_text()
    assert same(convert.from_hf(tmp_path / "again"), checkpoint)
    llama, tokens = in_transformers(tmp_path / "llama"), torch.randint(61, (2, 64))
    assert same(in_transformers(tmp_path / "again")(tokens).logits, llama(tokens).logits)
    convert.to_hf(checkpoint, tmp_path / "halves", dtype=torch.float16)
    assert same(in_transformers(tmp_path / "halves").state_dict(), llama.half().state_dict())


def test_what_config_json_may_leave_out_is_as_transformers_has_it():
    theirs = pytest.importorskip("transformers").LlamaConfig()
    ours = convert.model_config({"model_type": "llama"})
    for their_name, our_name, _ in convert.FIELDS:
        assert getattr(ours, our_name) == getattr(theirs, their_name)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and ours.rope_scaling is None


def test_a_llama_that_computes_something_else_is_refused_by_name():
    fields = {"model_type": "llama", **SHAPE}
    others = {"model_type": "mistral", "hidden_act": "gelu", "attention_bias": True, "mlp_bias": True}
    others |= {"head_dim": 64, "quantization_config": {"bits": 4}, "partial_rotary_factor": 0.5}
    ropes = [{"rope_type": "yarn"}, {"type": "linear", "factor": 2.0}, {"partial_rotary_factor": 0.5}]
    assert convert.model_config(fields).d_model == 32
    for name, value in others.items():
        with pytest.raises(ValueError, match=f"^{name} is"):
            convert.model_config(fields | {name: value})
    for name in ("rope_parameters", "rope_scaling"):
        for rope in ropes:
            with pytest.raises(ValueError, match=r"^(rope_type|partial_rotary_factor) is"):
                convert.model_config(fields | {name: rope})


def test_the_eos_id_is_that_of_the_tokenizer_or_else_of_the_config(tmp_path):
    tokenizer = '{"added_tokens": [{"id": 8, "content": "<a>"}, {"id": 9, "content": "<end>"}]}'
    for eos_token, eos_id in (("<end>", 9), ({"content": "<end>"}, 9), ("<other>", 5), (None, 5)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
        assert convert.find_eos_id(tmp_path, {"eos_token_id": [5, 6]}, tokenizer) == eos_id
    with pytest.raises(ValueError, match="eos_token_id"):
        convert.find_eos_id(tmp_path, {}, None)


# ------------------------------------------------------------------------ Copying out of lm.py, its docstring
TREE = ast.parse((ROOT / "lm.py").read_text(encoding="utf-8")).body
IMPORTS = [ast.unparse(node) for node in TREE if isinstance(node, ast.Import | ast.ImportFrom)]
DEFINITIONS = {node.name: node for node in TREE if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def copied_out(name):
    """The names that a file defines which holds this class or function and those that it uses."""
    needs, todo = {name}, [name]
    while todo:
        used = {node.id for node in ast.walk(DEFINITIONS[todo.pop()]) if isinstance(node, ast.Name)}
        todo += (used & DEFINITIONS.keys()) - needs
        needs |= used & DEFINITIONS.keys()
    names, sources = {"__name__": "copied"}, [DEFINITIONS[need] for need in DEFINITIONS if need in needs]
    exec("\n".join(IMPORTS + list(map(ast.unparse, sources))), names)
    return names


def test_each_class_and_function_can_be_copied_out_with_what_it_names(tmp_path):
    assert len(IMPORTS) + len(DEFINITIONS) == len(TREE) - 1  # beside them there is only the docstring
    copied = {name: copied_out(name) for name in DEFINITIONS}
    for name in ("AdamW", "MemmapTokenDataset", "CheckpointHandler", "sample_token", "lr_cosine_schedule"):
        assert copied[name].keys() & DEFINITIONS.keys() == {name}
    names = copied["MultiheadSelfAttention"]
    layer = names["MultiheadSelfAttention"](32, 4, 2, names["RoPE"](8, 16))
    layer(torch.randn(2, 9, 32)).sum().backward()
    copied["AdamW"]["AdamW"](layer.parameters()).step()
    copied["CheckpointHandler"]["CheckpointHandler"].save({"step": 3}, tmp_path / "a.pt")
    assert copied["CheckpointHandler"]["CheckpointHandler"].load(tmp_path / "a.pt") == {"step": 3}
    expected = dataset(tmp_path, 90).batch(5, 4, seed=1)
    data = copied["MemmapTokenDataset"]["MemmapTokenDataset"](tmp_path / "t.bin", 8, "uint16")
    assert same(data.batch(5, 4, seed=1), expected) and "Embedding" not in names


def test_the_training_run_in_the_first_docstring_prints_the_losses_that_it_states(monkeypatch, capsys):
    example = re.search(r"\n\n( {4}import torch\n.*?\n)\n\S", lm.__doc__, re.DOTALL)[1]
    first, bound = re.search(r"begins at (\d\.\d).*?falls\s+below\s+(\d)", lm.__doc__, re.DOTALL).groups()
    monkeypatch.chdir(ROOT)
    exec(textwrap.dedent(example), {})
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss (.*)", printed, re.MULTILINE)]
    assert len(losses) == 6 and "\ndef " in printed
    assert abs(losses[0] - float(first)) < 0.15 and losses[-1] < float(bound)


# -------------------------------------------------------------------------------------------------------- GPU
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
def test_loss_and_gradients_on_cpu_and_gpu_are_those_of_float64_even_compiled_to_one_graph(device, compiled):
    model, (tokens, targets) = tiny(num_kv_heads=2), torch.randint(61, (2, 3, 16))
    exact, results = copy.deepcopy(model).double(), []
    if compiled:
        model.compile(fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    for each, place in ((model.to(device), device), (exact, "cpu")):
        loss = each(tokens.to(place), targets.to(place))
        gradients = torch.autograd.grad(loss, list(each.parameters()))
        results.append([result.cpu().double() for result in (loss, *gradients)])
    close(*results)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_updates_through_autocast_on_cpu_and_gpu_lower_the_loss(device, dtype):
    model, (tokens, targets) = tiny().to(device), torch.randint(61, (2, 3, 16)).to(device)
    optimizer, losses = lm.AdamW(model.parameters(), lr=3e-3), []
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    for _ in range(4):
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = model(tokens, targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2] > losses[3] > 0


# ------------------------------------------------------------------------------- The command line, prepare.py
BOTTLES = "{} green bottles, standing on the wall; if one should fall, {} remain.\n"
TEXT = "".join(BOTTLES.format(i, i - 1) for i in range(120, 0, -1))
ODD = "naïve 東京 🙂 Ā\x00\u200d\r\n\t  don't 12345 עברית 🤷🏽‍♀️ ./?!\n"
SMALL = "--context_length=16 --d_model=16 --num_layers=1 --num_heads=2 --batch_size=8 --eval_tokens=64"
SMALL += " --device=cpu --dtype=float32 --max_lr=1e-2 --warmup_steps=0 --max_steps=9"
SMALL = f"{SMALL} --eval_interval=4 --log_interval=1".split()
LONG = ["--max_steps=5000", "--eval_interval=5000"]  # ends by itself, should a signal not end it


def run(script, *words, stdin=None):
    """Run a script in this process → what it prints. The tests keep their own handlers of signals."""
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", printed)
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
        patch.setattr(sys, "stdin", stdin or io.StringIO())
        patch.setattr(signal, "signal", lambda number, handler: None)
        script.main()
    printed.seek(0)
    return printed.read()


run_train = partial(run, train, *SMALL)
speak = partial(run, sample, "--max_new_tokens=9", "--device=cpu")
load = lm.CheckpointHandler.load


def refused(script, *words):
    with pytest.raises(SystemExit) as stop:
        run(script, *words)
    assert re.fullmatch("error: .*", stop.value.code)
    return stop.value.code


def parse(config_class, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", *words])
        return prepare.parse_options(config_class, "")


def manager(*words):
    return train.make_manager(parse(train.TrainConfig, *words))


def metrics(out_dir="out", key="step"):
    return [line for line in map(json.loads, open(f"{out_dir}/metrics.jsonl")) if key in line]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def start(*words):
    """Start a command that writes what it says to said.txt."""
    env = dict(os.environ, OMP_NUM_THREADS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    env["CUDA_VISIBLE_DEVICES"] = ""  # or torchrun would want a GPU for each process
    with open("said.txt", "w") as said:
        return subprocess.Popen([sys.executable, *words], stdout=said, stderr=subprocess.STDOUT, env=env)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder that holds TEXT and, in data/, its bytes as tokens."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    run(prepare, "text.txt")
    return tmp_path


@pytest.fixture
def trained(folder):
    run_train("--max_steps=2")


@pytest.fixture(scope="session")
def learned():
    pytest.importorskip("tokenizers")
    return prepare.train_tokenizer([TEXT, ODD], 400)


def save_untrained(tokenizer, path):
    model = lm.TransformerLM(lm.ModelConfig(tokenizer.vocab_size, 64, 16, 1, 2))
    state = {"model": model.state_dict(), "model_config": dataclasses.asdict(model.config)}
    state |= {"tokenizer": tokenizer.spec, "eos_id": tokenizer.eos_id}
    lm.CheckpointHandler.save(state, path)
    return state


def test_options_have_the_types_of_the_dataclass_and_what_is_no_option_is_refused(folder, capsys):
    words = "--max_lr=1 --max_st=7 --num_kv_heads=2 --resume=True --compile=False"
    expected = {"max_lr": 1.0, "max_steps": 7, "num_kv_heads": 2, "resume": True, "compile": False}
    options = parse(train.TrainConfig, *words.split())
    assert options == expected and list(map(type, options.values())) == list(map(type, expected.values()))
    for script, word, message in (
        (prepare, "--zzz=3", "unrecognized arguments: --zzz=3"),
        (prepare, "--val_fraction=many", "argument --val_fraction: invalid float value: 'many'"),
        (train, "--max_steps=1.5", "argument --max_steps: invalid int value: '1.5'"),
        (train, "--resume=maybe", "argument --resume: 'maybe' is neither True nor False"),
        (train, "--dtype=int8", "argument --dtype: invalid choice: 'int8'"),
        (sample, "--top=3", "ambiguous option"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(script, word)
        assert stop.value.code == 2 and f"error: {message}" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"text.txt", "data"}


@pytest.mark.parametrize("script", [prepare, train, sample, convert])
def test_help_shows_each_option_with_its_comment_and_default(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", "--help"])
    with pytest.raises(SystemExit):
        script.main()
    shown = "".join(capsys.readouterr().out.split())
    name = f"{script.__name__.title()}Config"
    source = Path(script.__file__).read_text().split(f"class {name}")[1]
    for field in dataclasses.fields(getattr(script, name)):
        comment = re.search(rf"^    {field.name}: .*?  # (.*)$", source, re.MULTILINE)[1]
        default = "" if field.type == list[str] else f"(default: {field.default})"
        assert field.name in shown and "".join(f"{comment} {default}".split()) in shown


def test_each_script_is_a_command_that_says_what_is_wrong_in_one_line(tmp_path):
    wrong = {"prepare": "no", "train": "--data_dir=no", "sample": "--checkpoint=no", "convert": "no to"}
    processes = []
    for script, words in wrong.items():
        words = [sys.executable, ROOT / f"{script}.py", *words.split()]
        processes.append(subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True))
    for process in processes:
        assert re.fullmatch("error: .*\\bno\\b.*\n", process.communicate(timeout=60)[1])
        assert process.returncode == 1


def test_the_last_tenth_is_held_out_and_byte_0_stands_between_documents(folder):
    for documents, train_text, val_text in (
        (["ab\n" * 50], "ab\n" * 45, "ab\n" * 5),
        (["a" * 30, "b" * 70], "a" * 30 + "\0" + "b" * 60, "b" * 10),
        (["a" * 45, "b" * 45, "c", "def", "ghijkl"], "a" * 45 + "\0" + "b" * 45, "c\0def\0ghijkl"),
        (["é" * 55, "abcdef"], "é" * 53, "éé\0abcdef"),  # 11 of 116 bytes would cut a character
    ):
        names = [f"{number}.txt" for number in range(len(documents))]
        for name, document in zip(names, documents, strict=True):
            Path(name).write_text(document, encoding="utf-8")
        Path("corpus.jsonl").write_text("".join(json.dumps({"text": d, "id": 3}) + "\n" for d in documents))
        for inputs in (names, ["corpus.jsonl"]):
            run(prepare, *inputs)
            assert Path("data/train.bin").read_text() == train_text
            assert Path("data/val.bin").read_text() == val_text
            val_bytes = len(val_text.replace("\0", "").encode())
            assert [*prepare.load_meta("data").values()] == ["bytes", 0, "uint8", val_bytes]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_tokens_decode_to_the_text_and_none_is_learned_from_the_held_out_part(folder, learned, kind):
    text = (TEXT + ODD) * 3 + "zyzyzyzy " * 100
    Path("odd.txt").write_bytes(text.encode())
    run(prepare, "odd.txt", f"--tokenizer={kind}", "--vocab_size=300")
    meta = prepare.load_meta("data")
    tokenizer = prepare.load_tokenizer(meta["tokenizer"], meta["eos_id"])
    train_data, val_data = (np.fromfile(f"data/{name}.bin", meta["dtype"]) for name in ("train", "val"))
    assert tokenizer.decode(train_data.tolist()) + tokenizer.decode(val_data.tolist()) == text
    assert tokenizer.decode(tokenizer.encode(ODD + "ж")) == ODD + "ж"
    assert tokenizer.vocab_size == {"bytes": 256, "bpe": 300}[kind]
    assert kind == "bytes" or "zy" not in tokenizer.tokenizer.get_vocab()


def test_a_long_file_read_in_blocks_has_the_tokens_of_the_whole(folder, learned):
    text = TEXT * 350
    Path("long.txt").write_text(text)
    save_untrained(learned, "bpe.pt")
    run(prepare, "long.txt", "--tokenizer=bpe.pt")
    assert len([*prepare.read_blocks(["long.txt"])]) >= 3
    cut = len(text) - len(text) // 10
    for name, part in (("train", text[:cut]), ("val", text[cut:])):
        assert np.fromfile(f"data/{name}.bin", "<u2").tolist() == learned.encode(part)
    assert prepare.load_meta("data")["tokenizer"] == learned.spec


def test_the_default_corpus_is_pythons_standard_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no data in data yet" in run_train("--max_steps=1")
    paths = prepare.standard_library()
    assert Path(ast.__file__) in paths and not any("test" in path.parts for path in paths)
    written = Path("data/train.bin").read_bytes() + Path("data/val.bin").read_bytes()
    assert written == b"\0".join(path.read_bytes() for path in paths if path.stat().st_size > 0)


@pytest.mark.parametrize("moment", ["train.bin", "val.bin", "meta.json"])
def test_a_preparation_killed_while_it_replaces_the_files_leaves_no_data(folder, monkeypatch, moment):
    def replace(source, target):
        if Path(target).name == moment:
            raise KeyboardInterrupt
        shutil.move(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        run(prepare, "text.txt", "--val_fraction=0.2")
    assert "data holds no data; make it:  python prepare.py" in refused(train, *SMALL)


def test_what_cannot_be_prepared_is_one_error_and_the_old_data_stays(folder, learned):
    before = contents("data")
    Path("empty.txt").touch()
    Path("latin.txt").write_bytes(b"caf\xe9" * 99)
    for words, message in {
        "text.txt missing.txt": "missing.txt",
        "text.txt data": "data is a folder",
        "empty.txt": "nothing to train on, or nothing to hold out",
        "latin.txt --tokenizer=bpe": "'utf-8' codec can't decode byte 0xe9",
        "text.txt --tokenizer=absent.pt": "absent.pt",
    }.items():
        assert message in refused(prepare, *words.split())
    for bad in ("no json", '{"title": "x"}', '["text"]', "3", "", '{"text": 3}', '{"text": "\\ud800"}'):
        Path("bad.jsonl").write_text(f'{{"text": "good"}}\n{bad}\n')
        assert refused(prepare, "bad.jsonl") == 'error: bad.jsonl, line 2: not like {"text": "..."}'
    assert contents("data").items() >= before.items()


# --------------------------------------------------------------------------------------------------- train.py
def test_a_run_writes_its_checkpoints_and_says_what_it_measures(folder, monkeypatch):
    received = []
    fake = type(sys)("wandb")  # an empty module
    fake.log = lambda values, step: received.append({"step": step, **values})
    fake.init = lambda project, config: received.append((project, config)) or fake
    monkeypatch.setitem(sys.modules, "wandb", fake)
    options = {"max_steps": 4, "log_interval": 2, "wandb_project": "p", "out_dir": "my run", "resume": True}
    said = run_train(*[f"--{name}={value}" for name, value in options.items()])
    lines = metrics("my run")
    assert [line["step"] for line in lines] == [0, 2, 4, 4]
    assert lines[0].keys() == lines[3].keys() == {"step", "val_loss", "val_bpb"}
    assert lines[1].keys() >= {"step", "train_loss", "lr", "grad_norm", "tokens_per_second"}
    for line in lines:
        assert re.search(rf"^step {line['step']}\b.*_loss {[*line.values()][1]:.4f} ", said, re.MULTILINE)
    assert said.startswith("new run in 'my run'\n11,568 parameters, 7,688 tokens in data, 59 steps")
    assert {path.name for path in Path("my run").iterdir()} == {"last.pt", "best.pt", "metrics.jsonl"}
    best, last = torch.load("my run/best.pt"), load("my run/last.pt")
    assert best.keys() | {"optimizer", "scaler"} == last.keys() and same(best["model"], last["model"])
    config = train.TrainConfig(**parse(train.TrainConfig, *SMALL) | options)
    assert last["config"] == dataclasses.asdict(config) and received == [("p", last["config"]), *lines]


def test_a_line_of_progress_has_the_mean_loss_since_the_last_and_the_rest_of_the_last_step(folder):
    run_train("--max_steps=8", "--eval_interval=6", "--out_dir=each")
    run_train("--max_steps=8", "--eval_interval=6", "--log_interval=3")
    each, lines = metrics("each", "train_loss"), metrics(key="train_loss")
    for line, first, last in zip(lines, (0, 3, 6), (2, 5, 7), strict=True):
        losses = [each[i]["train_loss"] for i in range(first, last + 1)]
        assert line["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
        assert (line["step"], line["grad_norm"]) == (last + 1, each[last]["grad_norm"])
        assert line["lr"] == lm.lr_cosine_schedule(last, 1e-2, 0.0, 0, 8)


@pytest.mark.parametrize("grad_clip", [0.25, 0.0])
def test_an_update_is_torchs_adamw_on_the_clipped_gradient(folder, grad_clip):
    m = manager(*SMALL, f"--grad_clip={grad_clip}", "--warmup_steps=4", "--weight_decay=0.5")
    model = manager(*SMALL).model
    params = [*model.parameters()]
    groups = [{"params": [p], "weight_decay": 0.5 if p.ndim > 1 else 0.0} for p in params]
    optimizer = torch.optim.AdamW(groups, betas=(m.config.beta1, m.config.beta2))
    for step in range(6):
        loss = model(*m.train_data.batch(step, 8, 0))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = lm.lr_cosine_schedule(step, 1e-2, 0.0, 4, 9)
        optimizer.step()
        close(m.update(step), (loss.detach(), norm), 1e-4)
    close([*m.model.parameters()], params, 1e-4)


def test_the_seed_decides_weights_and_data_and_with_the_step_dropout(folder):
    m, other = manager(*SMALL, "--dropout=0.5", "--max_lr=0"), manager(*SMALL, "--seed=1")
    assert not same(m.model.state_dict(), other.model.state_dict())
    other.model.load_state_dict(manager(*SMALL).model.state_dict())
    assert other.update(0)[0] != manager(*SMALL).update(0)[0]  # which has other data
    batch = m.train_data.batch(0, 8, 0)
    m.train_data.batch = lambda step, batch_size, seed: batch
    losses = [m.update(step)[0].item() for step in (0, 1, 2, 0)]
    assert losses[3] == losses[0] and len(set(losses)) == 3


@pytest.mark.parametrize("eval_tokens", [0, 48])
def test_an_evaluation_is_the_mean_over_the_same_windows_and_touches_no_random_state(folder, eval_tokens):
    m = manager(*SMALL, f"--eval_tokens={eval_tokens}", "--dropout=0.5", "--micro_batch_size=5")
    state = torch.get_rng_state()
    val_loss = m.evaluate()
    m.meta["val_bytes"] *= 3  # as if a token stood for three bytes
    m.evaluate_and_save(train.Logger(m.config, is_main_process=True))
    bits_per_byte = val_loss / math.log(2) / 3
    assert metrics() == [{"step": 0, "val_loss": val_loss, "val_bpb": pytest.approx(bits_per_byte)}]
    assert m.sample(5) == m.sample(5) and m.model.training and torch.equal(torch.get_rng_state(), state)
    n = len(m.val_data)
    indices = range(n) if eval_tokens == 0 else [0, (n - 1) // 2, n - 1]  # 3 windows, spread over the file
    m.model.eval()
    losses = [m.model(*(x[None] for x in m.val_data[i])).item() for i in indices]
    assert val_loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_the_best_model_is_kept_and_a_resumed_run_remembers_it(folder, monkeypatch):
    losses = {0: 4.0, 4: 3.0, 8: 3.5, 9: 2.0, 10: 2.2}
    monkeypatch.setattr(train.TrainManager, "evaluate", lambda self: losses[self.step])
    before_step(monkeypatch, 8, lambda self: self.request_stop(signal.SIGINT, None))  # the last
    run_train()
    run(train, "--resume=True", "--max_steps=10")
    for path, step in (("out/best.pt", 9), ("out/last.pt", 10)):
        assert (load(path)["step"], load(path)["best_val_loss"]) == (step, 2.0)


def test_float16_trains_through_the_scaler_which_skips_steps_and_resumes(folder):
    close(manager(*SMALL, "--dtype=float16").update(0), manager(*SMALL).update(0), 1e-2)
    m = manager(*SMALL, "--dtype=float16")
    m.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)  # the gradient overflows at first
    before = [p.clone() for p in m.model.parameters()]
    m.update(0)
    assert m.scaler.get_scale() == 2.0**23 and same(before, [p.detach() for p in m.model.parameters()])
    losses = [m.update(step % 9)[0] for step in range(40)]
    assert losses[-1] < losses[0] - 1
    run_train("--dtype=float16", "--max_steps=2")
    for dtype, steps, good_steps in (("float16", 4, 4), ("float32", 6, None), ("float16", 8, 2)):
        run(train, "--resume=True", f"--dtype={dtype}", f"--max_steps={steps}")
        assert load("out/last.pt")["scaler"].get("_growth_tracker") == good_steps


def before_step(patch, step, act):
    """Let the next run call act(manager) before it makes this step."""
    update = train.TrainManager.update

    def act_and_update(self, number):
        if number == step:
            act(self)
        return update(self, number)

    patch.setattr(train.TrainManager, "update", act_and_update)


@pytest.mark.parametrize("noticed_by,step", [("progress", 6), ("evaluation", 8), ("signal", 6)])
def test_a_run_that_diverges_is_an_error_and_saves_no_useless_weights(folder, monkeypatch, noticed_by, step):
    def diverge(self):
        self.model.norm.weight.data *= math.nan
        self.stop_requested = noticed_by == "signal"

    before_step(monkeypatch, 5, diverge)
    with pytest.raises(FloatingPointError, match=f"not finite at step {step}; try a lower --max_lr"):
        run_train("--log_interval=1" if noticed_by == "progress" else "--log_interval=100")
    last = load("out/last.pt")
    assert last["step"] == 4 and all(weight.isfinite().all() for weight in last["model"].values())


@pytest.mark.parametrize("at,dropout", [(1, 0.2), (4, 0.0), (4, 0.2), (6, 0.0), (7, 0.2)])
def test_a_run_interrupted_and_resumed_equals_the_uninterrupted_one(folder, monkeypatch, at, dropout):
    words = [f"--dropout={dropout}", "--micro_batch_size=3"]
    run_train(*words, "--out_dir=whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        before_step(patch, at - 1, lambda self: self.request_stop(signal.SIGINT, None))
        run_train(*words)
    assert run(train, "--resume=True").startswith(f"resuming out at step {at}\n")
    for name in ("last.pt", "best.pt"):
        whole, resumed = load(f"whole/{name}"), load(f"out/{name}")
        resumed["config"] |= {"out_dir": "whole", "resume": False}
        assert same(whole, resumed)
    assert metrics(key="val_loss") == metrics("whole", "val_loss")


def test_a_run_killed_at_many_moments_ends_with_the_same_weights(folder):
    words = [*SMALL, "--max_steps=80", "--eval_interval=2", "--dropout=0.1", "--log_interval=50"]
    run(train, *words, "--out_dir=whole")
    for kill in range(7):
        process = start(ROOT / "train.py", *words, "--resume=True")
        said = ""
        while process.poll() is None and ("parameters" not in said or said.count("val_loss") < kill):
            time.sleep(0.01)
            said = Path("said.txt").read_text()
        time.sleep(0.01 * kill)  # a moment between two evaluations, or within one
        if kill < 6:
            process.kill()
        process.wait(timeout=60)
    assert process.returncode == 0 and "resuming out at step" in Path("said.txt").read_text()
    for key in ("model", "optimizer", "best_val_loss", "step"):
        assert same(load("whole/last.pt")[key], load("out/last.pt")[key])


def test_ctrl_c_saves_the_step_just_made_although_nobody_reads_what_it_says(folder):
    words = [sys.executable, ROOT / "train.py", *SMALL, *LONG, "--log_interval=5000"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert any(line.startswith("step 0 ") for line in process.stdout)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) != 0 and 0 < load("out/last.pt")["step"] < 5000


def test_options_named_on_resuming_win_and_all_others_are_those_of_the_run(trained):
    named = {"beta1": 0.5, "weight_decay": 0.25, "max_lr": 0.5, "max_steps": 4, "d_model": 16}
    m = manager("--resume=True", *[f"--{name}={value}" for name, value in named.items()])
    assert dataclasses.asdict(m.config) == load("out/last.pt")["config"] | named | {"resume": True}
    assert [group["betas"] for group in m.optimizer.param_groups] == [(0.5, 0.95)] * 2
    assert [group["weight_decay"] for group in m.optimizer.param_groups] == [0.25, 0.0]
    assert {state["step"].item() for state in m.optimizer.state.values()} == {2}
    m.update(2)
    assert [group["lr"] for group in m.optimizer.param_groups] == [0.25] * 2  # halfway down the cosine


def test_a_run_is_not_overwritten_without_resume_nor_resumed_without_its_data(trained):
    for lost in ("last.pt", "best.pt"):
        shutil.copytree("out", lost)
        Path(lost, lost).unlink()
        before = contents(lost)
        assert f"{lost} holds a run; continue it with" in refused(train, *SMALL, f"--out_dir={lost}")
        assert contents(lost) == before
    shutil.rmtree("data")
    assert "data holds no data" in refused(train, "--resume=True", "--max_steps=4")
    assert not Path("data").exists()  # it does not go on with the default corpus


def test_a_checkpoint_is_tuned_in_its_shape_with_shorter_windows_and_dropout(trained):
    words = ["--init_from=out/best.pt", "--out_dir=tuned", "--context_length=8", "--dropout=0.5"]
    m, base = manager(*words), load("out/best.pt")
    assert same(m.model.state_dict(), base["model"])
    assert dataclasses.asdict(m.model.config) == base["model_config"] | {"dropout": 0.5}
    batch = m.train_data.batch(0, 4, 0)
    assert batch[0].shape == (4, 8) and m.model(*batch) != m.model(*batch)
    run(train, *words, "--max_steps=2", "--eval_tokens=64")
    run(train, "--out_dir=tuned", "--resume=True", "--max_steps=3")
    tuned = load("tuned/last.pt")
    assert tuned["step"] == 3 and not same(tuned["model"], base["model"])
    assert tuned["model_config"]["context_length"] == 16 and tuned["config"]["context_length"] == 8


@pytest.mark.parametrize("words", ["--resume=True --out_dir=out", "--init_from=out/best.pt --out_dir=tuned"])
def test_another_shape_or_other_tokens_than_those_of_the_checkpoint_are_refused(trained, words):
    shutil.copytree("data", "other")
    meta = Path("data/meta.json").read_text().replace("bytes", "tokenizer.json", 1)
    Path("other/meta.json").write_text(meta)
    Path("other/tokenizer.json").write_text("{}")
    before = contents("out")
    for word, message in {
        "--d_model=32": "--d_model=32: the model of the checkpoint has 16",
        "--tie_embeddings=True": "--tie_embeddings=True: the model of the checkpoint has False",
        "--context_length=17": "--context_length=17: the model takes at most 16",
        "--data_dir=other": "other was not prepared with the tokenizer of the checkpoint",
    }.items():
        assert message in refused(train, *words.split(), "--context_length=16", word)
    assert contents("out") == before and not Path("tuned").exists()


def test_what_cannot_be_trained_is_one_error_before_a_file_of_the_run_is_written(folder, monkeypatch):
    for word, message in {
        "--data_dir=none": "none holds no data; make it:  python prepare.py TEXT --out_dir=none",
        "--batch_size=500": "an epoch has 479 windows, fewer than the batch_size of 500",
        "--context_length=900": "data/val.bin: 854 tokens are fewer than context_length + 1",
        "--d_model=30": "d_model is 30; it must be a multiple of 2 * num_heads, 4",
        "--out_dir=text.txt/out": "text.txt",
    }.items():
        assert message in refused(train, *SMALL, word)
    with pytest.raises((RuntimeError, AssertionError)):  # which torch explains
        run_train("--device=cuda:77")
    monkeypatch.setenv("WORLD_SIZE", "3")  # as torchrun does
    assert "batch_size is 8, not a multiple of 3 processes" in refused(train, *SMALL)
    assert {path.name for path in folder.iterdir()} == {"text.txt", "data"}


@pytest.mark.parametrize("message", ["damaged", "not a checkpoint"])
def test_a_damaged_checkpoint_is_refused_by_all_that_read_one(trained, message):
    content = bytearray(Path("out/last.pt").read_bytes())
    content[len(content) // 2] ^= 1
    Path("out/last.pt").write_bytes(content if message == "damaged" else b"something else")
    for script, words in (
        (train, "--resume=True"),
        (train, "--init_from=out/last.pt --out_dir=tuned"),
        (prepare, "text.txt --tokenizer=out/last.pt"),
        (sample, "--checkpoint=out/last.pt"),
        (convert, "out/last.pt llama"),
    ):
        assert refused(script, *words.split()).startswith(f"error: out/last.pt: {message}")


def torchrun(*words, options=()):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
    return start(*command, ROOT / "train.py", *SMALL, "--micro_batch_size=3", "--log_interval=10", *words)


def wait_for_step(process, step):
    """Wait until the run has logged it → the ids of the processes that torchrun has started."""
    log = Path("out/metrics.jsonl")
    while process.poll() is None and not (log.exists() and f'"step": {step},' in log.read_text()):
        time.sleep(0.02)
    assert process.poll() is None, Path("said.txt").read_text()
    return [*map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())]


def test_two_processes_train_as_one_does(folder):
    words = ["--max_steps=40", "--log_interval=10"]
    run_train(*words)
    run_train(*words, "--micro_batch_size=3", "--out_dir=micro")
    process = torchrun(*words, "--out_dir=two")
    assert process.wait(timeout=60) == 0, Path("said.txt").read_text()
    for out_dir in ("micro", "two"):  # gradient accumulation changes nothing either
        for line, expected in zip(metrics(out_dir), metrics(), strict=True):
            for key in expected.keys() & {"step", "train_loss", "grad_norm", "val_loss"}:
                assert line[key] == pytest.approx(expected[key], abs=2e-4), (out_dir, line)
        close(load(f"{out_dir}/last.pt")["model"], load("out/last.pt")["model"], 2e-4)


@pytest.mark.parametrize("receiver", ["agent", "worker"])
def test_a_signal_stops_all_processes_after_the_same_step(folder, receiver):
    process = torchrun(*LONG)
    pids = wait_for_step(process, 20)
    os.kill(process.pid if receiver == "agent" else pids[1], signal.SIGTERM)
    assert process.wait(timeout=60) != 0
    said, step = Path("said.txt").read_text(), load("out/last.pt")["step"]
    assert f"stopped at step {step} of 5000\n" in said and 20 <= step < 5000
    assert "  python train.py --out_dir=out --resume=True\n" in said
    assert "RuntimeError" not in said and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_killed_process_restarts_the_run_from_its_last_checkpoint(folder):
    words = ["--max_steps=120", "--eval_interval=20", "--max_lr=1e-3", "--d_model=64", "--num_layers=2"]
    run_train(*words, "--out_dir=alone")
    process = torchrun(*words, "--resume=True", options=["--max-restarts=2"])
    os.kill(wait_for_step(process, 40)[1], signal.SIGKILL)
    assert process.wait(timeout=90) == 0, Path("said.txt").read_text()
    assert re.search(r"^resuming out at step \d*[02468]0$", Path("said.txt").read_text(), re.MULTILINE)
    close(load("out/last.pt")["model"], load("alone/last.pt")["model"], 2e-3)


# -------------------------------------------------------------------------------------- sample.py, convert.py
def test_a_prompt_is_given_piped_in_or_asked_for_and_the_same_seed_draws_the_same_text(trained):
    said = speak("--prompt=9 green", "--num_samples=2")
    first, second = said.removesuffix("\n\n").split("\n\n9 green")
    assert first.startswith("9 green") and second != first.removeprefix("9 green")
    assert speak("--num_samples=2", stdin=io.StringIO("9 green")) == said
    assert speak("--prompt=9 green", "--num_samples=2", "--seed=2") != said
    assert speak("--prompt=") == speak("--prompt=\n")
    terminal = io.StringIO("9 green\n8 green\n")
    terminal.isatty = lambda: True
    assert speak(stdin=terminal).startswith(f"prompt, or Ctrl-D to end:\n{first}\n\n8 green")


def test_a_sample_ends_where_a_document_does_and_does_not_show_its_end(trained, monkeypatch):
    def predict(self, tokens, targets=None, caches=None):
        following = {ord("l"): ord("s"), ord("s"): prepare.ByteTokenizer.eos_id}
        return torch.eye(256)[following[tokens[0, -1].item()]][None, None]

    monkeypatch.setattr(lm.TransformerLM, "forward", predict)
    assert speak("--prompt=wall", "--temperature=0") == "walls\n\n"


def test_a_stream_of_tokens_gives_whole_characters_and_the_text_of_all(learned):
    pieces = sample.decode_stream(prepare.ByteTokenizer(), [*b"> "], [*"naïve".encode()])
    assert [*pieces] == ["n", "a", "ï", "v", "e", ""]
    random = np.random.default_rng(0)
    for tokenizer in (prepare.ByteTokenizer(), learned):
        decode = partial(sample.decode_stream, tokenizer, tokenizer.encode("> "))
        for text in (TEXT[:500] + ODD * 2, ODD[1:], "🙂", ""):
            pieces = [*decode(tokenizer.encode(text))]
            assert "".join(pieces) == text and not any("�" in piece for piece in pieces)
        for _ in range(100):
            assert "".join(decode(random.integers(tokenizer.vocab_size, size=30).tolist()))
        cut = "".join(decode(tokenizer.encode("a🙂")[:-1]))
        assert cut.startswith("a") and cut.endswith("�")  # what never became whole is not kept back


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_checkpoint_becomes_a_llama_of_transformers_and_the_same_checkpoint_again(folder, learned, kind):
    transformers = pytest.importorskip("transformers")
    state = save_untrained(learned if kind == "bpe" else prepare.ByteTokenizer(), "ours.pt")
    end = "with its tokenizer\n" if kind == "bpe" else "without a tokenizer\n"
    assert run(convert, "ours.pt", "llama") == f"wrote llama, {end}"
    assert run(convert, "llama", "again.pt") == f"wrote again.pt, {end}"
    assert same(load("again.pt"), state if kind == "bpe" else state | {"tokenizer": None})
    assert refused(convert, "ours.pt", "llama") == "error: llama exists already"
    assert refused(convert, "llama", "ours.pt") == "error: ours.pt exists already"
    assert "two paths are needed" in refused(convert, "llama")
    if kind == "bytes":
        assert refused(sample, "--checkpoint=again.pt") == "error: the checkpoint has no tokenizer"
        assert not Path("llama/tokenizer.json").exists()
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained("llama")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.decode(tokenizer(TEXT[:99] + ODD)["input_ids"]) == TEXT[:99] + ODD
    tokens = model.generate(**tokenizer("9 green", return_tensors="pt"), max_new_tokens=9, do_sample=False)
    said = speak("--checkpoint=ours.pt", "--prompt=9 green", "--temperature=0")
    assert said == f"{tokenizer.decode(tokens[0])}\n\n"


def test_a_folder_gets_the_tokenizer_files_of_another_and_the_dtype_asked_for(folder, learned):
    safetensors = pytest.importorskip("safetensors.torch")
    save_untrained(learned, "tuned.pt")
    run(convert, "tuned.pt", "base")
    Path("base/tokenizer_config.json").write_text("{}")
    Path("base/chat_template.jinja").write_text("{}")
    run(convert, "tuned.pt", "tuned", "--like=base", "--dtype=bfloat16")
    base, tuned = contents("base"), contents("tuned")
    differ = {name for name in base.keys() | tuned.keys() if base.get(name) != tuned.get(name)}
    assert differ == {"config.json", "model.safetensors"}
    weights = safetensors.load_file("tuned/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    save_untrained(prepare.ByteTokenizer(), "bytes.pt")
    assert "another tokenizer" in refused(convert, "bytes.pt", "other", "--like=base")
    assert not Path("other").exists()


# ----------------------------------------------------------------------------------------- Code, README, docs
@pytest.mark.parametrize("name", ["lm.py", "prepare.py", "train.py", "sample.py", "convert.py"])
def test_no_function_is_longer_than_a_screen_and_no_line_is_dense(name):
    source = (ROOT / name).read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            code = node.body[ast.get_docstring(node) is not None :]
            limit = 60 if node.name == "train" else 40  # the loop of training stands in one piece
            assert node.end_lineno - code[0].lineno + 2 <= limit, node.name
        assert not isinstance(node, ast.NamedExpr), f":= in line {node.lineno}"
    assert max(map(len, source.splitlines())) <= 110


def test_the_readmes_twenty_lines_print_what_they_promise(capsys):
    pattern = r"```python\n((?:(?!```).)*)```\n\nIt prints\n\n```\n(.*?)```"
    code, promised = re.search(pattern, README, re.DOTALL).groups()
    exec(code, {})
    printed, number = capsys.readouterr().out, r"\d+\.\d+"
    assert re.sub(number, "", printed) == re.sub(number, "", promised)
    losses, stated = (list(map(float, re.findall(number, text))) for text in (printed, promised))
    assert losses == pytest.approx(stated, abs=0.03) and losses[-1] < 0.1


def test_the_readmes_commands_run(folder, learned, monkeypatch, capsys):
    pytest.importorskip("transformers")
    commands = re.findall(r"(?:^    |&& |`)python (\w+)\.py ?([^#`\n]*)", README, re.MULTILINE)
    assert {script for script, _ in commands} == {"prepare", "train", "sample", "convert"}
    for name in ("mytext.txt", "shakespeare.txt"):
        Path(name).write_text(TEXT)
    monkeypatch.setattr(prepare, "standard_library", lambda: ["text.txt"])
    convert.to_hf(save_untrained(learned, "base.pt"), "smollm2")  # in place of the download
    for script, arguments in commands:
        words = shlex.split(arguments)
        if script == "train":
            words += shlex.split(
                "--max_steps=2 --context_length=32 --batch_size=2 --device=cpu --compile=False"
            )
            words += ["--d_model=48", "--num_layers=1"] if "--init_from" not in arguments else []
        run(sys.modules[script], *words)
    (speed, _) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/speed.md").read_text(), re.DOTALL)
    exec(re.sub(r"rounds = (.*), \d+", r"rounds = \1, 1", speed), {})
    assert re.fullmatch(r"step {.* ms'}\ngenerate {.* ms'}\n", capsys.readouterr().out)


def test_the_readmes_picture_has_the_last_entry_of_each_step(folder, monkeypatch):
    (code,) = re.findall(r"```python\n(import json\n.*?)```", README, re.DOTALL)
    names = ("train_loss", "train_loss", "val_loss", "train_loss", "train_loss", "val_loss")
    entries = zip((50, 100, 100, 100, 150, 150), names, (5.0, 4.0, 4.5, 3.0, 2.0, 2.5), strict=True)
    Path("out").mkdir()
    Path("out/metrics.jsonl").write_text("".join(json.dumps({"step": s, n: v}) + "\n" for s, n, v in entries))
    drawn = []
    pyplot = types.ModuleType("matplotlib.pyplot")
    pyplot.plot = lambda x, y, style, label: drawn.append((list(x), list(y)))
    pyplot.xlabel = lambda text: None
    pyplot.legend = lambda: None
    pyplot.savefig = lambda path: Path(path).touch()
    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    exec(code, {})
    assert drawn == [([50, 100, 150], [5.0, 3.0, 2.0]), ([100, 150], [4.5, 2.5])]
    assert Path("loss.png").exists()


def test_the_readmes_tables_name_tests_that_exist_and_the_sections_of_lm_with_their_lines():
    named = re.findall(r"^\| .* \| `(test_\w+)` \|$", README, re.MULTILINE)
    assert len(named) == 10 and set(named) <= globals().keys()
    lines = (ROOT / "lm.py").read_text().splitlines()
    starts = [i for i, line in enumerate(lines, 1) if re.match(r"# -{9,} ", line)] + [len(lines) + 1]
    sections = {lines[a - 1].split("- ", 1)[1]: f"{a}–{b - 1}" for a, b in pairwise(starts)}
    rows = re.findall(r"^\| (.*?) \|.*\| (\d+–\d+) \|$", README, re.MULTILINE)
    assert dict(rows) == sections and [name for name, _ in rows] == list(sections)


EXPERIMENTS = (ROOT / "docs/experiments.md").read_text()
DIFFS = re.findall(r"```diff\n(.*?)```", EXPERIMENTS, re.DOTALL)
MUON = [diff for diff in DIFFS if "muon" in diff]


def apply_diff(diff, folder):
    for name in ("lm.py", "prepare.py", "train.py"):
        shutil.copy(ROOT / name, folder)
    subprocess.run(["git", "apply", "-"], input=diff.encode(), cwd=folder, check=True)


@pytest.mark.parametrize("number", range(len(DIFFS)))
def test_the_experiments_diffs_apply_and_change_what_lm_computes(tmp_path, number):
    apply_diff(DIFFS[number], tmp_path)
    (np.arange(610) % 61).astype("uint8").tofile(tmp_path / "tokens.bin")
    losses = []
    for folder in (tmp_path, ROOT):
        module = runpy.run_path(str(folder / "lm.py"))
        torch.manual_seed(0)
        model = module["TransformerLM"](module["ModelConfig"](61, 16, 32, 2, 4))
        matrices = [param for param in model.layers.parameters() if param.ndim > 1]
        optimizer = module["AdamW"]([{"params": matrices, "muon": True}])
        dataset = module["MemmapTokenDataset"](tmp_path / "tokens.bin", 16, "uint8")
        tokens, targets = dataset.batch(0, 2, seed=0)
        model(tokens, targets).backward()
        optimizer.step()
        losses.append(model(tokens, targets).item())
    assert math.isfinite(losses[0]) and abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96)])
def test_the_experiments_muon_is_torchs(tmp_path, shape):
    apply_diff(MUON[0], tmp_path)
    module = runpy.run_path(str(tmp_path / "lm.py"))
    initial = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(initial.clone()), torch.nn.Parameter(initial.clone())
    optimizer = module["AdamW"]([{"params": [ours], "muon": True}], lr=0.01, weight_decay=0.1)
    oracle = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(20):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        oracle.step()
    assert (ours - theirs).norm() < 0.02 * (theirs - initial).norm()  # torch iterates in bfloat16


def test_the_experiments_muon_trains_and_their_options_are_those_of_train(folder):
    apply_diff(MUON[0], folder)
    assert start("train.py", *SMALL).wait(timeout=60) == 0
    found = re.findall(r"(?:`|train\.py )(--\w+=[^`\n]*)", EXPERIMENTS)
    assert len(found) >= 2
    for words in found:
        parse(train.TrainConfig, *shlex.split(words))
