"""Turn text into token files: data/train.bin, data/val.bin and data/meta.json.

python prepare.py book.txt notes/*.md          # text files
python prepare.py corpus.jsonl                 # one document in each line: {"text": "..."}
python prepare.py                              # the source of Python's own standard library
python prepare.py book.txt --tokenizer=bpe --vocab_size=4096    # learn tokens of several bytes
python prepare.py book.txt --tokenizer=out/best.pt              # the tokenizer of a checkpoint

The last tenth of the text is held out: the model is validated on it, and never trained on it.
"""

import argparse
import contextlib
import dataclasses
import inspect
import itertools
import json
import os
import re
import sys
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

import lm


@dataclasses.dataclass
class PrepareConfig:
    """The options of `python prepare.py`; the comments are its --help."""

    inputs: list[str] = dataclasses.field(default_factory=list)  # text or .jsonl files; none: Python's source
    out_dir: str = "data"  # the folder to write
    tokenizer: str = "bytes"  # bytes; bpe: learned from the text; or a checkpoint file, for its tokenizer
    vocab_size: int = 4096  # how many tokens to learn with bpe
    val_fraction: float = 0.1  # share of the text to hold out, at its end


# ------------------------------------------------------------------------------------------------------- Text
def standard_library() -> list[Path]:
    """The source files of Python's standard library, without tests and tables."""
    root = Path(os.__file__).parent
    excluded = {"test", "tests", "idlelib", "encodings", "pydoc_data", "site-packages", "dist-packages"}
    paths = sorted(root.rglob("*.py"))
    return [path for path in paths if not excluded.intersection(path.relative_to(root).parts)]


def read_blocks(paths: list) -> Iterator[tuple[bytes, bool]]:
    """Yield all text in blocks, and whether a document begins with the block.

    A block is a document of a .jsonl file, or about a megabyte of whole lines of any other file.
    """
    for path in paths:
        with open(path, "rb") as file:
            if str(path).endswith(".jsonl"):
                for number, line in enumerate(file, start=1):
                    yield parse_line(line, f"{path}, line {number}"), True
                continue
            lines = file.readlines(2**20)
            begins_document = True
            while lines:
                yield b"".join(lines), begins_document
                lines = file.readlines(2**20)
                begins_document = False


def parse_line(line: bytes, where: str) -> bytes:
    """The text in a line of a .jsonl file."""
    try:
        return json.loads(line)["text"].encode()
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f'{where}: not like {{"text": "..."}}') from None


def split_blocks(paths: list, val_fraction: float) -> Iterator[tuple[str, bytes, bool]]:
    """Yield the blocks as `read_blocks` does, each with its split: "train", or at the end "val".

    The block in which the held-out part begins is cut in two.
    """
    total = sum(len(text) for text, _ in read_blocks(paths))  # reads all files once, to find their tenth
    train_left = total - int(total * val_fraction)  # bytes that are still to train on
    for text, begins_document in read_blocks(paths):
        cut = min(max(train_left, 0), len(text))
        while 0 < cut < len(text) and 0x80 <= text[cut] < 0xC0:  # not inside a character of UTF-8
            cut += 1
        if cut > 0:
            yield "train", text[:cut], begins_document
        if cut < len(text):
            yield "val", text[cut:], begins_document
        train_left -= cut


# ------------------------------------------------------------------------------------------------- Tokenizers
class ByteTokenizer:
    """Each byte is a token: nothing to learn, and no text that it cannot encode."""

    spec = "bytes"  # what a checkpoint keeps of it
    vocab_size = 256
    eos_id = 0  # the token that ends a document: a byte that text does not use

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt."""
        return list(text.encode())

    def encode_blocks(self, blocks: list[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(block, np.uint8) for block in blocks]

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


class BPETokenizer:
    """Byte-pair encoding: bytes that often follow each other become one token.

    Source: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016,
    arXiv:1508.07909.
    """

    def __init__(self, spec: str, eos_id: int):
        """spec: the text of a tokenizer.json."""
        import tokenizers

        self.tokenizer = tokenizers.Tokenizer.from_str(spec)
        self.tokenizer.no_truncation()  # a tokenizer.json may ask for this, and for padding
        self.tokenizer.no_padding()
        self.spec = spec
        self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1
        self.eos_id = eos_id

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt, after the token that begins a text, if the tokenizer has one."""
        return self.tokenizer.encode(text).ids

    def encode_blocks(self, blocks: list[bytes]) -> list[np.ndarray]:
        """The tokens of each block, computed on all cores. Raises UnicodeDecodeError if it is not UTF-8."""
        texts = [block.decode() for block in blocks]
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids) for encoding in encodings]

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Learn the vocab_size most useful tokens of the texts. Token 0, <|endoftext|>, ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    all_bytes = pre_tokenizers.ByteLevel.alphabet()  # also those that are not in the texts
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=all_bytes
    )
    tokenizer.train_from_iterator(texts, trainer)
    return BPETokenizer(tokenizer.to_str(), eos_id=0)


def load_tokenizer(spec: str | None, eos_id: int) -> ByteTokenizer | BPETokenizer:
    """The tokenizer of a checkpoint or of a meta.json."""
    if spec is None:
        raise ValueError("the checkpoint has no tokenizer")
    if spec == "bytes":
        return ByteTokenizer()
    return BPETokenizer(spec, eos_id)


