"""Train a language model on prepared tokens.

python train.py                                # a small model on Python's standard library, in minutes
python train.py --data_dir=data-notes --out_dir=out-notes --max_steps=5000
python train.py --out_dir=out-notes --resume=True               # continue from out-notes/last.pt
python train.py --init_from=llama.pt --data_dir=data-notes --out_dir=out-tuned --max_lr=1e-4    # fine-tune
torchrun --standalone --nproc_per_node=8 train.py --batch_size=64           # on eight GPUs
"""

import dataclasses
import json
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lm
import prepare


@dataclasses.dataclass
class TrainConfig:
    """The options of `python train.py --option=value`; the comments are its --help."""

    data_dir: str = "data"  # folder with train.bin, val.bin and meta.json, made by prepare.py
    out_dir: str = "out"  # folder for last.pt, best.pt and metrics.jsonl
    resume: bool = False  # continue out_dir/last.pt, if it exists
    init_from: str | None = None  # a checkpoint file whose model is fine-tuned, in the shape that it has
    # The model, as in lm.ModelConfig
    context_length: int = 128  # tokens of a training window
    d_model: int = 128  # hidden size
    num_layers: int = 4  # transformer blocks
    num_heads: int = 4  # heads of queries
    num_kv_heads: int | None = None  # heads of keys and values; None: num_heads
    d_ff: int | None = None  # width inside the feed-forward; None: 8/3 of d_model
    rope_theta: float = 10000.0  # base of RoPE's angles
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    tie_embeddings: bool = False  # one matrix as embedding and as output
    dropout: float = 0.0  # dropout probability
    # The optimization
    max_steps: int = 2500  # steps of the optimizer
    batch_size: int = 8  # sequences in a step, whatever the hardware
    micro_batch_size: int | None = None  # sequences computed at once, by each process; None: its whole share
    max_lr: float = 3e-3  # learning rate after the warm-up
    min_lr: float = 0.0  # learning rate at the end of the cosine decay
    warmup_steps: int = 100  # steps until max_lr
    weight_decay: float = 0.1  # of matrices and embeddings
    beta1: float = 0.9  # AdamW's decay rate of the first moment
    beta2: float = 0.95  # AdamW's decay rate of the second moment
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    seed: int = 0  # of the initial weights, the order of the data and dropout
    # What is reported and saved
    log_interval: int = 50  # steps between two lines of progress
    eval_interval: int = 500  # steps between two evaluations, each of which saves the run
    eval_tokens: int = 131072  # tokens of an evaluation, spread over val.bin; 0: all
    wandb_project: str | None = None  # also log to this project of Weights & Biases
    # The machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the matrix products
    compile: bool = False  # compile the model with torch.compile


# The options that describe the model of a checkpoint, and cannot be changed when it is trained further.
SHAPE = ["d_model", "num_layers", "num_heads", "num_kv_heads", "d_ff"]
SHAPE += ["rope_theta", "norm_eps", "tie_embeddings"]


class Logger:
    """Reports a run: on the console, in out_dir/metrics.jsonl and, if asked, to Weights & Biases."""

    def __init__(self, config: TrainConfig, is_main_process: bool):
        self.is_main_process = is_main_process  # all other processes report nothing
        self.wandb = None
        if is_main_process:
            Path(config.out_dir).mkdir(parents=True, exist_ok=True)
            self.file = open(Path(config.out_dir, "metrics.jsonl"), "a", buffering=1)  # 1: line by line
            if config.wandb_project:
                import wandb

                self.wandb = wandb.init(project=config.wandb_project, config=dataclasses.asdict(config))

    def log(self, step: int, values: dict, text: str) -> None:
        """Keep what was measured after so many steps, and print the text."""
        if self.is_main_process:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            if self.wandb is not None:
                self.wandb.log(values, step=step)
            self.say(f"step {step}  {text}")

    def say(self, text: str) -> None:
        if self.is_main_process:
            print(text, flush=True)


