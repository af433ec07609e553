"""Text in, text out: continue a prompt with a trained model.

python sample.py --prompt="def "
python sample.py --checkpoint=out-notes/best.pt --prompt=@opening.txt --temperature=1 --num_samples=3
"""

import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from lm import CheckpointHandler, ModelConfig, TransformerLM
from prepare import load_tokenizer, parse_args, pick_device, run


@dataclass
class SampleConfig:
    """Every key of `python sample.py --key=value`; the comments are its --help."""

    checkpoint: str = "out/best.pt"  # what train.py saved
    prompt: str = ""  # text to continue; @FILE reads it from a file, - from standard input
    max_new_tokens: int = 500  # tokens to add
    temperature: float = 0.8  # 0: always the likeliest token; 1: as the model finds them; above: wilder
    top_k: int | None = None  # draw among the k likeliest only
    top_p: float = 0.95  # draw among the fewest that hold this probability together; 1: among all
    num_samples: int = 1  # how many continuations
    seed: int = 0  # the same seed draws the same text
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights


def load_model(path: str) -> tuple[TransformerLM, object]:
    """The model and the tokenizer of a checkpoint, on the CPU."""
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


def main(argv: list[str]) -> None:
    c = SampleConfig(**parse_args(SampleConfig, argv, __doc__))
    for name in ("max_new_tokens", "num_samples", "seed"):
        if getattr(c, name) < 0:
            raise ValueError(f"--{name}={getattr(c, name)}: must be at least 0")
    model, tokenizer = load_model(c.checkpoint)
    device, dtype = pick_device(c.device, c.dtype)
    model.to(device, dtype)
    text = read_prompt(c.prompt)
    try:
        shown = text.decode()
    except UnicodeDecodeError as problem:
        raise ValueError(f"--prompt={c.prompt}: byte {problem.start:,} of it is not UTF-8 text") from None
    ids = tokenizer.encode(text).astype(np.int64) if text else np.array([tokenizer.eos_id])
    if len(ids) > (window := model.config.context_length):
        print(
            f"the prompt's {len(ids):,} tokens are more than the model sees: keeping the last {window}",
            file=sys.stderr,
        )
    tokens = torch.from_numpy(ids[-window:])[None].to(device)
    generator = torch.Generator(device).manual_seed(c.seed)
    sampling = {"temperature": c.temperature, "top_k": c.top_k, "top_p": c.top_p, "generator": generator}
    for i in range(c.num_samples):
        print("\n---" if i else "", shown, sep="\n" if i else "", end="", flush=True)
        stream = (
            t.item() for t in model.stream(tokens, c.max_new_tokens, eos_id=tokenizer.eos_id, **sampling)
        )
        for piece in tokenizer.decode(t for t in stream if t != tokenizer.eos_id):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    run(main)
