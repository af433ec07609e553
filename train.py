"""Train a language model on prepared tokens, and go on where a run stopped.

python train.py                                # a default model on Python's standard library, in minutes
python train.py --data_dir=data-notes --out_dir=out-notes --max_steps=5000
python train.py --resume=True                  # go on from out/last.pt
python train.py --init_from=FOLDER --data_dir=data-mine --out_dir=out-mine    # fine-tune a Hugging Face Llama
torchrun --standalone --nproc_per_node=8 train.py --resume=auto    # the same run, on eight GPUs
"""

import dataclasses
import importlib.util
import json
import math
import os
import re
import secrets
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

import lm
import prepare


@dataclasses.dataclass
class TrainConfig:
    """Every key of `python train.py --key=value`; the comments are its --help."""

    data_dir: str = "data"  # folder with train.bin, val.bin and meta.json, made by prepare.py
    out_dir: str = "out"  # folder for last.pt, best.pt and metrics.jsonl
    resume: Literal["auto", True, False] = False  # go on from out_dir/last.pt; auto: if it is there
    dry_run: bool = False  # only say what the run would take: parameters, arithmetic, memory
    init_from: str | None = None  # folder of a Hugging Face Llama to fine-tune; None: a fresh model
    # The model, as in lm.ModelConfig; with init_from the folder's, of which context_length may be lower
    vocab_size: int | None = None  # None: the tokenizer's
    context_length: int = 128  # tokens of a window: how far the model sees; with init_from at most 512
    d_model: int = 128  # width of the residual stream
    num_layers: int = 4  # transformer blocks
    num_heads: int = 4  # attention heads of each block
    num_kv_heads: int | None = None  # heads of keys and values; None: num_heads
    d_ff: int | None = None  # width inside the feed-forward; None: 8/3 of d_model
    rope_theta: float = 10000.0  # base of the rotary angles
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    tie_embeddings: bool = False  # one matrix as embedding and as output
    dropout: float = 0.0  # share of each residual branch that is dropped
    # The optimization
    max_steps: int = 2500  # updates
    batch_size: int = 8  # windows in an update, whatever the hardware
    max_lr: float | None = None  # learning rate after the warm-up; None: 3e-3, or 1e-4 with init_from
    min_lr: float = 0.0  # learning rate at the end
    warmup_steps: int | None = None  # updates until max_lr; None: a twentieth of max_steps
    weight_decay: float = 0.1  # of matrices and embeddings
    beta1: float = 0.7  # AdamW's memory of gradients; 0.9 is usual with large batches
    beta2: float = 0.98  # AdamW's memory of squared gradients; 0.95 is usual with large batches
    grad_clip: float = 1.0  # largest norm of the gradient
    seed: int = 0  # of the weights, the order of the data and dropout
    # What is reported and saved, and how often
    log_interval: int = 50  # updates between lines
    eval_interval: int = 500  # updates between evaluations
    eval_tokens: int = 131072  # validation tokens of an evaluation, spread over the file; 0: all
    checkpoint_interval: int = 500  # updates between checkpoints
    wandb_project: str | None = None  # log to this project of Weights & Biases too
    wandb_id: str | None = None  # its run there; None: a new one, with which resuming goes on
    # The machine, from here to the end: not part of the run, so that it can be resumed on another
    micro_batch_size: int | None = None  # windows that the device holds at once; None: batch_size
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the matrix products
    compile: Literal["auto", True, False] = "auto"  # auto: on CUDA
    fsdp: bool = False  # under torchrun: each process holds a share of the weights, not all of them
    timeout: int = 600  # under torchrun: seconds after which a process that is silent counts as dead

    def __post_init__(self):
        if self.max_lr is None:
            self.max_lr = 1e-4 if self.init_from else 3e-3
        if self.warmup_steps is None:
            self.warmup_steps = self.max_steps // 20
        counts = ("max_steps", "batch_size", "log_interval", "eval_interval", "checkpoint_interval")
        limits = dict.fromkeys((*counts, "micro_batch_size", "timeout"), (1, 2**63))
        limits |= dict.fromkeys(("warmup_steps", "eval_tokens", "seed"), (0, 2**63))
        limits |= {"beta1": (0, 1), "beta2": (0, 1), "weight_decay": (0, math.inf), "min_lr": (0, math.inf)}
        for name, (low, high) in limits.items():
            if (value := getattr(self, name)) is not None and not low <= value < high:
                raise ValueError(f"--{name}={value}: must be at least {low} and below {high}")
        for name in ("max_lr", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name}={getattr(self, name)}: must be above 0")
        if self.min_lr > self.max_lr:
            raise ValueError(f"--min_lr={self.min_lr}: must be at most max_lr, {self.max_lr}")

    def model(self) -> lm.ModelConfig:
        return lm.ModelConfig(**{key: getattr(self, key) for key in SHAPE_KEYS})


