"""Text in, text out: continue a prompt with a trained model.

python sample.py                               # asks for prompts, until Ctrl-D; or reads one, piped in
python sample.py --prompt="def "
python sample.py --checkpoint=out-notes/best.pt --prompt=@opening.txt --temperature=1 --num_samples=3
python sample.py --export=FOLDER               # writes the model for Hugging Face's transformers
"""

import contextlib
import os
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch

from lm import CheckpointHandler, ModelConfig, TransformerLM, load_pretrained, save_pretrained
from prepare import export_tokenizer, find_tokenizer, load_tokenizer, parse_args, pick_device, run_cli


@dataclass
class SampleConfig:
    """Every key of `python sample.py --key=value`; the comments are its --help."""

    checkpoint: str = "out/best.pt"  # what train.py saved, or the folder of a Hugging Face Llama
    export: str | None = None  # write the model to this folder, for transformers, instead of sampling
    prompt: str | None = None  # text to continue; @FILE reads it from a file, - from standard input
    max_new_tokens: int = 500  # tokens to add
    temperature: float = 0.8  # 0: always the likeliest token; 1: as the model finds them; above: wilder
    top_k: int | None = None  # draw among the k likeliest only
    top_p: float = 0.95  # draw among the fewest that hold this probability together; 1: among all
    num_samples: int = 1  # how many continuations
    seed: int = 0  # the same seed draws the same text
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights


def load_model(path: str) -> tuple:
    """The model and the tokenizer of a checkpoint or of a Hugging Face folder, on the CPU."""
    if not Path(path).exists():
        raise ValueError(f"{path}: not there; train a model:  python train.py  or name another --checkpoint")
    if Path(path).is_dir():
        return load_pretrained(path).eval(), find_tokenizer(path)
    state = CheckpointHandler(Path(path).parent).load(Path(path).name)
    if not {"model", "config", "tokenizer"} <= set(state):
        raise ValueError(f"{path}: no checkpoint of train.py")
    config = ModelConfig(**{field.name: state["config"][field.name] for field in fields(ModelConfig)})
    model = TransformerLM(config)
    model.load_state_dict(state["model"])
    return model.eval(), load_tokenizer(state["tokenizer"])


def read_prompt(prompt: str) -> bytes:
    if prompt == "-":
        return sys.stdin.buffer.read()
    return Path(prompt[1:]).read_bytes() if prompt.startswith("@") else os.fsencode(prompt)


def speak(model: TransformerLM, tokenizer, prompt: bytes, c: SampleConfig, generator) -> None:
    """Print the prompt and its continuations, as they come."""
    try:
        shown = prompt.decode()
    except UnicodeDecodeError as problem:
        raise ValueError(f"--prompt={c.prompt or '-'}: its byte {problem.start:,} is not UTF-8") from None
    ids = [*tokenizer.start_ids, *tokenizer.encode(prompt).tolist()] or [tokenizer.eos_id]
    if len(ids) > (window := model.config.context_length):
        print(f"of the prompt's {len(ids):,} tokens the model sees the last {window}", file=sys.stderr)
    tokens = torch.tensor([ids[-window:]], device=generator.device)
    start, made, eos_id = time.perf_counter(), 0, tokenizer.eos_id
    for i in range(c.num_samples):
        torch.backends.mkldnn.enabled = True
        stream = model.stream(tokens, c.max_new_tokens, c.temperature, c.top_k, c.top_p, eos_id, generator)
        text = tokenizer.decode(token for drawn in stream if (token := drawn.item()) != eos_id)
        first = next(text)  # settings out of range are refused here, before the prompt is shown
        # The prompt is read. For one token at a time in bfloat16, torch alone is 1.7 times as fast as oneDNN.
        torch.backends.mkldnn.enabled = model.lm_head.weight.dtype != torch.bfloat16
        print("\n---\n" * (i > 0) + shown + first, end="", flush=True)
        for piece in text:  # one for each token: the last is the end of what was held back
            print(piece, end="", flush=True)
            made += 1
        print()
    seconds = time.perf_counter() - start
    print(f"{made:,} tokens, {made / max(seconds, 1e-9):,.0f} tokens/s", file=sys.stderr)


def main(argv: list[str]) -> None:
    c = SampleConfig(**parse_args(SampleConfig, argv, __doc__))
    for name in ("max_new_tokens", "num_samples", "seed"):
        if not 0 <= getattr(c, name) < 2**63:
            raise ValueError(f"--{name}={getattr(c, name)}: must be at least 0 and below {2**63}")
    model, tokenizer = load_model(c.checkpoint)
    if c.export:
        save_pretrained(model, c.export, tokenizer.eos_id)
        export_tokenizer(tokenizer, c.export)
        print(f"{c.export}: load it with transformers' AutoModelForCausalLM and AutoTokenizer")
        return
    device, dtype = pick_device(c.device, c.dtype)
    model.to(device, dtype)
    generator = torch.Generator(device).manual_seed(c.seed)
    if c.prompt is None and sys.stdin.isatty():
        with contextlib.suppress(EOFError):  # Ctrl-D
            while True:
                speak(model, tokenizer, os.fsencode(input("prompt> ")), c, generator)
        print()
    else:
        speak(model, tokenizer, read_prompt("-" if c.prompt is None else c.prompt), c, generator)


if __name__ == "__main__":
    run_cli(main)
