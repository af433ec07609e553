"""Text in, text out: continue a prompt with a trained model.

python sample.py                               # asks for prompts until Ctrl-D; or reads one, piped in
python sample.py --prompt="def "
python sample.py --checkpoint=out-notes/best.pt --prompt=@opening.txt --temperature=1 --num_samples=3
python sample.py --export=FOLDER               # write the model for Hugging Face's transformers
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lm import (
    CheckpointHandler,
    ModelConfig,
    TransformerLM,
    atomic_write,
    load_pretrained,
    sample_token,
    save_pretrained,
)
from prepare import (
    VISIBLE_BYTES,
    Tokenizer,
    find_tokenizer,
    load_tokenizer,
    parse_args,
    pick_device,
    run_cli,
)


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

    def __post_init__(self):
        for name in ("max_new_tokens", "num_samples", "seed"):
            value = getattr(self, name)
            if not 0 <= value < 2**63:
                raise ValueError(f"--{name}={value}: must be at least 0 and below {2**63}")
        # Draw one token of one, so that settings out of range are refused before any work.
        sample_token(torch.zeros(1), self.temperature, self.top_k, self.top_p)


def load_model(path: str) -> tuple[TransformerLM, Tokenizer]:
    """The model and the tokenizer of a checkpoint or of a Hugging Face folder, on the CPU."""
    if not Path(path).exists():
        raise ValueError(f"{path}: not there; train a model:  python train.py  or name another --checkpoint")
    if Path(path).is_dir():
        return load_pretrained(path).eval(), find_tokenizer(path)
    state = CheckpointHandler(Path(path).parent).load(Path(path).name)
    for key in ("model", "model_config", "tokenizer"):
        if key not in state:
            raise ValueError(f"{path}: not a checkpoint of this version of train.py: it has no {key}")
    model = TransformerLM(ModelConfig(**state["model_config"]))
    model.load_state_dict(state["model"])
    return model.eval(), load_tokenizer(state["tokenizer"])


def read_prompt(prompt: str) -> bytes:
    if prompt == "-":
        return sys.stdin.buffer.read()
    if prompt.startswith("@"):
        return Path(prompt[1:]).read_bytes()
    return os.fsencode(prompt)


def print_samples(
    model: TransformerLM, tokenizer: Tokenizer, prompt: bytes, config: SampleConfig, generator: torch.Generator
) -> None:
    """Print the prompt and its continuations, as they come."""
    try:
        prompt_text = prompt.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt={config.prompt or '-'}: its byte {error.start:,} is not UTF-8") from None
    ids = [*tokenizer.start_ids, *tokenizer.encode(prompt).tolist()]
    if not ids:
        ids = [tokenizer.eos_id]  # after the end of a document, another begins
    context_length = model.config.context_length
    if len(ids) > context_length:
        print(f"the model sees the last {context_length} of the prompt's {len(ids):,} tokens", file=sys.stderr)
    tokens = torch.tensor([ids[-context_length:]], device=generator.device)
    start_time = time.perf_counter()
    num_tokens = 0
    for i in range(config.num_samples):
        if i > 0:
            print("\n---")
        print(prompt_text, end="", flush=True)
        drawn = draw_tokens(model, tokens, tokenizer.eos_id, config, generator)
        for text in tokenizer.decode(drawn):
            print(text, end="", flush=True)
            num_tokens += 1
        print()
    seconds = time.perf_counter() - start_time
    print(f"{num_tokens:,} tokens, {num_tokens / max(seconds, 1e-9):,.0f} tokens/s", file=sys.stderr)


def draw_tokens(
    model: TransformerLM, prompt: torch.Tensor, eos_id: int, config: SampleConfig, generator: torch.Generator
) -> Iterator[int]:
    """Yield the tokens that continue a prompt (1, T), up to the end of the document."""
    settings = (config.max_new_tokens, config.temperature, config.top_k, config.top_p)
    torch.backends.mkldnn.enabled = True
    for drawn in model.stream(prompt, *settings, eos_id, generator):
        # From here on the model reads one token at a time. In bfloat16 on a CPU, torch alone then takes
        # 1 / 1.7 of the time that it takes with oneDNN.
        torch.backends.mkldnn.enabled = model.lm_head.weight.dtype != torch.bfloat16
        token = drawn.item()
        if token == eos_id:
            return
        yield token


def export_tokenizer(tokenizer: Tokenizer, folder: str) -> None:
    """Write the files from which transformers' AutoTokenizer makes the same tokenizer."""
    if tokenizer.spec["kind"] == "bpe":
        content = tokenizer.spec["json"]
    else:
        as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        content = json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "pre_tokenizer": as_bytes,
                "decoder": as_bytes,
                "model": {"type": "BPE", "vocab": VISIBLE_BYTES, "merges": []},
            }
        )
    # No end-of-text token is declared here, or its name would be found in texts: config.json has its id.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    files = {
        "tokenizer.json": content,
        "tokenizer_config.json": json.dumps(settings),
        "generation_config.json": json.dumps({"eos_token_id": tokenizer.eos_id}),
    }
    for name, text in files.items():
        with atomic_write(Path(folder, name)) as file:
            file.write(text.encode())


def main(argv: list[str]) -> None:
    config = SampleConfig(**parse_args(SampleConfig, argv, __doc__))
    model, tokenizer = load_model(config.checkpoint)
    if config.export:
        save_pretrained(model, config.export, tokenizer.eos_id)
        export_tokenizer(tokenizer, config.export)
        print(f"{config.export}: load it with transformers' AutoModelForCausalLM and AutoTokenizer")
        return
    device, dtype = pick_device(config.device, config.dtype)
    model.to(device, dtype)
    generator = torch.Generator(device).manual_seed(config.seed)
    if config.prompt is not None:
        print_samples(model, tokenizer, read_prompt(config.prompt), config, generator)
    elif not sys.stdin.isatty():
        print_samples(model, tokenizer, read_prompt("-"), config, generator)
    else:
        ask_for_prompts(model, tokenizer, config, generator)


def ask_for_prompts(
    model: TransformerLM, tokenizer: Tokenizer, config: SampleConfig, generator: torch.Generator
) -> None:
    """Continue one prompt after another, until the user presses Ctrl-D."""
    while True:
        try:
            prompt = input("prompt> ")
        except EOFError:
            print()
            return
        print_samples(model, tokenizer, os.fsencode(prompt), config, generator)


if __name__ == "__main__":
    run_cli(main)
