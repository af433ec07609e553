"""Train a language model on prepared tokens, and go on where a run stopped.

python train.py                                # a default model on Python's standard library, in minutes
python train.py --data_dir=data-notes --out_dir=out-notes --max_steps=5000
python train.py --resume=True                  # go on from out/last.pt
python train.py --init_from=MODEL --data_dir=data-mine --out_dir=out-mine    # fine-tune a model
torchrun --standalone --nproc_per_node=8 train.py --resume=auto    # the same run, on eight GPUs
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

import lm
import prepare


# ----------------------------------------------------------------------------------------------------- Config
@dataclasses.dataclass
class TrainConfig:
    """Every key of `python train.py --key=value`; the comments are its --help."""

    data_dir: str = "data"  # folder with train.bin, val.bin and meta.json, made by prepare.py
    out_dir: str = "out"  # folder for last.pt, best.pt and metrics.jsonl
    resume: Literal["auto", True, False] = False  # go on from out_dir/last.pt; auto: if it is there
    init_from: str | None = None  # a Hugging Face folder or a checkpoint, to fine-tune; None: a fresh model
    # The model, as in lm.ModelConfig. With init_from it is the one that is there.
    vocab_size: int | None = None  # None: the tokenizer's
    context_length: int = 128  # tokens of a training window; with init_from: the model's, at most 512
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
    log_interval: int | None = None  # updates between lines; None: a 50th of max_steps, at most 50
    eval_interval: int | None = None  # updates between evaluations; None: a 5th of max_steps, at most 500
    eval_tokens: int = 131072  # validation tokens of an evaluation, spread over the file; 0: all
    checkpoint_interval: int | None = None  # updates between checkpoints; None: one at each evaluation
    wandb_project: str | None = None  # log to this project of Weights & Biases too
    # The machine: these are not part of the run, so that it can be resumed on another machine
    micro_batch_size: int | None = None  # windows held at once; None: all, but few with init_from on a CPU
    recompute: bool = False  # keep less for the backward pass: less memory, up to a third more time
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the matrix products
    compile: Literal["auto", True, False] = "auto"  # auto: on CUDA
    fsdp: bool = False  # under torchrun: each process holds a share of the weights, not all of them

    def __post_init__(self):
        """Fill in what depends on other keys; raise ValueError for values that cannot be."""
        if self.max_lr is None:
            self.max_lr = 1e-4 if self.init_from else 3e-3
        if self.warmup_steps is None:
            self.warmup_steps = self.max_steps // 20
        if self.log_interval is None:
            self.log_interval = min(50, max(1, self.max_steps // 50))
        if self.eval_interval is None:
            self.eval_interval = min(500, max(1, self.max_steps // 5))
        if self.checkpoint_interval is None:
            self.checkpoint_interval = self.eval_interval
        intervals = ("log_interval", "eval_interval", "checkpoint_interval")
        for name in ("max_steps", "batch_size", "micro_batch_size", *intervals):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**63:
                raise ValueError(f"--{name}={value}: must be at least 1 and below 2**63")
        for name in ("warmup_steps", "eval_tokens", "seed", "weight_decay", "min_lr"):
            if not 0 <= getattr(self, name) < 2**63:
                raise ValueError(f"--{name}={getattr(self, name)}: must be at least 0 and below 2**63")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)}: must be at least 0 and below 1")
        for name in ("max_lr", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name}={getattr(self, name)}: must be above 0 and finite")
        if self.min_lr > self.max_lr:
            raise ValueError(f"--min_lr={self.min_lr}: must be at most max_lr, {self.max_lr}")

    def model_config(self) -> lm.ModelConfig:
        """The shape of a fresh model. Raises ValueError for a shape that cannot be."""
        return lm.ModelConfig(**{key: getattr(self, key) for key in MODEL_KEYS})

    def evaluation_is_due(self, step: int) -> bool:
        """Whether to evaluate after update `step`. A run begins, at 0, and ends with an evaluation."""
        return step % self.eval_interval == 0 or step >= self.max_steps

    def evaluations_left(self, step: int) -> int:
        """How many evaluations come after update `step`."""
        if step >= self.max_steps:
            return 0
        return (self.max_steps - 1) // self.eval_interval - step // self.eval_interval + 1  # and the last

    def resolve_shape(self, meta: dict) -> None:
        """Fill in the keys of the model that are None, for the data that meta.json describes."""
        if self.vocab_size is None:
            self.vocab_size = meta["vocab_size"]
        if self.vocab_size < meta["vocab_size"]:
            raise ValueError(
                f"--vocab_size={self.vocab_size}: the tokenizer has {meta['vocab_size']} tokens; "
                "the model needs at least as many"
            )
        model_config = self.model_config()
        self.num_kv_heads = model_config.num_kv_heads
        self.d_ff = model_config.d_ff


KEYS = [field.name for field in dataclasses.fields(TrainConfig)]
MODEL_KEYS = [field.name for field in dataclasses.fields(lm.ModelConfig) if field.name in KEYS]
# A resumed run takes the keys of the machine from the command line alone. It keeps the fixed ones as they
# were. All others are those of the checkpoint, unless the command line has them.
MACHINE_KEYS = ["out_dir", "resume", "micro_batch_size", "recompute", "device", "dtype", "compile", "fsdp"]
FIXED_KEYS = [*MODEL_KEYS, "init_from", "batch_size", "seed"]


# ----------------------------------------------------------------------------------------------------- Logger
class Logger:
    """Reports a run: on the console, in out_dir/metrics.jsonl and, if asked, to Weights & Biases."""

    def __init__(self, config: TrainConfig, step: int, wandb_id: str | None = None):
        """Go on after update `step`. wandb_id: the run at Weights & Biases to go on with; None: a new one."""
        self.config = config
        self.evaluation_seconds = 0.0  # how long the last one took
        self.wandb = None
        self.wandb_id = wandb_id
        if config.wandb_project:
            self.open_wandb()
        self.path = Path(config.out_dir, "metrics.jsonl")
        self.lock = contextlib.ExitStack()
        self.lock.enter_context(prepare.locked(config.out_dir))  # two runs would mix their files
        # Open for the whole run, and written line by line, so that a killed run has written what it reported.
        self.file = open(self.path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self.cut_metrics(step)
        if step == 0:
            self.file.write(json.dumps({"step": 0, "config": dataclasses.asdict(config)}) + "\n")

    def open_wandb(self) -> None:
        """Begin a run at Weights & Biases, or go on with one. Raises ValueError if that fails."""
        import wandb

        config = dataclasses.asdict(self.config)
        project = self.config.wandb_project
        try:
            self.wandb = wandb.init(project=project, id=self.wandb_id, resume="allow", config=config)
        except Exception as error:  # of many types: no login, no network, a name that it does not take
            reason = " ".join(str(error).split())
            raise ValueError(f"--wandb_project={project}: {reason}") from None
        self.wandb_id = self.wandb.id

    def cut_metrics(self, step: int) -> None:
        """Cut off the lines of metrics.jsonl that a run which goes on after update `step` will write again.

        These are all later lines, and the evaluation at `step`, if one is due. A fresh run keeps nothing.
        """
        size = 0
        if step > 0:
            for line, values in read_metrics(self.path):
                if values["step"] > step:
                    break
                if values["step"] == step and "val_loss" in values and self.config.evaluation_is_due(step):
                    break
                size += len(line)
        self.file.truncate(size)

    def record(self, step: int, values: dict) -> None:
        """Keep what was measured after update `step`."""
        line = {"step": step}
        for key, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                value = None  # JSON has no NaN and no infinity
            line[key] = value
        self.file.write(json.dumps(line) + "\n")
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def say(self, text: str, passing: bool = False) -> None:
        """Print a line. On a terminal, the next line takes the place of a passing one."""
        end = "\n"
        if sys.stdout.isatty():
            # A wider line takes two rows, of which only one could be cleared.
            fits = len(text) < shutil.get_terminal_size().columns
            if passing and fits:
                end = ""
            text = f"\r\033[K{text}"  # go to the start of the row and clear it
        prepare.print_safely(text, end)

    def progress(self, step: int, values: dict) -> None:
        """Report the updates of one interval."""
        self.record(step, values)
        c = self.config
        max_steps = c.max_steps
        tokens_left = (max_steps - step) * c.batch_size * c.context_length
        seconds_left = tokens_left / values["tokens_per_second"]
        left = int(seconds_left + c.evaluations_left(step) * self.evaluation_seconds)
        text = f"step {step}/{max_steps}  train_loss {values['train_loss']:.3f}  lr {values['lr']:.2e}"
        text += f"  grad_norm {values['grad_norm']:.2f}  {values['tokens_per_second']:,.0f} tokens/s"
        if values.get("skipped"):  # in float16
            text += f"  skipped {values['skipped']}"
        self.say(f"{text}  {left // 60}:{left % 60:02} left", passing=True)

    def first_update(self, step: int, seconds: float) -> None:
        """Say how long the first update of this start took, if the first line of progress is far off."""
        interval = self.config.log_interval
        next_line = min(self.config.max_steps, (step // interval + 1) * interval)
        if seconds * (next_line - step) > 10:
            self.say(f"step {step} took {seconds:.1f} s; the next line comes after step {next_line}")

    def evaluation(self, step: int, val_loss: float, val_bpb: float, text: str, seconds: float) -> None:
        """Report an evaluation, which took so many seconds. text: what the model writes now."""
        self.evaluation_seconds = seconds
        self.record(step, {"val_loss": val_loss, "val_bpb": val_bpb})
        losses = f"val_loss {val_loss:.4f} nats  val_bpb {val_bpb:.4f} bits/byte"
        self.say(f"step {step}/{self.config.max_steps}  {losses}  {text!r}")

    def close(self) -> None:
        """End the report."""
        self.file.close()
        self.lock.close()
        if self.wandb is not None:
            self.wandb.finish()
        if importlib.util.find_spec("matplotlib"):
            self.draw()

    def draw(self) -> None:
        """Draw the losses in metrics.jsonl to loss.png."""
        from matplotlib.figure import Figure

        lines = [values for _, values in read_metrics(self.path)]
        figure = Figure(figsize=(8, 3.5), layout="constrained")
        axes = figure.subplots()
        for key, style in (("train_loss", "-"), ("val_loss", "o-")):
            # Leave out the evaluation before training: it lies so high that it would flatten the rest.
            measured = [line for line in lines if key in line and line["step"] > 0]
            steps = [line["step"] for line in measured]
            losses = [math.nan if line[key] is None else line[key] for line in measured]
            axes.plot(steps, losses, style, label=key, markersize=4)
        axes.set(xlabel="update", ylabel="loss, nats per token")
        axes.legend()
        axes.grid(alpha=0.3)
        try:
            figure.savefig(self.path.with_name("loss.png"), dpi=110)
        except OSError as error:
            self.say(f"warning: {prepare.format_error(error)}")


def read_metrics(path: Path) -> Iterator[tuple[bytes, dict]]:
    """Yield each line of metrics.jsonl, and what it says. Raises ValueError for one that says no step."""
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):  # the process was killed while it wrote this line
            break
        try:
            values = json.loads(line)
            values["step"] = int(values["step"])
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not a line of metrics ({error!r})") from None
        yield line, values


class NullLogger:
    """Stands in for Logger in every process but the first: its methods do nothing."""

    def say(self, text: str) -> None:
        pass

    def progress(self, step: int, values: dict) -> None:
        pass

    def first_update(self, step: int, seconds: float) -> None:
        pass

    def evaluation(self, step: int, val_loss: float, val_bpb: float, text: str, seconds: float) -> None:
        pass

    def close(self) -> None:
        pass


# ----------------------------------------------------------------------------------------------- TrainManager
class LossModule(nn.Module):
    """TransformerLM.loss as a module's forward: torch.compile and DDP act on forward alone."""

    def __init__(self, model: lm.TransformerLM):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.model.loss(tokens, targets)


