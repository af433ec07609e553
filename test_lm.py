"""Every test, grouped as lm.py is; then the scripts, then the README. Run: python -m pytest"""

import ast
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import pickle
import pty
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import lm
import prepare
import sample
import train
from lm import (
    AdamW,
    CheckpointHandler,
    Embedding,
    KVCache,
    Linear,
    MemmapTokenDataset,
    ModelConfig,
    MultiheadSelfAttention,
    RMSNorm,
    RoPE,
    SwiGLU,
    TransformerBlock,
    TransformerLM,
    attention,
    fast_attention,
    linear_cross_entropy,
    lr_cosine_schedule,
    sample_token,
)

ROOT = Path(__file__).parent
README = (ROOT / "README.md").read_text()
settings.register_profile("brief", max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("brief")


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
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def tiny(**changes) -> TransformerLM:
    shape = {"vocab_size": 61, "context_length": 16, "d_model": 32, "num_layers": 2, "num_heads": 4}
    return TransformerLM(ModelConfig(**shape | changes))


def with_gradients(f, inputs, upstream=1.0, parameters=()):
    """[f(*inputs), its gradient for each input and parameter], where `upstream` reaches it from above."""
    y = f(*inputs)
    wanted = [t for t in (*inputs, *parameters) if t.requires_grad]
    return [
        y.detach(),
        *torch.autograd.grad(y, wanted, torch.as_tensor(upstream, dtype=y.dtype).expand_as(y)),
    ]


def raising(problem):
    """A function that takes anything and raises `problem`."""

    def fail(*args, **kwargs):
        raise problem

    return fail


# ------------------------------------------------------------------------------------------ Linear, Embedding
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(), (0,), (1,), (3, 5)])
def test_linear_is_torchs_linear_without_bias(rows, dtype):
    ours, theirs = Linear(24, 40).to(dtype), torch.nn.Linear(24, 40, bias=False, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    x, g = torch.randn(*rows, 24, dtype=dtype, requires_grad=True), torch.randn(*rows, 40, dtype=dtype)
    results = (with_gradients(f, [x], g, f.parameters()) for f in (ours, theirs))
    close(*results, 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("kind,std", [(Linear, math.sqrt(2 / 800)), (Embedding, 1.0)])
def test_linear_starts_at_glorots_variance_and_embedding_at_1(kind, std):
    weight = kind(300, 500).weight
    assert weight.std().item() == pytest.approx(std, rel=0.01)
    assert abs(weight.mean().item()) < 0.01 * std


def test_embedding_is_torchs_embedding():
    ours, theirs, tokens = Embedding(50, 16), torch.nn.Embedding(50, 16), torch.randint(50, (3, 7))
    theirs.load_state_dict(ours.state_dict())
    close(*(with_gradients(f, [tokens], 1, f.parameters()) for f in (ours, theirs)))


def test_residual_projections_start_smaller_by_the_root_of_their_number():
    for layer in tiny(d_model=128, num_layers=8).layers:
        a, m = layer.self_attn, layer.mlp
        for inner, outer in ((a.q_proj, a.o_proj), (m.up_proj, m.down_proj)):
            ratio = outer.weight.std() / inner.weight.std()
            assert ratio.item() == pytest.approx(1 / math.sqrt(2 * 8), rel=0.05)


# ---------------------------------------------------------------------------------------------------- RMSNorm
def test_rmsnorm_is_torchs_rmsnorm_and_its_gradients():
    ours, theirs = RMSNorm(32), torch.nn.RMSNorm(32, 1e-5)
    torch.nn.init.uniform_(ours.weight, 0.5, 2)
    theirs.load_state_dict(ours.state_dict())
    x, g = torch.randn(4, 6, 32, requires_grad=True), torch.randn(4, 6, 32)
    close(*(with_gradients(f, [x], g, f.parameters()) for f in (ours, theirs)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rmsnorm_computes_in_float32_and_returns_its_inputs_dtype(dtype):
    norm, x = RMSNorm(64, 1e-5), (1000 * torch.randn(4, 64)).to(dtype)  # squares overflow float16
    y = norm(x)
    exact = x.double() / torch.sqrt(x.double().square().mean(-1, keepdim=True) + 1e-5)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact.to(dtype).double(), rtol=torch.finfo(dtype).eps, atol=0)


# ------------------------------------------------------------------------------------------------------- RoPE
def test_rope_multiplies_pairs_of_halves_by_complex_phases():
    K, theta, start = 8, 500.0, 37
    positions = torch.arange(start, start + 4)[:, None].double()
    angle = positions * theta ** (-2 * torch.arange(K // 2).double() / K)
    q, k = torch.randn(2, 3, 4, K), torch.randn(2, 1, 4, K)
    for x, rotated in zip((q, k), RoPE(K, 41, theta)(q, k, start), strict=True):
        z = torch.complex(x[..., : K // 2].double(), x[..., K // 2 :].double())
        z = z * torch.polar(torch.ones_like(angle), angle)
        close(rotated, torch.cat((z.real, z.imag), -1).float())
    with pytest.raises(ValueError, match="41 tokens are more than the context_length of 40"):
        RoPE(K, 40, theta)(q, k, start)


def test_after_rope_a_dot_product_depends_on_the_distance_alone():
    rope, q, k = RoPE(8, 100), torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(i, j):
        return (rope(q, q, i)[0] * rope(k, k, j)[1]).sum().item()

    assert score(90, 83) == pytest.approx(score(7, 0), abs=1e-5)
    assert abs(score(7, 0) - score(6, 0)) > 1e-3


def test_scaled_rope_keeps_fast_pairs_slows_slow_ones_and_mixes_between():
    frequency = torch.tensor([1.0, 0.3, 0.1, 0.04, 0.01])
    turns = 64 * frequency / (2 * math.pi)  # 10.2, 3.1, 1.02, 0.41, 0.10
    scaled = RoPE.scale_frequencies(frequency, 8.0, 1.0, 4.0, 64)
    mixed = [f * ((t - 1) / 3 + (4 - t) / 3 / 8) for f, t in zip(frequency, turns, strict=True)]
    expected = torch.stack([frequency[0], mixed[1], mixed[2], frequency[3] / 8, frequency[4] / 8])
    close(scaled, expected, 1e-6)


# ----------------------------------------------------------------------------------------------------- SwiGLU
def test_swiglu_is_its_formula_in_float64():
    mlp, x = SwiGLU(16, 40), torch.randn(3, 5, 16)
    gate, up, down = (p.double() for p in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight))
    g = x.double() @ gate.T
    close(mlp(x), ((g / (1 + torch.exp(-g)) * (x.double() @ up.T)) @ down.T).float())


# ----------------------------------------------------------------------------------------- Attention, KVCache
def test_a_cache_holds_what_was_appended_and_refuses_more_when_full():
    k, v = torch.randn(2, 2, 3, 10, 4)
    cache = KVCache(10)
    cache.update(k[:, :, :9], v[:, :, :9])
    keys, values = cache.update(k[:, :, 9:], v[:, :, 9:])
    assert torch.equal(keys, k) and torch.equal(values, v)
    with pytest.raises(ValueError, match="11 tokens are more than the cache's max_length of 10"):
        cache.update(k[:, :, :1], v[:, :, :1])


def attention_loop(q, k, v):
    """One query at a time, in float64."""
    q, k, v = q.double(), *(z.double().repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))
    T, S, K = q.shape[2], k.shape[2], q.shape[3]
    out = torch.empty_like(q)
    for t in range(T):
        end = S - T + t + 1
        weights = torch.exp(torch.einsum("bhk,bhsk->bhs", q[:, :, t], k[:, :, :end]) / K**0.5)
        out[:, :, t] = torch.einsum("bhs,bhsk->bhk", weights / weights.sum(-1, keepdim=True), v[:, :, :end])
    return out


@pytest.mark.parametrize("T,S", [(1, 1), (7, 7), (1, 9), (4, 9)])
@pytest.mark.parametrize("implementation,G", [(attention, 6), (fast_attention, 6), (fast_attention, 2)])
def test_plain_attention_and_the_fused_kernel_are_the_formula_gradients_included(implementation, G, T, S):
    qkv = [torch.randn(2, heads, n, 8, requires_grad=True) for heads, n in ((6, T), (G, S), (G, S))]
    g = torch.randn(2, 6, T, 8)
    expected = [t.float() for t in with_gradients(attention_loop, qkv, g)]
    close(with_gradients(implementation, qkv, g), expected)


def test_both_attentions_are_really_run(monkeypatch):
    calls, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(lm, "attention", lambda *a: calls.append("plain") or attention(*a))
    monkeypatch.setattr(lm.F, fused.__name__, lambda *a, **k: calls.append("fused") or fused(*a, **k))
    for dtype in (torch.bfloat16, torch.float32):
        for T in (1024, 64):
            fast_attention(*torch.randn(3, 1, 2, T, 8, dtype=dtype))
    assert calls == ["fused", "plain", "fused", "fused"]


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_multihead_attention_is_torchs_with_rope_and_grouped_heads(num_kv_heads):
    """torch.nn.MultiheadAttention has no RoPE, so that ours turns by no angle; its weights are stacked."""
    D, H, K = 32, 4, 8
    ours = MultiheadSelfAttention(D, H, num_kv_heads, RoPE(K, 16))
    ours.rope.cos[:], ours.rope.sin[:] = 1, 0
    theirs = torch.nn.MultiheadAttention(D, H, bias=False, batch_first=True)
    k, v = (
        p.weight.view(-1, K, D).repeat_interleave(H // num_kv_heads, 0) for p in (ours.k_proj, ours.v_proj)
    )
    stacked = torch.cat((ours.q_proj.weight, k.flatten(0, 1), v.flatten(0, 1)))
    theirs.load_state_dict({"in_proj_weight": stacked, "out_proj.weight": ours.o_proj.weight})
    x, mask = torch.randn(2, 9, D), torch.nn.Transformer.generate_square_subsequent_mask(9)
    close(ours(x), theirs(x, x, x, attn_mask=mask, need_weights=False)[0])


@pytest.mark.parametrize("d_model,head_dim", [(50, 12), (48, 6)])
def test_a_layer_refuses_a_rope_of_another_size(d_model, head_dim):
    with pytest.raises(ValueError, match=f"d_model is {d_model}, not 4 heads of rope's {head_dim}"):
        MultiheadSelfAttention(d_model, 4, 4, RoPE(head_dim, 16))


class LoRA(torch.nn.Module):
    """A frozen layer plus a trained product of two small matrices."""

    def __init__(self, base):
        super().__init__()
        self.base, (d_out, d_in) = base.requires_grad_(False), base.weight.shape
        self.a, self.b = torch.nn.Parameter(torch.randn(2, d_in)), torch.nn.Parameter(torch.randn(d_out, 2))

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


@pytest.mark.parametrize(
    "name", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
)
def test_a_replaced_projection_acts_in_training_and_in_generation(name):
    model, tokens, called = tiny(num_kv_heads=2).eval(), torch.randint(61, (2, 9)), []
    layer = model.layers[0]
    owner = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
    lora = LoRA(getattr(owner, name))
    setattr(owner, name, lora)
    before = TransformerLM(model.config).eval()  # the same model with the product added to its weights
    state = {k.replace(f"{name}.base.", f"{name}."): w for k, w in model.state_dict().items()}
    key = next(k for k in state if k.startswith("layers.0.") and k.endswith(f"{name}.weight"))
    state[key] = state[key] + lora.b @ lora.a
    before.load_state_dict({k: w for k, w in state.items() if not k.endswith((".a", ".b"))})
    close(model.loss(tokens[:, :-1], tokens[:, 1:]), before.loss(tokens[:, :-1], tokens[:, 1:]))
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    assert lora.a.grad.abs().sum() > 0 and lora.base.weight.grad is None
    lora.register_forward_hook(lambda *_: called.append(name))
    assert torch.equal(model.generate(tokens, 5, temperature=0), before.generate(tokens, 5, temperature=0))
    assert len(called) == 5


def test_a_bias_of_a_replaced_projection_acts_in_training_and_in_generation():
    layer, x = MultiheadSelfAttention(32, 4, 2, RoPE(8, 16)), torch.randn(1, 5, 32)
    layer.k_proj = torch.nn.Linear(32, 16, bias=True)
    whole, cache = layer(x), KVCache(5)
    close(torch.cat([layer(token, cache) for token in x.split(1, 1)], 1), whole)
    layer.k_proj.bias.data.zero_()
    assert (layer(x) - whole).abs().max() > 1e-3


@pytest.mark.parametrize("silent", ["self_attn.o_proj", "mlp.down_proj"])
def test_dropout_drops_of_each_residual_branch_and_nothing_else(silent):
    block, x = TransformerBlock(32, 4, 4, 64, RoPE(8, 16), dropout=0.5), torch.randn(64, 8, 32)
    block.get_submodule(silent).weight.data.zero_()
    branch, dropped = block.eval()(x) - x, block.train()(x) - x
    zero = dropped == 0
    assert 0.45 < zero.float().mean() < 0.55
    close(dropped[~zero], 2 * branch[~zero])


# --------------------------------------------------------------------------------- ModelConfig, TransformerLM
@pytest.mark.parametrize(
    "name,changes",
    [
        ("d_model", {"num_heads": 3}),
        ("d_model", {"d_model": 12, "num_heads": 4}),  # heads of 3 features have no pairs
        ("num_kv_heads", {"num_kv_heads": 3}),
        ("vocab_size", {"vocab_size": 0}),
        ("d_ff", {"d_ff": 10**18}),
        ("num_layers", {"num_layers": 2**30}),  # would take days to make
        ("d_ff", {"d_ff": -1}),
        ("norm_eps", {"norm_eps": 0.0}),
        ("rope_theta", {"rope_theta": math.inf}),
        ("dropout", {"dropout": -0.1}),
        ("dropout", {"dropout": 1.0}),
    ],
)
def test_impossible_shapes_are_refused_by_name(name, changes):
    with pytest.raises(ValueError, match=f"^{name} is"):
        tiny(**changes)


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 0.02,
    "high_freq_factor": 1.5,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize("change", [{"factor": 0.0}, {"factor": "8"}, {"low_freq_factor": 2}, {"beta": 1}])
def test_impossible_scaling_of_rope_is_refused(change):
    with pytest.raises(ValueError, match=rf"^rope_scaling.*{next(iter(change))}"):
        tiny(rope_scaling=LLAMA3 | change)


@pytest.mark.parametrize("d_model,d_ff", [(128, 344), (192, 512), (288, 768), (4096, 10928)])
def test_d_ff_is_eight_thirds_of_d_model_rounded_up_to_a_multiple_of_eight(d_model, d_ff):
    assert ModelConfig(10, 10, d_model, 1, 4).d_ff == d_ff


def test_the_defaults_of_a_run_are_those_of_the_model():
    defaults = {name: getattr(ModelConfig, name) for name in train.MODEL_KEYS if hasattr(ModelConfig, name)}
    assert {name: getattr(train.TrainConfig, name) for name in defaults} == defaults and len(defaults) == 6


def in_transformers(model, folder, **settings):
    """transformers' LlamaForCausalLM of the same weights."""
    pytest.importorskip("transformers")
    lm.save_pretrained(model, folder, **settings)
    return in_float32(folder)


def in_float32(folder):
    """What transformers makes of the folder."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(theirs) is transformers.LlamaForCausalLM
    return theirs


LLAMAS = [
    {},
    {"context_length": 64, "d_model": 64, "rope_scaling": LLAMA3},
    {"num_kv_heads": 2, "rope_theta": 500.0, "norm_eps": 0.1},
    {"num_kv_heads": 1, "d_ff": 40, "tie_embeddings": True},
]


@pytest.mark.parametrize("changes", LLAMAS)
def test_the_model_is_transformers_llama_in_logits_loss_and_gradients(tmp_path, changes):
    model = tiny(**changes)
    for p in model.parameters():
        if p.ndim == 1:
            torch.nn.init.uniform_(p, 0.5, 1.5)  # gains of 1 would hide a missing one
    theirs = in_transformers(model, tmp_path)
    tokens = torch.randint(61, (3, model.config.context_length + 1))
    x, y = tokens[:, :-1], tokens[:, 1:]
    close(model(x), theirs(x).logits)
    model.loss(x, y).backward()
    loss = theirs(x, labels=x, shift_labels=y.contiguous()).loss
    loss.backward()
    close(model.loss(x, y), loss)
    expected = {k.removeprefix("model."): p.grad for k, p in theirs.named_parameters()}
    actual = {k: p.grad for k, p in model.named_parameters()}
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tie", [False, True])
def test_a_model_made_on_the_meta_device_is_filled_by_reset_parameters(tie):
    with torch.device("meta"):
        model = tiny(tie_embeddings=tie)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(math.nan)
    expected = tiny(tie_embeddings=tie)
    torch.manual_seed(5)
    model.reset_parameters()
    torch.manual_seed(5)
    expected.reset_parameters()
    assert same(model.state_dict(), expected.state_dict())
    assert same(dict(model.named_buffers()), dict(expected.named_buffers()))
    assert (model.lm_head.weight is model.embed_tokens.weight) == tie


@pytest.mark.parametrize("tie", [False, True])
def test_a_model_made_on_the_meta_device_is_complete_once_its_weights_are_loaded(tie):
    model = tiny(tie_embeddings=tie)
    with torch.device("meta"):
        other = tiny(tie_embeddings=tie)
    other.to_empty(device="cpu").reset_parameters()
    other.load_state_dict(model.state_dict())
    state = torch.get_rng_state()
    held = lm.model_from_state_dict(model.config, model.state_dict())
    assert torch.equal(torch.get_rng_state(), state)  # no initial values were drawn
    tokens = torch.randint(61, (2, 16))
    for again in (other, held):
        assert same(again(tokens), model(tokens))
        assert (again.lm_head.weight is again.embed_tokens.weight) == tie
    assert held.norm.weight.data_ptr() == model.norm.weight.data_ptr()  # the tensor itself, not a copy
    with pytest.raises(ValueError, match=r"^the weights do not fit the config: .*layers\.1\.mlp"):
        lm.model_from_state_dict(tiny(num_layers=1).config, model.state_dict())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_recomputed_blocks_give_the_same_loss_and_gradients(dropout):
    model, tokens = tiny(dropout=dropout), torch.randint(61, (3, 17))
    calls = []
    model.layers[1].self_attn.q_proj.register_forward_hook(lambda *args: calls.append(1))
    results = []
    for model.recompute in (False, True):
        torch.manual_seed(3)
        model.zero_grad()
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert same(*results) and len(calls) == 3  # once, and then once forward and once again
    other = tiny(dropout=dropout)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert same(model.eval()(tokens[:, :16]), other.eval()(tokens[:, :16]))


def test_more_tokens_than_the_window_are_refused():
    with pytest.raises(ValueError, match="context_length"):
        tiny()(torch.zeros(1, 17, dtype=torch.int64))


# ------------------------------------------------------------------------------------------------------- Loss
@pytest.mark.parametrize("rows,vocab", [(7, 11), (300, 70_000), (600, 70_000)])  # plain, two chunks, three
@pytest.mark.parametrize("ignored", [0, 5])
def test_the_loss_is_torchs_cross_entropy_of_all_the_logits(rows, vocab, ignored):
    x, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(vocab, 8, requires_grad=True)
    targets = torch.randint(vocab, (rows,))
    targets[:ignored] = -100
    ours = with_gradients(lambda *xw: linear_cross_entropy(*xw, targets), [x, weight], 3)
    theirs = with_gradients(lambda x, w: F.cross_entropy(x @ w.T, targets), [x, weight], 3)
    close(ours[0], theirs[0])
    assert all((a - b).norm() < 1e-5 * b.norm() for a, b in zip(ours[1:], theirs[1:], strict=True))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert torch.equal(linear_cross_entropy(x, weight, targets), ours[0])
    assert counter.get_total_flops() == 2 * rows * vocab * 8  # an evaluation forms no gradients


def test_x_and_targets_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match=r"x \(2, 5, 8\) and targets \(2, 4\) do not match"):
        linear_cross_entropy(torch.zeros(2, 5, 8), torch.zeros(11, 8), torch.zeros(2, 4, dtype=torch.int64))


def test_a_replaced_head_acts_in_the_loss():
    model, tokens = tiny(), torch.randint(61, (2, 9))
    x, y = tokens[:, :-1], tokens[:, 1:]
    model.lm_head = LoRA(model.lm_head)
    loss = model.loss(x, y)
    close(loss, F.cross_entropy(model(x).flatten(0, 1), y.flatten()))
    loss.backward()
    assert model.lm_head.a.grad.abs().sum() > 0


@pytest.fixture
def chunked(monkeypatch):
    """Makes the loss go by chunks of 256 rows, however few the logits."""
    monkeypatch.setattr(lm, "MAX_LOGITS", 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_chunked_loss_follows_autocast_as_linear_does(chunked, dtype):
    x, weight = torch.randn(300, 32, requires_grad=True), torch.randn(97, 32, requires_grad=True)
    targets = torch.randint(97, (300,))
    with torch.autocast("cpu", dtype):
        ours = linear_cross_entropy(x, weight, targets)
        close(ours, F.cross_entropy(F.linear(x, weight).float(), targets), 1e-6)  # of the same dtype
    exact = torch.autograd.grad(F.cross_entropy(x @ weight.T, targets), [x, weight])
    for a, b in zip(torch.autograd.grad(ours, [x, weight]), exact, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 4 * torch.finfo(dtype).eps * b.norm()


def test_the_chunked_loss_compiles_to_one_graph_and_refuses_a_second_derivative(chunked):
    x, weight = torch.randn(1000, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    targets = torch.randint(300, (1000,))
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    for implementation in (compiled, linear_cross_entropy):
        close(implementation(x, weight, targets), F.cross_entropy(x @ weight.T, targets))
    (dx,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(dx.sum(), x)


# --------------------------------------------------------------------------------------------------- Sampling
def drawn(probabilities, draws=4000, **settings):
    """How often each token is drawn from these probabilities."""
    logits = torch.log(torch.tensor(probabilities)).expand(draws, -1)
    tokens = sample_token(logits, generator=torch.Generator().manual_seed(0), **settings)
    return (torch.bincount(tokens, minlength=len(probabilities)) / draws).tolist()


@pytest.mark.parametrize(
    "expected,settings",
    [
        ([0.15, 0.5, 0.05, 0.3], {}),
        ([0.15, 0.5, 0.05, 0.3], {"top_k": 9}),
        ([0.15, 0.5, 0.05, 0.3], {"top_p": 1.0}),
        ([0.0225 / 0.365, 0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365], {"temperature": 0.5}),
        ([0, 1, 0, 0], {"temperature": 0}),
        ([0, 1, 0, 0], {"temperature": 1e-40}),
        ([0, 1, 0, 0], {"top_k": 1}),
        ([0, 1, 0, 0], {"top_p": 1e-9}),
        ([0, 0.625, 0, 0.375], {"top_k": 2}),
        ([0, 0.625, 0, 0.375], {"top_p": 0.7}),  # the docstring's example
        ([0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95], {"top_p": 0.81}),
        ([0, 0.625, 0, 0.375], {"top_k": 3, "top_p": 0.6}),  # of the three, 0.526 comes before the second
        ([0, 1, 0, 0], {"temperature": 0.5, "top_k": 3, "top_p": 0.68}),  # 0.25 / 0.3625 = 0.69
    ],
)
def test_temperature_top_k_and_top_p_on_distributions_worked_by_hand(expected, settings):
    actual = drawn([0.15, 0.5, 0.05, 0.3], **settings)
    for a, b in zip(actual, expected, strict=True):
        assert (a == 0) == (b == 0) and abs(a - b) < 4 * math.sqrt(0.25 / 4000)


def test_each_row_of_any_leading_shape_is_drawn_from_its_own_logits():
    logits = torch.full((2, 3, 6), -math.inf)
    wanted = torch.tensor([[0, 1, 2], [3, 4, 5]])
    logits.scatter_(-1, wanted[..., None], 0.0)
    for options in ({}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.5}):
        assert torch.equal(sample_token(logits, **options), wanted)
        assert sample_token(logits[1, 2], **options).shape == ()


@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.5}])
def test_logits_that_are_nan_are_refused(settings):
    with pytest.raises(ValueError, match="logits are NaN"):
        sample_token(torch.tensor([[0.0, math.nan, 1.0]]), **settings)


def test_of_tied_tokens_top_k_keeps_exactly_k_and_top_p_no_more_than_reach_it():
    assert sum(f > 0 for f in drawn([0.1] * 10, top_k=3)) == 3
    assert sum(f > 0 for f in drawn([0.5] * 2, top_p=0.5)) == 1


def test_top_p_of_one_forms_no_sum_that_could_lose_tokens(monkeypatch):
    """A float32 running sum may reach 1 before its end; what comes after would be dropped."""
    monkeypatch.setattr(torch.Tensor, "cumsum", raising(AssertionError("a sum")))
    for top_k, top_p in ((None, 1.0), (None, None), (3, 1.0)):
        sample_token(torch.zeros(2, 9), top_k=top_k, top_p=top_p)
    with pytest.raises(AssertionError, match="a sum"):
        sample_token(torch.zeros(2, 9), top_p=0.9)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=8, unique=True), st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_sufficient_set(weights, p):
    probs, order = torch.tensor(weights, dtype=torch.float64).div(sum(weights)).sort(descending=True)
    before = probs.cumsum(0) - probs
    assume((probs.cumsum(0) - p).abs().min() > 1e-5)  # a float32 sum cannot tell
    logits = torch.tensor(weights, dtype=torch.float32).log().expand(600, -1)
    seen = set(sample_token(logits, top_p=p).tolist())
    assert order[0].item() in seen and seen <= set(order[before < p].tolist())


@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=12),
    st.floats(),
    st.none() | st.integers(),
    st.none() | st.floats(),
)
@example([0.0] * 5, -1.0, None, None)
@example([0.0] * 5, math.nan, None, None)
@example([0.0] * 5, 1.0, 0, None)
@example([0.0] * 5, 1.0, None, 0.0)
@example([0.0] * 5, 1.0, None, 1.1)
@example([0.0], 1.0, None, 1e-300)  # 0 in float32
def test_any_sampling_settings_draw_a_token_or_are_refused_where_out_of_range(
    logits, temperature, top_k, top_p
):
    within = temperature >= 0 and (top_k is None or top_k >= 1) and (top_p is None or 0 < top_p <= 1)
    refused = pytest.raises(ValueError, match=r"(temperature|top_k|top_p) is .*; it must be")
    with contextlib.nullcontext() if within else refused:
        token = sample_token(torch.tensor([logits]), temperature, top_k, top_p)
        assert token.shape == (1,) and 0 <= token < len(logits)


# ------------------------------------------------------------------------------------------- stream, generate
@pytest.mark.parametrize("chunks", [[16], [1] * 16, [5, 1, 1, 9]])
def test_cached_logits_are_the_full_forwards_at_every_position(chunks):
    model, tokens = tiny(num_kv_heads=2).eval(), torch.randint(61, (3, 16))
    caches = [KVCache(16) for _ in model.layers]
    pieces = [model(piece, caches) for piece in tokens.split(chunks, 1)]
    close(torch.cat(pieces, 1), model(tokens))


@torch.no_grad()
@pytest.mark.parametrize("prompt_length", [5, 40])  # shorter than the window, and longer: its end is kept
def test_generation_past_the_window_is_the_argmax_of_full_forwards(prompt_length):
    model, T, sequence = tiny(tie_embeddings=True).eval(), 16, torch.randint(61, (64, prompt_length))
    for p in model.parameters():
        p.mul_(4)  # a fresh model looks at little but the last token
    actual, start = model.generate(sequence, 60, temperature=0), max(0, prompt_length - T)
    whole, less = (model(sequence[:, first:])[:, -1].argmax(-1) for first in (start, start + 1))
    assert not torch.equal(whole, less)  # even the first token of the window counts
    for _ in range(60):
        if sequence.shape[1] - start > T:  # the window is full: its last half is read again
            start = sequence.shape[1] - T // 2
        token = model(sequence[:, start:])[:, -1].argmax(-1)
        sequence = torch.cat((sequence, token[:, None]), 1)
    assert torch.equal(actual, sequence) and len(set(actual[0].tolist())) > 5


def test_generating_depends_on_its_generator_alone_and_gives_tokens_to_train_on():
    model, prompt = tiny(dropout=0.5).eval(), torch.randint(61, (2, 3))
    state = torch.get_rng_state()
    a, b, c = (model.generate(prompt, 20, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(a[:, :3], prompt) and a.shape == (2, 23)
    assert torch.equal(torch.get_rng_state(), state)
    model.loss(a[:, :16], a[:, 1:17]).backward()
    assert model.embed_tokens.weight.grad.abs().sum() > 0


def test_the_mode_is_the_callers():
    model, prompt = tiny(dropout=0.9), torch.randint(61, (1, 3))
    for mode in (True, False):
        model.train(mode)
        texts = {tuple(model.generate(prompt, 12, temperature=0)[0].tolist()) for _ in range(5)}
        assert model.training == mode and (len(texts) > 1) == mode  # dropout acts in train mode


def test_a_stream_takes_no_more_memory_than_its_window():
    model = tiny().eval()
    stream = model.stream(torch.zeros(1, 1, dtype=torch.int64), 2**62)
    assert len([token for token, _ in zip(stream, range(40), strict=False)]) == 40


def test_finished_rows_repeat_eos_and_the_stream_ends_when_all_have_finished():
    model, prompt, generator = tiny(vocab_size=4), torch.randint(4, (8, 2)), torch.Generator().manual_seed(0)
    out = model.generate(prompt, 500, eos_id=0, generator=generator)[:, 2:]
    ends = [row.tolist().index(0) for row in out]
    assert len(set(ends)) > 1 and out.shape[1] == max(ends) + 1
    for row, end in zip(out, ends, strict=True):
        assert (row[end:] == 0).all()


@pytest.mark.parametrize("prompt,new", [([], 1), ([61], 1), ([-1], 1), ([60], -1)])
def test_prompts_without_tokens_or_with_unknown_ones_and_less_than_no_tokens_are_refused(prompt, new):
    with pytest.raises(
        ValueError, match=r"prompt must hold one or more tokens, each from 0 to 60|max_new_tokens is -1"
    ):
        tiny().generate(torch.tensor([prompt], dtype=torch.int64), new)


# ---------------------------------------------------------------------------------- AdamW, lr_cosine_schedule
@pytest.mark.parametrize("rate", [float, torch.tensor])
def test_adamw_is_torchs_over_100_steps_and_a_saved_state(rate):
    ours = [torch.nn.Parameter(torch.randn(s)) for s in ((7, 5), (5,), (), (2,))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]

    def make(params, optimizer, **settings):
        settings |= {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        made = optimizer(params[:1], lr=rate(1e-2), **settings)
        made.add_param_group({"params": params[1:], "weight_decay": 0.0})
        made.add_param_group({"params": []})
        return made

    a, b = make(ours, AdamW), make(theirs, torch.optim.AdamW, foreach=False)
    for step in range(100):
        for p, q in zip(ours[:3], theirs[:3], strict=True):  # the last has no gradient, and stays
            p.grad = torch.randn_like(p) * 10 ** (step % 5 - 4)
            q.grad = p.grad.clone()
        for optimizer in (a, b):
            for group in optimizer.param_groups:
                group["lr"] = rate(1e-2 * (1 + step % 3))
            optimizer.step()
        if step == 50:  # the state goes through a file into a fresh optimizer
            file = io.BytesIO()
            torch.save(a.state_dict(), file)
            file.seek(0)
            a = make(ours, AdamW)
            a.load_state_dict(torch.load(file, weights_only=True))
    close(ours, theirs, 1e-6)


@pytest.mark.parametrize("first,second", [(AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW)])
def test_our_adamw_and_torchs_go_on_from_each_others_state(first, second):
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    start, gradients = torch.randn(7, 5), torch.randn(20, 7, 5)

    def updates(optimizer, param, gradients):
        for gradient in gradients:
            param.grad = gradient.clone()
            optimizer.step()

    stays, moves = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    updates(first([stays], **settings), stays, gradients)
    before = first([moves], **settings)
    updates(before, moves, gradients[:10])
    after = second([moves])  # whose settings come with the state
    after.load_state_dict(before.state_dict())
    updates(after, moves, gradients[10:])
    close(stays, moves, 1e-6)


def test_a_parameter_that_is_unfrozen_late_starts_its_own_count():
    ours = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    theirs = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    a, b = AdamW(ours), torch.optim.AdamW(theirs, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(10):
        for params in (ours, theirs):
            params[0].grad = torch.full((3,), 0.1)
            params[1].grad = torch.full((3,), 0.1) if step >= 7 else None
        a.step()
        b.step()
    close(ours, theirs, 1e-6)


@pytest.mark.parametrize(
    "settings",
    [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"eps": -1.0}, {"weight_decay": -0.1}],
)
def test_adamw_refuses_what_torchs_refuses(settings):
    for optimizer in (AdamW, torch.optim.AdamW):
        with pytest.raises(ValueError):
            optimizer([torch.nn.Parameter(torch.ones(1))], **settings)


# Losses of 20 updates, from weights of a fixed formula, recorded before lm.py was written anew
GOLDEN = {
    (2, False): [
        *(4.150494, 4.117058, 4.111164, 3.939256, 4.034214, 3.889729, 3.814877, 3.848508, 3.821470, 3.777784),
        *(3.688651, 3.582831, 3.548925, 3.625360, 3.435142, 3.486337, 3.456370, 3.317726, 3.342821, 3.387673),
    ],
    (4, True): [
        *(4.184467, 4.093048, 4.136789, 4.032441, 3.976899, 3.923123, 3.812009, 3.877481, 3.726375, 3.722769),
        *(3.718276, 3.676908, 3.534124, 3.584702, 3.500144, 3.521043, 3.523605, 3.421867, 3.270836, 3.332659),
    ],
}


@pytest.mark.parametrize("num_kv_heads,tie_embeddings", GOLDEN)
def test_twenty_updates_give_the_golden_losses(num_kv_heads, tie_embeddings):
    model = tiny(num_kv_heads=num_kv_heads, tie_embeddings=tie_embeddings)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            wave = torch.sin(1.7 * torch.arange(p.numel(), dtype=torch.float64) + i).view_as(p)
            p.copy_(1 + 0.3 * wave if p.ndim == 1 else wave / math.sqrt(p.shape[1]))
    optimizer, losses = AdamW(model.parameters(), lr=3e-3), []
    for tokens in (torch.arange(20 * 3 * 17) ** 2 % 61).view(20, 3, 17):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(GOLDEN[num_kv_heads, tie_embeddings], abs=1e-4)


def test_the_schedule_is_its_table():
    table = {0: 0.0, 1: 0.1, 5: 0.5, 10: 1.0, 35: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 60: 0.55, 110: 0.1}
    for step, rate in (table | {10**6: 0.1}).items():
        assert lr_cosine_schedule(step, 1.0, 0.1, 10, 110) == pytest.approx(rate, rel=1e-12)
    assert lr_cosine_schedule(0, 1.0, 0.0, 0, 10) == 1.0  # without warm-up
    assert lr_cosine_schedule(10, 1.0, 0.0, 10, 10) == 0.0  # without descent


# ----------------------------------------------------------------------------------------- MemmapTokenDataset
def arange_file(path, count, dtype="uint16"):
    np.arange(count).astype(dtype).tofile(path)
    return path


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**63 - 1))
@example(1, 8, 3)
@example(992, 7, 3)
@example(985, 16, 3)
@example(499, 1, 3)
def test_an_epoch_visits_every_window_once_in_a_fresh_order(tmp_path_factory, extra, T, seed):
    count, n = T + extra, (T + extra - 1) // T
    data = MemmapTokenDataset(arange_file(tmp_path_factory.mktemp("t") / "t.bin", count), T, "uint16")
    assert len(data) == n and all(torch.equal(data[i][0], torch.arange(i * T, i * T + T)) for i in range(n))
    orders = set()
    for epoch in range(4):
        x, y = data.batch(epoch, n, seed)
        assert x.dtype == torch.int64 and torch.equal(y, x + 1)
        starts = x[:, 0]
        assert torch.equal(x, starts[:, None] + torch.arange(T))
        offset = starts.min().item()
        assert offset < T and (epoch > 0 or offset == 0)
        order = ((starts - offset + T - 1) // T).tolist()  # the last one may begin earlier
        assert sorted(order) == list(range(n))
        assert all(starts[i] == min(order[i] * T + offset, count - T - 1) for i in range(n))
        orders.add(tuple(order))
    assert n < 20 or len(orders) == 4


def test_later_epochs_begin_at_other_tokens(tmp_path):
    data = MemmapTokenDataset(arange_file(tmp_path / "t.bin", 1000), 50, "uint16")
    firsts = [data.batch(epoch, len(data), seed=1)[0].min().item() for epoch in range(8)]
    assert firsts[0] == 0 and len(set(firsts)) > 4


def test_a_shuffle_spreads_each_window_over_all_places():
    places, counts = np.arange(11), np.zeros((11, 11))
    for epoch in range(1100):
        counts[places, lm.shuffled(places, 11, seed=0, epoch=epoch)] += 1
    chi2 = ((counts - 100) ** 2 / 100).sum()
    assert chi2 < 100 + 5 * math.sqrt(200)  # 100 degrees of freedom, five standard deviations


def test_the_order_of_data_is_the_one_of_every_version():
    assert lm.shuffled(np.arange(12), 12, seed=3, epoch=4).tolist() == [8, 2, 9, 1, 6, 10, 7, 0, 11, 3, 4, 5]


def test_a_dataset_travels_to_a_dataloaders_workers_as_its_path_and_not_as_its_tokens(tmp_path):
    data = MemmapTokenDataset(arange_file(tmp_path / "t.bin", 100_000), 8, "uint16", vocab_size=2**15)
    pickled = pickle.dumps(data)
    there = pickle.loads(pickled)
    assert len(pickled) < 1000 and torch.equal(there[5][0], data[5][0]) and there.vocab_size == 2**15


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_batches_depend_on_seed_and_step_alone_and_ranks_share_them_out(tmp_path, world_size):
    path = arange_file(tmp_path / "t.bin", 1000)
    one, other = (MemmapTokenDataset(path, 8, "uint16") for _ in range(2))
    for step in (0, 21, 19, 20):  # batch 20 straddles two epochs
        whole = one.batch(step, 6, seed=1)[0]
        parts = [other.batch(step, 6, 1, rank, world_size)[0] for rank in range(world_size)]
        assert torch.equal(torch.cat(parts), whole)
        assert not torch.equal(one.batch(step, 6, seed=2)[0], whole)
    with pytest.raises(ValueError, match=r"batch_size 7 .* 2"):
        one.batch(0, 7, 0, 0, 2)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_the_largest_token_of_each_dtype_survives(tmp_path, dtype):
    largest = np.iinfo(dtype).max
    np.full(9, largest, dtype).tofile(tmp_path / "t.bin")
    x, y = MemmapTokenDataset(tmp_path / "t.bin", 8, dtype)[0]
    assert x.tolist() == y.tolist() == [largest] * 8


def test_files_that_are_not_what_they_seem_are_refused(tmp_path):
    path = tmp_path / "t.bin"
    with pytest.raises(OSError):
        MemmapTokenDataset(path, 8, "uint16")
    path.write_bytes(b"123")
    with pytest.raises(ValueError, match=r"t\.bin: 3 bytes"):
        MemmapTokenDataset(path, 1, "uint16")
    for count in (0, 8):
        with pytest.raises(
            ValueError, match=rf"t\.bin: {count} tokens are fewer than context_length \+ 1 = 9"
        ):
            MemmapTokenDataset(arange_file(path, count), 8, "uint16")
    with pytest.raises(ValueError, match="dtype is int16"):
        MemmapTokenDataset(path, 8, "int16")
    data = MemmapTokenDataset(arange_file(path, 100), 8, "uint16", vocab_size=48)
    with pytest.raises(ValueError, match=r"t\.bin: token 48 is 48, .* 48 entries"):
        data[5]
    assert data[4][1].max() == 40


@given(
    st.binary(min_size=1, max_size=400),
    st.integers(1, 40),
    st.sampled_from(["uint8", "uint16", "uint32"]),
    st.integers(0, 9),
    st.integers(1, 300),
)
def test_any_token_file_gives_batches_or_is_refused(tmp_path_factory, content, T, dtype, step, vocab_size):
    path = tmp_path_factory.mktemp("tokens") / "t.bin"
    path.write_bytes(content)
    try:
        x, y = MemmapTokenDataset(path, T, dtype, vocab_size).batch(step, 4, seed=step)
        assert x.shape == y.shape == (4, T) and torch.equal(x[:, 1:], y[:, :-1])
        assert x.min() >= 0 and max(x.max(), y.max()) < vocab_size
    except ValueError as problem:
        assert "t.bin: " in str(problem)


# ------------------------------------------------------------------------------------------ CheckpointHandler
def test_a_checkpoint_returns_what_was_saved(tmp_path):
    plain = {"step": 3, "best": math.inf, "name": "ü", "none": None, "list": [1, (2.5, True)], "raw": b"\0"}
    scheduler = torch.optim.lr_scheduler.MultiStepLR(AdamW([torch.nn.Parameter(torch.ones(1))]), [3, 7])
    plain["scheduler"] = scheduler.state_dict()
    state, handler = {"model": tiny().state_dict(), **plain}, CheckpointHandler(tmp_path / "new")
    handler.save("a.pt", state)
    assert same(handler.load("a.pt"), state) and os.listdir(tmp_path / "new") == ["a.pt"]
    assert same(torch.load(tmp_path / "new/a.pt"), state)  # the checksum does not disturb torch


class Evil:
    """Pickled, it is code that makes the file `ran`."""

    def __reduce__(self):
        return open, ("ran", "w")


def test_damage_and_code_are_refused_and_the_file_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handler, rng = CheckpointHandler("."), np.random.default_rng(0)
    handler.save("a.pt", {"x": torch.randn(50)})
    good = Path("a.pt").read_bytes()
    damaged = [good[:-1], good[:100], b"", b"abc", good + b"\0"]
    for byte, bit in zip(rng.integers(0, len(good), 1000), rng.integers(0, 8, 1000), strict=True):
        damaged.append(good[:byte] + bytes([good[byte] ^ 1 << bit]) + good[byte + 1 :])
    for content in damaged:
        Path("a.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.pt"):
            handler.load("a.pt")
    file = io.BytesIO()
    torch.save({"model": Evil()}, file)  # code, whatever its checksum
    sealed = file.getvalue() + zlib.crc32(file.getvalue()).to_bytes(4, "little")
    Path("evil.pt").write_bytes(sealed)
    with pytest.raises(ValueError, match=r"evil\.pt: not a checkpoint"):
        handler.load("evil.pt")
    assert not Path("ran").exists()
    torch.save({"x": torch.ones(3)}, "plain.pt")
    with pytest.raises(ValueError, match=r"plain\.pt: .* not written by CheckpointHandler.save"):
        handler.load("plain.pt")


class Subclass(torch.Tensor):
    """A tensor of a type that torch.load does not know."""


@pytest.mark.parametrize(
    "state,named",
    [
        ({"best": np.float64(1.5)}, r"state\['best'\] is a float64"),
        ({"config": {"out": [1, Path("x")]}}, r"state\['config'\]\['out'\]\[1\] is a PosixPath"),
        ({"when": datetime.now()}, r"state\['when'\] is a datetime"),
        ({np.int64(3): 1}, r"the key .* of state is a int64"),
        ({"model": torch.ones(2).as_subclass(Subclass)}, r"state\['model'\] is a Subclass"),
        ({"model": Evil()}, r"state\['model'\] is a Evil"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved_and_the_old_file_stays(tmp_path, state, named):
    handler = CheckpointHandler(tmp_path)
    handler.save("a.pt", {"step": 1})
    with pytest.raises(ValueError, match=named):
        handler.save("a.pt", state)
    assert handler.load("a.pt") == {"step": 1} and os.listdir(tmp_path) == ["a.pt"]


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_a_checkpoint_or_refused(tmp_path_factory, content, sealed):
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "x.pt").write_bytes(content + (zlib.crc32(content).to_bytes(4, "little") if sealed else b""))
    with pytest.raises(ValueError, match=r"x\.pt"):
        CheckpointHandler(folder).load("x.pt")


# ----------------------------------------------------------------------------------------------- Hugging Face
@pytest.mark.parametrize("changes", LLAMAS)
def test_we_load_what_transformers_saves_in_shards_of_any_dtype(tmp_path, changes):
    theirs, tokens = in_transformers(tiny(**changes), tmp_path / "ours", eos_id=7), torch.randint(61, (2, 8))
    assert theirs.config.eos_token_id == 7
    safetensors = pytest.importorskip("safetensors")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        theirs.to(dtype).save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
        index = json.loads((tmp_path / "theirs/model.safetensors.index.json").read_text())
        ours = safetensors.safe_open(tmp_path / "ours/model.safetensors", "pt")
        assert set(ours.keys()) == index["weight_map"].keys()  # transformers alone would read other names too
        again = lm.load_pretrained(tmp_path / "theirs", context_length=8)
        assert again.config.context_length == 8 and again.lm_head.weight.dtype == torch.float32
        close(again(tokens), in_float32(tmp_path / "theirs")(tokens).logits)
        tied = again.lm_head.weight is again.embed_tokens.weight
        assert tied == again.config.tie_embeddings == changes.get("tie_embeddings", False)


def change_config(folder, **fields):
    """Change fields of config.json; those whose new value is None go."""
    path = Path(folder, "config.json")
    fields = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("attention_bias", True, "attention_bias"),
        ("mlp_bias", True, "mlp_bias"),
        ("hidden_act", "gelu", "hidden_act"),
        ("is_causal", False, "is_causal"),
        ("model_type", "gemma", "model_type is 'gemma'"),
        ("model_type", "mistral", "sliding_window is 4096; it must be null"),  # for 8,192 tokens
        ("model_type", None, "model_type is None"),
        ("rope_scaling", {"rope_type": "llama3", "factor": 32.0}, "rope_scaling: low_freq_factor is None"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "RoPE of type 'linear'"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 10000.0}, "RoPE of type 'yarn'"),
        ("rope_parameters", {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("head_dim", 64, "head_dim"),
        ("quantization_config", {"bits": 4}, "quantization_config"),
        ("hidden_size", "wide", "not the config of a supported model: .*str"),
        ("hidden_size", None, "weights do not fit"),  # left out, it is 4,096
        ("num_attention_heads", 3, "d_model is 32; it must be a multiple of 2 \\* num_heads, 6"),
        ("tie_word_embeddings", True, "tie_word_embeddings is true, but lm_head.weight is not the embedding"),
    ],
)
def test_what_the_model_does_not_do_is_refused_by_name_and_never_loaded_wrong(
    tmp_path, field, value, message
):
    pytest.importorskip("safetensors")
    lm.save_pretrained(tiny(context_length=8192), tmp_path)
    change_config(tmp_path, **{field: value})
    with pytest.raises(ValueError, match=message):
        lm.load_pretrained(tmp_path)


def test_what_config_json_may_leave_out_is_as_transformers_has_it(tmp_path):
    pytest.importorskip("transformers")
    lm.save_pretrained(tiny(), tmp_path)
    tokens = torch.randint(61, (1, 16))
    missing = ("num_key_value_heads", "rope_theta", "rms_norm_eps", "tie_word_embeddings")
    change_config(tmp_path, **dict.fromkeys((*missing, "max_position_embeddings", "hidden_act")))
    theirs = in_float32(tmp_path)
    ours = lm.load_pretrained(tmp_path)
    close(ours(tokens), theirs(tokens).logits)
    assert ours.config.norm_eps == theirs.config.rms_norm_eps == 1e-6
    assert ours.config.context_length == theirs.config.max_position_embeddings == 2048


IGNORED = {  # what people's folders hold, and transformers' LlamaForCausalLM does not use
    "_name_or_path": "a/b",
    "_model_name_or_path": "a/b",
    "_attn_implementation": "sdpa",
    "_commit_hash": "0" * 40,
    "unsloth_fixed": True,
    "unsloth_version": "2026.1",
    "attention_dropout": 0.1,
    "max_length": 20,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "id2label": {"0": "LABEL_0"},
    "auto_map": {"AutoConfig": "somewhere.Config"},
    "rope_scaling": {"type": "default"},
    "rope_interleaved": False,
    "is_llama_config": True,
    "torch_dtype": "bfloat16",
    "pad_token_id": 2,
    "transformers.js_config": {"dtype": "q4"},
    "sliding_window": 4,
    "pretraining_tp": 2,
}


@pytest.mark.parametrize("name", IGNORED)
def test_what_transformers_ignores_in_config_json_is_ignored(tmp_path, name):
    pytest.importorskip("transformers")
    lm.save_pretrained(tiny(), tmp_path)
    change_config(tmp_path, **{name: IGNORED[name]})
    tokens = torch.randint(61, (1, 16))
    close(lm.load_pretrained(tmp_path)(tokens), in_float32(tmp_path)(tokens).logits)


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("original", [16, None])  # left out, it is max_position_embeddings
def test_llama_3s_rope_is_loaded_in_both_spellings(tmp_path, spelling, original):
    pytest.importorskip("transformers")
    model = tiny(context_length=64, d_model=64, rope_theta=500.0)
    lm.save_pretrained(model, tmp_path)
    rope = {**LLAMA3, "rope_type": "llama3", "original_max_position_embeddings": original}
    if original is None:
        del rope["original_max_position_embeddings"]
    if spelling == "rope_parameters":  # transformers 5 keeps theta there
        rope["rope_theta"] = 500.0
        change_config(tmp_path, rope_theta=None)
    change_config(tmp_path, **{spelling: rope})
    tokens = torch.randint(61, (2, 64))
    ours = lm.load_pretrained(tmp_path)
    close(ours(tokens), in_float32(tmp_path)(tokens).logits)
    assert (ours(tokens) - model(tokens)).abs().max() > 0.01  # the scaling acts


@pytest.mark.parametrize("window", [None, 16])
def test_a_mistral_that_sees_its_whole_context_is_a_llama(tmp_path, window):
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 16, "max_position_embeddings": 16, "sliding_window": window}
    theirs = transformers.MistralForCausalLM(transformers.MistralConfig(**shape))  # 8 key/value heads
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(61, (2, 16))
    ours = lm.load_pretrained(tmp_path)
    close(ours(tokens), theirs.eval()(tokens).logits)
    assert ours.config.num_kv_heads == 8
    change_config(tmp_path, sliding_window=15)
    with pytest.raises(ValueError, match="sliding_window is 15; it must be null, or at least the context"):
        lm.load_pretrained(tmp_path)
    assert lm.load_pretrained(tmp_path, context_length=15)(tokens[:, :15]).shape == (2, 15, 61)


@pytest.mark.parametrize("tie", [False, True])
def test_weights_are_loaded_in_the_dtype_asked_for_and_trained_without_touching_their_file(tmp_path, tie):
    safetensors = pytest.importorskip("safetensors.torch")
    model = tiny(tie_embeddings=tie).to(torch.bfloat16)
    lm.save_pretrained(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    stored = safetensors.load_file(tmp_path / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for dtype in (torch.bfloat16, torch.float32):
        again = lm.load_pretrained(tmp_path, dtype)
        assert same(again.state_dict(), model.to(dtype).state_dict())
        with torch.no_grad():
            for param in again.parameters():
                param.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_weights_that_are_missing_too_many_misshapen_or_damaged_are_refused(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    lm.save_pretrained(tiny(), tmp_path)
    path = tmp_path / "model.safetensors"
    good = safetensors.load_file(path)
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
    for weights, named in (
        ({k: v for k, v in good.items() if k != "model.norm.weight"}, "norm.weight"),
        (good | bias, "q_proj.bias"),
        (good | {"model.norm.weight": torch.ones(31)}, "norm.weight"),
    ):
        safetensors.save_file(weights, path)
        with pytest.raises(ValueError, match=named):
            lm.load_pretrained(tmp_path)
    safetensors.save_file(good | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, path)
    lm.load_pretrained(tmp_path)  # what Llama 2 keeps of RoPE is computed here
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"model.norm.weight": "of-old.safetensors"}}')
    lm.load_pretrained(tmp_path)  # the whole file is the later one, as transformers sees it too
    path.rename(tmp_path / "of-old.safetensors")
    lm.load_pretrained(tmp_path)
    for damage in ("{}", "[]", '{"weight_map": null}', "no json"):
        index.write_text(damage)
        with pytest.raises(ValueError, match=str(tmp_path)):
            lm.load_pretrained(tmp_path)
    (tmp_path / "of-old.safetensors").rename(path)
    index.unlink()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=str(tmp_path)):
        lm.load_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(OSError, match="safetensors"):
        lm.load_pretrained(tmp_path)


# --------------------------------------------------------------------------------------- Copying out of lm.py
def definitions():
    """{name: source} of each class, function and constant at the top level of lm.py."""
    source = (ROOT / "lm.py").read_text()
    lines, found = source.splitlines(), {}
    for n in ast.parse(source).body:
        if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.Assign):  # a constant is an assignment
            name = n.targets[0].id if isinstance(n, ast.Assign) else n.name
            first = min([n.lineno, *(d.lineno for d in getattr(n, "decorator_list", []))])
            found[name] = "\n".join(lines[first - 1 : n.end_lineno])
    return found


def needs_of(name, sources):
    """The names that the first comment in the source of `name` says it needs."""
    first_comment = re.search(r"# needs: (.*)", sources[name].split('"""')[0])
    needs = first_comment[1].split(", ") if first_comment else []
    if needs == ["everything above"]:
        return list(sources)[: list(sources).index(name)]
    found = []
    for need in needs:
        need, and_its = need.removesuffix(" and its needs"), need.endswith(" and its needs")
        found += [*(needs_of(need, sources) if and_its else []), need]
    return list(dict.fromkeys(found))


IMPORTS = "\n".join(re.findall(r"^(?:import|from) .*$", (ROOT / "lm.py").read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", definitions())
def test_each_class_and_function_can_be_copied_out_with_what_its_first_comment_names(name, tmp_path):
    sources, copied = definitions(), tmp_path / "copied.py"
    needs = needs_of(name, sources)
    copied.write_text("\n\n".join([IMPORTS, *(sources[n] for n in [*needs, name])]))
    module = runpy.run_path(str(copied))
    copied_names = names_used("\n".join(sources[n] for n in [*needs, name]))
    unknown = {n for n in copied_names if n in sources and n not in module}
    assert not unknown, f"{name} uses {unknown}, which its comment does not name"
    idle = set(needs) - copied_names
    assert not idle, f"the comment of {name} names {idle}, which it does not use"


def names_used(source):
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}


# ------------------------------------------------------------------------------- The command line, prepare.py

BOTTLES = "{} green bottles, standing on the wall; if one should fall, {} remain.\n"
TEXT = "".join(BOTTLES.format(i, i - 1) for i in range(120, 0, -1))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder that holds TEXT and, in data/, its tokens; the scripts' functions run in it."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    prepare.main(["text.txt"])
    return tmp_path


def command(*words, stdin=b"", cwd=None, status=0):
    """Run a script as a person would; return what it prints."""
    script, *rest = words
    words = [sys.executable, ROOT / script, *rest]
    result = subprocess.run(words, input=stdin, capture_output=True, cwd=cwd, timeout=120)
    assert result.returncode == status, result.stderr.decode()
    return result.stdout.decode() if status == 0 else result.stderr.decode()


def test_keys_are_typed_as_the_dataclass_says():
    words = ["--max_lr=1", "--max_steps=1e4", "--compile=auto", "--resume=true", "--dtype=BFloat16"]
    words += ["--num_kv_heads=none", "--d_ff=2", "--seed=9007199254740993", "--fsdp=False", "--out_dir=a=b"]
    expected = {"max_lr": 1.0, "max_steps": 10_000, "compile": "auto", "resume": True, "dtype": "bfloat16"}
    expected |= {"num_kv_heads": None, "d_ff": 2, "seed": 9007199254740993, "fsdp": False, "out_dir": "a=b"}
    actual = prepare.parse_args(train.TrainConfig, words, "")
    assert actual == expected
    assert [type(value) for value in actual.values()] == [type(value) for value in expected.values()]


def test_a_value_may_follow_its_key_as_a_word_of_its_own(folder):
    words = ["--prompt", "- a list", "--temperature", "-1", "--top_k=3", "--seed", "1"]
    expected = {"prompt": "- a list", "temperature": -1.0, "top_k": 3, "seed": 1}
    assert prepare.parse_args(sample.SampleConfig, words, "") == expected
    prepare.main(["--out_dir", "spaced", "text.txt", "--val_fraction", "0.2"])
    prepare.main(["text.txt", "--out_dir=joined", "--val_fraction=0.2"])
    assert contents("spaced") == contents("joined")


@pytest.mark.parametrize(
    "arg,message",
    [
        ("--max_step=3", "no such key; did you mean --max_steps=VALUE? --help lists all keys"),
        ("max_steps=3", "a key is given as --max_steps=VALUE"),
        ("--zzz=3", "no such key; --help lists all keys"),
        ("word", "no such key; --help lists all keys"),
        ("--max_steps=1.5", "must be a whole number"),
        ("--max_steps=many", "must be a whole number"),
        ("--max_steps=inf", "must be a whole number"),
        ("--max_lr=fast", "must be a number"),
        ("--dtype=int8", "must be one of auto, float32"),
        ("--resume=maybe", "must be one of auto, True, False"),
        ("--resume", "a key is given as --resume=VALUE"),
        ("--max_steps=", "the value is missing"),
        ("--num_kv_heads=", "the value is missing"),
        ("--dtype=", "the value is missing"),
        ("--fsdp=", "the value is missing"),
    ],
)
def test_keys_that_cannot_be_understood_are_refused(arg, message):
    with pytest.raises(ValueError, match=f"^{re.escape(f'{arg}: {message}')}"):
        prepare.parse_args(train.TrainConfig, [arg], "")


def test_a_key_is_not_the_value_of_the_key_before_it():
    with pytest.raises(ValueError, match=r"^--resume: a key is given as --resume=VALUE"):
        prepare.parse_args(train.TrainConfig, ["--resume", "--out_dir=x"], "")


def test_only_text_may_be_empty():
    assert prepare.parse_args(sample.SampleConfig, ["--prompt="], "") == {"prompt": ""}


words = st.text(st.characters(codec="utf-8"), max_size=12)
keys = st.sampled_from([f.name for f in train.TrainConfig.__dataclass_fields__.values()])
numbers = st.one_of(st.integers(), st.floats(), words, st.sampled_from(["none", "auto", "1e4", "-1", "nan"]))


@given(st.lists(st.one_of(words, st.builds("--{}={}".format, keys, numbers)), max_size=6))
def test_any_command_line_is_a_config_or_one_error(argv):
    argv = [arg for arg in argv if arg not in ("-h", "--help")]
    try:
        c = train.TrainConfig(**prepare.parse_args(train.TrainConfig, argv, ""))
        c.vocab_size = c.vocab_size or 256
        assert c.model_config().d_model % c.num_heads == 0 and c.batch_size >= 1 and 0 < c.max_lr < math.inf
    except ValueError as problem:
        assert "\n" not in str(problem).strip("\n") or any("\n" in arg for arg in argv)


@pytest.mark.parametrize("script,config", [(prepare, "Prepare"), (train, "Train"), (sample, "Sample")])
def test_help_lists_every_key_with_its_default_and_meaning(script, config, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    out, fields = capsys.readouterr().out, dataclasses.fields(getattr(script, f"{config}Config"))
    assert stop.value.code == 0
    for shown in (f"--{f.name}={f.default}" for f in fields):
        assert re.search(rf"^  {re.escape(shown)} +\w", out, re.MULTILINE), shown


def read_tokens(path):
    return np.fromfile(path, np.uint8).tobytes()


def contents(folder="data"):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_of_one_document_the_last_tenth_is_held_out(folder):
    data = TEXT.encode()
    cut = len(data) - len(data) // 10
    assert read_tokens("data/train.bin") == data[:cut]
    assert read_tokens("data/val.bin") == data[cut:]
    assert json.loads(Path("data/meta.json").read_text()) == {
        "tokenizer": {"kind": "bytes"},
        "vocab_size": 256,
        "eos_id": 0,
        "dtype": "uint8",
        "source": "text.txt",
        "train_tokens": cut,
        "val_tokens": len(data) - cut,
        "train_bytes": cut,
        "val_bytes": len(data) - cut,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def test_of_many_files_every_tenth_is_held_out_and_byte_0_stands_between(folder):
    names = [f"doc {i:02}" for i in range(20)]
    for name in names:
        path = Path("in", name[:5], f"{name}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    Path("in", ".hidden").write_text("no text")
    prepare.main(["in"])
    assert read_tokens("data/val.bin").decode() == "doc 09\0doc 19"
    assert read_tokens("data/train.bin").decode() == "\0".join(n for n in names if n[-1] != "9")
    meta = prepare.load_meta("data")
    assert (meta["val_tokens"], meta["val_bytes"]) == (13, 12)


def test_of_many_lines_in_a_jsonl_file_every_tenth_is_held_out(folder):
    lines = [{"text": f"document {i}\nof two lines", "id": i} for i in range(20)]
    Path("corpus.jsonl").write_text("\n\n".join(map(json.dumps, lines)))  # empty lines are no documents
    prepare.main(["corpus.jsonl"])
    assert read_tokens("data/val.bin") == b"document 9\nof two lines\0document 19\nof two lines"
    assert read_tokens("data/train.bin").count(b"\0") == 17


def test_val_fraction_says_which_documents_are_held_out(folder):
    Path("corpus.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(1, 9)))
    prepare.main(["corpus.jsonl", "--val_fraction=0.25"])
    assert read_tokens("data/val.bin") == b"4\x008"
    prepare.main(["corpus.jsonl", "--val_fraction=0.5"])
    assert read_tokens("data/val.bin") == b"2\x004\x006\x008"
    prepare.main(["corpus.jsonl", "--val_fraction=0.4"])
    assert read_tokens("data/val.bin") == b"3\x005\x008"


def test_of_fewer_documents_the_end_of_each_is_held_out_and_no_character_cut(folder):
    Path("a.txt").write_text("ab" * 50)
    Path("b.txt").write_text("é" * 50, encoding="utf-8")
    prepare.main(["a.txt", "b.txt", "--val_fraction=0.155"])  # 15 bytes of 100: the cut is inside an é
    assert read_tokens("data/train.bin").decode() == ("ab" * 50)[:85] + "\0" + "é" * 43
    assert read_tokens("data/val.bin").decode() == ("ab" * 50)[85:] + "\0" + "é" * 7
    Path("nine.jsonl").write_text('{"text": "0123456789"}\n' * 9)
    prepare.main(["nine.jsonl"])
    assert read_tokens("data/train.bin") == b"\0".join([b"012345678"] * 9)
    assert read_tokens("data/val.bin") == b"\0".join([b"9"] * 9)


@pytest.mark.parametrize("out_dir", ["in/data", "in", "."])
def test_what_was_prepared_inside_an_input_folder_is_no_text_and_the_input_may_lie_in_it(folder, out_dir):
    Path("in").mkdir()
    Path("text.txt").rename("in/text.txt")
    for _ in range(2):
        prepare.main(["in", f"--out_dir={out_dir}"])
        assert read_tokens(f"{out_dir}/train.bin") + read_tokens(f"{out_dir}/val.bin") == TEXT.encode()
        left_behind = Path(out_dir, ".train.bin.1234567.tmp")  # by a process that was killed
        left_behind.write_text("")
        prepare.main(["in", f"--out_dir={out_dir}"])
        assert not left_behind.exists()


def test_the_standard_library_is_split_by_whole_modules():
    corpus = prepare.standard_library(0.1)
    root = Path(ast.__file__).parent
    modules = {"train": set(), "val": set()}
    sizes = {"train": 0, "val": 0}
    for piece in corpus.pieces("reading"):
        modules[piece.split].add(piece.path.relative_to(root).parts[0])
        sizes[piece.split] += len(piece.text)
        assert not re.search("/(tests?|site-packages|encodings|idlelib)/", str(piece.path))
    assert not modules["train"] & modules["val"]
    assert 0.05 < sizes["val"] / sizes["train"] < 0.2 and sizes["train"] > 4e6


def test_the_byte_tokenizer_returns_any_text_and_holds_broken_characters_back():
    tokenizer = prepare.ByteTokenizer()
    assert "".join(tokenizer.decode([97, 256, 98])) == "a\ufffdb"  # as from a vocabulary that is padded
    text = "naïve 東京 🙂\n"
    ids = tokenizer.encode(text.encode()).tolist()
    pieces = list(tokenizer.decode(ids))
    assert "".join(pieces) == text and pieces[2:4] == ["", "ï"] and "�" not in "".join(pieces)
    assert "".join(tokenizer.decode(ids[:-2])).endswith("�")


ODD = "naïve 東京 🙂 <|endoftext|> Ā\x00\u200d\r\n\t  don't 12345  \n"


@pytest.fixture(scope="module")
def learned():
    """A BPE of 400 tokens, learned from TEXT and ODD."""
    pytest.importorskip("tokenizers")
    return prepare.train_tokenizer([TEXT, ODD], 400)


@example(ODD)
@given(st.text(st.characters(codec="utf-8"), max_size=200))
def test_any_utf8_survives_a_learned_tokenizer(learned, text):
    ids = learned.encode(text.encode()).tolist()
    assert "".join(learned.decode(ids)) == text and b"".join(learned.table[i] for i in ids) == text.encode()
    assert learned.eos_id not in ids  # its name, in ODD, is text like any other


def test_pieces_of_a_long_text_have_the_tokens_of_the_whole(learned, folder):
    text = ((TEXT + ODD) * 60).encode()
    Path("long.txt").write_bytes(text)
    corpus = prepare.Corpus("long", [Path("long.txt")], val_fraction=0.5)
    joined = {"train": b"", "val": b""}
    for split in joined:
        pieces = [piece for piece in corpus.pieces("reading") if piece.split == split]
        assert [piece.starts_document for piece in pieces] == [True, False, False, False]
        joined[split] = b"".join(piece.text for piece in pieces)
        ids = np.concatenate(learned.encode_pieces(pieces))
        assert ids.tolist() == learned.encode(joined[split]).tolist()
    assert joined["train"] + joined["val"] == text
    assert len(joined["val"]) == len(text) // 2


def test_pieces_of_a_text_without_spaces_cut_no_character(folder):
    Path("long.txt").write_bytes(("東京🙂" * 40_000).encode())
    pieces = list(prepare.Corpus("long", [Path("long.txt")], 0.5).pieces("reading"))
    assert len(pieces) > 5
    assert "".join(piece.decode() for piece in pieces) == "東京🙂" * 40_000
    assert max(len(piece.text) for piece in pieces) < 2**17


def test_preparing_with_a_learned_tokenizer_keeps_it_beside_the_tokens(folder):
    pytest.importorskip("tokenizers")
    prepare.main(["text.txt", "--tokenizer=bpe", "--vocab_size=300", "--out_dir=bpe"])
    meta = prepare.load_meta("bpe")
    tokenizer = prepare.load_tokenizer(meta["tokenizer"])
    assert (meta["vocab_size"], meta["dtype"]) == (tokenizer.vocab_size, "uint16") == (300, "uint16")
    cut = len(TEXT) - len(TEXT) // 10
    for name, text in (("train", TEXT[:cut]), ("val", TEXT[cut:])):
        ids = np.fromfile(f"bpe/{name}.bin", "<u2")
        assert "".join(tokenizer.decode(ids.tolist())) == text and len(ids) < len(text) / 2
        assert (meta[f"{name}_tokens"], meta[f"{name}_bytes"]) == (len(ids), len(text))
    prepare.main(["text.txt", "--tokenizer=bpe/tokenizer.json", "--out_dir=again"])
    assert contents("again") == contents("bpe")
    Path("bpe/tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"bpe/tokenizer\.json: not there; make it:  python prepare\.py"):
        prepare.load_meta("bpe")


def test_what_is_held_out_teaches_the_tokenizer_nothing(folder):
    pytest.importorskip("tokenizers")
    Path("held.txt").write_text("a b " * 450 + "zyzyzyzy " * 22)  # the last tenth, or nearly
    prepare.main(["held.txt", "--tokenizer=bpe", "--vocab_size=300", "--out_dir=bpe"])
    tokenizer = prepare.load_tokenizer(prepare.load_meta("bpe")["tokenizer"])
    assert b"zy" not in tokenizer.table and b" b" in tokenizer.table


def test_what_cannot_be_prepared_is_refused_and_the_old_data_stays(folder):
    tokenizers = pytest.importorskip("tokenizers")
    Path("word.json").write_text(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0})).to_str())
    Path("nothing.json").write_text("{}")
    Path("latin.txt").write_bytes(b"caf\xe9" * 99)
    Path("empty.txt").touch()
    before = contents()
    for words, message in (
        (["missing.txt"], "missing.txt: not a file or folder"),
        (["empty.txt"], "empty.txt: 0 bytes to train on and 0 to validate with are too few"),
        (["--val_fraction=0"], "--val_fraction=0.0: must be above 0"),
        (["--val_fraction=0.6"], "--val_fraction=0.6: must be above 0 and at most 0.5"),
        (["text.txt", "--tokenizer=word.json"], r"word\.json: .*"),
        (["text.txt", "--tokenizer=nothing.json"], r"nothing\.json: "),
        (["text.txt", "--tokenizer=text.txt"], r"text\.txt: "),
        (["text.txt", "--tokenizer=absent"], "absent"),
        (["latin.txt", "--tokenizer=bpe"], r"latin\.txt: not UTF-8 .* --tokenizer=bytes takes"),
        (["text.txt", "--vocab_size=300"], "--vocab_size=300: only --tokenizer=bpe learns tokens"),
        (["text.txt", "--tokenizer=bpe", "--vocab_size=100"], "at least 257"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            prepare.main(words)
        assert contents() == before


def test_a_tokenizer_of_words_and_byte_fallback_is_spelled_as_its_own_decoder_does(folder):
    tokenizers = pytest.importorskip("tokenizers")
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "w", "a", "l", "▁w", "▁wa"]
    ids, merges = {name: i for i, name in enumerate(names)}, [("▁", "w"), ("▁w", "a")]
    llama = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges, byte_fallback=True))
    replace, d = tokenizers.normalizers.Replace(" ", "▁"), tokenizers.decoders
    llama.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"), replace])
    llama.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    llama.add_special_tokens(["<s>", "</s>"])
    llama.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    Path("tokenizer.json").write_text(llama.to_str())
    ours = prepare.find_tokenizer(".")
    assert ours.eos_id == 2 and ours.start_ids == (1,)
    ids = ours.encode("wall é\n".encode()).tolist()
    assert "".join(ours.decode(ids)) == " wall é\n" and llama.decode(ids) == "wall é\n"
    long = "wall a " * 30_000  # in one piece, because each would get a space before it
    Path("long.jsonl").write_text(json.dumps({"text": long}) + '\n{"text": "wa"}\n' * 2)
    prepare.main(["long.jsonl", "--tokenizer=.", "--val_fraction=0.5"])
    ids = llama.encode(long, add_special_tokens=False).ids
    wa = names.index("▁wa")  # each document begins and ends as the model has learned
    assert np.fromfile("data/train.bin", "<u2").tolist() == [1, *ids, 2, 1, wa]
    assert np.fromfile("data/val.bin", "<u2").tolist() == [1, wa]


def test_each_file_is_read_once_and_what_was_read_and_replaced_is_said(folder, monkeypatch, capsys):
    Path("in").mkdir()
    Path("in/a.txt").write_text("a" * 100)
    Path("in/link.txt").symlink_to("a.txt")
    Path("in/dead.txt").symlink_to("nowhere")
    Path("in/.#a.txt").symlink_to("the lock of an editor")  # hidden files are no text, nor worth a warning
    Path("in/lines.JSONL").write_text('{"text": "bb"}\n' * 2)
    capsys.readouterr()
    prepare.main(["in", "in/a.txt", "./in/a.txt", "--val_fraction=0.5"])
    said, warned = capsys.readouterr()
    assert warned == "warning: in: links that lead nowhere, left out: 1\n"
    assert "from in in/a.txt ./in/a.txt (files: 2, documents: 3), in place of those of text.txt\n" in said
    assert read_tokens("data/train.bin").count(b"a") + read_tokens("data/val.bin").count(b"a") == 100

    def walk(folder, onerror):
        onerror(PermissionError(13, "Permission denied", folder))

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(PermissionError):
        prepare.main(["in"])


def test_learning_tokens_ends_on_ctrl_c_and_is_quick_for_a_word_of_a_million_letters(folder, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    handlers = []
    learn = tokenizers.ByteLevelBPETokenizer.train_from_iterator

    def learn_and_look(*args, **kwargs):
        handlers.append(signal.getsignal(signal.SIGINT))
        return learn(*args, **kwargs)

    monkeypatch.setattr(tokenizers.ByteLevelBPETokenizer, "train_from_iterator", learn_and_look)
    before = signal.getsignal(signal.SIGINT)
    Path("long.txt").write_text("a" * 1_000_000)
    start_time = time.perf_counter()
    prepare.main(["long.txt", "--tokenizer=bpe"])
    assert time.perf_counter() - start_time < 30  # over 100 seconds without the cut
    assert handlers == [signal.SIG_DFL] and signal.getsignal(signal.SIGINT) == before
    with pytest.raises(ValueError, match="--vocab_size=1000000000: too many for 1,000,000 bytes of text"):
        prepare.main(["long.txt", "--tokenizer=bpe", "--vocab_size=1e9"])


DEEP = "[" * 100_000


def test_what_is_empty_nested_or_impossible_is_one_error(folder, monkeypatch):
    Path("deep.jsonl").write_text(DEEP)
    Path("latin.txt").write_bytes("é".encode("latin-1") * 100)
    Path("damaged").mkdir()
    Path("damaged/tokenizer.json").write_text("{}")
    Path("damaged/tokenizer_config.json").write_text(DEEP)
    Path("tokenizer.json").write_text('{"version": "1.0"}' + " " * 2_000_000 + "x" * 2_000_000)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xe9" * 1000)))
    for main, words, message in (
        (prepare.main, [""], "an input is an empty name"),
        (prepare.main, ["deep.jsonl"], r"deep\.jsonl, line 1: not an object"),
        (prepare.main, ["-", "--tokenizer=bpe"], r"^standard input: not UTF-8"),
        (prepare.main, ["text.txt", "--tokenizer=tokenizer.json"], r"tokenizer\.json: not a tokenizer\.json"),
        (prepare.main, ["text.txt", "--tokenizer=damaged"], r"damaged/tokenizer_config\.json: damaged, not"),
        (prepare.main, ["text.txt", "--tokenizer=a/b"], "hf download a/b --local-dir b"),
        (train.main, ["--init_from="], "--init_from=: the value is missing"),
        (train.main, ["--vocab_size=0"], "--vocab_size=0: the tokenizer has 256"),
        (train.main, ["--rope_theta=inf"], "rope_theta is inf"),
        (train.main, ["--device=meta"], "--device=meta: not usable here"),
        (sample.main, ["--export="], "--export=: the value is missing"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            main(words)
        assert len(str(raised.value)) < 500
    path = Path("data/meta.json")
    good = path.read_text()
    for bad in (DEEP, good.replace('"val_bytes": 854', '"val_bytes": 0'), "[]"):
        path.write_text(bad)
        with pytest.raises(ValueError, match=r"data/meta\.json: "):
            prepare.load_meta("data")


@pytest.mark.parametrize("line", ["{}", DEEP, "[]", '{"step": "late"}', "no json"])
def test_a_line_of_metrics_without_a_step_is_an_error_that_names_the_file(trained, line):
    with open("out/metrics.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"out/metrics\.jsonl, line 6: not a line of metrics"):
        train.main([*AGAIN, "--max_steps=3"])


def test_weights_and_biases_that_do_not_work_are_one_error_before_anything_is_made(folder, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "init", raising(wandb.errors.UsageError("No API key.\nRun wandb login")))
    with pytest.raises(ValueError, match=r"^--wandb_project=p: No API key\. Run wandb login$"):
        train.main([*SMALL, "--wandb_project=p"])
    assert not Path("out").exists()


def test_a_line_that_is_no_document_is_refused_by_its_number(folder):
    for bad in ("no json", '{"title": "x"}', '["text"]', "3", '{"text": 3}', '{"text": "\\ud800"}'):
        Path("bad.jsonl").write_text(f'{{"text": "good"}}\n{bad}\n')
        with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: not an object like"):
            prepare.main(["bad.jsonl"])


def test_long_work_says_how_long_it_will_take(capsys, monkeypatch):
    clock = iter([0.0, 5.0, 20.0, 30.0, 90.0])
    monkeypatch.setattr(prepare.time, "perf_counter", lambda: next(clock))
    progress = prepare.Progress("preparing", 8, "MB")
    for _ in range(4):
        progress.add(1)
    shown = capsys.readouterr().err.splitlines()  # in a log: after ten seconds, then once a minute
    assert shown == ["preparing 2 of 8 MB  0.1 MB/s  1:00 left", "preparing 4 of 8 MB  0.0 MB/s  1:30 left"]


def test_a_meta_json_that_is_missing_cut_off_or_of_another_version_is_refused(folder):
    with pytest.raises(ValueError, match=r"no data/meta\.json: not there; make it: .* --out_dir='no data'$"):
        prepare.load_meta("no data")
    path = Path("data/meta.json")
    good = path.read_text()
    path.write_text(good[: len(good) // 2])
    with pytest.raises(ValueError, match=r"data/meta\.json: damaged, not an object in JSON"):
        prepare.load_meta("data")
    for key in json.loads(good):
        meta = json.loads(good)
        del meta[key]
        path.write_text(json.dumps(meta))
        with pytest.raises(ValueError, match=rf"data/meta\.json: has no {key}; prepare the data again: "):
            prepare.load_meta("data")


# --------------------------------------------------------------------------------------------------- train.py

SMALL = "--context_length=16 --d_model=16 --num_layers=1 --num_heads=2 --batch_size=8 --eval_tokens=64"
SMALL = f"{SMALL} --device=cpu --dtype=float32 --max_lr=1e-2 --eval_interval=4 --log_interval=1".split()
CPU = ["--device=cpu", "--dtype=float32"]  # auto measures which dtype is fast, and may vary
AGAIN = ["--resume=True", *CPU]


def manager(*args, **kwargs) -> train.TrainManager:
    config = train.TrainConfig(**prepare.parse_args(train.TrainConfig, [*SMALL, *args], ""))
    meta = prepare.load_meta("data")
    config.resolve_shape(meta)
    return train.TrainManager(config, meta, **kwargs)


def metrics(out_dir="out", key="step"):
    """The lines that have the key."""
    lines = []
    for text in Path(out_dir, "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        if key in line:
            lines.append(line)
    return lines


def last(out_dir="out"):
    return CheckpointHandler(out_dir).load("last.pt")


def ended(main, *words):
    """(exit status, what is on standard error) of a script's main that does not end well."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as error:
        patch.setattr(sys, "argv", ["script", *words])
        with pytest.raises(SystemExit) as stop:
            prepare.run_cli(main)
    return stop.value.code, error.getvalue()


@pytest.fixture
def trained(folder, capsys):
    """The working folder, with a run of two updates in out/; what that printed is not captured."""
    train.main([*SMALL, "--max_steps=2"])
    capsys.readouterr()
    return folder


def interrupt_update(monkeypatch, number):
    """Let the next run be interrupted in place of its update with this number."""
    update = train.TrainManager.update

    def interrupted(self):
        if self.step + 1 == number:
            raise KeyboardInterrupt
        return update(self)

    monkeypatch.setattr(train.TrainManager, "update", interrupted)


@pytest.mark.parametrize("at", [1, 2, 3, 5, 8])
def test_a_run_interrupted_at_any_update_and_resumed_equals_the_uninterrupted_one(folder, monkeypatch, at):
    args = [*SMALL, "--max_steps=9", "--dropout=0.2", "--checkpoint_interval=3", "--micro_batch_size=4"]
    train.main([*args, "--out_dir=whole"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_update(patch, at)
        train.main(args)
    torch.rand(at)  # the state of the global generator does not matter
    if at <= 3:  # nothing was saved yet: begin again
        assert not Path("out/last.pt").exists()
        train.main(args)
    else:  # after update 3; or after update 4, before its evaluation; or after update 6
        assert last()["step"] == {5: 4, 8: 6}[at]
        train.main([*AGAIN, "--micro_batch_size=4"])
    whole, resumed = last("whole"), last()
    for state in (whole, resumed):
        state["config"].update(out_dir="", resume=False)
    assert same(whole, resumed)
    lines = [metrics("whole")[1:], metrics()[1:]]
    for line in [*lines[0], *lines[1]]:
        line.pop("tokens_per_second", None)
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0] if "val_loss" in line] == [0, 4, 8, 9]
    assert [line["step"] for line in lines[0] if "train_loss" in line] == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_dropout_draws_anew_in_each_micro_batch_of_each_update(folder, monkeypatch):
    m = manager("--dropout=0.2", "--micro_batch_size=4")
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    for _ in range(9):
        m.update()
    assert len(set(seeds)) == len(seeds) == 9 * 2


def test_an_evaluation_that_fails_loses_no_update_and_is_made_again(folder, monkeypatch):
    evaluate = train.TrainManager.evaluate

    def failing(self):
        if self.step == 4:
            raise OSError("no evaluation")
        return evaluate(self)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no evaluation"):
        patch.setattr(train.TrainManager, "evaluate", failing)
        train.main([*SMALL, "--max_steps=6"])
    assert last()["step"] == 4 and [line["step"] for line in metrics(key="val_loss")] == [0]
    train.main(AGAIN)
    assert [line["step"] for line in metrics(key="val_loss")] == [0, 4, 6]
    train.main([*AGAIN, "--max_steps=7"])  # in this longer run, no evaluation is due at 6: that line stays
    assert [line["step"] for line in metrics(key="val_loss")] == [0, 4, 6, 7]
    train.main(AGAIN)  # nothing is left to train, but the last evaluation is made again
    assert [line["step"] for line in metrics(key="val_loss")] == [0, 4, 6, 7]
    assert [line["step"] for line in metrics(key="train_loss")] == [1, 2, 3, 4, 5, 6, 7]


def test_resuming_takes_the_runs_keys_or_new_ones_but_refuses_those_that_shape_it(folder):
    with pytest.raises(ValueError, match=r"out holds no last\.pt to go on from; leave out --resume"):
        train.main([*SMALL, "--resume=True"])
    train.main([*SMALL, "--max_steps=2", "--resume=auto"])  # begins, for there is nothing yet
    for arg in ("--d_model=32", "--batch_size=4", "--seed=1", "--init_from=llama"):
        with pytest.raises(ValueError, match=f"{arg}: the run in out has"):
            train.main(["--resume=True", arg])
    message = r"out holds a run already.* --out_dir=out --resume=True .* --out_dir=out-2"
    with pytest.raises(ValueError, match=message):
        train.main([*SMALL, "--max_steps=1"])
    m = manager("--beta1=0.5", "--weight_decay=0.25", state=last())
    assert [group["betas"][0] for group in m.optimizer.param_groups] == [0.5, 0.5]
    assert [group["weight_decay"] for group in m.optimizer.param_groups] == [0.25, 0.0]
    assert [param_state["step"].item() for param_state in m.optimizer.state.values()] == [2] * len(m.params)
    train.main(["--resume=auto", "--max_steps=4", "--max_lr=0.5", "--d_model=16", "--device=cpu"])
    state = last()
    assert state["step"] == 4 and state["config"]["max_lr"] == 0.5 and state["config"]["context_length"] == 16
    assert [line["step"] for line in metrics(key="train_loss")] == [1, 2, 3, 4]
    train.main([*AGAIN[:2], "--max_steps=5", "--dtype=float16"])  # it needs no float16 before


def test_the_config_keeps_the_machine_as_asked_and_a_resumed_run_has_the_dtype_that_it_had(folder):
    keys = [key for key in SMALL if not key.startswith(("--dtype", "--device"))]
    train.main([*keys, "--max_steps=1", "--dtype=bfloat16"])
    state = last()
    assert state["config"]["device"] == state["config"]["compile"] == "auto"
    assert (state["config"]["dtype"], state["dtype"]) == ("bfloat16", "bfloat16")
    assert state["config"]["vocab_size"] == 256 and state["config"]["num_kv_heads"] == 2
    assert state["config"]["d_ff"] == 48 and state["config"]["warmup_steps"] == 0
    train.main(["--resume=True", "--max_steps=2", "--device=cpu"])
    state = last()
    assert (state["config"]["dtype"], state["dtype"]) == ("auto", "bfloat16")
    train.main(["--resume=True", "--max_steps=3", "--device=cpu", "--dtype=float32"])
    assert last()["dtype"] == "float32"


def test_an_error_of_the_command_line_is_not_blamed_on_the_checkpoint(trained):
    with pytest.raises(ValueError, match=r"^--device=meta: not usable here"):
        train.main(["--resume=True", "--max_steps=3", "--device=meta"])


def test_other_data_is_refused_unless_it_is_named(trained, capsys):
    before = Path("out/metrics.jsonl").read_bytes()
    Path("more.txt").write_text(TEXT + "And one more.\n")
    for words in (["text.txt", "--val_fraction=0.2"], ["more.txt"]):  # another split; another text
        prepare.main(words)
        with pytest.raises(
            ValueError, match="data does not hold the data that the run in out has seen so far"
        ):
            train.main([*AGAIN, "--max_steps=3"])
    assert Path("out/metrics.jsonl").read_bytes() == before
    capsys.readouterr()
    train.main([*AGAIN, "--max_steps=3", "--data_dir=data"])
    assert capsys.readouterr().out.startswith("warning: data does not hold the data")
    assert last()["data"] == prepare.load_meta("data")["sha256"]


def test_accumulation_changes_neither_loss_nor_gradient_nor_weights(folder):
    results = []
    for micro in (8, 4, 2, 3):
        m = manager(f"--micro_batch_size={micro}", "--grad_clip=0.1")
        loss, norm = m.update()
        results.append((loss, norm, torch.cat([p.detach().flatten() for p in m.params])))
    for other in results[1:]:
        close(other, results[0], 1e-6)


def test_an_update_is_torchs_adamw_on_the_clipped_gradient(folder):
    m, theirs = manager("--grad_clip=0.25", "--warmup_steps=4", "--weight_decay=0.5"), manager()
    theirs.model.load_state_dict(m.model.state_dict())
    groups = []
    for param in theirs.params:
        groups.append({"params": [param], "weight_decay": 0.5 if param.ndim > 1 else 0.0})
    optimizer = torch.optim.AdamW(groups, betas=(m.config.beta1, m.config.beta2))
    for step in range(1, 6):
        x, y = theirs.train_data.batch(step - 1, 8, 0)
        loss = F.cross_entropy(theirs.model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.params, 0.25)
        for group in optimizer.param_groups:
            group["lr"] = lr_cosine_schedule(step, 1e-2, 0.0, 4, m.config.max_steps)
        optimizer.step()
        close(m.update(), (loss.detach(), norm), 1e-4)
    for p, q in zip(m.params, theirs.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-5)


def test_evaluation_is_the_mean_over_the_same_windows_and_touches_no_random_state(folder):
    m, state = manager("--eval_tokens=0", "--dropout=0.5", "--batch_size=5"), torch.get_rng_state()
    val_loss, val_bpb = m.evaluate()
    assert (val_loss, val_bpb) == m.evaluate() and m.model.training
    x, y = m.val_data.windows(list(range(len(m.val_data))))
    expected = F.cross_entropy(m.model.eval()(x).flatten(0, 1), y.flatten()).item()
    assert (val_loss, val_bpb) == pytest.approx((expected, expected / math.log(2)), rel=1e-5)
    m.meta["val_bytes"] *= 3  # as if a token stood for three bytes
    assert m.evaluate() == (val_loss, pytest.approx(val_bpb / 3, rel=1e-12))
    assert m.sample(5) == m.sample(5) and m.model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_the_best_model_is_kept_and_only_the_best(folder, monkeypatch, capsys):
    losses = {0: 1.0, 4: 3.0, 8: 2.0, 12: 2.5}  # an untrained model is not the best, whatever its loss
    monkeypatch.setattr(train.TrainManager, "evaluate", lambda self: (losses[self.step], 1.0))
    train.main([*SMALL, "--max_steps=12"])
    best = CheckpointHandler("out").load("best.pt")
    for state in (best, last()):
        assert (state["best_val_loss"], state["best_step"]) == (2.0, 8)
    assert best["step"] == 8 and "optimizer" not in best
    assert [line["val_loss"] for line in metrics(key="val_loss")] == [*losses.values()]
    losses[13] = 2.6
    train.main([*AGAIN, "--max_steps=13"])  # a resumed run remembers
    assert capsys.readouterr().out.count("best val_loss 2.0000 nats, after update 8\n") == 2


def test_a_finished_run_says_so_and_one_that_goes_on_says_what_is_of_this_start(trained, capsys):
    written = Path("out/metrics.jsonl").read_bytes()
    train.main(AGAIN)
    said = "out holds a finished run of 2 updates; train on:  python train.py --resume=True --out_dir=out"
    assert capsys.readouterr().out == f"{said} --device=cpu --dtype=float32 --max_steps=4\n"
    assert Path("out/metrics.jsonl").read_bytes() == written
    train.main([*AGAIN, "--max_steps=5"])
    out = capsys.readouterr().out
    assert "warning: with the keys given, lr rises from 0.00e+00 to" in out
    assert ", going on after update 2\n" in out
    assert re.search(r"^5 updates, 3 of them since it went on in 0:\d\d; best val_loss", out, re.MULTILINE)
    kept = metrics()[:-1]  # its last evaluation failed, or the process was killed in it: it is made again
    Path("out/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    train.main(AGAIN)
    out = capsys.readouterr().out
    assert "warning" not in out and len(metrics()) == len(kept) + 1


def test_intervals_fit_short_runs_and_the_evaluations_that_are_left_are_counted():
    for max_steps, log, evaluation in (
        (1, 1, 1),
        (30, 1, 6),
        (200, 4, 40),
        (2500, 50, 500),
        (10**6, 50, 500),
    ):
        config = train.TrainConfig(max_steps=max_steps)
        assert (config.log_interval, config.eval_interval) == (log, evaluation)
        assert config.checkpoint_interval == evaluation
    assert train.TrainConfig(eval_interval=7).checkpoint_interval == 7
    for max_steps in (1, 6, 7):
        for eval_interval in (1, 2, 3, 7, 9):
            config = train.TrainConfig(max_steps=max_steps, eval_interval=eval_interval)
            for step in range(max_steps + 1):
                later = sum(config.evaluation_is_due(k) for k in range(step + 1, max_steps + 1))
                assert config.evaluations_left(step) == later


def test_the_time_left_counts_evaluations_and_the_first_update_says_how_long_it_took(folder, capsys):
    logger = train.Logger(train.TrainConfig(max_steps=100, eval_interval=20, log_interval=50), 0)
    logger.first_update(1, 61.25)
    logger.evaluation(0, 5.5, 8.0, "text", seconds=60.0)
    speed = 8 * 128 / 2  # an update takes two seconds
    measured = {"train_loss": 5.0, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": speed}
    logger.progress(50, measured)
    out = capsys.readouterr().out
    assert "step 1 took 61.2 s; the next line comes after step 50\n" in out
    assert out.endswith("4:40 left\n")  # 50 updates, and the evaluations at 60, 80 and 100


def test_float16_trains_through_the_scaler_and_logs_what_it_skips(folder):
    m, exact = manager("--dtype=float16", "--warmup_steps=1"), manager("--warmup_steps=1")
    m.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)  # overflows at first
    before = [p.clone() for p in m.params]
    m.update()
    assert m.skipped == 1 and m.scaler.get_scale() == 2.0**23 and same(before, [p.detach() for p in m.params])
    while m.skipped == m.step:
        m.update()
    losses = [m.update()[0].item() for _ in range(20)]
    assert m.skipped < m.step and losses[-1] < losses[0] - 0.3
    exact.step = m.step  # the same batch and lr, from the same weights
    exact.model.load_state_dict(m.model.state_dict())
    for a, b in zip(m.update(), exact.update(), strict=True):
        assert abs(a.item() / b.item() - 1) < 0.01
    train.main([*SMALL, "--dtype=float16", "--max_steps=2"])
    assert metrics(key="train_loss")[0]["skipped"] == 0 and last()["scaler"]["scale"] == 65536.0
    train.Logger(m.config, 0).record(1, {"grad_norm": math.nan, "lr": math.inf, "skipped": 1})
    assert metrics()[1:] == [{"step": 1, "grad_norm": None, "lr": None, "skipped": 1}]  # JSON has neither


def test_metrics_hold_the_run_line_by_line(folder, capsys):
    train.main([*SMALL, "--max_steps=4", "--log_interval=2"])
    config, *lines = metrics()
    assert config["step"] == 0 and config["config"]["d_model"] == 16 and config["config"]["device"] == "cpu"
    assert [line["step"] for line in lines] == [0, 2, 4, 4]
    assert lines[0].keys() == lines[3].keys() == {"step", "val_loss", "val_bpb"}
    assert lines[1].keys() == {"step", "train_loss", "lr", "grad_norm", "tokens_per_second"}
    out = capsys.readouterr().out
    for shown in ("5.55 nats, ln(256),", "python sample.py --checkpoint=out\n", "--resume=True"):
        assert shown in out
    for line in lines[1:3]:
        shown = f"train_loss {line['train_loss']:.3f}  lr {line['lr']:.2e}  grad_norm {line['grad_norm']:.2f}"
        assert re.search(rf"^step {line['step']}/4  {re.escape(shown)}  .* left$", out, re.MULTILINE)


def test_the_train_loss_is_the_mean_over_the_interval(folder):
    train.main([*SMALL, "--max_steps=8", "--out_dir=each"])
    train.main([*SMALL, "--max_steps=8", "--log_interval=3"])
    each = [line["train_loss"] for line in metrics("each", "train_loss")]
    means = [sum(each[0:3]) / 3, sum(each[3:6]) / 3, sum(each[6:8]) / 2]
    assert [line["train_loss"] for line in metrics(key="train_loss")] == pytest.approx(means, rel=1e-6)


def test_a_line_is_rewritten_in_place_only_on_a_terminal_that_is_wide_enough(folder, monkeypatch, capsys):
    logger = train.Logger(manager().config, 0)
    logger.say("in a file", passing=True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "10")
    logger.say("short", passing=True)
    logger.say("longer than that", passing=True)
    logger.say("stays")
    shown = capsys.readouterr().out
    assert shown == "in a file\n\r\033[Kshort\r\033[Klonger than that\n\r\033[Kstays\n"


def test_the_losses_are_drawn_where_matplotlib_is_installed(folder, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, dpi: drawn.append((self, path)))
    train.main([*SMALL, "--max_steps=6", "--log_interval=2", "--eval_interval=3"])
    ((picture, path),) = drawn
    assert path == Path("out/loss.png")
    for key, line in zip(("train_loss", "val_loss"), picture.axes[0].lines, strict=True):
        measured = [(m["step"], m[key]) for m in metrics(key=key) if m["step"] > 0]  # all but the first guess
        assert [*zip(*line.get_data(), strict=True)] == measured and len(measured) >= 2
    assert picture.axes[0].get_xlabel() and "nats" in picture.axes[0].get_ylabel()


@pytest.mark.parametrize(
    "module,script,words",
    [
        ("wandb", train, ["--wandb_project=x", "--device=cpu"]),
        ("tokenizers", prepare, ["text.txt", "--tokenizer=bpe"]),
        ("safetensors", sample, ["--checkpoint=llama"]),
    ],
)
def test_a_missing_package_is_one_error_that_says_what_to_install(folder, monkeypatch, module, script, words):
    lm.save_pretrained(tiny(), "llama")
    sample.export_tokenizer(prepare.ByteTokenizer(), "llama")
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    error = f"error: this needs the package {module}:  pip install {module}\n"
    assert ended(script.main, *words) == (2, error) and not Path("out").exists()


def test_weights_and_biases_receives_config_losses_and_lr(folder, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train.main([*SMALL, "--wandb_project=p", "--max_steps=4", "--log_interval=2"])
    (record,) = Path("wandb").glob("offline-run-*/*.wandb")
    arrived, (_, *lines) = record.read_bytes(), metrics()
    assert b"weight_decay" in arrived and b"data_dir" in arrived
    for line in lines:
        for key in {"train_loss", "lr", "val_loss"} & line.keys():
            assert key.encode() in arrived and json.dumps(line[key]).encode() in arrived, key
    train.main([*AGAIN, "--max_steps=6", "--log_interval=2"])  # goes on with the same run there
    ids = {path.name.rsplit("-", 1)[1] for path in Path("wandb").glob("offline-run-*")}
    assert ids == {last()["wandb_id"]}


def test_values_out_of_range_are_refused_before_any_work_by_name(folder):
    bad = {"max_lr": -1, "batch_size": 0, "beta1": 1, "grad_clip": 0, "d_model": 30, "max_steps": 0}
    bad.update(min_lr=1, device="tpu", seed=-1, micro_batch_size=0, vocab_size=255)
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name):
            train.main([*SMALL, f"--{name}={value}"])
        assert not Path("out").exists()


def test_without_a_compiler_auto_warns_and_runs_eagerly_but_true_fails_in_torchs_words(
    folder, monkeypatch, capsys
):
    monkeypatch.setattr(torch, "compile", raising(RuntimeError("no compiler\nlong story")))
    assert not train.compile_works(torch.device("cpu"))
    warning = "warning: torch.compile does not work here (no compiler); running eagerly\n"
    assert capsys.readouterr().err == warning
    assert not manager("--compile=auto").compile  # on the CPU it is not even tried
    with pytest.raises(RuntimeError, match="no compiler\nlong story"):
        manager("--compile=True")


@pytest.mark.slow
def test_compiled_training_computes_what_eager_training_does(folder):
    a, b = manager("--compile=True"), manager()
    assert a.compile and not b.compile
    for _ in range(4):
        close(a.update(), b.update(), 1e-4)


def test_flops_are_those_that_torch_counts_in_matrix_products(monkeypatch):
    monkeypatch.setattr(lm, "fast_attention", attention)  # torch does not count inside of its kernel
    model = tiny()
    x = torch.randint(61, (2, 16))
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
    gains = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert counter.get_total_flops() == x.numel() * (train.flops_per_token(model, 16) - 6 * gains)
    tied = tiny(tie_embeddings=True)  # as many products: one matrix is looked up and multiplied
    assert train.flops_per_token(tied, 16) == train.flops_per_token(model, 16)


def test_the_first_lines_say_what_the_run_will_take(folder, capsys):
    train.main([*SMALL, "--max_steps=3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "model    11,568 parameters: 1 layers, d_model 16, 2 heads"
    assert lines[1] == "data     7,688 tokens of text.txt"
    assert lines[2] == "run      3 updates of 8 x 16 tokens: 384 tokens, 0.05 epochs, 1.84e+07 FLOP"
    assert lines[3] == "machine  cpu, float32, eager"


# --------------------------------------------------------------------------------------------- Many processes

ALONE = "--d_model=32 --num_layers=2 --num_heads=4 --micro_batch_size=2 --log_interval=1 --eval_interval=20"
ALONE = [*SMALL, *ALONE.split(), "--min_lr=1e-2", "--warmup_steps=0"]  # one lr: max_steps does not matter
WAYS = {"DDP": [], "FSDP": ["--fsdp=True"]}
TWO = ["--standalone", "--nproc_per_node=2"]

FORKS = """
import json, os, socket, sys
import torch._dynamo, prepare, train  # imported once: a fork starts in a fifth of a second

def fork(argv, rank, world_size, port):
    pid = os.fork()
    if pid == 0:
        if world_size > 1:  # what torchrun tells the processes that it starts
            os.environ.update(TORCHELASTIC_RUN_ID="test", TORCHELASTIC_RESTART_COUNT="0", RANK=str(rank))
            os.environ.update(LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
        sys.argv = ["train.py", *argv]
        status = 1
        try:
            prepare.run_cli(train.main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        finally:
            sys.stdout.flush()
            os._exit(status)
    return pid

for line in sys.stdin:
    world_size, argv = json.loads(line)
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    pids = [fork(argv, rank, world_size, port) for rank in range(world_size)]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print("ended", *statuses, flush=True)
"""


def in_processes(*runs):
    """Run train.py for each (number of processes, arguments), one after another; return what they print."""
    words = [sys.executable, "-c", FORKS]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    lines = "".join(json.dumps(run) + "\n" for run in runs)
    result = subprocess.run(words, input=lines, capture_output=True, text=True, env=environment, timeout=150)
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


def torchrun(*args, options=TWO, script=ROOT / "train.py"):
    """Start train.py in two processes of one thread each."""
    words = [sys.executable, "-m", "torch.distributed.run", *options, script, *args]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def agree(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        for key in ("step", "train_loss", "grad_norm", "val_loss"):
            assert a.get(key) == pytest.approx(b.get(key), abs=2e-4), (a, b)


def test_two_processes_train_as_one_does(folder, capsys):
    args = [*ALONE, "--max_steps=40"]
    train.main([*args, "--out_dir=alone"])
    ddp = torchrun(*args, "--out_dir=DDP")
    out, err = ddp.communicate(timeout=100)
    assert ddp.returncode == 0, err
    fsdp_out, err = in_processes((2, [*args, "--out_dir=FSDP", "--fsdp=True"]))
    assert fsdp_out.endswith("ended 0 0\n"), err
    for way, printed in (("DDP", out), ("FSDP", fsdp_out)):
        assert printed.count("a blind guess") == 1 and f"2 processes, {way}" in printed  # one process prints
        agree(metrics(way), metrics("alone"))
        ours, theirs = last(way), last("alone")
        close(ours["model"], theirs["model"], 1e-3)
        close(ours["optimizer"]["state"], theirs["optimizer"]["state"], 1e-3)
        capsys.readouterr()
        sample.main([f"--checkpoint={way}/best.pt", "--prompt=9 green", "--max_new_tokens=5"])
        assert capsys.readouterr().out.startswith("9 green")


@pytest.mark.slow
def test_a_checkpoint_of_each_way_goes_on_in_each_other(folder):
    train.main([*ALONE, "--max_steps=28", "--out_dir=alone"])
    again = [*AGAIN, "--micro_batch_size=2"]
    fsdp = [*again, "--fsdp=True"]
    out, err = in_processes(
        (1, [*ALONE, "--max_steps=4"]),
        (2, [*again, "--max_steps=8"]),
        (2, [*fsdp, "--max_steps=12"]),
        (1, [*again, "--max_steps=16"]),
        (2, [*fsdp, "--max_steps=20"]),
        (2, [*again, "--max_steps=24"]),
        (1, [*again, "--max_steps=28"]),
    )
    assert out.count("ended 0 0\n") == 4 and out.count("ended 0\n") == 3, err
    agree(metrics(key="train_loss"), metrics("alone", key="train_loss"))


def test_fsdp_gives_each_process_its_share_of_the_model_that_one_process_would_have(folder):
    """A fresh model with tied embeddings, and one that is loaded to be tuned."""
    args = [*ALONE, "--max_steps=3", "--tie_embeddings=True"]
    train.main([*args, "--out_dir=alone"])
    tune = ["--init_from=alone", "--recompute=True", "--device=cpu", "--dtype=float32"]
    tune += ["--batch_size=4", "--max_steps=3", "--eval_tokens=64", "--eval_interval=20", "--log_interval=1"]
    train.main([*tune, "--out_dir=tuned-alone"])
    fsdp = ["--fsdp=True", "--out_dir"]
    out, err = in_processes((2, [*args, *fsdp, "FSDP"]), (2, [*tune, *fsdp, "tuned-FSDP"]))
    assert out.count("ended 0 0\n") == 2, err
    agree(metrics("FSDP"), metrics("alone"))
    agree(metrics("tuned-FSDP"), metrics("tuned-alone"))
    for way in ("FSDP", "tuned-FSDP"):
        model = last(way)["model"]
        assert torch.equal(model["lm_head.weight"], model["embed_tokens.weight"])


def test_where_the_first_process_finds_an_error_it_says_so_and_all_end(trained):
    out, err = in_processes((2, SMALL), (3, [*SMALL, "--out_dir=other"]))
    assert out == "ended 2 2\nended 2 2 2\n"
    holds, divides = err.splitlines()
    assert holds.startswith("error: out holds a run already; go on with it:  python train.py --out_dir=out")
    assert divides == "error: --batch_size=8: does not divide among 3 processes; 9 would"


def test_fsdp_is_refused_where_it_cannot_work(folder):
    with pytest.raises(ValueError, match="--fsdp=True: needs torchrun"):
        train.main([*SMALL, "--fsdp=True"])
    module = train.LossModule(tiny())
    with pytest.raises(ValueError, match="--fsdp=True: needs --dtype=bfloat16 or float32"):
        train.parallelize(module, torch.device("cpu"), torch.float16, True, False)


def wait_for_update(process, step):
    while process.poll() is None and (not Path("out/last.pt").exists() or metrics()[-1]["step"] < step):
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[1]


def workers(agent):
    """The ids of the processes that torchrun has started and that have not ended."""
    return [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_killed_process_restarts_the_run_from_its_last_checkpoint(folder):
    args = [*ALONE, "--fsdp=True", "--max_steps=60", "--checkpoint_interval=10", "--resume=auto"]
    out, err = in_processes((2, [*args, "--out_dir=whole"]))
    assert out.endswith("ended 0 0\n"), err
    process = torchrun(*args, options=[*TWO, "--max-restarts=3"])
    wait_for_update(process, 20)
    os.kill(workers(process)[-1], signal.SIGKILL)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    assert out.count("a blind guess") == 2 and metrics()[-1]["step"] == 60
    agree(metrics(), metrics("whole"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_processes_agree_on_the_update_at_which_a_signal_stops_them(folder, number):
    process = torchrun(*ALONE, "--max_steps=100000", "--checkpoint_interval=5")
    wait_for_update(process, 10)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert f"stopped after update {last()['step']}; go on with:" in out and "error:" not in err


@pytest.mark.slow
def test_a_process_that_hangs_is_an_error_after_the_timeout(folder):
    Path("impatient.py").write_text(
        f"import datetime, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport prepare, train\n"
        "train.TIMEOUT = datetime.timedelta(seconds=5)\nprepare.run_cli(train.main)\n"
    )
    process = torchrun(*ALONE, "--max_steps=100000", "--checkpoint_interval=5", script="impatient.py")
    wait_for_update(process, 10)
    hanging = workers(process)[-1]
    os.kill(hanging, signal.SIGSTOP)
    start = time.perf_counter()
    while workers(process) != [hanging]:
        time.sleep(0.1)
        assert time.perf_counter() - start < 30, "the other process still waits"
    assert time.perf_counter() - start > 2
    os.kill(hanging, signal.SIGCONT)  # or else torchrun waits half a minute before it kills what hangs
    err = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and "RuntimeError" in err and last()["step"] >= 10


@pytest.mark.slow
def test_the_command_for_two_machines_runs_on_one_and_survives_a_kill(folder, monkeypatch):
    page = (ROOT / "docs/many_gpus.md").read_text()
    args = [*ALONE, "--max_steps=200", "--checkpoint_interval=10"]
    out, err = in_processes((2, [*args, "--out_dir=whole"]))
    assert out.endswith("ended 0 0\n"), err
    command = re.search(r"^    torchrun (--nnodes=2 .*)$", page, re.MULTILINE)[1]
    command = command.replace("HOST:29500", "localhost:29517").replace("node=8", "node=1")
    options, keys = (shlex.split(part) for part in command.split("train.py"))
    monkeypatch.setenv(*re.search(r"^    export (.*)=(.*)$", page, re.MULTILINE).groups())
    keys += [*args, "--data_dir=data", "--out_dir=out"]
    agents = [torchrun(*keys, options=options) for _ in range(2)]
    wait_for_update(agents[0], 20)
    os.kill(workers(agents[1])[-1], signal.SIGKILL)
    outputs = [agent.communicate(timeout=150) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert sum(out.count("2 processes, DDP") for out, _ in outputs) == 2 and metrics()[-1]["step"] == 200
    agree(metrics(), metrics("whole"))


# --------------------------------------------------------------------------------------------- sample.py, run
def test_the_three_scripts_run_as_commands_and_a_signal_ends_in_a_checkpoint(tmp_path):
    data, out = TEXT.encode() + bytes(range(256)) * 8, tmp_path / "out"  # any bytes are text
    command("prepare.py", "-", "--val_fraction=0.25", stdin=data, cwd=tmp_path)
    train_bin, val_bin = (read_tokens(tmp_path / f"data/{name}.bin") for name in ("train", "val"))
    assert train_bin + val_bin == data and len(val_bin) == len(data) // 4
    words = [sys.executable, ROOT / "train.py", *SMALL, "--max_steps=1000000"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert any(line.startswith("step") for line in process.stdout)
    process.terminate()
    rest = process.communicate()[0]
    assert process.returncode == 128 + 15
    assert (
        f"after update {last(out)['step']}; go on with:  python train.py --resume=True --out_dir=out" in rest
    )
    train.main(
        [*AGAIN, f"--out_dir={out}", f"--data_dir={tmp_path}/data", f"--max_steps={last(out)['step'] + 1}"]
    )
    said = command("sample.py", "--prompt=9 green", "--max_new_tokens=30", "--num_samples=2", cwd=tmp_path)
    assert said.startswith("9 green") and "\n---\n9 green" in said
    refused = command("sample.py", "--checkpoint=no.pt", cwd=tmp_path, status=2)
    assert refused.startswith("error: no.pt: not there; train a model:  python train.py")
    refused = command("sample.py", "--prompt=9 green", "--top_p=2", cwd=tmp_path, status=2)
    assert refused == "error: top_p is 2.0; it must be above 0 and at most 1\n"


def test_a_reader_that_leaves_ends_the_sample_without_a_word(trained):
    words = [sys.executable, ROOT / "sample.py", "--max_new_tokens=100000", "--device=cpu"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def test_sampling_reads_prompts_from_files_and_standard_input_and_keeps_the_end_of_long_ones(
    trained, monkeypatch, capsys
):
    def say(prompt, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        asked = [] if prompt is None else [f"--prompt={prompt}"]
        sample.main([*asked, "--max_new_tokens=9", *CPU])
        return capsys.readouterr()

    Path("prompt.txt").write_text("x" * 40)
    out, err = say("@prompt.txt")
    assert out.startswith("x" * 40) and "the model does not see the first 24 tokens of the prompt" in err
    out, err = say("-", b"hello")
    assert out.startswith("hello") and out == say("hello").out  # the same seed draws the same text
    assert out == say(None, b"hello").out  # piped in
    assert re.search(r"^\d tokens, [\d,]+ tokens/s$", err, re.MULTILINE)
    with pytest.raises(ValueError, match="--prompt=-: its byte 4 is not UTF-8"):
        say(None, b"hell\xff")
    say("")  # begins after the end of a document


def test_echo_adds_nothing_to_a_prompt_and_ctrl_c_ends_the_answer_alone(trained, monkeypatch, capsys):
    Path("out/best.pt").rename("out/other.pt")
    Path("out/prev.pt").unlink(missing_ok=True)
    message = r"out/best\.pt: not there, but out/last\.pt and out/other\.pt"
    with pytest.raises(ValueError, match=message):
        sample.main(["--checkpoint=out/best.pt"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"9 green\n")))
    monkeypatch.setattr(TransformerLM, "stream", lambda *args, **kwargs: iter([torch.tensor([65])]))
    sample.main([*CPU])
    assert capsys.readouterr().out == "9 greenA\n"
    answers = ["8 green", "9 green"]
    monkeypatch.setattr("builtins.input", lambda question: answers.pop() if answers else raising(EOFError)())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(TransformerLM, "stream", raising(KeyboardInterrupt()))
    sample.main([*CPU])  # both prompts were asked for
    assert capsys.readouterr().out == "9 green\n8 green\n\n"
    with pytest.raises(KeyboardInterrupt):
        sample.main([*CPU, "--prompt=x"])

    def interrupted(*args, **kwargs):
        yield torch.tensor([65])
        raise KeyboardInterrupt

    monkeypatch.setattr(TransformerLM, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample.main(["--device=cpu", "--dtype=bfloat16", "--prompt=x"])
    assert torch.backends.mkldnn.enabled  # switched off for single tokens, and on again
    with pytest.raises(ValueError, match=r"--export=out: holds a run of train\.py; name another folder"):
        sample.main(["--export=out"])


def test_a_sample_ends_where_a_document_does_and_does_not_show_its_end(trained, monkeypatch, capsys):
    drawn = [torch.tensor([token]) for token in (*b" of", prepare.ByteTokenizer.eos_id)]
    monkeypatch.setattr(TransformerLM, "stream", lambda *args, **kwargs: iter(drawn))
    sample.main(["--prompt=wall", "--device=cpu"])
    printed = capsys.readouterr()
    assert printed.out == "wall of\n" and printed.err.startswith("3 tokens, ")


def test_on_a_terminal_sampling_asks_for_prompts_until_the_input_ends(trained, monkeypatch, capsys):
    answers = ["8 green", "9 green"]
    monkeypatch.setattr("builtins.input", lambda question: answers.pop() if answers else raising(EOFError)())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    sample.main(["--max_new_tokens=3", "--device=cpu"])
    printed = capsys.readouterr()
    assert printed.out.startswith("9 green") and "\n8 green" in printed.out
    assert printed.err.count("tokens/s") == 2


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_an_exported_model_speaks_in_transformers_and_can_be_tuned_further(folder, capsys, kind):
    transformers = pytest.importorskip("transformers")
    prepare.main(["text.txt", f"--tokenizer={kind}", *["--vocab_size=300"] * (kind == "bpe")])
    train.main([*SMALL, "--max_steps=30"])
    sample.main(["--export=llama"])
    capsys.readouterr()
    ours, tokenizer = prepare.load_model(Path("out/best.pt")).eval(), prepare.find_tokenizer("out")
    theirs = transformers.AutoTokenizer.from_pretrained("llama")
    for text in (TEXT[:200], ODD, "", "  ", "<|endoftext|>", "Ā"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text.encode()).tolist()
        assert theirs.decode(theirs(text)["input_ids"]) == text
    model = transformers.AutoModelForCausalLM.from_pretrained("llama")
    assert model.generation_config.eos_token_id == tokenizer.eos_id == model.config.eos_token_id
    ids = theirs("9 green", return_tensors="pt")["input_ids"]
    greedy = model.generate(ids, max_new_tokens=4, do_sample=False)
    stated = ours.generate(ids, 4, temperature=0, eos_id=tokenizer.eos_id)
    assert theirs.decode(greedy[0]) == "".join(tokenizer.decode(stated[0].tolist()))
    said = []
    for checkpoint in ("out/best.pt", "llama"):
        sample.main([f"--checkpoint={checkpoint}", "--prompt=9 green", "--max_new_tokens=9", *CPU])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    tune = ["--init_from=llama", "--out_dir=tuned", "--device=cpu", "--dtype=float32", "--batch_size=4"]
    if kind == "bytes":  # the folder's tokenizer is not known to be of bytes
        with pytest.raises(ValueError, match=r"prepare\.py TEXT --tokenizer=llama --out_dir=data"):
            train.main(tune)
        prepare.main(["text.txt", "--tokenizer=llama"])
    assert train.new_config({"init_from": "llama", "context_length": 8}).context_length == 8
    config = train.new_config({"init_from": "llama", "device": "cpu", "dtype": "float32"})
    before = train.TrainManager(config, prepare.load_meta("data")).evaluate()[0]
    assert before < 0.8 * math.log(config.vocab_size)  # what the model knew
    train.main([*tune, "--max_steps=20", "--max_lr=1e-3", "--eval_interval=10"])
    lines = [line for line in metrics("tuned") if "val_loss" in line]
    assert lines[0]["val_loss"] == pytest.approx(before, rel=1e-5)
    assert lines[-1]["val_loss"] < lines[1]["val_loss"] < before
    train.main([*tune, "--max_steps=1", "--context_length=8", "--out_dir=short"])
    assert last("short")["config"]["context_length"] == 8  # of the training window
    assert last("short")["model_config"]["context_length"] == 16
    train.main(["--resume=True", "--out_dir=tuned", "--device=cpu", "--dtype=float32", "--max_steps=21"])
    with pytest.raises(ValueError, match="--d_model=8: the model in llama has 16"):
        train.main([*tune, "--d_model=8", "--out_dir=other"])


def test_a_path_that_holds_no_model_is_refused_with_what_to_do(folder):
    pytest.importorskip("safetensors")
    hub = "not a folder; if it is a model on Hugging Face, fetch it:  hf download a/b-1 --local-dir b-1"
    download = "hf download OWNER/NAME --local-dir llama"
    for path, message in (("a/b-1", hub), ("out/best.pt", "not there; train a model:  python train.py")):
        with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
            prepare.find_model(path)
    Path("llama").mkdir()
    with pytest.raises(ValueError, match=r"llama: has no best\.pt, .* no config\.json"):
        prepare.find_model("llama")
    Path("llama/adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"llama: an adapter, .* merge_and_unload"):
        prepare.find_model("llama")
    Path("llama/adapter_config.json").unlink()
    Path("llama/config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"has no model\.safetensors; .*  {download}$"):
        prepare.find_model("llama")
    Path("llama/pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(ValueError, match=rf"safetensors, but pytorch_model\.bin, .* code; .*  {download}$"):
        prepare.find_model("llama")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    Path("llama/model.safetensors").write_text(pointer)
    with pytest.raises(ValueError, match=rf"model\.safetensors: only a pointer of git-lfs.*  {download}$"):
        prepare.find_model("llama")
    lm.save_pretrained(tiny(), "llama")
    assert prepare.find_model("llama") == Path("llama")


def test_a_run_is_sampled_tuned_and_its_tokens_are_used_by_the_name_of_its_folder(folder, capsys):
    pytest.importorskip("tokenizers")
    prepare.main(["text.txt", "--tokenizer=bpe", "--vocab_size=300"])
    train.main([*SMALL, "--max_steps=4"])
    assert prepare.find_model("out") == Path("out/best.pt")
    with pytest.raises(ValueError, match=r"prepare\.py TEXT --tokenizer=out --out_dir=data-two"):
        prepare.main(["text.txt", "--out_dir=data-two"])
        train.main(["--init_from=out", "--data_dir=data-two", "--out_dir=two", "--device=cpu"])
    prepare.main(["text.txt", "--tokenizer=out/last.pt", "--out_dir=data-two"])
    assert read_tokens("data-two/train.bin") == read_tokens("data/train.bin")
    capsys.readouterr()
    tune = ["--max_steps=4", "--eval_tokens=64", "--device=cpu", "--dtype=float32"]
    train.main(["--init_from=out", "--data_dir=data-two", "--out_dir=two", *tune])
    losses = [line["val_loss"] for line in metrics("two", "val_loss")]
    assert losses[0] == pytest.approx(metrics(key="val_loss")[-1]["val_loss"], rel=1e-6)
    assert last("two")["config"]["init_from"] == "out" and len(losses) == 5
    Path("two/best.pt").unlink()
    assert prepare.find_model("two") == Path("two/last.pt")
    sample.main(["--checkpoint=two", "--prompt=9 green", "--max_new_tokens=3", "--device=cpu"])
    assert capsys.readouterr().out.split("\n")[-2].startswith("9 green")
    with pytest.raises(ValueError, match="--num_layers=2: the model in out has 1"):
        train.main(["--init_from=out", "--num_layers=2", "--out_dir=three", *tune])


def test_on_a_cpu_fine_tuning_holds_no_more_windows_than_its_cores_need(folder):
    train.main([*SMALL, "--context_length=600", "--max_steps=1"])
    for context_length, expected in ((None, 1), (256, 2), (8, 64)):
        overrides = {"init_from": "out", "device": "cpu", "dtype": "float32"}
        if context_length is not None:
            overrides["context_length"] = context_length
        config = train.new_config(overrides)
        assert config.context_length == (context_length or 512)
        tuned = train.TrainManager(config, prepare.load_meta("data"))
        assert tuned.micro_batch_size == expected
        config.micro_batch_size = 3
        assert train.TrainManager(config, prepare.load_meta("data")).micro_batch_size == 3
    assert manager().micro_batch_size == 8  # a fresh run: all


CHAT = "<|im_start|>user\nHow many?<|im_end|>\n"


@pytest.fixture
def base(folder):
    """The folder of a chat model, of 8 windows and with special tokens; its tokenizer says how to chat."""
    transformers = pytest.importorskip("transformers")
    tokenizer = prepare.train_tokenizer([TEXT], 300).tokenizer
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )
    turn = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    fast.chat_template = "{% for m in messages %}" + turn + "{% endfor %}"
    fast.save_pretrained("base")
    lm.save_pretrained(tiny(vocab_size=tokenizer.get_vocab_size(), context_length=64), "base")
    settings = {"eos_token_id": fast.eos_token_id, "do_sample": True, "temperature": 0.6}
    Path("base/generation_config.json").write_text(json.dumps(settings))
    return fast


def test_special_tokens_are_text_unless_asked_for(folder, base):
    Path("chat.txt").write_text(CHAT * 50)
    for special in (False, True):
        prepare.main(["chat.txt", "--tokenizer=base", f"--special_tokens={special}"])
        tokens = np.fromfile("data/train.bin", "<u2")
        assert base.decode(tokens).startswith(CHAT)
        for name in ("<|im_start|>", "<|im_end|>"):
            assert (base.convert_tokens_to_ids(name) in tokens[:-1]) == special
        train.main(["--init_from=base", "--max_steps=1", "--device=cpu", f"--out_dir=out-{special}"])
        ids = prepare.find_tokenizer(f"out-{special}").encode(CHAT.encode())  # as in its data
        assert np.array_equal(ids, tokens[: len(ids)])
    prepare.main(["chat.txt", "--tokenizer=out-True", "--out_dir=again"])
    assert base.convert_tokens_to_ids("<|im_end|>") not in np.fromfile("again/train.bin", "<u2")[:-1]
    with pytest.raises(ValueError, match="only the --tokenizer of a model has special tokens"):
        prepare.main(["chat.txt", "--special_tokens=True"])


def test_a_tuned_model_gives_back_what_its_base_came_with(folder, base):
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    prepare.main(["text.txt", "--tokenizer=base"])
    train.main(["--init_from=base", "--max_steps=1", "--context_length=16", "--device=cpu"])
    for dtype in ("float32", "bfloat16"):
        sample.main(["--checkpoint=out", f"--export=tuned-{dtype}", f"--dtype={dtype}"])
        weights = safetensors.load_file(f"tuned-{dtype}/model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {getattr(torch, dtype)}
    theirs = transformers.AutoTokenizer.from_pretrained("tuned-float32")
    messages = [{"role": "user", "content": "How many?"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == CHAT
    for role in ("bos_token", "eos_token", "pad_token"):
        assert getattr(theirs, role) == getattr(base, role)
    assert theirs(CHAT)["input_ids"] == base(CHAT)["input_ids"] and "token_type_ids" not in theirs(CHAT)
    assert theirs.model_max_length == 64
    model = transformers.AutoModelForCausalLM.from_pretrained("tuned-bfloat16", dtype="auto")
    assert model.dtype == torch.bfloat16 and model.generation_config.temperature == 0.6
    assert model.config.max_position_embeddings == 64  # the model's own, not the window of the training
    assert model.config.eos_token_id == base.eos_token_id


# --------------------------------------------------------------------- Nothing lost, nothing wrong accepted

KILLS = """
import os, random, signal, sys, time
import torch._dynamo, train  # imported once: a fork starts in a fifth of a second
random.seed(0)
kills = 0
while not os.path.exists("killed/done"):
    pid = os.fork()
    if pid == 0:
        sys.stdout = open(os.devnull, "w")
        resume = any(os.path.exists(f"killed/{name}.pt") for name in ("last", "prev"))
        again = ["--resume=True", "--out_dir=killed", "--device=cpu", "--dtype=float32"]
        train.main(again if resume else sys.argv[1:])
        open("killed/done", "w").close()
        os._exit(0)
    time.sleep(random.uniform(0.2, 0.4 + 0.02 * kills))
    child, status = os.waitpid(-1, os.WNOHANG)
    if child == 0:
        os.kill(pid, signal.SIGKILL)
        kills += os.waitpid(-1, 0)[1] == signal.SIGKILL
    elif status:
        sys.exit(f"a run ended with status {status}")
print(kills)
"""


def test_a_second_interrupt_stops_at_once(folder):
    long = ["--d_model=256", "--num_heads=4", "--num_layers=8", "--batch_size=1024", "--context_length=64"]
    words = [sys.executable, ROOT / "train.py", *SMALL, *long]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert any("val_loss" in line for line in process.stdout)  # its first update takes many seconds
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    for _ in range(6):  # two that come while one operation runs are noticed as one
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
    assert process.wait(timeout=3) == -signal.SIGINT and not Path("out/last.pt").exists()


def test_a_closed_terminal_saves_first(folder):
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
        words = [
            sys.executable,
            str(ROOT / "train.py"),
            *SMALL,
            "--max_steps=1000000",
            "--eval_interval=1000000",
        ]
        os.execv(sys.executable, words)
    shown = b""
    while shown.count(b"train_loss") < 20:
        shown += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    assert last()["step"] == metrics()[-1]["step"] >= 20


def test_a_run_under_nohup_does_not_hear_that_the_terminal_was_closed(folder):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        m = manager()
        train.stop_on_signals(m)
        os.kill(os.getpid(), signal.SIGHUP)
        assert m.stop_signal == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert m.stop_signal == signal.SIGTERM
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.slow
def test_a_run_killed_at_many_moments_ends_with_the_same_weights(folder):
    args = [*SMALL, "--max_steps=500", "--checkpoint_interval=1", "--dropout=0.1", "--log_interval=50"]
    train.main([*args, "--out_dir=whole"])
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    words = [sys.executable, "-c", KILLS, *args, "--out_dir=killed"]
    result = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 8
    whole, killed = last("whole"), last("killed")
    assert same(whole["model"], killed["model"])
    assert same(whole["optimizer"]["state"], killed["optimizer"]["state"])


def test_a_resume_that_fails_keeps_the_metrics_so_far(trained, monkeypatch):
    before = metrics()
    monkeypatch.setattr(os, "fsync", raising(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"\.pt"):
        train.main([*AGAIN, "--max_steps=4"])
    assert metrics()[: len(before)] == before


def test_a_full_disk_is_one_error_and_loses_nothing(trained):
    resource = pytest.importorskip("resource")
    half = Path("out/last.pt").stat().st_size // 2
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({half}, {half}))"
    words = [sys.executable, "-c", f"{limit}\nimport prepare, train; prepare.run_cli(train.main)"]
    before = last()
    result = subprocess.run(
        [*words, *AGAIN, "--max_steps=4"],
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )
    assert result.returncode == 2 and resource
    assert re.fullmatch(r"error: out/\w+\.pt: File too large\n", result.stderr), result.stderr
    assert same(last(), before) and not list(Path("out").glob("*.tmp"))


def damage(path):
    content = bytearray(Path(path).read_bytes())
    content[len(content) // 2] ^= 1
    Path(path).write_bytes(content)


def test_a_best_model_without_a_last_one_is_not_overwritten(trained):
    Path("out/last.pt").unlink()
    before = contents("out")
    for words in ([], ["--resume=auto"], ["--resume=True"]):
        with pytest.raises(ValueError, match=r"out holds the best\.pt of a run, .* add --init_from=out$"):
            train.main([*SMALL, *words])
    assert contents("out") == before


def test_the_best_model_stays_although_last_does_not_know_of_the_last_evaluation(folder, monkeypatch):
    losses = {0: 4.0, 4: 3.0, 6: 1.0, 8: 2.0}
    monkeypatch.setattr(train.TrainManager, "evaluate", lambda self: (losses[self.step], 1.0))
    train.main([*SMALL, "--max_steps=6"])  # saves, then evaluates
    best = Path("out/best.pt").read_bytes()
    train.main([*AGAIN, "--max_steps=8"])  # 6 is no update at which this run evaluates
    assert Path("out/best.pt").read_bytes() == best
    assert (last()["best_val_loss"], last()["best_step"]) == (1.0, 6)


@pytest.mark.parametrize("main,words", [(train.main, SMALL), (prepare.main, ["text.txt"])])
def test_a_second_process_does_not_write_to_the_same_folder(folder, main, words):
    pytest.importorskip("fcntl")
    lock = "with prepare.locked('shared'):\n    print('locked', flush=True)\n    time.sleep(60)"
    lock = f"import prepare, time\n{lock}"
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    other = subprocess.Popen([sys.executable, "-c", lock], stdout=subprocess.PIPE, env=environment)
    other.stdout.readline()
    with pytest.raises(ValueError, match="shared: another process is writing to it; name another folder"):
        main([*words, "--out_dir=shared", *(["--max_steps=1"] if main is train.main else [])])
    assert os.listdir("shared") == [".lock"]
    other.kill()
    other.wait()
    main([*words, "--out_dir=shared", *(["--max_steps=1"] if main is train.main else [])])  # it died with it
    assert len(os.listdir("shared")) > 3


def test_temporary_files_of_two_processes_have_two_names(folder, monkeypatch):
    with lm.atomic_write("x") as first:
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with lm.atomic_write("x") as second:
            assert first.name != second.name


@pytest.mark.parametrize("closed", ["pipe", "all"])
def test_no_print_and_no_picture_ends_a_run(folder, closed):
    Path("out/loss.png").mkdir(parents=True)  # which cannot be written then
    words = shlex.join([sys.executable, str(ROOT / "train.py"), *SMALL, "--max_steps=3"])
    rest = {"pipe": "2>&1 | true; exit ${PIPESTATUS[0]}", "all": "<&- >&- 2>&-"}[closed]
    environment = dict(os.environ, PYTHONIOENCODING="ascii")
    assert subprocess.run(["bash", "-c", f"{words} {rest}"], env=environment, timeout=100).returncode == 0
    assert last()["step"] == 3 and len(metrics()) == 6


def test_text_is_read_and_written_as_utf8_whatever_the_locale():
    for name in ("lm.py", "prepare.py", "train.py", "sample.py"):
        for call in ast.walk(ast.parse((ROOT / name).read_text())):
            if not isinstance(call, ast.Call):
                continue
            function = (
                call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            )
            modes = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
            binary = any("b" in str(mode) for mode in modes)
            devnull = "devnull" in ast.unparse(call)
            if function in ("open", "read_text", "write_text") and not binary and not devnull:
                assert any(k.arg == "encoding" for k in call.keywords), ast.unparse(call)


def rename(state, old, new):
    state[new] = state.pop(old)


WRONG = {
    "no weight": lambda s: s["model"].pop("norm.weight"),
    "another weight": lambda s: s["model"].update(extra=torch.ones(2)),
    "a weight of another shape": lambda s: s["model"].update({"norm.weight": torch.ones(3)}),
    "a weight that is a number": lambda s: s["model"].update({"norm.weight": 1.0}),
    "weights in a list": lambda s: s.update(model=[1]),
    "no shape": lambda s: s.update(model_config=None),
    "a shape without d_model": lambda s: s["model_config"].pop("d_model"),
    "a shape with a new field": lambda s: s["model_config"].update(heads=3),
    "a shape with a text": lambda s: s["model_config"].update(d_model="wide"),
    "another shape": lambda s: s["model_config"].update(num_layers=2),
    "a step that is a text": lambda s: s.update(step="3"),
    "a step before the first": lambda s: s.update(step=-3),
    "a config in a list": lambda s: s.update(config=["max_steps"]),
    "a config with a text": lambda s: s["config"].update(max_steps="many"),
    "no optimizer state": lambda s: s["optimizer"].update(state={}),
    "an optimizer state less": lambda s: s["optimizer"]["state"].pop("norm.weight"),
    "an optimizer state of another shape": lambda s: s["optimizer"]["state"]["norm.weight"].update(
        exp_avg=torch.ones(3)
    ),
    "an optimizer without groups": lambda s: s["optimizer"].pop("param_groups"),
    "an optimizer in a text": lambda s: s.update(optimizer="adamw"),
    "no dtype": lambda s: s.pop("dtype"),
    "an unknown dtype": lambda s: s.update(dtype="float7"),
    "no scaler": lambda s: s.pop("scaler"),
    "no tokenizer": lambda s: s.pop("tokenizer"),
    "an unknown tokenizer": lambda s: s.update(tokenizer={"kind": "runes"}),
    "no best loss": lambda s: s.pop("best_val_loss"),
    "a best loss that is a text": lambda s: s.update(best_val_loss="good"),
    "no data": lambda s: s.pop("data"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_whole_checkpoint_with_wrong_contents_is_refused_by_name(folder, wrong):
    state = checkpoint_of_this_version()
    WRONG[wrong](state)
    CheckpointHandler("out").save("last.pt", state)
    with pytest.raises(ValueError, match="out"):
        train.main(["--resume=True", "--device=cpu"])
    assert not Path("out/metrics.jsonl").exists() and same(last(), state)


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(folder, capsys):
    args = [*SMALL, "--max_steps=6", "--checkpoint_interval=2"]
    train.main(args)
    whole = last()["model"]
    damage("out/last.pt")
    train.main(AGAIN)
    text = capsys.readouterr().out
    assert "out/last.pt: damaged" in text and "going on from the checkpoint before" in text
    assert same(last()["model"], whole)
    Path("out/last.pt").unlink()  # where only prev.pt is left, it is the run
    with pytest.raises(ValueError, match="out holds a run already"):
        train.main(args)
    damage("out/prev.pt")
    with pytest.raises(ValueError, match=r"out/prev\.pt: damaged"):
        train.main(["--resume=True"])


def test_checkpoints_of_something_else_are_refused(trained):
    good = last()
    runes = {**good, "tokenizer": {"kind": "runes"}}
    later = {**good, "config": {**good["config"], "num_experts": 8}}
    earlier = dict(good)
    del earlier["model_config"]
    best = CheckpointHandler("out").load("best.pt")
    for state, message in (
        (runes, "--data_dir=data: not the tokenizer that the run in out has"),
        (later, "out/last.pt: of a later version of train.py, with the key num_experts"),
        (earlier, "out/last.pt: not a checkpoint of train.py, or one of an earlier version; train anew"),
        ({"weights": torch.zeros(3)}, "out/last.pt: not a checkpoint of train.py"),
        (best, "out/last.pt: has no optimizer, as a best.pt; only a last.pt can be resumed"),
    ):
        CheckpointHandler("out").save("last.pt", state)
        status, error = ended(train.main, "--resume=True")
        assert status == 2 and re.fullmatch(f"error: {re.escape(message)}.*\n", error)
    for state, message in ((runes, "runes"), ({"weights": torch.zeros(3)}, "checkpoint of")):
        CheckpointHandler("out").save("last.pt", state)
        with pytest.raises(ValueError, match=message):
            sample.main(["--checkpoint=out/last.pt"])


def checkpoint_of_this_version() -> dict:
    """What train.py saved when this format began. Every later version must load it and go on: never edit it.

    New keys of the config may come; those that are missing here then take their defaults.
    """
    shapes = {
        "embed_tokens.weight": (256, 4),
        "layers.0.input_layernorm.weight": (4,),
        "layers.0.self_attn.q_proj.weight": (4, 4),
        "layers.0.self_attn.k_proj.weight": (4, 4),
        "layers.0.self_attn.v_proj.weight": (4, 4),
        "layers.0.self_attn.o_proj.weight": (4, 4),
        "layers.0.post_attention_layernorm.weight": (4,),
        "layers.0.mlp.gate_proj.weight": (8, 4),
        "layers.0.mlp.up_proj.weight": (8, 4),
        "layers.0.mlp.down_proj.weight": (4, 8),
        "norm.weight": (4,),
        "lm_head.weight": (256, 4),
    }
    model = {}
    optimizer_state = {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        wave = torch.sin(torch.arange(1.0, size + 1)).reshape(shape)
        model[name] = 1 + wave / 10 if len(shape) == 1 else wave
        optimizer_state[name] = {
            "step": torch.tensor(3.0),
            "exp_avg": wave / 1000,
            "exp_avg_sq": wave.square() / 1e6,
        }
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    gains = [name for name, shape in shapes.items() if len(shape) == 1]
    group = {"lr": torch.tensor(0.005), "betas": (0.7, 0.98), "eps": 1e-8}
    shape = {
        "vocab_size": 256,
        "context_length": 16,
        "d_model": 4,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 2,
        "d_ff": 8,
        "rope_theta": 10000.0,
        "norm_eps": 1e-5,
        "tie_embeddings": False,
        "dropout": 0.0,
    }
    config = {
        **shape,
        "data_dir": "data",
        "out_dir": "out",
        "resume": False,
        "init_from": None,
        "max_steps": 6,
        "batch_size": 8,
        "max_lr": 0.01,
        "min_lr": 0.0,
        "warmup_steps": 0,
        "weight_decay": 0.1,
        "beta1": 0.7,
        "beta2": 0.98,
        "grad_clip": 1.0,
        "seed": 0,
        "log_interval": 1,
        "eval_interval": 3,
        "eval_tokens": 64,
        "checkpoint_interval": 500,
        "wandb_project": None,
        "micro_batch_size": None,
        "device": "cpu",
        "dtype": "auto",
        "compile": "auto",
        "fsdp": False,
    }
    return {
        "model": model,
        "model_config": shape,
        "optimizer": {
            "state": optimizer_state,
            "param_groups": [
                {**group, "weight_decay": 0.1, "params": matrices},
                {**group, "weight_decay": 0.0, "params": gains},
            ],
        },
        "scaler": {},
        "step": 3,
        "config": config,
        "dtype": "float32",
        "best_val_loss": 6.5,
        "best_step": 0,
        "tokenizer": {"kind": "bytes"},
        "data": hashlib.sha256(TEXT.encode()).hexdigest(),
        "wandb_id": None,
    }


def test_a_checkpoint_of_this_version_loads_and_goes_on(folder, capsys):
    state = checkpoint_of_this_version()
    CheckpointHandler("out").save("last.pt", state)
    train.main(["--resume=True", "--device=cpu"])
    losses = [line["train_loss"] for line in metrics(key="train_loss")]
    assert losses == pytest.approx([5.946776, 6.047859, 6.043494], abs=1e-4)
    losses = [line["val_loss"] for line in metrics(key="val_loss")]
    assert losses == pytest.approx([6.073172, 6.026917], abs=1e-4)
    capsys.readouterr()
    sample.main(["--checkpoint=out/last.pt", "--prompt=9 green", "--max_new_tokens=3", "--device=cpu"])
    assert capsys.readouterr().out.startswith("9 green")
    written = last()
    assert written.keys() == state.keys() | {"train_tokens"}
    assert written["config"].keys() >= state["config"].keys()
    assert written["optimizer"]["state"]["norm.weight"]["step"] == 6

    del state["config"]["eval_tokens"]  # as if this key had come later
    CheckpointHandler("out").save("last.pt", state)
    train.main(["--resume=True", "--device=cpu"])
    assert last()["config"]["eval_tokens"] == train.TrainConfig.eval_tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_training_stops_where_nothing_is_finite_and_keeps_finite_weights(folder, monkeypatch, dtype):
    steps, loss = [], TransformerLM.loss

    def broken(self, x, y):
        if self.training:
            steps.append(None)
        is_broken = self.training and len(steps) > 4
        return loss(self, x, y) * (math.nan if is_broken else 1)

    monkeypatch.setattr(TransformerLM, "loss", broken)
    with pytest.raises(ValueError, match=r"not finite at update .*--max_lr below"):
        train.main(
            [*SMALL, "--max_steps=99", "--log_interval=3", "--checkpoint_interval=2", f"--dtype={dtype}"]
        )
    # Float16's scaler, which the others do without, halves from 2**16 to below 2**-20 first.
    assert 4 + 37 <= len(steps) < 4 + 40 if dtype == "float16" else len(steps) < 7
    for name in ("last.pt", "prev.pt"):
        for weight in CheckpointHandler("out").load(name)["model"].values():
            assert weight.isfinite().all() and weight.dtype == torch.float32


def test_data_that_is_not_what_meta_json_says_is_refused_before_the_first_update(folder):
    def refused(message):
        with pytest.raises(ValueError, match=message):
            train.main(SMALL)
        assert not Path("out/metrics.jsonl").exists()

    good, meta = Path("data/val.bin").read_bytes(), json.loads(Path("data/meta.json").read_text())
    Path("data/val.bin").write_bytes(good[:-1])
    refused(r"val\.bin: 853 tokens, but meta\.json says 854 of type uint8; prepare")
    Path("data/val.bin").write_bytes(good[:9])
    refused(r"val\.bin: 9 tokens are fewer than context_length")
    Path("data/val.bin").write_bytes(good)
    Path("data/meta.json").write_text(json.dumps(meta | {"dtype": "uint16"}))
    refused(r"train\.bin: 3,844 tokens, but meta\.json says 7,688 of type uint16")
    Path("data/meta.json").write_text(json.dumps(meta | {"vocab_size": 100, "eos_id": 0}))
    refused(r"train\.bin: token \d+ is \d+, but the vocabulary has 100 entries")


def test_a_killed_preparation_leaves_the_old_data_valid(folder, monkeypatch):
    before = contents()
    Path("long.txt").write_bytes(b"new text " * 300_000)
    encode_pieces = prepare.ByteTokenizer.encode_pieces
    calls = []

    def killed(self, pieces):
        calls.append(pieces)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode_pieces(self, pieces)

    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(Exception):
            monkeypatch.setattr(prepare, "BATCH_SIZE", 1)
            monkeypatch.setattr(prepare.ByteTokenizer, "encode_pieces", killed)
            prepare.main(["long.txt"])
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert contents().items() > before.items()  # what was half written lies beside it
    prepare.main(["text.txt"])
    assert contents() == before


@pytest.mark.parametrize("out_dir", ["text.txt", "text.txt/out", "/proc/out"])
def test_an_output_folder_that_cannot_be_written_is_an_error_at_the_start(folder, out_dir):
    for main, words in ((train.main, SMALL), (prepare.main, ["text.txt"])):
        status, error = ended(main, *words, f"--out_dir={out_dir}")
        assert status == 2 and re.fullmatch(f"error: .*{out_dir.split('/out')[0]}.*\n", error)


def test_out_of_memory_names_the_keys_that_lower_it(folder, monkeypatch):
    said = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    overflow = RuntimeError("Storage size calculation overflowed with sizes=[2, 2]")
    for problem in (torch.OutOfMemoryError("CUDA"), said, overflow, RuntimeError("a bug")):
        monkeypatch.setattr(train.TrainManager, "update", raising(problem))
        message = "^out of memory; lower --micro_batch_size, .* or try --recompute=True$|a bug"
        with pytest.raises((ValueError, RuntimeError), match=message) as raised:
            train.main(SMALL)
        assert raised.type is (RuntimeError if "bug" in str(problem) else ValueError)


def test_one_line_errors_end_with_status_2_and_bugs_keep_their_traceback():
    missing = FileNotFoundError(2, "No such file or directory", "x.pt")
    assert ended(raising(ValueError("what, where, remedy"))) == (2, "error: what, where, remedy\n")
    assert ended(raising(missing)) == (2, "error: x.pt: No such file or directory\n")
    assert ended(raising(KeyboardInterrupt())) == (130, "")
    for bug in (TypeError("a bug"), RuntimeError("a bug")):
        with pytest.raises(type(bug)):
            ended(raising(bug))


SHAPES = {
    "context_length": st.integers(-1, 40),
    "d_model": st.sampled_from([0, 1, 8, 12, 24]),
    "num_layers": st.integers(0, 2),
    "num_heads": st.integers(0, 4),
    "num_kv_heads": st.sampled_from([None, 1, 2, 3]),
    "batch_size": st.integers(0, 5),
    "micro_batch_size": st.sampled_from([None, 0, 1, 2, 100]),
    "max_steps": st.integers(0, 3),
    "warmup_steps": st.sampled_from([None, 0, 5]),
    "eval_tokens": st.sampled_from([0, 1, 10**12]),
    "grad_clip": st.sampled_from([0, 1e-30, 1e30]),
    "max_lr": st.sampled_from([0.0, 1e-300, 1e-3, 1e30]),
    "dropout": st.sampled_from([-0.1, 0.0, 0.5, 1.0]),
    "tie_embeddings": st.booleans(),
    "dtype": st.sampled_from(["float32", "bfloat16"]),
    "vocab_size": st.sampled_from([None, 255, 256, 300]),
    "seed": st.sampled_from([-1, 0, 2**62]),
}


@settings(max_examples=80)
@given(st.dictionaries(st.sampled_from(sorted(SHAPES)), st.none(), max_size=6), st.data())
def test_any_settings_are_a_run_that_speaks_or_one_error(tmp_path_factory, keys, data):
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(TEXT)
    chosen = [f"--{key}={data.draw(SHAPES[key], key)}" for key in keys]
    with contextlib.chdir(folder):
        prepare.main(["text.txt"])
        try:
            train.main([*SMALL, "--max_steps=2", *chosen])
        except ValueError as problem:
            assert chosen and "\n" not in str(problem)  # with nothing chosen there is nothing to refuse
        else:
            sample.main(["--prompt=", "--max_new_tokens=50", "--device=cpu", "--dtype=float32"])


# -------------------------------------------------------------------------------------------------- README.md
def test_the_readmes_twenty_lines_print_what_they_promise(tmp_path, capsys):
    code, promised = re.search(
        r"```python\n((?:(?!```).)*)```\n\nIt prints\n\n```\n(.*?)```", README, re.DOTALL
    ).groups()
    (tmp_path / "twenty.py").write_text(code)
    runpy.run_path(str(tmp_path / "twenty.py"))
    printed, number = capsys.readouterr().out, r"\d+\.\d+"
    assert re.sub(number, "", printed) == re.sub(number, "", promised)
    losses, stated = (list(map(float, re.findall(number, text))) for text in (printed, promised))
    assert losses == pytest.approx(stated, abs=0.03) and losses[-1] < 0.1


def test_the_readmes_commands_run(folder, capsys):
    """Each in turn, in a folder of its own, small and short where it trains."""
    short = "--max_steps=2 --num_layers=1 --d_model=48 --context_length=32 --batch_size=2 --device=cpu"
    commands = re.findall(
        r"^(?:    |.*&& )python (prepare|train|sample)\.py ?([^#\n]*?)(?: *#.*)?$", README, re.MULTILINE
    )
    assert len(commands) >= 6
    Path("mytext.txt").write_text(TEXT)
    Path("shakespeare.txt").write_text(TEXT)
    lm.save_pretrained(tiny(vocab_size=400, context_length=64), "smollm2", 0)  # in place of the download
    sample.export_tokenizer(prepare.train_tokenizer([TEXT], 400), "smollm2")
    for script, arguments in commands:
        words = shlex.split(arguments)
        if script == "train" and "--resume=True" not in words:
            fixed = ("--d_model", "--num_layers") if "--init_from" in arguments else ()
            words += [word for word in short.split() if not word.startswith(fixed)]
            words += ["--compile=False"]  # not every machine has a compiler
        {"prepare": prepare, "train": train, "sample": sample}[script].main(words)
    assert "sample more" in capsys.readouterr().out
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (loads,) = (block for block in blocks if "llama-mine" in block)
    Path("loads.py").write_text(loads)
    runpy.run_path("loads.py")
    assert capsys.readouterr().out.startswith("Once ")
    (compares,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/speed.md").read_text(), re.DOTALL)
    Path("compares.py").write_text(
        compares.replace("rounds = torch.bfloat16, 20", "rounds = torch.bfloat16, 1")
    )
    runpy.run_path("compares.py")
    assert re.fullmatch(r"step {'lm.py': '.* ms'}\ngenerate {'lm.py': '.* ms'}\n", capsys.readouterr().out)


def test_the_readmes_promises_name_tests_that_exist():
    named = re.findall(r"^\| .* \| `(test_\w+)` \|$", README, re.MULTILINE)
    assert len(named) >= 12 and set(named) <= globals().keys()


EXPERIMENTS = (ROOT / "docs/experiments.md").read_text()
DIFFS = re.findall(r"```diff\n(.*?)```", EXPERIMENTS, re.DOTALL)


def apply_diff(diff, folder):
    """Change copies of the scripts as a reader of docs/experiments.md would."""
    for name in ("lm.py", "prepare.py", "train.py"):
        shutil.copy(ROOT / name, folder)
    subprocess.run(["git", "apply", "-"], input=diff.encode(), cwd=folder, check=True)


def muon_diff():
    (diff,) = (diff for diff in DIFFS if "muon" in diff)
    return diff


def loss_after_an_update(path):
    """The loss that the lm.py at path gives for a small model and seed 0."""
    module = runpy.run_path(str(path))
    torch.manual_seed(0)
    model = module["TransformerLM"](module["ModelConfig"](61, 16, 32, 2, 4))
    matrices = [param for param in model.layers.parameters() if param.ndim > 1]
    optimizer = module["AdamW"]([{"params": matrices, "muon": True}])
    x, y = torch.arange(16)[None], torch.arange(1, 17)[None]
    model.loss(x, y).backward()
    optimizer.step()
    return model.loss(x, y).item()


@pytest.mark.parametrize("number", range(len(DIFFS)))
def test_the_experiments_diffs_apply_and_change_what_lm_computes(tmp_path, number):
    apply_diff(DIFFS[number], tmp_path)
    changed, plain = (loss_after_an_update(folder / "lm.py") for folder in (tmp_path, ROOT))
    assert math.isfinite(changed) and abs(changed - plain) > 1e-4


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96)])
def test_the_experiments_muon_is_torchs(tmp_path, shape):
    """torch's iterates in bfloat16, and so differs by about 1 % in each update."""
    apply_diff(muon_diff(), tmp_path)
    module = runpy.run_path(str(tmp_path / "lm.py"))
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer = module["AdamW"]([{"params": [ours], "muon": True}], lr=0.01, weight_decay=0.1)
    oracle = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(20):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        oracle.step()
    assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()


def test_the_experiments_muon_trains_and_resumes(folder, monkeypatch):
    for name in ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG"):
        monkeypatch.delenv(name, raising=False)  # the changed copies do not count as the project
    apply_diff(muon_diff(), folder)
    command(folder / "train.py", *SMALL, "--max_steps=2")
    assert "2 of them since it went on" in command(folder / "train.py", *AGAIN, "--max_steps=4")


def test_the_experiments_keys_are_keys_of_train():
    found = re.findall(r"(?:`|train\.py )(--\w+=[^`\n]*)", EXPERIMENTS)
    assert len(found) >= 2
    for keys in found:
        train.TrainConfig(**prepare.parse_args(train.TrainConfig, shlex.split(keys), ""))


def test_the_readmes_guide_has_the_sections_of_lm_and_their_lines():
    lines = (ROOT / "lm.py").read_text().splitlines()
    starts = [i for i, line in enumerate(lines, 1) if re.match(r"# -{9,} ", line)] + [len(lines) + 1]
    sections = {lines[a - 1].split("- ", 1)[1]: f"{a}–{b - 1}" for a, b in pairwise(starts)}
    rows = re.findall(r"^\| (.*?) \|.*\| (\d+–\d+) \|$", README, re.MULTILINE)
    assert dict(rows) == sections and [name for name, _ in rows] == list(sections)


@pytest.mark.parametrize("name", ["lm.py", "prepare.py", "train.py", "sample.py"])
def test_no_function_is_longer_than_a_screen(name):
    functions = [n for n in ast.walk(ast.parse((ROOT / name).read_text())) if isinstance(n, ast.FunctionDef)]
    for node in functions:
        limit = 70 if node.name == "train" else 40  # the loop of training stands in one piece
        assert node.end_lineno - node.lineno < limit, node.name
