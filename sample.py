"""Text in, text out: continue a prompt with a trained model.

python sample.py                               # asks for prompts until Ctrl-D; or reads one, piped in
python sample.py --prompt="def "
python sample.py --checkpoint=out-notes/best.pt --prompt=@opening.txt --temperature=1 --num_samples=3
python sample.py --export=FOLDER               # write the model for Hugging Face's transformers
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Generator, Tensor

import lm
import prepare
from lm import TransformerLM
from prepare import Tokenizer


@dataclass
class SampleConfig:
    """Every key of `python sample.py --key=value`; the comments are its --help."""

    checkpoint: str = "out"  # the folder of a run, or one of its files; or a Hugging Face folder
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
        lm.check_sampling(self.temperature, self.top_k, self.top_p)


def read_prompts(prompt: str | None) -> Iterator[bytes]:
    """Yield the prompt; or what is piped in; or, on a terminal, one after another until Ctrl-D."""
    if prompt is None and sys.stdin.isatty():
        with contextlib.suppress(ModuleNotFoundError):  # Windows has none
            import readline  # noqa: F401 (the arrow keys then edit the line, and bring back earlier ones)
        while True:
            try:
                line = input("prompt> ")
            except EOFError:
                print()
                return
            yield os.fsencode(line)
    elif prompt is None or prompt == "-":
        yield sys.stdin.buffer.read().removesuffix(b"\n")  # which `echo` adds
    elif prompt.startswith("@"):
        yield Path(prompt[1:]).read_bytes()
    else:
        yield os.fsencode(prompt)


def draw_tokens(
    model: TransformerLM, prompt: Tensor, eos_id: int, config: SampleConfig, generator: Generator
) -> Iterator[int]:
    """Yield the tokens that follow the prompt (1, T), up to the end of the document."""
    stream = model.stream(
        prompt,
        config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        eos_id=eos_id,
        generator=generator,
    )
    try:
        for token in stream:
            # The prompt is read. Token by token, bfloat16 on a CPU is 1.5 times as fast without oneDNN.
            torch.backends.mkldnn.enabled = model.lm_head.weight.dtype != torch.bfloat16
            if token.item() == eos_id:
                break
            yield token.item()
    finally:  # Ctrl-C ends the answer, and the next prompt is read with oneDNN
        torch.backends.mkldnn.enabled = True


def print_samples(
    model: TransformerLM, tokenizer: Tokenizer, prompt: bytes, config: SampleConfig, generator: Generator
) -> None:
    """Print the prompt and its continuations, token by token."""
    try:
        prompt_text = prompt.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt={config.prompt or '-'}: its byte {error.start:,} is not UTF-8") from None
    ids = [*tokenizer.start_ids, *tokenizer.encode(prompt).tolist()]
    if not ids:
        ids = tokenizer.encode(b"\n").tolist()  # the model needs a token to continue
    context_length = model.config.context_length
    if len(ids) > context_length:
        hidden = len(ids) - context_length
        print(f"the model does not see the first {hidden:,} tokens of the prompt", file=sys.stderr)
    tokens = torch.tensor([ids[-context_length:]], device=generator.device)
    num_tokens = 0
    start_time = time.perf_counter()
    for i in range(config.num_samples):
        if i > 0:
            print("\n---")
        print(prompt_text, end="", flush=True)
        drawn = draw_tokens(model, tokens, tokenizer.eos_id, config, generator)
        for text in tokenizer.decode(drawn):
            print(text, end="", flush=True)
            num_tokens += 1
        num_tokens -= 1  # decode yields a text for each token, and one more at the end
        print()
    seconds = time.perf_counter() - start_time
    print(f"{num_tokens:,} tokens, {num_tokens / max(seconds, 1e-9):,.0f} tokens/s", file=sys.stderr)


def export_tokenizer(tokenizer: Tokenizer, folder: str) -> None:
    """Write the files from which transformers' AutoTokenizer makes the same tokenizer."""
    files = dict(tokenizer.spec.get("settings", {}))  # as they came with the base of a fine-tuned model
    if tokenizer.spec["kind"] == "bpe":
        files["tokenizer.json"] = tokenizer.spec["json"]
    else:
        as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        files["tokenizer.json"] = json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "pre_tokenizer": as_bytes,
                "decoder": as_bytes,
                "model": {"type": "BPE", "vocab": prepare.VISIBLE_BYTES, "merges": []},
            }
        )
    settings = {
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # in a text, the name of a special token is text
        "bos_token": tokenizer.eos_name,
        "eos_token": tokenizer.eos_name,
    }
    if "tokenizer_config.json" in files:
        settings = json.loads(files["tokenizer_config.json"])
    # This class takes tokenizer.json as it is, in every version of transformers.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    files["tokenizer_config.json"] = json.dumps(settings, indent=2)
    files.setdefault("generation_config.json", json.dumps({"eos_token_id": tokenizer.eos_id}))
    for name, text in files.items():
        with lm.atomic_write(Path(folder, name)) as file:
            file.write(text.encode())


def main(argv: list[str]) -> None:
    config = SampleConfig(**prepare.parse_args(SampleConfig, argv, __doc__))
    path = prepare.find_model(config.checkpoint)
    tokenizer = prepare.find_tokenizer(path)
    if config.export:
        if Path(config.export, "last.pt").exists() or Path(config.export, "best.pt").exists():
            raise ValueError(f"--export={config.export}: holds a run of train.py; name another folder")
        dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
        model = prepare.load_model(path, dtype)
        lm.save_pretrained(model, config.export, tokenizer.eos_id)
        export_tokenizer(tokenizer, config.export)
        print(f"{config.export}: load it with transformers' AutoModelForCausalLM and AutoTokenizer")
        return
    device, dtype = prepare.pick_device(config.device, config.dtype)
    model = prepare.load_model(path, dtype).to(device).eval()
    generator = Generator(device).manual_seed(config.seed)
    for prompt in read_prompts(config.prompt):
        try:
            print_samples(model, tokenizer, prompt, config, generator)
        except KeyboardInterrupt:
            if config.prompt is not None or not sys.stdin.isatty():
                raise
            print()  # Ctrl-C ends the answer; at the prompt it ends the program


if __name__ == "__main__":
    prepare.run_cli(main)