class TrainManager:
    """One training run: model, optimizer and data, from the first step to the last."""

    def __init__(self, config: TrainConfig, meta: dict, checkpoint: dict | None = None):
        """meta: what meta.json says. checkpoint: its model is trained further; None: a new model."""
        c = config
        self.config = config
        self.meta = meta
        self.step = 0  # steps made so far
        self.best_val_loss = math.inf
        self.stop_requested = False
        self.rank = int(os.environ.get("RANK", 0))  # the number of this process, from torchrun
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))  # how many train together
        if c.batch_size % self.world_size != 0:
            raise ValueError(f"batch_size is {c.batch_size}, not a multiple of {self.world_size} processes")
        self.micro_batch_size = c.micro_batch_size or c.batch_size // self.world_size
        if self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size is {self.micro_batch_size}; it must be at least 1")

        self.tokenizer = prepare.load_tokenizer(meta["tokenizer"], meta["eos_id"])
        data_dir = Path(c.data_dir)
        self.train_data = lm.MemmapTokenDataset(data_dir / "train.bin", c.context_length, meta["dtype"])
        self.val_data = lm.MemmapTokenDataset(data_dir / "val.bin", c.context_length, meta["dtype"])
        self.steps_per_epoch = self.train_data.steps_per_epoch(c.batch_size)

        self.device, self.dtype = prepare.pick_device(c.device, c.dtype)
        self.autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        self.model = self.make_model(checkpoint)
        self.ddp_model = self.model
        if self.world_size > 1:  # DDP averages the gradients of the processes in the backward pass
            self.ddp_model = nn.parallel.DistributedDataParallel(self.model)
            # RoPE's tables do not change. (As an argument this has other names in other versions of torch.)
            self.ddp_model.broadcast_buffers = False

        decay = [param for param in self.model.parameters() if param.ndim > 1]
        no_decay = [param for param in self.model.parameters() if param.ndim == 1]  # RMSNorm's gains
        groups = [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
        self.optimizer = lm.AdamW(groups, c.max_lr, (c.beta1, c.beta2), weight_decay=c.weight_decay)
        # float16 has no numbers below 6e-8, and gradients are small: the scaler multiplies the loss before
        # the backward pass and divides the gradient after it. For the other dtypes it does nothing.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def make_model(self, checkpoint: dict | None) -> lm.TransformerLM:
        c = self.config
        torch.manual_seed(c.seed)
        if checkpoint is None:
            shape = {name: getattr(c, name) for name in ["context_length", *SHAPE]}
            model = lm.TransformerLM(lm.ModelConfig(self.tokenizer.vocab_size, **shape, dropout=c.dropout))
        else:
            fields = checkpoint["model_config"] | {"dropout": c.dropout}
            model = lm.TransformerLM(lm.ModelConfig(**fields))
            model.load_state_dict(checkpoint["model"])
        if c.compile:
            model.compile()
        return model.to(self.device)

    def train(self, logger: Logger) -> None:
        """Train to max_steps, or until a signal asks to stop."""
        c = self.config
        losses = []  # of the steps since the last line of the log, of progress or of an evaluation
        start_time = time.perf_counter()
        for step in range(self.step, c.max_steps):
            if step % c.eval_interval == 0:
                self.evaluate_and_save(logger)
                losses = []
                start_time = time.perf_counter()

            loss, grad_norm = self.update(step)
            losses.append(loss)  # it stays on the device: to read it would make every step wait
            self.step = step + 1

            # A signal may have reached one process only, but all must stop after the same step.
            if self.sum_over_processes(float(self.stop_requested)) > 0 and self.step < c.max_steps:
                self.check_finite(loss, grad_norm)
                self.save("last.pt")
                return

            if self.step % c.log_interval == 0 or self.step == c.max_steps:
                self.check_finite(loss, grad_norm)
                seconds = (time.perf_counter() - start_time) / len(losses)  # of a step
                self.report_progress(logger, torch.stack(losses).mean().item(), grad_norm.item(), seconds)
                losses = []
                start_time = time.perf_counter()
        self.evaluate_and_save(logger)

    def update(self, step: int) -> tuple[Tensor, Tensor]:
        """Make one step of the optimizer → the loss of its batch, the norm of its gradient, 0-d tensors."""
        c = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = lm.lr_cosine_schedule(step, c.max_lr, c.min_lr, c.warmup_steps, c.max_steps)
        dropout_seed = np.random.SeedSequence((c.seed, step, self.rank)).generate_state(1)
        torch.manual_seed(dropout_seed.item())  # so that a resumed run drops what an uninterrupted one drops
        tokens, targets = self.train_data.batch(step, c.batch_size, c.seed)
        tokens = tokens[self.rank :: self.world_size].to(self.device)  # the share of this process
        targets = targets[self.rank :: self.world_size].to(self.device)

        # Gradient accumulation: the gradients of the micro-batches add up to that of the batch.
        loss = torch.zeros((), device=self.device)
        for start in range(0, len(tokens), self.micro_batch_size):
            end = min(start + self.micro_batch_size, len(tokens))
            if self.world_size > 1:  # average over the processes once, in the last backward pass
                self.ddp_model.require_backward_grad_sync = end == len(tokens)
            with self.autocast:
                micro_loss = self.ddp_model(tokens[start:end], targets[start:end])
            micro_loss = micro_loss * ((end - start) / len(tokens))  # so that the sum is the mean of all rows
            self.scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()

        self.scaler.unscale_(self.optimizer)
        max_norm = c.grad_clip if c.grad_clip > 0 else math.inf
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        self.scaler.step(self.optimizer)  # in float16 it skips a step whose gradient is not finite
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss, grad_norm

    def check_finite(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Raise FloatingPointError if a step has made the weights useless. This waits for the device."""
        finite = loss.isfinite()
        if not self.scaler.is_enabled():  # which skips a step with such a gradient
            finite = finite & grad_norm.isfinite()
        if not finite:
            raise FloatingPointError(f"loss or gradient not finite at step {self.step}; try a lower --max_lr")

    def sum_over_processes(self, value: float) -> float:
        if self.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)  # on the CPU: no GPU has to be waited for
        dist.all_reduce(total)
        return total.item()

    def report_progress(self, logger: Logger, loss: float, grad_norm: float, seconds_per_step: float) -> None:
        c = self.config
        loss = self.sum_over_processes(loss) / self.world_size
        lr = self.optimizer.param_groups[0]["lr"]
        speed = c.batch_size * c.context_length / seconds_per_step
        minutes_left = (c.max_steps - self.step) * seconds_per_step / 60
        values = {"train_loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_second": speed}
        text = f"train_loss {loss:.4f}  lr {lr:.2e}  grad_norm {grad_norm:.2f}  {speed:,.0f} tokens/s"
        logger.log(self.step, values, f"{text}  {minutes_left:.1f} minutes left")

    def evaluate_and_save(self, logger: Logger) -> None:
        """Evaluate, save the run, then report."""
        val_loss = self.evaluate()
        if not math.isfinite(val_loss):
            raise FloatingPointError(f"val_loss not finite at step {self.step}; try a lower --max_lr")
        if val_loss < self.best_val_loss:
            self.best_val_loss = val_loss
            self.save("best.pt")
        self.save("last.pt")
        # Bits per byte can be compared between tokenizers; nats per token cannot.
        val_bpb = val_loss / math.log(2) * len(self.val_data.tokens) / self.meta["val_bytes"]
        if self.rank == 0:
            text = f"val_loss {val_loss:.4f} nats  {val_bpb:.4f} bits/byte  {self.sample(60)!r}"
            logger.log(self.step, {"val_loss": val_loss, "val_bpb": val_bpb}, text)

    @torch.no_grad()
    def evaluate(self) -> float:
        """The validation loss in nats per token, over the same windows each time."""
        c = self.config
        count = len(self.val_data)
        if c.eval_tokens > 0:
            count = min(count, max(1, c.eval_tokens // c.context_length))
        indices = np.linspace(0, len(self.val_data) - 1, count).astype(int)  # spread over the file
        starts = indices[self.rank :: self.world_size] * c.context_length  # the share of this process
        total = 0.0
        self.model.eval()
        for i in range(0, len(starts), self.micro_batch_size):
            tokens, targets = self.val_data.read(starts[i : i + self.micro_batch_size])
            with self.autocast:
                loss = self.model(tokens.to(self.device), targets.to(self.device))
            total += loss.item() * len(tokens)
        self.model.train()
        return self.sum_over_processes(total) / count

    def sample(self, max_new_tokens: int) -> str:
        """Text that the model writes now, after a newline, drawn with the same seed each time."""
        prompt = torch.tensor([self.tokenizer.encode("\n")], device=self.device)
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        self.model.eval()
        tokens = self.model.generate(prompt, max_new_tokens, temperature=0.8, generator=generator)
        self.model.train()
        return self.tokenizer.decode(tokens[0, prompt.shape[1] :].tolist())

    def save(self, name: str) -> None:
        """Write out_dir/name; only last.pt has what a run needs to be resumed."""
        if self.rank != 0:
            return
        state = {
            "model": self.model.state_dict(),
            "model_config": dataclasses.asdict(self.model.config),
            "tokenizer": self.meta["tokenizer"],
            "eos_id": self.meta["eos_id"],
            "config": dataclasses.asdict(self.config),
            "step": self.step,
            "best_val_loss": self.best_val_loss,
        }
        if name == "last.pt":
            state["optimizer"] = self.optimizer.state_dict()
            state["scaler"] = self.scaler.state_dict()
        lm.CheckpointHandler.save(state, Path(self.config.out_dir, name))

    def load(self, state: dict) -> None:
        """Continue the run of a last.pt, whose model this one has already."""
        optimizer = state["optimizer"]
        optimizer["param_groups"] = self.optimizer.state_dict()["param_groups"]  # with today's options
        self.optimizer.load_state_dict(optimizer)
        if state["scaler"]:  # empty unless the run was in float16
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.best_val_loss = state["best_val_loss"]

    def request_stop(self, number: int, frame) -> None:
        """The handler of a signal: stop after the step that is being made."""
        self.stop_requested = True
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once


def make_manager(options: dict) -> TrainManager:
    """The manager of the run that the command line asks for: a new one, or one that is resumed."""
    out_dir = Path(options.get("out_dir", TrainConfig.out_dir))
    last = out_dir / "last.pt"
    resume = options.get("resume", False)
    if not resume and (last.exists() or (out_dir / "best.pt").exists()):
        raise ValueError(f"{out_dir} holds a run; continue it with --resume=True, or name another --out_dir")

    resuming = resume and last.exists()
    if resuming:
        checkpoint = lm.CheckpointHandler.load(last)
        saved = checkpoint["config"] | {"out_dir": str(out_dir)}  # the folder may have been moved
    elif "init_from" in options:
        checkpoint = lm.CheckpointHandler.load(options["init_from"])
        saved = {name: checkpoint["model_config"][name] for name in SHAPE}
    else:
        checkpoint = None
        saved = {}
    config = TrainConfig(**(saved | options))  # what the command line names wins

    if not resuming and config.data_dir == TrainConfig.data_dir:
        prepare_default_data(config)
    meta = prepare.load_meta(config.data_dir)
    if checkpoint is not None:
        check_compatible(config, meta, checkpoint)
    manager = TrainManager(config, meta, checkpoint)
    if resuming:
        manager.load(checkpoint)
    return manager


def prepare_default_data(config: TrainConfig) -> None:
    """Prepare the source of Python's standard library in the first process, unless it is there."""
    if int(os.environ.get("RANK", 0)) == 0 and not Path(config.data_dir, "train.bin").exists():
        print(f"no data in {config.data_dir} yet: preparing the source of Python's standard library")
        tokenizer = config.init_from or "bytes"
        prepare.prepare(prepare.PrepareConfig(out_dir=config.data_dir, tokenizer=tokenizer))
    if dist.is_initialized():
        dist.barrier()  # the other processes wait


def check_compatible(config: TrainConfig, meta: dict, checkpoint: dict) -> None:
    """Raise ValueError if the model of a checkpoint cannot be trained with these options, on this data."""
    for name in SHAPE:
        has = checkpoint["model_config"][name]
        if getattr(config, name) not in (None, has):
            raise ValueError(f"--{name}={getattr(config, name)}: the model of the checkpoint has {has}")
    longest = checkpoint["model_config"]["context_length"]
    if config.context_length > longest:
        raise ValueError(f"--context_length={config.context_length}: the model takes at most {longest}")
    if checkpoint["tokenizer"] != meta["tokenizer"]:
        raise ValueError(f"{config.data_dir} was not prepared with the tokenizer of the checkpoint")


def main() -> None:
    options = prepare.parse_options(TrainConfig, __doc__)
    sys.stdout.reconfigure(errors="replace")  # the terminal may not know all characters of a sample
    with prepare.one_line_errors():
        if "RANK" in os.environ:  # torchrun has started this process, as one of several
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        manager = make_manager(options)
        config = manager.config
        logger = Logger(config, is_main_process=manager.rank == 0)
    if manager.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # float32 products with TF32: faster, fewer digits

    out_dir = shlex.quote(config.out_dir)
    logger.say(f"resuming {out_dir} at step {manager.step}" if manager.step > 0 else f"new run in {out_dir}")
    num_params = sum(param.numel() for param in manager.model.parameters())
    logger.say(
        f"{num_params:,} parameters, {len(manager.train_data.tokens):,} tokens in {config.data_dir}, "
        f"{manager.steps_per_epoch:,} steps an epoch, {manager.device}, {manager.dtype}"
    )
    signal.signal(signal.SIGINT, manager.request_stop)
    signal.signal(signal.SIGTERM, manager.request_stop)
    manager.train(logger)

    stopped = manager.step < config.max_steps
    logger.say(f"{'stopped' if stopped else 'finished'} at step {manager.step} of {config.max_steps}")
    name = "last.pt" if stopped else "best.pt"  # a run that was just begun has no good best.pt yet
    logger.say(f"sample:    python sample.py --checkpoint={out_dir}/{name}")
    further = "" if stopped else f" --max_steps={2 * config.max_steps}"
    logger.say(f"train on:  python train.py --out_dir={out_dir} --resume=True{further}")
    if dist.is_initialized():
        dist.barrier()  # a process that leaves early would look dead to the others
        dist.destroy_process_group()
    if stopped:
        sys.exit(1)  # so that a command after && does not take it for a finished run


if __name__ == "__main__":
    main()
