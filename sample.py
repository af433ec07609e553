"""Text in, text out: continue a prompt with a trained model.

python sample.py --prompt="def "
python sample.py --checkpoint=out-notes/best.pt --prompt="Once " --temperature=1 --num_samples=3
python sample.py < opening.txt                 # continues what is piped in
python sample.py                               # on a terminal: asks for one prompt after another
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

import lm
import prepare


@dataclass
class SampleConfig:
    """The options of `python sample.py --option=value`; the comments are its --help."""

    checkpoint: str = "out/best.pt"  # a checkpoint file
    prompt: str | None = None  # text to continue; None: read it from standard input, or ask for it
    max_new_tokens: int = 500  # tokens to add
    temperature: float = 0.8  # 0: always the likeliest token; 1: as the model predicts; above: wilder
    top_k: int | None = None  # draw among the k likeliest tokens; None: all
    top_p: float | None = None  # draw among the fewest that reach this probability together; None: all
    num_samples: int = 1  # how many continuations
    seed: int = 0  # the same seed draws the same text
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights


def read_prompts(prompt: str | None) -> Iterator[str]:
    """Yield the prompt; or what is piped in; or, on a terminal, one line after another."""
    if prompt is not None:
        yield prompt
    elif not sys.stdin.isatty():
        yield sys.stdin.read()
    else:
        print("prompt, or Ctrl-D to end:")
        for line in sys.stdin:
            yield line.removesuffix("\n")


def decode_stream(tokenizer, before: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of the tokens that follow those before, holding back incomplete characters.

    Some tokenizers drop the space at the start of a text. So decode together with the tokens before.
    """
    new = []
    for token in tokens:
        new.append(token)
        text = tokenizer.decode(before + new)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(tokenizer.decode(before)) :]
            before = new  # the last piece is enough
            new = []
    yield tokenizer.decode(before + new)[len(tokenizer.decode(before)) :]


def main() -> None:
    c = SampleConfig(**prepare.parse_options(SampleConfig, __doc__))
    sys.stdout.reconfigure(errors="replace")  # the terminal may not know all characters
    with prepare.one_line_errors():
        device, dtype = prepare.pick_device(c.device, c.dtype)
        model, state = lm.load_model(c.checkpoint)
        tokenizer = prepare.load_tokenizer(state["tokenizer"], state["eos_id"])
    model.to(device, dtype).eval()
    eos_id = tokenizer.eos_id
    generator = torch.Generator(device).manual_seed(c.seed)
    for prompt in read_prompts(c.prompt):
        prompt = prompt or "\n"  # there must be a token to continue
        prompt_tokens = tokenizer.encode(prompt)
        batch = torch.tensor([prompt_tokens], device=device)
        for _ in range(c.num_samples):
            print(prompt, end="", flush=True)
            stream = model.stream(batch, c.max_new_tokens, c.temperature, c.top_k, c.top_p, eos_id, generator)
            new_tokens = (token.item() for token in stream if token != eos_id)
            for text in decode_stream(tokenizer, prompt_tokens, new_tokens):
                print(text, end="", flush=True)
            print("\n")


if __name__ == "__main__":
    main()