# Of a resumed run: what is taken from the command line alone, and what must stay as it was.
KEYS = [field.name for field in dataclasses.fields(TrainConfig)]
MACHINE_KEYS = {"out_dir", "resume", "dry_run", *KEYS[KEYS.index("micro_batch_size") :]}
SHAPE_KEYS = {field.name for field in dataclasses.fields(lm.ModelConfig)}
FIXED_KEYS = SHAPE_KEYS | {"batch_size", "seed", "init_from"}


# ------------------------------------------------------------------------------------------- What a run takes
def on_meta(config: lm.ModelConfig) -> lm.TransformerLM:
    """The model on torch's meta device, where tensors take no memory."""
    with torch.device("meta"):
        return lm.TransformerLM(config)


def count_parameters(config: lm.ModelConfig) -> int:
    return sum(p.numel() for p in on_meta(config).parameters())


def flops_per_token(c: TrainConfig) -> int:
    """Forward and backward: 6 a weight in products, 12·L·D·T for attention (PaLM, 2022, appendix B)."""
    looked_up = 0 if c.tie_embeddings else c.vocab_size * c.d_model
    return 6 * (count_parameters(c.model()) - looked_up) + 12 * c.num_layers * c.d_model * c.context_length


def saved_bytes(c: TrainConfig, rows: int) -> int:
    """What `rows` windows keep from the forward pass for the backward one, by a pass that takes no memory."""
    saved, dtype = {}, getattr(torch, c.dtype)
    model = on_meta(c.model())
    model.to(dtype if c.fsdp else torch.float32)
    autocast = torch.autocast("cpu", dtype, enabled=not c.fsdp and dtype != torch.float32)
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.setdefault(tensor.untyped_storage()._cdata, tensor), lambda tensor: tensor
    )
    with FakeTensorMode(allow_non_fake_inputs=True), autocast, hooks:
        model.to_empty(device="cpu")
        tokens = torch.zeros(rows, c.context_length, dtype=torch.int64)
        model.loss(tokens, tokens)
    for tensor in (*model.parameters(), *model.buffers()):
        saved.pop(tensor.untyped_storage()._cdata, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def memory(c: TrainConfig, world_size: int) -> dict[str, int]:
    """Bytes that each process will need, by what for; activations are those of an eager run."""
    total = count_parameters(c.model())
    held = total // (world_size if c.fsdp else 1)
    rows = min(c.micro_batch_size or c.batch_size, c.batch_size // world_size)
    need = {"weights": 4 * held, "gradients": 4 * held, "AdamW": 8 * held}
    need["activations"] = saved_bytes(c, rows)
    if c.fsdp:  # the block at work and the next, all that is outside of blocks, a block's float32 gradients
        block = sum(p.numel() for p in on_meta(c.model()).layers[0].parameters())
        outside = total - c.num_layers * block
        need["gathered"] = (2 * block + outside) * getattr(torch, c.dtype).itemsize + 4 * block
    return need


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.0f}" if size >= 1e11 else f"{size / 1e9:.3g}"


def describe(c: TrainConfig, meta: dict | None, world_size: int) -> None:
    """Print what is about to run, and what it takes; without data where meta is None."""
    size, tokens = count_parameters(c.model()), c.batch_size * c.context_length
    print(f"model    {size:,} parameters: {c.num_layers} layers, d_model {c.d_model}, {c.num_heads} heads")
    if meta:
        epochs = c.max_steps * tokens / meta["train_tokens"]
        data = f"{meta['train_tokens']:,} tokens of {meta['source']} (sha256 {meta['sha256'][:12]})"
        print(f"data     {data}: {epochs:.2f} epochs")
    batch = f"{c.batch_size} x {c.context_length} = {tokens:,} tokens"
    print(f"run      {c.max_steps:,} updates of {batch}, {flops_per_token(c):,} FLOP a token")
    ways = f", {world_size} processes, {'FSDP' if c.fsdp else 'DDP'}" if world_size > 1 else ""
    print(f"machine  {c.device}, {c.dtype}, {'compiled' if c.compile else 'eager'}{ways}")
    if c.dry_run:
        need = memory(c, world_size)
        parts = " + ".join(f"{name} {gigabytes(size)}" for name, size in need.items())
        print(f"memory   {gigabytes(sum(need.values()))} GB in each process: {parts}")


# ---------------------------------------------------------------------------------------------------- Logging
class Silent:
    """Stands in for a logger where none is wanted, so that nobody asks: takes any call, does nothing."""

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None


class Logger:
    """Reports a run: to the console, to out_dir/metrics.jsonl, and to Weights & Biases."""

    def __init__(self, config: TrainConfig, step: int):
        """Go on after update `step`: what metrics.jsonl holds of later ones is cut off."""
        self.config, self.start, self.first_step = config, time.perf_counter(), step
        self.flops, self.width = flops_per_token(config), len(str(config.max_steps))
        self.live = sys.stdout.isatty()  # rewrite the line in place; in a log, one line an interval
        self.path = Path(config.out_dir, "metrics.jsonl")
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 (open as long as the run)
        lines = self.path.read_bytes().splitlines(keepends=True) if step else []
        whole = [line for line in lines if line.endswith(b"}\n")]  # a kill may have cut the last one
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        self.file.truncate(len(b"".join(kept)))  # steps never fall: what is kept comes first
        self.wandb, keys = Silent(), dataclasses.asdict(config)
        if config.wandb_project:
            import wandb

            self.wandb = wandb.init(
                project=config.wandb_project, id=config.wandb_id, resume="allow", config=keys
            )
        if not step:
            self.record(0, config=keys)

    def record(self, step: int, **values) -> None:
        line = json.dumps({"step": step, **values})
        # What is not finite, as the gradient of an update that float16 skips, is null: JSON has no NaN.
        self.file.write(json.dumps(json.loads(line, parse_constant=lambda word: None)) + "\n")
        self.wandb.log(values, step=step)

    def say(self, text: str, passing: bool = False) -> None:
        """Print a line, on a terminal in place of one that was `passing`."""
        print(f"\r\033[K{text}" if self.live else text, end="" if self.live and passing else "\n", flush=True)

    def progress(self, step: int, values: dict) -> None:
        self.record(step, **values)
        c, speed = self.config, values["tokens_per_second"]
        elapsed = time.perf_counter() - self.start
        left = int(elapsed / (step - self.first_step) * (c.max_steps - step))
        skipped = f"  skipped {values['skipped']}" if values.get("skipped") else ""
        line = (
            f"step {step:{self.width}}/{c.max_steps}  loss {values['train_loss']:.3f}"
            f"  rate {values['lr']:.2e}  gradient {values['grad_norm']:.2f}{skipped}"
            f"  {speed:,.0f} tokens/s  {speed * self.flops / 1e12:.2f} TFLOP/s"
            f"  {left // 60}:{left % 60:02} left"
        )
        self.say(line, passing=True)

    def evaluation(self, step: int, nats: float, bpb: float, text: str) -> None:
        self.record(step, val_loss=nats, val_bpb=bpb)
        self.say(f"step {step:{self.width}}  validation {nats:.4f} nats, {bpb:.4f} bits/byte  {text}")

    def close(self) -> None:
        self.file.close()
        self.wandb.finish()
        if importlib.util.find_spec("matplotlib"):
            self.draw()

    def draw(self) -> None:
        """Draw the losses in metrics.jsonl to loss.png."""
        from matplotlib.figure import Figure

        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        figure = Figure(figsize=(8, 3.5), layout="constrained")
        axes = figure.subplots()
        for key, style, label in (("train_loss", "-", "training"), ("val_loss", "o-", "validation")):
            points = [(line["step"], line[key]) for line in lines if key in line]
            axes.plot(*np.array(points, float).reshape(-1, 2).T, style, label=label, markersize=4)
        axes.set(xlabel="update", ylabel="loss, nats per token")
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(self.path.with_name("loss.png"), dpi=110)


# --------------------------------------------------------------------------------------------- Many processes
# torchrun starts this file once for each device. With one process nothing here does anything: skip it.


def join_processes(timeout: int) -> None:
    """Join the processes that torchrun started beside this one, if it did. Only the first then prints."""
    if not dist.is_torchelastic_launched():
        return
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True":
        # This store outlives its processes: those that start again must not find the addresses of the dead.
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend, limit = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timedelta(seconds=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open as long as the process)


def from_first(work) -> tuple[TrainConfig, dict, dict | None]:
    """The (config, meta, state) of work(), done by the first process alone, on all; weights stay with it.

    Where work fails, the first process raises and the others end.
    """
    if not dist.is_initialized():
        return work()
    found, light = None, [None]
    try:
        if dist.get_rank() == 0:
            config, meta, state = found = work()
            light = [(config, meta, state and state | {"model": {}, "optimizer": {}})]
    finally:
        dist.broadcast_object_list(light)
    if light[0] is None:
        sys.exit(2)
    return found or light[0]


def over_all(value: float, operation=dist.ReduceOp.SUM) -> float:
    """The sum (or the maximum) of the processes' values."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.float64)  # on the CPU: no GPU is waited for
    dist.all_reduce(tensor, operation)
    return tensor.item()


def spread(loss: nn.Module, c: TrainConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Make loss, and what it does backward, one over all processes.

    With DDP each process holds the whole model. With FSDP each holds a share of the weights, gradients and
    optimizer state, a block's weights are gathered while it is their turn, and gradients are averaged after
    each micro-step: a whole one would not fit.
    """
    if not c.fsdp:
        options = {"forward_sync_buffers": False, "gradient_as_bucket_view": True}
        return nn.parallel.DistributedDataParallel(loss, **options)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for part in (*loss.model.layers, loss.model):
        if c.compile and part is not loss.model:
            part.compile()
        fully_shard(part, mesh=mesh, mp_policy=policy)
    for method in ("loss", "generate"):
        register_fsdp_forward_method(loss.model, method)
    return loss


# --------------------------------------------------------------------------------------------------- Training
class Loss(nn.Module):
    """TransformerLM.loss as a forward, which is what DDP acts on."""

    def __init__(self, model: lm.TransformerLM):
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.model.loss(tokens, targets)


class TrainManager:
    """One training run: the model and all that changes with it, from its first update to its last."""

    def __init__(self, config: TrainConfig, meta: dict, state: dict | None = None):
        """A fresh run, or the one that the checkpoint `state` holds."""
        c, self.config, self.meta = config, config, meta
        self.tokenizer = prepare.load_tokenizer(meta["tokenizer"])
        self.checkpoints = lm.CheckpointHandler(c.out_dir)
        self.rank, self.world_size = 0, 1
        if dist.is_initialized():
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if c.device.startswith("cuda") and self.world_size > 1:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            c.device = "cuda"  # the one just set
        self.device, self.dtype = prepare.pick_device(c.device, c.dtype)
        self.train_data, self.val_data = self.open_data("train"), self.open_data("val")
        torch.manual_seed(c.seed)
        if c.init_from and state is None:
            self.model = lm.load_pretrained(c.init_from, context_length=c.context_length, dropout=c.dropout)
        else:
            self.model = lm.TransformerLM(c.model())
        self.loss = Loss(self.model)
        if not c.fsdp:
            self.loss.to(self.device)
            if c.compile:
                self.loss.compile()
        if dist.is_initialized():
            self.loss = spread(self.loss, c, self.device, self.dtype)
        self.params = list(self.model.parameters())
        matrices = {"params": [p for p in self.params if p.ndim > 1]}
        gains = {"params": [p for p in self.params if p.ndim == 1], "weight_decay": 0.0}  # do not decay
        rate = torch.tensor(c.max_lr, device=self.device)  # a tensor: a compiled step then serves every rate
        self.optimizer = lm.AdamW([matrices, gains], rate, (c.beta1, c.beta2), weight_decay=c.weight_decay)
        self.compile_optimizer = c.compile and not c.fsdp
        # float16 ends at 6e-8: gradients are scaled up for the backward pass. The others need none.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        self.step, self.best_val_loss, self.stop_signal = 0, math.inf, 0
        self.skipped = torch.zeros((), device=self.device)  # updates whose gradient was not finite
        if state is not None:
            self.load(state)

    def open_data(self, split: str) -> lm.MemmapTokenDataset:
        c, path = self.config, Path(self.config.data_dir, f"{split}.bin")
        data = lm.MemmapTokenDataset(path, c.context_length, self.meta["dtype"], c.vocab_size)
        if len(data.tokens) != self.meta[f"{split}_tokens"]:
            stated = f"meta.json says {self.meta[f'{split}_tokens']:,} of type {self.meta['dtype']}"
            raise ValueError(f"{path}: {len(data.tokens):,} tokens, but {stated}; prepare it again")
        data.windows(np.arange(min(len(data), 4096)))  # a cheap look for ids out of range
        return data

    def load(self, state: dict) -> None:
        """Go on from a checkpoint. Its weights are needed in the first process only, which deals them out."""
        options = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
        states.set_model_state_dict(self.model, state["model"], options=options)
        groups = self.optimizer.param_groups  # kept, with the rates, betas and decay of this command line
        states.set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=options)
        self.optimizer.param_groups = groups
        for param_state in self.optimizer.state.values():
            for name, tensor in param_state.items():  # a copy: these lie in the checkpoint, which is mapped
                param_state[name] = tensor.to(self.device, copy=True)
        if state["scaler"]:  # empty where the run was not in float16
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.best_val_loss = state["step"], state["best_val_loss"]

    def to_device(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        cuda = self.device.type == "cuda"  # from pinned memory, the next batch is copied during this update
        return [(t.pin_memory() if cuda else t).to(self.device, non_blocking=cuda) for t in tensors]

    def rate(self) -> float:
        c = self.config
        return lm.lr_cosine_schedule(self.step, c.max_lr, c.min_lr, c.warmup_steps, c.max_steps)

    # --------------------------------------------------------------------------------------------- One update

    def update(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Make update self.step + 1; return its loss and the norm of its gradient, 0-d tensors."""
        c = self.config
        self.step += 1
        for group in self.optimizer.param_groups:
            group["lr"].fill_(self.rate())
        batch = self.train_data.batch(self.step - 1, c.batch_size, c.seed, self.rank, self.world_size)
        x, y = self.to_device(*batch)
        rows, total = c.micro_batch_size or len(x), torch.zeros((), device=self.device)
        for i, (xi, yi) in enumerate(zip(x.split(rows), y.split(rows), strict=True)):
            if c.dropout:
                key = np.random.SeedSequence((c.seed, self.step, i, self.rank))
                torch.manual_seed(key.generate_state(1, np.uint64).item())
            if self.world_size > 1:  # DDP: average over the processes once, in the last backward pass
                self.loss.require_backward_grad_sync = (i + 1) * rows >= len(x)
            with self.autocast:
                loss = self.loss(xi, yi) * (len(xi) / len(x))
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.params, c.grad_clip)
        norm = norm.full_tensor() if c.fsdp else norm
        self.skipped += ~norm.isfinite()
        self.scaler.step(self.optimizer)  # with float16, skips the update if a gradient is not finite
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.compile_optimizer:  # only now, when its state exists, is its step one graph
            self.compile_optimizer, self.optimizer.step = False, torch.compile(self.optimizer.step)
        return total, norm

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Validation loss in nats per token and in bits per byte, over the same windows each time."""
        c, data = self.config, self.val_data
        used = min(len(data), max(1, c.eval_tokens // c.context_length)) if c.eval_tokens else len(data)
        indices = np.arange(used) * len(data) // used
        rows = 4 * (c.micro_batch_size or c.batch_size // self.world_size)  # without gradients, more fit
        total = 0.0
        self.model.eval()
        for i in range(0, used, rows * self.world_size):
            mine = indices[i + self.rank * rows :][:rows]
            x, y = self.to_device(*data.windows(mine if len(mine) else indices[:1]))  # FSDP needs all to join
            with self.autocast:
                total += self.model.loss(x, y).item() * len(mine)
        self.model.train()
        nats = over_all(total) / used
        return nats, nats / math.log(2) * self.meta["val_tokens"] / self.meta["val_bytes"]

    def sample(self, max_new_tokens: int) -> str:
        """Text from the model as it is, drawn from the same seed each time."""
        ids = [*self.tokenizer.start_ids, *self.tokenizer.encode(b"\n").tolist()]
        prompt = torch.tensor([ids], device=self.device)
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        self.model.eval()
        made = self.model.generate(prompt, max_new_tokens, temperature=0.8, top_p=0.95, generator=generator)
        self.model.train()
        return "".join(self.tokenizer.decode(made[0, len(ids) :].tolist()))

    def check(self) -> None:
        """Raise ValueError once a gradient was not finite. It waits for the device: not for each update."""
        diverged = self.scaler.get_scale() < 2**-20 if self.scaler.is_enabled() else self.skipped > 0
        if diverged:
            raise ValueError(
                f"loss or gradient not finite at update {self.step} or shortly before; {self.config.out_dir} "
                f"keeps what was saved before; try --max_lr below {self.config.max_lr}, --warmup_steps above "
                f"{self.config.warmup_steps}, or --dtype=float32"
            )

    def save(self, name: str, with_optimizer: bool = True) -> None:
        options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = {
            "model": states.get_model_state_dict(self.model, options=options),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "config": dataclasses.asdict(self.config),
            "model_config": dataclasses.asdict(self.model.config),
            "best_val_loss": self.best_val_loss,
            "tokenizer": self.meta["tokenizer"],
        }
        if with_optimizer:
            state["optimizer"] = states.get_optimizer_state_dict(self.model, self.optimizer, options=options)
        if self.rank == 0:
            self.checkpoints.save(name, state)

    def save_last(self) -> None:
        """Save last.pt; the one before stays as prev.pt, should last.pt ever be found damaged."""
        self.save("next.pt")
        last = self.checkpoints.folder / "last.pt"
        if self.rank == 0:
            if last.exists():
                os.replace(last, last.with_name("prev.pt"))
            os.replace(last.with_name("next.pt"), last)

    def validate(self, logger: Logger) -> None:
        nats, bpb = self.evaluate()
        if nats < self.best_val_loss:
            self.best_val_loss = nats
            self.save("best.pt", with_optimizer=False)
        logger.evaluation(self.step, nats, bpb, repr(self.sample(60)))

    def train(self, logger: Logger) -> int:
        """Make the updates that are left, up to max_steps or to a signal that asks to stop → that, or 0."""
        c = self.config
        mark, marked, stop = time.perf_counter(), self.step, 0
        while self.step < c.max_steps and not stop:
            loss, norm = self.update()
            stop = int(over_all(self.stop_signal, dist.ReduceOp.MAX))  # all processes after the same update
            log, validate, save = (
                self.step % interval == 0 or self.step == c.max_steps
                for interval in (c.log_interval, c.eval_interval, c.checkpoint_interval)
            )
            if log or validate or save or stop:
                self.check()
            if log:
                tokens = (self.step - marked) * c.batch_size * c.context_length
                values = {
                    "train_loss": over_all(loss.item()) / self.world_size,
                    "lr": self.rate(),
                    "grad_norm": norm.item(),
                    "tokens_per_second": tokens / (time.perf_counter() - mark),
                }
                if self.scaler.is_enabled():
                    values["skipped"] = int(self.skipped)
                logger.progress(self.step, values)
            if validate:
                self.validate(logger)
            if save or stop:
                self.save_last()
            if log or validate or save:  # only updates are timed
                mark, marked = time.perf_counter(), self.step
        return stop if self.step < c.max_steps else 0


# ------------------------------------------------------------------------------------------------------- main
def resume_run(given: dict, out_dir: str) -> tuple[TrainConfig, dict]:
    """The config and the state of the run in out_dir; `given` keys replace its own where they may."""
    checkpoints, last = lm.CheckpointHandler(out_dir), Path(out_dir, "last.pt")
    prev = last.with_name("prev.pt")
    try:
        state = checkpoints.load("last.pt")
    except (ValueError, FileNotFoundError) as problem:
        if not prev.exists():
            raise
        print(f"{prepare.format_error(problem)}; going on from the checkpoint before it, {prev}")
        state = checkpoints.load("prev.pt")
        if last.exists():
            os.replace(last, last.with_name("damaged.pt"))
    if set(state.get("config", ())) != set(KEYS) or "optimizer" not in state:  # best.pt goes without
        raise ValueError(f"{last}: not made by this version of train.py, or not as a last.pt")
    saved = {key: value for key, value in state["config"].items() if key not in MACHINE_KEYS}
    for key in sorted(FIXED_KEYS & given.keys()):
        if given[key] != saved[key]:
            raise ValueError(f"--{key}={given[key]}: the run in {out_dir} has {saved[key]} and keeps it")
    return TrainConfig(**saved | given), state


def new_config(given: dict) -> TrainConfig:
    """The config of a fresh run: the given keys, and where it fine-tunes a model, that model's shape."""
    if not (folder := given.get("init_from")):
        return TrainConfig(**given)
    shape = dataclasses.asdict(lm.pretrained_config(folder))
    for key in sorted(SHAPE_KEYS & given.keys() - {"dropout"}):
        if given[key] != shape[key] and not (key == "context_length" and given[key] < shape[key]):
            raise ValueError(f"--{key}={given[key]}: the model in {folder} has {shape[key]}")
    return TrainConfig(**shape | {"context_length": min(shape["context_length"], 512)} | given)


def resolve(c: TrainConfig, meta: dict, world_size: int = 1) -> None:
    """Put in c what "auto" and None become here: checkpoints and metrics.jsonl record it."""
    c.vocab_size = c.vocab_size or meta["vocab_size"]
    if c.vocab_size < meta["vocab_size"]:
        raise ValueError(f"--vocab_size={c.vocab_size}: the tokenizer has {meta['vocab_size']} tokens")
    c.model()  # refuses what cannot be, before anything is read
    device, dtype = prepare.pick_device(c.device, c.dtype)
    c.device, c.dtype = str(device), str(dtype).removeprefix("torch.")
    if c.wandb_project:
        importlib.import_module("wandb")  # if it is missing, that is an error now
        c.wandb_id = c.wandb_id or secrets.token_hex(4)
    if c.batch_size % world_size:
        least = math.ceil(c.batch_size / world_size) * world_size
        reason = f"does not divide among {world_size} processes; {least} would"
        raise ValueError(f"--batch_size={c.batch_size}: {reason}")
    if c.fsdp and not dist.is_initialized() and not c.dry_run:
        raise ValueError("--fsdp=True: needs torchrun:  torchrun --standalone --nproc_per_node=8 train.py")
    if c.fsdp and c.dtype == "float16":
        raise ValueError("--fsdp=True: needs --dtype=bfloat16 or float32; float16 needs a scaler of its own")
    c.compile = device.type == "cuda" if c.compile == "auto" else c.compile
    if c.compile:
        try:  # it takes a compiler beside torch
            torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
        except Exception as problem:  # each backend fails in a way of its own
            reason = (str(problem) or type(problem).__name__).splitlines()[0]
            print(f"warning: torch.compile does not work here ({reason}); running eagerly")
            c.compile = False


def find_run(given: dict) -> tuple[TrainConfig, dict, dict | None]:
    """The config, the data's meta.json, and the checkpoint of the run to go on with, if there is one."""
    out_dir, resume = given.get("out_dir", TrainConfig.out_dir), given.get("resume", TrainConfig.resume)
    begun = any(Path(out_dir, name).exists() for name in ("last.pt", "prev.pt"))
    if resume is True or (resume == "auto" and begun):
        config, state = resume_run(given, out_dir)
    elif begun:
        begin = f"python train.py --out_dir={out_dir}"
        ways = f"go on with it:  {begin} --resume=True  or keep it:  {begin}-2"
        raise ValueError(f"{out_dir} holds a run already; {ways}")
    else:
        config, state = new_config(given), None
        if not Path(config.data_dir, "meta.json").exists() and "data_dir" not in given:
            print(f"no data in {config.data_dir}/ yet: preparing the source of Python's standard library")
            prepare.main([f"--out_dir={config.data_dir}", f"--tokenizer={config.init_from or 'bytes'}"])
    meta = prepare.load_meta(config.data_dir)
    resolve(config, meta, dist.get_world_size() if dist.is_initialized() else 1)
    data, model = f"--data_dir={config.data_dir}", config.init_from
    if state and state["tokenizer"] != meta["tokenizer"]:
        raise ValueError(f"{data}: not the tokenizer that the run in {out_dir} has")
    if model and not state and prepare.find_tokenizer(model).spec != meta["tokenizer"]:
        command = f"python prepare.py TEXT --tokenizer={model} --out_dir={config.data_dir}"
        raise ValueError(f"{data}: not in the tokens of {model}; prepare it again:  {command}")
    return config, meta, state


def plan(given: dict) -> None:
    """Print what a run would take, for as many processes as WORLD_SIZE in the environment; begin nothing."""
    if given.get("resume"):
        raise ValueError("--dry_run=True: plans a new run; leave out --resume")
    config, world_size = new_config(given), int(os.environ.get("WORLD_SIZE", 1))
    meta = prepare.load_meta(config.data_dir) if Path(config.data_dir, "meta.json").exists() else None
    resolve(config, meta or {"vocab_size": prepare.ByteTokenizer.vocab_size}, world_size)
    describe(config, meta, world_size)


def run_training(manager: TrainManager, given: dict) -> None:
    """The run from where it stands to its end, or to a signal, which the exit status then tells."""
    config = manager.config
    Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    describe(config, manager.meta, manager.world_size)
    print(f"A loss of {math.log(config.vocab_size):.2f} nats, ln({config.vocab_size}), is a blind guess.")
    logger = Logger(config, manager.step) if manager.rank == 0 else Silent()

    def stop(number: int, frame) -> None:
        manager.stop_signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one stops at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    start_time = time.perf_counter()
    stopped = manager.train(logger)
    seconds = int(time.perf_counter() - start_time)
    logger.close()
    # The keys of the machine are not the run's: whoever gave them must give them again.
    keys = [f" --{key}={given[key]}" for key in given if key in MACHINE_KEYS - {"out_dir", "resume"}]
    command = "torchrun ... train.py" if manager.world_size > 1 else "python train.py"
    again = f"{command} --resume=True --out_dir={config.out_dir}{''.join(keys)}"
    if stopped:
        logger.say(f"stopped after update {manager.step}; go on with:  {again}")
    else:
        print(
            f"\n{manager.sample(400)}\n\n{manager.step:,} updates in {seconds // 60}:{seconds % 60:02}; "
            f"best validation loss {manager.best_val_loss:.4f} nats\n"
            f"sample more:  python sample.py --checkpoint={Path(config.out_dir, 'best.pt')}\n"
            f"train on:     {again} --max_steps={2 * config.max_steps}"
        )
    if dist.is_initialized():
        dist.barrier()  # who leaves early would look dead to the others
    if stopped:
        sys.exit(128 + stopped)


def main(argv: list[str]) -> None:
    given = prepare.parse_args(TrainConfig, argv, __doc__)
    if given.get("dry_run"):
        plan(given)
        return
    join_processes(given.get("timeout", TrainConfig.timeout))
    config, meta, state = from_first(lambda: find_run(given))
    try:
        manager = TrainManager(config, meta, state)
        del state  # as large as the model and its optimizer
        run_training(manager, given)
    except (RuntimeError, MemoryError) as problem:  # say what happened where torch's own words do not
        if prepare.is_out_of_memory(problem):
            keys = ("micro_batch_size", "batch_size", "context_length", "d_model", "num_layers")
            values = ", ".join(f"--{key}={getattr(config, key)}" for key in keys)
            raise ValueError(f"out of memory on {config.device}; lower one of {values}") from None
        if dist.is_initialized() and re.search("(?i)gloo|nccl|peer|connection|timed out", str(problem)):
            lost = f"another process of this run died, or was silent for --timeout={config.timeout} seconds"
            raise ValueError(f"{lost} ({str(problem).splitlines()[0]})") from None
        raise


if __name__ == "__main__":
    try:
        prepare.run_cli(main)
        status = 0
    except SystemExit as leaving:
        status = leaving.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    if dist.is_torchelastic_launched():
        sys.stdout.flush()
        os._exit(status)  # at a usual exit, what is left of the process group aborted in 1 of 16 runs
    sys.exit(status)