# ------------------------------------------------------------------------------------------------ Token files
def prepare(config: PrepareConfig) -> None:
    """Write train.bin, val.bin, meta.json and, unless the tokens are bytes, tokenizer.json to out_dir."""
    paths = config.inputs or standard_library()
    tokenizer = make_tokenizer(config, paths)
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)  # the smallest that holds every token
    out = Path(config.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "train.bin.tmp", "wb") as train_file, open(out / "val.bin.tmp", "wb") as val_file:
        files = {"train": train_file, "val": val_file}
        blocks = split_blocks(paths, config.val_fraction)
        num_bytes = write_tokens(blocks, tokenizer, dtype.newbyteorder("<"), files)
    if num_bytes["train"] == 0 or num_bytes["val"] == 0:
        raise ValueError("nothing to train on, or nothing to hold out: more text, or another --val_fraction")
    meta = {
        "tokenizer": "bytes" if tokenizer.spec == "bytes" else "tokenizer.json",
        "eos_id": tokenizer.eos_id,
        "dtype": dtype.name,
        "val_bytes": num_bytes["val"],
    }
    (out / "meta.json.tmp").write_text(json.dumps(meta, indent=2))

    # The new files are complete. While they replace the old ones there is no meta.json, so none are used.
    (out / "meta.json").unlink(missing_ok=True)
    os.replace(out / "train.bin.tmp", out / "train.bin")
    os.replace(out / "val.bin.tmp", out / "val.bin")
    if tokenizer.spec != "bytes":
        (out / "tokenizer.json").write_text(tokenizer.spec, encoding="utf-8")
    os.replace(out / "meta.json.tmp", out / "meta.json")
    print(f"\nwrote {out}: {num_bytes['train']:,} bytes of text to train on, {num_bytes['val']:,} held out")


def make_tokenizer(config: PrepareConfig, paths: list) -> ByteTokenizer | BPETokenizer:
    """The tokenizer that the option of this name asks for."""
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer == "bpe":
        blocks = split_blocks(paths, config.val_fraction)
        train_texts = (text.decode() for split, text, _ in blocks if split == "train")
        return train_tokenizer(train_texts, config.vocab_size)
    checkpoint = lm.CheckpointHandler.load(config.tokenizer)
    return load_tokenizer(checkpoint["tokenizer"], checkpoint["eos_id"])


def write_tokens(blocks: Iterator, tokenizer, dtype: np.dtype, files: dict) -> dict[str, int]:
    """Write the tokens of all blocks to the file of their split → how many bytes of text each split has."""
    num_bytes = {"train": 0, "val": 0}
    group = list(itertools.islice(blocks, 16))  # to be encoded together, on all cores
    while group:
        encoded = tokenizer.encode_blocks([text for _, text, _ in group])
        for (split, text, begins_document), tokens in zip(group, encoded, strict=True):
            if begins_document and files[split].tell() > 0:
                files[split].write(np.array(tokenizer.eos_id, dtype))
            files[split].write(tokens.astype(dtype))
            num_bytes[split] += len(text)
        print(f"\rprepared {sum(num_bytes.values()) / 1e6:,.1f} MB of text", end="", flush=True)
        group = list(itertools.islice(blocks, 16))
    return num_bytes


def load_meta(data_dir: str) -> dict:
    """What data_dir/meta.json says, with the text of tokenizer.json in place of its name."""
    path = Path(data_dir, "meta.json")
    if not path.exists():
        raise ValueError(f"{data_dir} holds no data; make it:  python prepare.py TEXT --out_dir={data_dir}")
    meta = json.loads(path.read_text())
    if meta["tokenizer"] == "tokenizer.json":
        meta["tokenizer"] = path.with_name("tokenizer.json").read_text(encoding="utf-8")
    return meta


# ------------------------------------------------------------------------------------- What the scripts share
def parse_options(config_class: type, doc: str) -> dict:
    """The options that the command line names, with the types and comments of a dataclass's fields."""
    source = inspect.getsource(config_class)
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", source, re.MULTILINE))
    parser = argparse.ArgumentParser(
        description=doc,
        usage="python %(prog)s [--option=value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    for field in dataclasses.fields(config_class):
        comment = comments.get(field.name, "").replace("%", "%%")
        if field.type == list[str]:
            parser.add_argument(field.name, nargs="*", help=comment)
            continue
        kind = field.type
        if type(None) in typing.get_args(kind):  # as int | None
            kind = typing.get_args(kind)[0]
        choices = typing.get_args(kind) or None  # of a Literal
        kind = {bool: parse_bool, int: int, float: float}.get(kind, str)
        help_text = f"{comment} (default: {field.default})"
        metavar = None if choices else ""  # None: argparse shows the choices
        parser.add_argument(f"--{field.name}", type=kind, choices=choices, metavar=metavar, help=help_text)
    return vars(parser.parse_args())


def parse_bool(text: str) -> bool:
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text == "True"


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Say in one line what is wrong with the command line, the data or a checkpoint."""
    try:
        yield
    except IsADirectoryError as error:
        folder = error.filename
        hint = f"(if it is a model of Hugging Face:  python convert.py {folder} llama.pt)"
        sys.exit(f"error: {folder} is a folder, but a file is needed {hint}")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


def pick_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype of these names; "auto": a GPU if there is one, bfloat16 if it has that."""
    if device == "auto":
        has_gpu = torch.accelerator.is_available()
        device = torch.accelerator.current_accelerator().type if has_gpu else "cpu"
    if dtype == "auto":
        is_cuda = device.startswith("cuda")
        has_bfloat16 = is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bfloat16 else "float32"
    return torch.device(device), getattr(torch, dtype)


def main() -> None:
    options = parse_options(PrepareConfig, __doc__)
    with one_line_errors():
        prepare(PrepareConfig(**options))


if __name__ == "__main__":
    main()