def compile_works(device: torch.device) -> bool:
    """Whether torch.compile works here: it needs a compiler, which does not come with torch."""

    def add_one(x):
        return x + 1

    try:
        torch.compile(add_one)(torch.zeros(1, device=device))
        return True
    except Exception as error:  # each backend fails in its own way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f"warning: torch.compile does not work here ({reason}); running eagerly", file=sys.stderr)
        return False


class TrainManager:
    """One training run: the model, its optimizer and its data, from the first update to the last."""

    def __init__(self, config: TrainConfig, meta: dict, state: dict | None = None):
        """Begin a run on the data that `meta` describes, or go on with the one in the checkpoint `state`."""
        self.config = config
        self.meta = meta
        self.step = 0  # updates made so far
        self.saved_step = 0  # updates made when last.pt was saved
        self.best_val_loss = math.inf
        self.best_step = 0  # where that was
        self.wandb_id = None
        self.stop_signal = 0  # the number of a signal that asks to stop
        self.rank = 0  # number of this process
        self.world_size = 1  # how many train together
        if dist.is_initialized():
            self.rank = dist.get_rank()
            self.world_size = dist.get_world_size()
        self.tokenizer = prepare.load_tokenizer(meta["tokenizer"])
        self.checkpoints = lm.CheckpointHandler(config.out_dir)
        self.train_data = self.open_data("train")
        self.val_data = self.open_data("val")
        self.setup_device(state)
        self.build_model(state)
        self.build_optimizer()
        if state is not None:
            with prepare.contents_of(Path(config.out_dir)):
                self.load(state)
        if self.compile and not config.fsdp:  # after load, which makes a step of its own
            self.optimizer.step = torch.compile(self.optimizer.step)

    def open_data(self, split: str) -> lm.MemmapTokenDataset:
        """Open train.bin or val.bin. Raises ValueError if it is not what meta.json says."""
        path = Path(self.config.data_dir, f"{split}.bin")
        data = lm.MemmapTokenDataset(
            path, self.config.context_length, self.meta["dtype"], self.config.vocab_size
        )
        if len(data.tokens) != self.meta[f"{split}_tokens"]:
            raise ValueError(
                f"{path}: {len(data.tokens):,} tokens, but meta.json says {self.meta[f'{split}_tokens']:,} "
                f"of type {self.meta['dtype']}; prepare it again"
            )
        data.windows(np.arange(min(len(data), 4096)))  # a cheap look for tokens out of range
        return data

    def setup_device(self, state: dict | None) -> None:
        """Decide what the keys of the machine are here. The config keeps them as they were asked for."""
        dtype = self.config.dtype
        if dtype == "auto" and state is not None:
            dtype = state["dtype"]  # what the run had so far
        device = self.config.device
        if self.world_size > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # each process on its own GPU
        self.device, self.dtype = prepare.pick_device(device, dtype)
        self.dtype = broadcast(self.dtype)  # a CPU's is measured, and processes might measure differently
        self.dtype_name = str(self.dtype).removeprefix("torch.")
        self.compile = self.config.compile
        if self.compile == "auto":
            self.compile = self.device.type == "cuda" and compile_works(self.device)
        self.autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        self.micro_batch_size = self.config.micro_batch_size
        if self.micro_batch_size is None:
            self.micro_batch_size = self.config.batch_size // self.world_size
            if self.config.init_from and self.device.type == "cpu":
                # 512 tokens give its cores enough work; more of them would only take memory.
                self.micro_batch_size = max(1, 512 // self.config.context_length)

    def build_model(self, state: dict | None) -> None:
        """Make the model, and the module that computes its loss."""
        c = self.config
        if c.fsdp:  # the whole model may not fit here: make its shape alone; the weights come below
            with torch.device("meta"):
                self.model = lm.TransformerLM(self.model_config(state))
        else:
            self.model = self.make_full_model(state)
        self.model.recompute = c.recompute
        self.compute_loss = LossModule(self.model)
        if not c.fsdp:
            self.compute_loss.to(self.device)
            if self.compile:
                self.compute_loss.compile()
        if dist.is_initialized():
            self.compute_loss = parallelize(self.compute_loss, self.device, self.dtype, c.fsdp, self.compile)
        if c.fsdp:
            self.broadcast_weights(state)

    def model_config(self, state: dict | None) -> lm.ModelConfig:
        """The shape of the model that this run begins or goes on with."""
        c = self.config
        if state is not None:
            return lm.ModelConfig(**state["model_config"])
        if c.init_from:
            model_config = prepare.load_config(prepare.find_model(c.init_from))
            return dataclasses.replace(model_config, dropout=c.dropout)
        return c.model_config()

    def make_full_model(self, state: dict | None) -> lm.TransformerLM:
        """The model, with its weights, on the CPU."""
        c = self.config
        if state is not None:
            with prepare.contents_of(Path(c.out_dir)):
                weights = {name: weight.clone() for name, weight in state["model"].items()}  # out of the file
                return lm.model_from_state_dict(self.model_config(state), weights)
        if c.init_from:
            return prepare.load_model(prepare.find_model(c.init_from), dropout=c.dropout)
        torch.manual_seed(c.seed)
        return lm.TransformerLM(c.model_config())

    def broadcast_weights(self, state: dict | None) -> None:
        """Under FSDP: the first process makes the whole model, and sends each process its share."""
        self.model.to_empty(device=self.device)
        self.model.reset_parameters()  # fills RoPE's tables; the weights are replaced now
        weights = {}
        if self.rank == 0:
            weights = self.make_full_model(state).state_dict()
        options = dcp_state_dict.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        dcp_state_dict.set_model_state_dict(self.model, weights, options=options)

    def build_optimizer(self) -> None:
        """Make the optimizer, and the scaler that float16 needs."""
        c = self.config
        self.params = list(self.model.parameters())
        decay = [param for param in self.params if param.ndim > 1]
        no_decay = [param for param in self.params if param.ndim == 1]  # should be near 1: no decay towards 0
        groups = [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
        lr = torch.tensor(c.max_lr, device=self.device)  # a tensor: one compiled step serves every value
        self.optimizer = lm.AdamW(groups, lr, (c.beta1, c.beta2), weight_decay=c.weight_decay)
        # float16 has no numbers below 6e-8, and gradients are small: the loss is scaled up for the backward
        # pass. The other dtypes need no scaling.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        # Updates whose gradient was not finite. It stays on the device, so that no update waits for it.
        self.skipped = torch.zeros((), device=self.device)

    # ----------------------------------------------------------------------------------------------- Training

    def train(self, logger: Logger | NullLogger) -> int:
        """Train to max_steps, or until a signal asks to stop. Return the number of that signal, or 0."""
        c = self.config
        loss_sum = torch.zeros((), device=self.device)  # over the updates since the last line
        num_losses = 0
        first_step = self.step + 1
        self.restart_clock()
        while True:
            # Evaluate, the first time before the first update. An evaluation takes long: save before it.
            if c.evaluation_is_due(self.step):
                self.save_last()
                self.validate(logger)
                self.restart_clock()
            if self.step >= c.max_steps:
                return 0

            # Make one update. Its loss stays on the device: to read it here would make each update wait.
            batch_loss, grad_norm = self.update()
            loss_sum += batch_loss
            num_losses += 1
            if self.step == first_step:
                loss_sum.item()  # wait for the device
                logger.first_update(self.step, time.perf_counter() - self.clock_time)

            # Log the mean loss since the last line: that of a single batch is too noisy to show a trend.
            if self.step % c.log_interval == 0 or self.step == c.max_steps:
                self.raise_if_diverged()
                values = {
                    "train_loss": all_reduce(loss_sum.item() / num_losses) / self.world_size,
                    "lr": self.lr(),
                    "grad_norm": grad_norm.item(),
                    "tokens_per_second": self.tokens_per_second(),
                }
                if self.scaler.is_enabled():
                    values["skipped"] = int(self.skipped)
                logger.progress(self.step, values)
                loss_sum.zero_()
                num_losses = 0
                self.restart_clock()

            # Save. All processes must stop after the same update, so the signal of one is that of all.
            stop_signal = int(all_reduce(self.stop_signal, dist.ReduceOp.MAX))
            if self.step % c.checkpoint_interval == 0 or stop_signal:
                self.save_last()
                self.restart_clock()
            if stop_signal:
                return stop_signal

    def restart_clock(self) -> None:
        """Count time and updates from here. Called after evaluations and checkpoints: updates alone count."""
        self.clock_time = time.perf_counter()
        self.clock_step = self.step

    def tokens_per_second(self) -> float:
        """The speed since the clock was restarted. All work of the device must be done."""
        updates = self.step - self.clock_step
        tokens = updates * self.config.batch_size * self.config.context_length
        return tokens / (time.perf_counter() - self.clock_time)

    def lr(self) -> float:
        """The learning rate of update number self.step."""
        c = self.config
        return lm.lr_cosine_schedule(self.step, c.max_lr, c.min_lr, c.warmup_steps, c.max_steps)

    def to_device(self, tokens: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return tokens.to(self.device)
        # From pinned memory the copy runs while the GPU still computes the update before.
        return tokens.pin_memory().to(self.device, non_blocking=True)

    def update(self) -> tuple[Tensor, Tensor]:
        """Make one update. Return the loss of its batch and the norm of its gradient, 0-d tensors."""
        c = self.config
        x, y = self.train_data.batch(self.step, c.batch_size, c.seed, self.rank, self.world_size)
        x = self.to_device(x)
        y = self.to_device(y)
        self.step += 1
        for group in self.optimizer.param_groups:
            group["lr"].fill_(self.lr())

        # The gradients of the micro-batches add up to that of the batch.
        batch_loss = torch.zeros((), device=self.device)
        for start in range(0, len(x), self.micro_batch_size):
            end = min(start + self.micro_batch_size, len(x))
            self.seed_dropout(start)
            if self.world_size > 1:  # DDP averages over the processes once, in the last backward pass
                self.compute_loss.require_backward_grad_sync = end == len(x)
            with self.autocast:
                micro_loss = self.compute_loss(x[start:end], y[start:end])
            micro_loss = micro_loss * ((end - start) / len(x))  # so that the sum is the mean of all windows
            self.scaler.scale(micro_loss).backward()
            batch_loss += micro_loss.detach()

        # Clip the gradient, then step. With float16 the scaler skips a step whose gradient is not finite.
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(self.params, c.grad_clip)
        if c.fsdp:
            grad_norm = grad_norm.full_tensor()  # this process held a share of it
        self.skipped += ~grad_norm.isfinite()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return batch_loss, grad_norm

    def seed_dropout(self, start: int) -> None:
        """Seed what is random in one micro-batch, so that a resumed run drops what the whole run would."""
        if self.config.dropout > 0:
            key = np.random.SeedSequence((self.config.seed, self.step, start, self.rank))
            torch.manual_seed(key.generate_state(1, np.uint64).item())

    def raise_if_diverged(self) -> None:
        """Raise ValueError if a gradient was not finite. This waits for the device."""
        diverged = self.skipped.item() > 0
        if self.scaler.is_enabled():  # it skips such updates and lowers the scale; this low it cannot help
            diverged = self.scaler.get_scale() < 2**-20
        if diverged:
            raise ValueError(
                f"loss or gradient not finite at update {self.step} or shortly before; {self.config.out_dir} "
                f"keeps what was saved before; try --max_lr below {self.config.max_lr}, --warmup_steps above "
                f"{self.config.warmup_steps}, or --dtype=float32"
            )

    # --------------------------------------------------------------------------------------------- Evaluation

    def validate(self, logger: Logger | NullLogger) -> None:
        """Evaluate, report, and keep the model as best.pt if it is the best so far, and trained at all."""
        start_time = time.perf_counter()
        val_loss, val_bpb = self.evaluate()
        if self.step > 0 and val_loss < self.best_val_loss:
            self.best_val_loss = val_loss
            self.best_step = self.step
            self.save("best.pt", with_optimizer=False)
        text = self.sample(60)
        logger.evaluation(self.step, val_loss, val_bpb, text, time.perf_counter() - start_time)

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """The validation loss in nats per token and in bits per byte, over the same windows each time."""
        c = self.config
        count = len(self.val_data)
        if c.eval_tokens > 0:
            count = min(count, max(1, c.eval_tokens // c.context_length))
        indices = np.arange(count) * len(self.val_data) // count  # spread over the file
        # The processes take rows in turn. Without gradients, more rows fit in memory than in training.
        rows = 4 * self.micro_batch_size
        total = 0.0
        progress = prepare.Progress("evaluating", count, "windows")
        self.model.eval()
        for start in range(0, count, rows * self.world_size):
            mine = indices[start + self.rank * rows :][:rows]
            # FSDP needs every process to take part: one that has no rows left computes any, and adds 0.
            x, y = self.val_data.windows(mine if len(mine) > 0 else indices[:1])
            with self.autocast:
                mean_loss = self.model.loss(self.to_device(x), self.to_device(y)).item()
            total += mean_loss * len(mine)
            if self.rank == 0:
                progress.add(min(rows * self.world_size, count - start))
        self.model.train()
        val_loss = all_reduce(total) / count
        tokens_per_byte = self.meta["val_tokens"] / self.meta["val_bytes"]
        return val_loss, val_loss / math.log(2) * tokens_per_byte

    def sample(self, max_new_tokens: int) -> str:
        """Text that the model writes now, drawn from the same seed each time."""
        start = [*self.tokenizer.start_ids, *self.tokenizer.encode(b"\n").tolist()]
        prompt = torch.tensor([start], device=self.device)
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        self.model.eval()
        tokens = self.model.generate(prompt, max_new_tokens, temperature=0.8, top_p=0.95, generator=generator)
        self.model.train()
        return "".join(self.tokenizer.decode(tokens[0, len(start) :].tolist()))

    # -------------------------------------------------------------------------------------------- Checkpoints

    def save(self, name: str, with_optimizer: bool = True) -> None:
        """Save the run to out_dir/name. Under FSDP the first process gathers the shares of all and writes."""
        # The file is the same for one process, DDP and FSDP: whole tensors, by name.
        options = dcp_state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = {
            "model": dcp_state_dict.get_model_state_dict(self.model, options=options),
            "model_config": dataclasses.asdict(self.model.config),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "config": dataclasses.asdict(self.config),
            "dtype": self.dtype_name,
            "best_val_loss": self.best_val_loss,
            "best_step": self.best_step,
            "tokenizer": self.meta["tokenizer"],
            "data": self.meta["sha256"],
            "train_tokens": self.meta["train_tokens"],
            "wandb_id": self.wandb_id,
        }
        if with_optimizer:
            state["optimizer"] = dcp_state_dict.get_optimizer_state_dict(
                self.model, self.optimizer, options=options
            )
        if self.rank == 0:
            self.checkpoints.save(name, state)

    def save_last(self) -> None:
        """Save last.pt, unless it holds this update already. The one before stays as prev.pt, in reserve."""
        if self.step == self.saved_step:
            return
        self.raise_if_diverged()
        self.save("next.pt")  # complete before it takes the place of last.pt
        if self.rank == 0:
            last = Path(self.config.out_dir, "last.pt")
            if last.exists():
                os.replace(last, last.with_name("prev.pt"))
            os.replace(last.with_name("next.pt"), last)
        self.saved_step = self.step

    def load(self, state: dict) -> None:
        """Go on from a checkpoint, whose weights the model has already.

        Each process takes what it holds of the optimizer's state: all of it, or its share under FSDP.
        """
        options = dcp_state_dict.StateDictOptions(full_state_dict=True)
        # The groups of the checkpoint hold the lr, betas and weight decay of its time; keep those of now.
        groups = self.optimizer.param_groups
        if len(state["optimizer"]["state"]) != len(self.params):  # torch would begin with zeros
            raise ValueError("the state of the optimizer does not fit the model")
        dcp_state_dict.set_optimizer_state_dict(
            self.model, self.optimizer, state["optimizer"], options=options
        )
        self.optimizer.param_groups = groups
        # Copy step, exp_avg and exp_avg_sq to the device of their parameter: they lie in the mapped file.
        for param in self.params:
            param_state = self.optimizer.state[param]
            if param_state["exp_avg"].shape != param.shape:
                raise ValueError("the state of the optimizer does not fit the model")
            for key, tensor in param_state.items():
                param_state[key] = tensor.to(param.device, copy=True)
        if state["scaler"]:  # empty if the run was not in float16
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.saved_step = state["step"]
        self.best_val_loss, self.best_step = run_on_rank_0(self.find_best, state)
        self.wandb_id = state["wandb_id"]

    def find_best(self, state: dict) -> tuple[float, int]:
        """The best loss of this run on the data of now, and the update after which it was.

        last.pt does not know of the evaluation that came after it; best.pt does.
        """
        best = (math.inf, 0)
        candidates = [state]
        with contextlib.suppress(OSError, ValueError):  # best.pt is missing or damaged
            candidates.append(self.checkpoints.load("best.pt"))
        for candidate in candidates:
            if is_same_data(candidate, self.meta) and candidate["best_val_loss"] < best[0]:
                best = (candidate["best_val_loss"], candidate["best_step"])
        return best


# --------------------------------------------------------------------------------------------- Many processes
# torchrun starts this file once for each device. With one process nothing here does anything: skip it.
TIMEOUT = timedelta(minutes=10)  # a process that is silent for so long counts as dead


def init_distributed() -> None:
    """Join the processes that torchrun started beside this one, if it did."""
    if not dist.is_torchelastic_launched():
        return
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's store outlives the processes. Those that it starts in place of dead ones get a part of
        # their own in it, or they would find the addresses of the dead.
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)


def broadcast(value):
    """Return the first process's value in all of them."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def run_on_rank_0(work, *args) -> tuple:
    """Call work(*args) in the first process alone, and return its result in all of them.

    If it fails, the first process raises the error and the others end.
    """
    result = None
    try:
        if not dist.is_initialized() or dist.get_rank() == 0:
            result = work(*args)
    finally:
        result = broadcast(result)
    if result is None:
        sys.exit(2)
    return result


def all_reduce(value: float, operation=dist.ReduceOp.SUM) -> float:
    """The sum of the values of all processes, or what else `operation` makes of them."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.float64)  # on the CPU, so that no GPU is waited for
    dist.all_reduce(tensor, operation)
    return tensor.item()


def parallelize(
    loss_module: LossModule, device: torch.device, dtype: torch.dtype, fsdp: bool, compile_blocks: bool
) -> nn.Module:
    """Wrap the module in DDP or FSDP.

    With DDP each process holds the whole model, and gradients are averaged in the backward pass. With FSDP
    each holds a share of the weights, gradients and optimizer state. A block's weights are gathered while it
    computes. Gradients are averaged after each micro-batch, because a process could not hold them all.
    """
    if not fsdp:
        return nn.parallel.DistributedDataParallel(
            loss_module, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
    if dtype == torch.float16:
        raise ValueError("--fsdp=True: needs --dtype=bfloat16 or float32; float16 needs a scaler of its own")
    model = loss_module.model
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.layers:
        if compile_blocks:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    # FSDP gathers weights when forward is called; here these two are called instead.
    register_fsdp_forward_method(model, "loss")
    register_fsdp_forward_method(model, "generate")
    return loss_module


# ------------------------------------------------------------------------------------------------------- main
def find_run(overrides: dict) -> tuple[TrainConfig, str | None]:
    """The config of the run, and the name of the checkpoint in out_dir to go on from, or None.

    overrides: the keys of the command line. Raises ValueError for what cannot be trained.
    """
    out_dir = overrides.get("out_dir", TrainConfig.out_dir)
    resume = overrides.get("resume", TrainConfig.resume)
    begun = Path(out_dir, "last.pt").exists() or Path(out_dir, "prev.pt").exists()
    if not begun and Path(out_dir, "best.pt").exists():
        raise ValueError(
            f"{out_dir} holds the best.pt of a run, but no last.pt to go on from; name another --out_dir, "
            f"and to begin with that model, add --init_from={shlex.quote(out_dir)}"
        )
    if resume is True and not begun:
        raise ValueError(f"{out_dir} holds no last.pt to go on from; leave out --resume to begin a run")
    if resume and begun:
        config, checkpoint = resumed_run(overrides, out_dir)
    elif begun:
        go_on = shlex.join(["python", "train.py", f"--out_dir={out_dir}", "--resume=True"])
        words = ["python", "train.py"]
        for key, value in {**overrides, "out_dir": f"{out_dir}-2"}.items():
            words.append(f"--{key}={value}")
        keep = shlex.join(words)
        raise ValueError(f"{out_dir} holds a run already; go on with it:  {go_on}  or keep it:  {keep}")
    else:
        config = new_config(overrides)
        prepare_data(config, overrides)
        checkpoint = None
    config.resolve_shape(prepare.load_meta(config.data_dir))
    if config.fsdp and not dist.is_initialized():
        raise ValueError("--fsdp=True: needs torchrun:  torchrun --standalone --nproc_per_node=8 train.py")
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if config.batch_size % world_size != 0:
        enough = math.ceil(config.batch_size / world_size) * world_size
        raise ValueError(
            f"--batch_size={config.batch_size}: does not divide among {world_size} processes; {enough} would"
        )
    return config, checkpoint


def new_config(overrides: dict) -> TrainConfig:
    """The config of a fresh run. If it fine-tunes a model, it has that model's shape."""
    init_from = overrides.get("init_from")
    if init_from is None:
        return TrainConfig(**overrides)
    shape = dataclasses.asdict(prepare.load_config(prepare.find_model(init_from)))
    values = dict(overrides)
    values.setdefault("context_length", min(shape["context_length"], 512))
    for key in MODEL_KEYS:
        if key == "dropout":  # of the training, not of the model
            continue
        value = values.setdefault(key, shape[key])
        is_shorter = key == "context_length" and value < shape[key]
        if value != shape[key] and not is_shorter:
            raise ValueError(f"--{key}={value}: the model in {init_from} has {shape[key]}")
    return TrainConfig(**values)


def prepare_data(config: TrainConfig, overrides: dict) -> None:
    """Prepare the default corpus if a fresh run names no data, and check that the tokens are the model's."""
    data_dir = config.data_dir
    init_from = config.init_from
    if "data_dir" not in overrides and not Path(data_dir, "meta.json").exists():
        print(f"no data in {data_dir}/ yet: preparing the source of Python's standard library")
        prepare.main([f"--out_dir={data_dir}", f"--tokenizer={init_from or 'bytes'}"])
    if init_from is None:
        return
    spec = prepare.find_tokenizer(init_from).spec
    if not prepare.same_tokens(spec, prepare.load_meta(data_dir)["tokenizer"]):
        command = ["python", "prepare.py", "TEXT", f"--tokenizer={init_from}", f"--out_dir={data_dir}"]
        again = shlex.join(command)
        raise ValueError(
            f"--data_dir={data_dir}: not in the tokens of {init_from}; prepare it again:  {again}"
        )


def resumed_run(overrides: dict, out_dir: str) -> tuple[TrainConfig, str]:
    """The config of the run in out_dir, with the overrides that it may take, and its checkpoint's name."""
    checkpoint, state = find_checkpoint(out_dir)
    saved = {}
    with prepare.contents_of(Path(out_dir, checkpoint)):
        for key, value in state["config"].items():
            if key not in MACHINE_KEYS:
                saved[key] = value
        config = TrainConfig(**saved)
        lm.ModelConfig(**state["model_config"])  # raises an error if this cannot be
    for key in FIXED_KEYS:
        before = getattr(config, key)
        if overrides.get(key, before) != before:
            raise ValueError(f"--{key}={overrides[key]}: the run in {out_dir} has {before} and keeps it")
    before = config
    config = dataclasses.replace(config, **overrides)

    meta = prepare.load_meta(config.data_dir)
    if state["tokenizer"] != meta["tokenizer"]:
        raise ValueError(f"--data_dir={config.data_dir}: not the tokenizer that the run in {out_dir} has")
    if not is_same_data(state, meta):
        changed = f"{config.data_dir} does not hold the data that the run in {out_dir} has seen so far"
        if "data_dir" not in overrides:
            raise ValueError(f"{changed}; to go on all the same, add --data_dir={config.data_dir}")
        print(f"warning: {changed}; best.pt will be replaced by the best on this data")
    warn_if_lr_rises(before, config, state["step"])
    return config, checkpoint


def is_same_data(state: dict, meta: dict) -> bool:
    """Whether a checkpoint was trained on the data that `meta` describes: the same text, split as before."""
    train_tokens = state.get("train_tokens", meta["train_tokens"])  # earlier versions did not save it
    return state["data"] == meta["sha256"] and train_tokens == meta["train_tokens"]


def warn_if_lr_rises(before: TrainConfig, config: TrainConfig, step: int) -> None:
    """Warn if a longer schedule, or a higher one, raises the learning rate of a run at update `step`."""
    rates = []
    for c in (before, config):
        rates.append(lm.lr_cosine_schedule(step + 1, c.max_lr, c.min_lr, c.warmup_steps, c.max_steps))
    if rates[1] > rates[0]:
        print(f"warning: with the keys given, lr rises from {rates[0]:.2e} to {rates[1]:.2e}")


def is_finished(config: TrainConfig, step: int) -> bool:
    """Whether the run in out_dir, which has made `step` updates, has made its last evaluation too."""
    path = Path(config.out_dir, "metrics.jsonl")
    if step < config.max_steps or not path.exists():
        return False
    last = {}
    for _, values in read_metrics(path):
        last = values
    return last.get("step") == step and "val_loss" in last


CHECKPOINT = {
    "model": dict,
    "model_config": dict,
    "optimizer": dict,
    "scaler": dict,
    "step": int,
    "config": dict,
    "dtype": str,
    "best_val_loss": float,
    "best_step": int,
    "tokenizer": dict,
    "data": str,
}


def find_checkpoint(out_dir: str) -> tuple[str, dict]:
    """The name and the content of out_dir/last.pt or, if that is damaged or missing, of prev.pt."""
    checkpoints = lm.CheckpointHandler(out_dir)
    last = Path(out_dir, "last.pt")
    prev = Path(out_dir, "prev.pt")
    try:
        name = "last.pt"
        state = checkpoints.load(name)
    except (ValueError, FileNotFoundError) as error:
        if not prev.exists():
            raise
        name = "prev.pt"
        state = checkpoints.load(name)
        print(f"{prepare.format_error(error)}; going on from the checkpoint before it, {prev}")
        if last.exists():  # the next save would put it in the place of prev.pt
            os.replace(last, Path(out_dir, "damaged.pt"))

    path = Path(out_dir, name)
    if not {"model", "model_config", "step", "config"} <= state.keys():
        raise ValueError(f"{path}: not a checkpoint of train.py, or one of an earlier version; train anew")
    if "optimizer" not in state:
        raise ValueError(f"{path}: has no optimizer, as a best.pt; only a last.pt can be resumed")
    for key, kind in CHECKPOINT.items():
        if not isinstance(state.get(key), kind):
            raise ValueError(
                f"{path}: damaged: {key} is a {type(state.get(key)).__name__}, no {kind.__name__}"
            )
    if state["dtype"] not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"{path}: damaged: dtype is {state['dtype']}")
    if state["step"] < 1:
        raise ValueError(f"{path}: damaged: step is {state['step']}")
    unknown = sorted(state["config"].keys() - set(KEYS))
    if unknown:
        raise ValueError(f"{path}: of a later version of train.py, with the key {unknown[0]}")
    return name, state


def make_manager(config: TrainConfig, checkpoint: str | None) -> TrainManager:
    """The manager of the run that find_run has found."""
    meta = prepare.load_meta(config.data_dir)
    if checkpoint is not None:  # find_run has verified it; mapped, it takes no memory until it is read
        path = Path(config.out_dir, checkpoint)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return TrainManager(config, meta, state)
    return TrainManager(config, meta)


def flops_per_token(model: lm.TransformerLM, context_length: int) -> int:
    """Arithmetic of training: 6 for each weight, 12·L·D·T for attention (PaLM, 2022, appendix B)."""
    weights = sum(param.numel() for param in model.parameters())
    if not model.config.tie_embeddings:  # an embedding is looked up, not multiplied
        weights -= model.embed_tokens.weight.numel()
    return 6 * weights + 12 * model.config.num_layers * model.config.d_model * context_length


def describe(manager: TrainManager) -> str:
    """What is about to run, in a few lines."""
    c = manager.config
    meta = manager.meta
    shape = manager.model.config
    num_params = sum(param.numel() for param in manager.params)
    tokens = c.max_steps * c.batch_size * c.context_length
    flops = tokens * flops_per_token(manager.model, c.context_length)
    origin = f", from {c.init_from}" if c.init_from else ""
    going_on = f", going on after update {manager.step:,}" if manager.step > 0 else ""
    machine = f"{manager.device}, {manager.dtype_name}, {'compiled' if manager.compile else 'eager'}"
    if manager.world_size > 1:
        machine += f", {manager.world_size} processes, {'FSDP' if c.fsdp else 'DDP'}"
    return (
        f"model    {num_params:,} parameters: {shape.num_layers} layers, d_model {shape.d_model}, "
        f"{shape.num_heads} heads{origin}\n"
        f"data     {meta['train_tokens']:,} tokens of {meta['source']}\n"
        f"run      {c.max_steps:,} updates of {c.batch_size} x {c.context_length} tokens: {tokens:,} tokens, "
        f"{tokens / meta['train_tokens']:.2f} epochs, {flops:.2e} FLOP{going_on}\n"
        f"machine  {machine}\n"
        f"A loss of {math.log(c.vocab_size):.2f} nats, ln({c.vocab_size}), is a blind guess."
    )


def stop_on_signals(manager: TrainManager) -> None:
    """Let the signals that ask to stop (Ctrl-C, kill, a closed terminal) end the run after its update."""

    def stop(number: int, frame) -> None:
        manager.stop_signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one stops at once

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    # Windows has no SIGHUP, and under nohup it is ignored and shall stay so.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, stop)


def resume_command(manager: TrainManager, overrides: dict) -> str:
    """The command that goes on with this run."""
    words = ["python", "train.py"]
    if manager.world_size > 1:
        words = ["torchrun", "...", "train.py"]
    words += ["--resume=True", f"--out_dir={manager.config.out_dir}"]
    # The checkpoint does not hold the keys of the machine: give them again.
    for key, value in overrides.items():
        if key in MACHINE_KEYS and key not in ("resume", "out_dir"):
            words.append(f"--{key}={value}")
    return shlex.join(words)


def run_training(manager: TrainManager, overrides: dict) -> int:
    """Train to the end, or until a signal asks to stop. Return the number of that signal, or 0."""
    config = manager.config
    command = resume_command(manager, overrides)
    train_on = f"{command} --max_steps={2 * max(manager.step, config.max_steps)}"
    first_process = manager.rank == 0
    if run_on_rank_0(is_finished, config, manager.step):
        if first_process:
            print(f"{config.out_dir} holds a finished run of {manager.step:,} updates; train on:  {train_on}")
        return 0

    logger = NullLogger()
    if first_process:
        logger = Logger(config, manager.step, manager.wandb_id)
        manager.wandb_id = logger.wandb_id
    logger.say(describe(manager))
    stop_on_signals(manager)
    steps_before = manager.step
    start_time = time.perf_counter()
    try:
        stop_signal = manager.train(logger)
    finally:
        logger.close()
    seconds = int(time.perf_counter() - start_time)
    if manager.device.type == "cuda":
        logger.say(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    sample = shlex.join(["python", "sample.py", f"--checkpoint={config.out_dir}"])
    if stop_signal:
        logger.say(f"stopped after update {manager.step}; go on with:  {command}\nsample it with:  {sample}")
        return stop_signal
    text = manager.sample(400)  # all processes take part, under FSDP
    here = f", {manager.step - steps_before:,} of them since it went on" if steps_before > 0 else ""
    logger.say(
        f"\n{text}\n\n{manager.step:,} updates{here} in {seconds // 60}:{seconds % 60:02}; "
        f"best val_loss {manager.best_val_loss:.4f} nats, after update {manager.best_step:,}\n"
        f"sample more:  {sample}\ntrain on:     {train_on}"
    )
    return 0


def main(argv: list[str]) -> None:
    overrides = prepare.parse_args(TrainConfig, argv, __doc__)
    init_distributed()
    config, checkpoint = run_on_rank_0(find_run, overrides)
    try:
        stop_signal = run_training(make_manager(config, checkpoint), overrides)
    except (RuntimeError, MemoryError) as error:
        if not prepare.is_out_of_memory(error):
            raise
        keys = "--micro_batch_size, --batch_size, --context_length, --d_model, --num_layers or --vocab_size"
        raise ValueError(f"out of memory; lower {keys}, or try --recompute=True") from None
    if dist.is_initialized():
        dist.barrier()  # a process that leaves early would look dead to the others
        dist.destroy_process_group()
    if stop_signal:
        sys.exit(128 + stop_signal)  # as a shell reports it


if __name__ == "__main__":
    prepare.run_cli(main)
