"""Turn text into token files: data/train.bin, data/val.bin and data/meta.json.

python prepare.py book.txt                     # one document: its last tenth is held out for validation
python prepare.py notes/ --out_dir=data-notes  # every file in the folder: each tenth file is held out
python prepare.py corpus.jsonl                 # one document in each line: {"text": "..."}
curl ... | python prepare.py -                 # standard input
python prepare.py                              # the source of Python's own standard library
python prepare.py book.txt --tokenizer=bpe --vocab_size=4096     # learn tokens of several bytes
python prepare.py book.txt --tokenizer=FOLDER  # the tokenizer of a Hugging Face model, or of a checkpoint
"""

# The sections follow the text on its way: documents, tokenizers, token files. The last one holds what the
# three scripts share: a dataclass as a command line, errors in one line, models, and the choice of a device.

import codecs
import contextlib
import dataclasses
import difflib
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import timeit
import types
import typing
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

import lm
from lm import atomic_write


@dataclasses.dataclass
class PrepareConfig:
    """Every key of `python prepare.py --key=value`; the comments are its --help."""

    out_dir: str = "data"  # the folder to write
    tokenizer: str = "bytes"  # bytes; bpe: learned from the text; or the folder or checkpoint of a model
    vocab_size: int | None = None  # with --tokenizer=bpe: how many tokens to learn; None: 4096
    special_tokens: bool = False  # read <|im_start|> and the like as the tokens that they name, not as text
    val_fraction: float = 0.1  # share to hold out: every tenth document, or the end of each if they are few

    def __post_init__(self):
        if not 0 < self.val_fraction <= 0.5:
            raise ValueError(f"--val_fraction={self.val_fraction}: must be above 0 and at most 0.5")
        if self.vocab_size is not None:
            if self.tokenizer != "bpe":
                raise ValueError(f"--vocab_size={self.vocab_size}: only --tokenizer=bpe learns tokens")
            if not 257 <= self.vocab_size < 2**31:
                raise ValueError(f"--vocab_size={self.vocab_size}: must be at least 257 and below {2**31}")
        if self.special_tokens and self.tokenizer in ("bytes", "bpe"):
            raise ValueError("--special_tokens=True: only the --tokenizer of a model has special tokens")


# -------------------------------------------------------------------------------------------------- Documents
@dataclasses.dataclass
class Piece:
    """A part of a document, short enough to be encoded at once."""

    path: Path  # the file that it is from, for messages
    split: str  # where it goes: "train" or "val"
    starts_document: bool
    text: bytes

    def decode(self) -> str:
        try:
            return self.text.decode()
        except UnicodeDecodeError as error:
            reason = f"not UTF-8 ({error.reason} at byte {error.start:,} of a piece)"
            raise ValueError(f"{self.path.name}: {reason}; --tokenizer=bytes takes any file") from None


@dataclasses.dataclass
class Corpus:
    """The files to prepare, and which part of their text is held out for validation.

    With a val_fraction of 0.1, every tenth document is held out. Where there are fewer than ten, it is the
    last tenth of each.
    """

    name: str  # for messages and meta.json
    files: list[Path]
    val_fraction: float
    val_files: set[Path] | None = None  # if given, hold out these files instead
    num_documents: int = 0  # as `pieces` has counted them

    def documents(self) -> Iterator[tuple[Path, BinaryIO]]:
        """Open each document: a whole file, or the text in a line of a .jsonl file."""
        for path in self.files:
            with open(path, "rb") as file:
                if path.suffix.lower() != ".jsonl":
                    yield path, file
                    continue
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield path, io.BytesIO(parse_line(line, f"{path}, line {number}"))

    def pieces(self, doing: str, whole_documents: bool = False) -> Iterator[Piece]:
        """Yield all documents, piece by piece, so that a file may be larger than memory.

        doing: what the progress line calls this. whole_documents: leave each document in one piece.
        """
        total_size = sum(path.stat().st_size for path in self.files)
        progress = Progress(doing, total_size / 1e6, "MB")
        enough = math.ceil(1 / self.val_fraction)
        few_documents = sum(1 for _ in itertools.islice(self.documents(), enough)) < enough
        for number, (path, file) in enumerate(self.documents(), start=1):
            self.num_documents = number
            size = file.seek(0, os.SEEK_END)
            # Train on the bytes before `cut`, and hold out those from there on.
            if self.val_files is not None:
                cut = 0 if path in self.val_files else size
            elif few_documents:
                cut = next_character(file, size - int(size * self.val_fraction))
            else:  # hold out the 10th, the 20th, … for 0.1; the 3rd, the 5th, the 8th, … for 0.4
                num_before = int((number - 1) * self.val_fraction)
                num_now = int(number * self.val_fraction)
                cut = 0 if num_now > num_before else size
            block_size = max(1, size) if whole_documents else 2**16
            for split, start, end in (("train", 0, cut), ("val", cut, size)):
                for piece in read_pieces(path, file, split, start, end, block_size):
                    yield piece
                    progress.add(len(piece.text) / 1e6)


def parse_line(line: bytes, where: str) -> bytes:
    """The text in a line of a .jsonl file."""
    try:
        return json.loads(line)["text"].encode()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f'{where}: not an object like {{"text": "..."}} ({error})') from None


def next_character(file: BinaryIO, position: int) -> int:
    """Where the next character of UTF-8 begins, at `position` or shortly after."""
    file.seek(position)
    rest = re.match(rb"[\x80-\xbf]*", file.read(3))  # bytes that do not begin a character
    return position + rest.end()


# Where to cut a text into pieces: after the last word that a space follows. A token always ends there, so
# the tokens of the pieces are those of the whole. If there is none, as in Chinese: before the last character.
CUT = re.compile(rb"(?s).*[0-9A-Za-z](?=\s)|.+(?=[^\x80-\xbf])|.*")


def read_pieces(
    path: Path, file: BinaryIO, split: str, start: int, end: int, block_size: int
) -> Iterator[Piece]:
    """Yield the bytes of a document from start to end, in pieces of about block_size bytes."""
    file.seek(start)
    starts_document = True
    text = b""
    for position in range(start, end, block_size):
        text += file.read(min(block_size, end - position))
        if position + block_size < end:
            cut = CUT.match(text).end()
        else:  # nothing follows
            cut = len(text)
        yield Piece(path, split, starts_document, text[:cut])
        starts_document = False
        text = text[cut:]


class Progress:
    """Says how far the work is: every second on a terminal; in a log after ten seconds, then every minute."""

    def __init__(self, what: str, total: float, unit: str):
        self.what = what
        self.total = total
        self.unit = unit
        self.done = 0.0
        self.start_time = time.perf_counter()
        self.next_report = 1 if sys.stderr.isatty() else 10  # seconds after the start

    def add(self, amount: float) -> None:
        self.done += amount
        seconds = time.perf_counter() - self.start_time
        if seconds < self.next_report:
            return
        self.next_report = seconds + (1 if sys.stderr.isatty() else 60)
        speed = max(1e-9, self.done) / seconds
        left = max(0, int((self.total - self.done) / speed))
        show_progress(
            f"{self.what} {self.done:,.0f} of {self.total:,.0f} {self.unit}"
            f"  {speed:,.1f} {self.unit}/s  {left // 60}:{left % 60:02} left"
        )


# ------------------------------------------------------------------------------------------ Finding the files
OUTPUTS = ["train.bin", "val.bin", "meta.json", "tokenizer.json"]


def find_files(inputs: list[str], out_dir: str, copies: str) -> list[Path]:
    """The files that are named, and those in folders that are named.

    Standard input is copied to the folder `copies`: the size of a file is known, and it can be read twice.
    """
    files = {}  # by their resolved path, so that each is read once
    for name in inputs:
        path = Path(name)
        if name == "":
            raise ValueError("an input is an empty name: a variable that is not set?")
        if name == "-":
            path = Path(copies, "standard input")  # one text; JSON lines need a file that is named *.jsonl
            with open(path, "wb") as copy:
                shutil.copyfileobj(sys.stdin.buffer, copy)
            found = [path]
        elif path.is_dir():
            found = files_in_folder(path, Path(out_dir).resolve())
        elif path.is_file():
            found = [path]
        else:
            raise ValueError(f"{name}: not a file or folder; to pipe text in:  ... | python prepare.py -")
        for path in found:
            files.setdefault(path.resolve(), path)
    return list(files.values())


def files_in_folder(folder: Path, out: Path) -> list[Path]:
    """All files in a folder and its folders, but hidden ones and those that we have written to `out`.

    Raises OSError if a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    files = []
    num_dead_links = 0
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]  # where os.walk goes next
        for name in names:
            if name.startswith("."):
                continue
            path = Path(parent, name)
            is_ours = name in OUTPUTS and path.parent.resolve() == out
            if path.is_file() and not is_ours:
                files.append(path)
            elif path.is_symlink() and not path.exists():
                num_dead_links += 1
    if num_dead_links > 0:
        print(f"warning: {folder}: links that lead nowhere, left out: {num_dead_links:,}", file=sys.stderr)
    return sorted(files)


TESTS_AND_TABLES = {"test", "tests", "idlelib", "lib2to3", "distutils", "encodings", "pydoc_data"}
OTHER_PACKAGES = {"site-packages", "dist-packages"}


def standard_library(val_fraction: float) -> Corpus:
    """The source of Python's standard library, a text that is on every machine.

    Files of one module are alike, so whole top-level modules are held out, chosen by a hash of their names.
    """
    root = Path(os.__file__).parent
    files = []
    val_files = set()
    for path in sorted(root.rglob("*.py"), key=Path.as_posix):
        parts = path.relative_to(root).parts
        # The settings and paths of the machine that built Python.
        build = path.name.startswith("_sysconfigdata") or parts[0].startswith("config-")
        if build or TESTS_AND_TABLES.intersection(parts) or OTHER_PACKAGES.intersection(parts):
            continue
        files.append(path)
        module = parts[0].removesuffix(".py")
        if zlib.crc32(module.encode()) % round(1 / val_fraction) == 0:
            val_files.add(path)
    version = sys.version.split()[0]
    return Corpus(f"the standard library of Python {version}", files, val_fraction, val_files)


# ------------------------------------------------------------------------------------------------- Tokenizers
class Tokenizer:
    """What all tokenizers have in common. Each turns bytes into token ids (encode) and back (decode)."""

    vocab_size: int
    eos_id: int  # the token that ends a document
    eos_name: str  # its name in a tokenizer.json
    start_ids: tuple[int, ...] = ()  # the tokens that begin one, as Llama 2's <s>
    table: list[bytes]  # the bytes that each token stands for
    spec: dict  # all that load_tokenizer needs to make the same tokenizer
    whole_documents = False  # whether a document must be encoded in one piece

    def decode(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of each token as it comes; hold back a character that is not complete yet."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in ids:
            if token < len(self.table):
                yield decoder.decode(self.table[token])
            else:  # a model's vocabulary may be padded with tokens that stand for nothing
                yield decoder.decode(b"\xff")
        yield decoder.decode(b"", final=True)


class ByteTokenizer(Tokenizer):
    """Each byte is a token: nothing to learn, and no text that it cannot encode."""

    vocab_size = 256
    eos_id = 0  # a byte that text does not use
    eos_name = chr(256)  # see visible_bytes

    def __init__(self):
        self.table = [bytes([byte]) for byte in range(256)]
        self.spec = {"kind": "bytes"}

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8)

    def encode_pieces(self, pieces: list[Piece]) -> list[np.ndarray]:
        return [self.encode(piece.text) for piece in pieces]


def visible_bytes() -> dict[str, int]:
    """Which byte each character of a tokenizer.json stands for, as GPT-2 (2019) chose them.

    A byte that is a visible character is written as itself, the others as the characters from 256 on.
    """
    byte_of = {}
    free = 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            byte_of[chr(byte)] = byte
        else:
            byte_of[chr(free)] = byte
            free += 1
    return byte_of


VISIBLE_BYTES = visible_bytes()
EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # in GPT-2, Llama 3, Llama 2, Gemma
# What the folder of a Hugging Face model says about its tokens beside tokenizer.json. Nothing here reads it,
# but a fine-tuned model that is exported gets it back.
SETTINGS_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


class BPETokenizer(Tokenizer):
    """Byte-pair encoding: bytes that often follow each other become one token.

    It needs the package `tokenizers`, and comes from a tokenizer.json, of Hugging Face or learned here.
    Source: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016,
    arXiv:1508.07909.
    """

    def __init__(self, spec: dict):
        """spec: "json" is the content of a tokenizer.json; the other entries may be left out.

        If "special_tokens" is true, "<|endoftext|>" in a text is the token of this name; else it is text like
        any other. Raises ValueError if the tokenizer cannot be used.
        """
        import tokenizers

        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(spec["json"])
            decoder = json.dumps(json.loads(spec["json"])["decoder"])
        except Exception as error:  # the package raises no narrower type, and may show the whole file
            raise ValueError(f"not a tokenizer.json: {str(error)[:200]}") from None
        # Two kinds of tokenizer keep every byte. GPT-2's writes each byte as a visible character. Llama 2's
        # has a token like <0xE9> for each byte of a rare character; it puts a space before each text.
        self.byte_level = "ByteLevel" in decoder
        if not self.byte_level and "ByteFallback" not in decoder:
            raise ValueError("its tokens do not stand for bytes; such a tokenizer is not supported")
        self.whole_documents = not self.byte_level
        self.tokenizer.encode_special_tokens = not spec.get("special_tokens")  # True means: as text
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

        names = {token: name for name, token in self.tokenizer.get_vocab().items()}
        self.vocab_size = max(names) + 1
        self.table = [self.spell(names.get(token, "")) for token in range(self.vocab_size)]
        self.start_ids = tuple(self.tokenizer.encode("").ids)
        self.eos_id = spec.get("eos_id")
        if self.eos_id is None:
            self.eos_id = self.find_eos_id()
        if self.eos_id not in names:
            raise ValueError(f"eos_token_id is {self.eos_id}: it has no such token; name one in config.json")
        self.eos_name = names[self.eos_id]
        self.spec = {"kind": "bpe", **spec, "eos_id": self.eos_id}

    def find_eos_id(self) -> int | None:
        for name in EOS_NAMES:
            token = self.tokenizer.token_to_id(name)
            if token is not None:
                return token
        return None

    def spell(self, name: str) -> bytes:
        """The bytes that the token of this name stands for."""
        if self.byte_level:
            if all(character in VISIBLE_BYTES for character in name):
                return bytes(VISIBLE_BYTES[character] for character in name)
            return name.encode()  # a token that was added later, under its plain name
        byte = re.fullmatch("<0x([0-9A-F]{2})>", name)
        if byte:
            return bytes.fromhex(byte[1])
        return name.replace("▁", " ").encode()

    def encode(self, text: bytes) -> np.ndarray:
        """Raises UnicodeDecodeError, a ValueError, where text is not UTF-8."""
        encoding = self.tokenizer.encode(text.decode(), add_special_tokens=False)
        return np.array(encoding.ids, np.int64)

    def encode_pieces(self, pieces: list[Piece]) -> list[np.ndarray]:
        """Encode on all CPU cores at once. Raises ValueError where a piece is not UTF-8."""
        texts = [piece.decode() for piece in pieces]
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Learn the vocab_size most useful tokens of the texts. Token 0, <|endoftext|>, ends a document."""
    import tokenizers

    tokenizer = tokenizers.ByteLevelBPETokenizer()
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # or Ctrl-C would wait until the package is done
    tokenizer.train_from_iterator(
        texts, vocab_size, min_frequency=0, show_progress=False, special_tokens=["<|endoftext|>"]
    )
    signal.signal(signal.SIGINT, handler)
    return BPETokenizer({"json": tokenizer.to_str(), "eos_id": 0})


def find_tokenizer(path: str | Path, special_tokens: bool | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, of a tokenizer.json, or of a checkpoint.

    special_tokens: whether their names in a text are these tokens; None: as in the data of the checkpoint.
    Raises OSError if the file cannot be read, ValueError if it cannot be used.
    """
    file = Path(path)
    if not file.exists():
        find_model(path)  # says what to do
    if file.is_dir() and (file / "tokenizer.json").exists():
        file = file / "tokenizer.json"
    elif file.is_dir():  # that of a run
        file = find_model(path)
    if file.is_dir():
        raise ValueError(f"{path}: has no tokenizer.json")
    if file.suffix == ".json":
        spec = read_tokenizer_json(file)
    else:
        spec = read_checkpoint(file)["tokenizer"]
    with contents_of(file):
        spec = dict(spec)
        if special_tokens:
            spec["special_tokens"] = True
        elif special_tokens is False:
            spec.pop("special_tokens", None)
        return load_tokenizer(spec)


def read_tokenizer_json(file: Path) -> dict:
    """The spec of a BPETokenizer: a tokenizer.json, and what the files beside it say about its tokens."""
    spec = {"kind": "bpe", "json": file.read_text(encoding="utf-8")}
    settings = {}
    for name in SETTINGS_FILES:
        path = file.with_name(name)
        if path.exists():
            settings[name] = path.read_text(encoding="utf-8")
            if name.endswith(".json"):
                read_json(path)  # if it is damaged, say so now
    if settings:
        spec["settings"] = settings
    for config in (file.with_name("generation_config.json"), file.with_name("config.json")):
        if spec.get("eos_id") is None and config.exists():
            spec["eos_id"] = read_json(config).get("eos_token_id")
    if isinstance(spec.get("eos_id"), list):  # chat models have further ones, which end a turn
        spec["eos_id"] = spec["eos_id"][0]
    return spec


def load_tokenizer(spec: dict) -> Tokenizer:
    """The tokenizer that the `spec` of a meta.json or of a checkpoint describes."""
    kind = spec.get("kind")
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "bpe":
        return BPETokenizer(spec)
    raise ValueError(f"the tokenizer is of the kind {kind!r}; only bytes and bpe are known")


def same_tokens(spec: dict, other: dict) -> bool:
    """Whether two tokenizers mean the same by each token, though one may read special tokens as text."""
    return all(spec.get(key) == other.get(key) for key in ("kind", "json", "eos_id"))


# ------------------------------------------------------------------------------------------------ Token files
BATCH_SIZE = 256  # pieces to encode at once: enough work for all cores


def write_tokens(corpus: Corpus, tokenizer: Tokenizer, out_dir: str) -> None:
    """Write the tokens of a corpus to train.bin and val.bin in out_dir, and what they are to meta.json.

    Each file appears whole or not at all. Raises ValueError if there is too little text, OSError if a file
    cannot be read or written.
    """
    out = Path(out_dir)
    replaced = ""
    with contextlib.suppress(OSError, ValueError):  # nothing was there, or it was damaged
        replaced = f", in place of those of {read_json(out / 'meta.json').get('source')}"
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)  # the smallest that holds every token id
    with atomic_write(out / "train.bin") as train_file, atomic_write(out / "val.bin") as val_file:
        files = {"train": train_file, "val": val_file}
        counts = write_pieces(corpus, tokenizer, dtype.newbyteorder("<"), files)
        if counts["train_tokens"] == 0 or counts["val_tokens"] == 0:
            raise ValueError(
                f"{corpus.name}: {counts['train_bytes']:,} bytes to train on and {counts['val_bytes']:,} to "
                "validate with are too few; use more text, or another --val_fraction"
            )
    spec = dict(tokenizer.spec)
    if "json" in spec:
        with atomic_write(out / "tokenizer.json") as file:
            file.write(spec.pop("json").encode())
    meta = {
        "tokenizer": spec,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "dtype": dtype.name,
        "source": corpus.name,
        **counts,
    }
    with atomic_write(out / "meta.json") as file:
        file.write(json.dumps(meta, indent=2).encode() + b"\n")
    show_progress("")
    print(
        f"{out}: {meta['train_tokens']:,} tokens to train on, {meta['val_tokens']:,} to validate with, "
        f"from {corpus.name} (files: {len(corpus.files):,}, documents: {corpus.num_documents:,}){replaced}"
    )


def write_pieces(corpus: Corpus, tokenizer: Tokenizer, dtype: np.dtype, files: dict[str, BinaryIO]) -> dict:
    """Write the tokens of each piece to the file of its split → what meta.json says about the files."""
    start = np.array(tokenizer.start_ids, dtype)
    separator = np.array([tokenizer.eos_id, *tokenizer.start_ids], dtype)  # between two documents
    num_bytes = {"train": 0, "val": 0}
    digest = hashlib.sha256()
    pieces = corpus.pieces("preparing", tokenizer.whole_documents)
    batch = list(itertools.islice(pieces, BATCH_SIZE))
    while batch:
        encoded = tokenizer.encode_pieces(batch)
        for piece, ids in zip(batch, encoded, strict=True):
            file = files[piece.split]
            if piece.starts_document:
                file.write(separator if file.tell() > 0 else start)
            file.write(ids.astype(dtype))
            num_bytes[piece.split] += len(piece.text)
            digest.update(piece.text)
        batch = list(itertools.islice(pieces, BATCH_SIZE))
    return {
        "train_tokens": files["train"].tell() // dtype.itemsize,
        "val_tokens": files["val"].tell() // dtype.itemsize,
        "train_bytes": num_bytes["train"],
        "val_bytes": num_bytes["val"],
        "sha256": digest.hexdigest(),  # of the text
    }


META_KEYS = [
    "tokenizer",
    "vocab_size",
    "eos_id",
    "dtype",
    "source",
    "train_tokens",
    "val_tokens",
    "train_bytes",
    "val_bytes",
    "sha256",
]


def load_meta(data_dir: str) -> dict:
    """What data_dir/meta.json says; the spec of the tokenizer is complete, as load_tokenizer needs it.

    Raises ValueError if the data must be prepared first, or again.
    """
    path = Path(data_dir, "meta.json")
    command = f"python prepare.py TEXT --out_dir={shlex.quote(str(data_dir))}"
    try:
        meta = read_json(path)
        for key in META_KEYS:
            if key not in meta:
                raise ValueError(f"{path}: has no {key}; prepare the data again:  {command}")
        for key in ("vocab_size", "train_tokens", "val_tokens", "train_bytes", "val_bytes"):
            if type(meta[key]) is not int or meta[key] < 1:
                raise ValueError(f"{path}: {key} is {meta[key]!r}; prepare the data again:  {command}")
        spec = meta["tokenizer"]
        if spec["kind"] == "bpe":
            spec["json"] = path.with_name("tokenizer.json").read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename}: not there; make it:  {command}") from None
    return meta


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError if it is damaged, OSError if it cannot be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, not an object in JSON ({error})") from None


# ------------------------------------------------------------------------------------------------------- main
LONG_WORD = re.compile(r"\S{200}")


def make_tokenizer(config: PrepareConfig, corpus: Corpus) -> Tokenizer:
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer != "bpe":
        return find_tokenizer(config.tokenizer, config.special_tokens)
    pieces = corpus.pieces("learning tokens from")
    # A word of many thousand letters would take minutes: cut it.
    texts = (LONG_WORD.sub(r"\g<0> ", piece.decode()) for piece in pieces if piece.split == "train")
    num_bytes = sum(file.stat().st_size for file in corpus.files)
    if config.vocab_size is not None and config.vocab_size > 257 + num_bytes:
        raise ValueError(f"--vocab_size={config.vocab_size}: too many for {num_bytes:,} bytes of text")
    return train_tokenizer(texts, config.vocab_size or 4096)


def main(argv: list[str]) -> None:
    inputs = []
    keys = []
    for word in join_values(argv):
        if word == "-" or not word.startswith("-"):
            inputs.append(word)
        else:
            keys.append(word)
    config = PrepareConfig(**parse_args(PrepareConfig, keys, __doc__))
    with locked(config.out_dir), tempfile.TemporaryDirectory() as copies:
        if inputs:
            name = " ".join("standard input" if name == "-" else name for name in inputs)
            corpus = Corpus(name, find_files(inputs, config.out_dir, copies), config.val_fraction)
        else:
            corpus = standard_library(config.val_fraction)
        write_tokens(corpus, make_tokenizer(config, corpus), config.out_dir)


# ------------------------------------------------------------------------------- What the three scripts share
def parse_args(config_class: type, argv: list[str], doc: str) -> dict:
    """The keys given on a command line, each with a value of the type of the dataclass's field.

    Both --key=value and --key value are understood. --help prints doc and all keys. Raises ValueError for an
    unknown key and for a value of another type.
    """
    if "-h" in argv or "--help" in argv:
        print_help(config_class, doc)
        sys.exit(0)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    overrides = {}
    for word in join_values(argv):
        key, equals, text = word.removeprefix("--").partition("=")
        if key not in fields:
            hint = "--help lists all keys"
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.6)
            if near:
                hint = f"did you mean --{near[0]}=VALUE? {hint}"
            raise ValueError(f"{word}: no such key; {hint}")
        if not word.startswith("--") or not equals:
            raise ValueError(f"{word}: a key is given as --{key}=VALUE")
        overrides[key] = parse_value(word, text, fields[key].type)
    return overrides


def join_values(argv: list[str]) -> list[str]:
    """Write each `--key value` as `--key=value`."""
    words = []
    key_waits = False  # for its value
    for word in argv:
        if key_waits and not word.startswith("--"):
            words[-1] += f"={word}"
            key_waits = False
        else:
            words.append(word)
            key_waits = word.startswith("--") and "=" not in word and word != "--help"
    return words


def parse_value(word: str, text: str, kind) -> object:
    """The value `text` of the argument `word`, as a str, int, float, bool or Literal, or as one | None."""
    if isinstance(kind, types.UnionType):  # as int | None
        if text.lower() == "none":
            return None
        kind = typing.get_args(kind)[0]
    if text == "" and not word.startswith("--prompt="):  # a prompt may be empty
        raise ValueError(f"{word}: the value is missing")
    if kind is str:
        return text
    choices = (True, False) if kind is bool else typing.get_args(kind)  # of a Literal; numbers have none
    for choice in choices:
        if text.lower() == str(choice).lower():
            return choice
    if choices:
        raise ValueError(f"{word}: must be one of {', '.join(map(str, choices))}")
    try:
        return parse_whole_number(text) if kind is int else float(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{word}: must be {what}") from None


def parse_whole_number(text: str) -> int:
    """Like int(text), but 1e4 is a whole number too."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


def print_help(config_class: type, doc: str) -> None:
    """Print doc, and each field with its default and the comment behind it."""
    source = inspect.getsource(config_class)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    print(doc.strip())
    print("\nKeys, with their defaults:")
    for field in dataclasses.fields(config_class):
        key = f"--{field.name}={field.default}"
        print(f"  {key:33}  {comments[field.name]}")


def run_cli(main: Callable[[list[str]], None]) -> None:
    """Call main(argv). What the user can mend ends in one line and status 2, a bug in its traceback."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (open for the whole run)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where the terminal does not know a character
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as a shell reports it
    except BrokenPipeError:  # whoever reads our output, as `| head` does, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE
    except Exception as error:
        can_be_mended = isinstance(error, ValueError | OSError | ModuleNotFoundError)
        if not can_be_mended and not is_out_of_memory(error):
            raise
        show_progress("")
        print(f"error: {format_error(error)}", file=sys.stderr)
        sys.exit(2)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the memory of any device is full. On a CPU, torch raises a RuntimeError then."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    too_large = "allocate memory" in str(error) or "Storage size" in str(error)
    return isinstance(error, RuntimeError) and too_large


def format_error(error: Exception) -> str:
    """What is wrong, in one line."""
    if isinstance(error, ModuleNotFoundError):  # a package that is imported where it is used
        return f"this needs the package {error.name}:  pip install {error.name}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Make a folder, and keep other processes from writing to it meanwhile.

    The lock ends with its process, however that ends. Raises ValueError if another process has it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows has other locks
        yield
        return
    with open(Path(folder, ".lock"), "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is writing to it; name another folder") from None
        except OSError:  # some network file systems have no locks
            yield
            return
        for leftover in Path(folder).glob(".*.[0-9]*.tmp"):  # by atomic_write of a process that was killed
            leftover.unlink()
        yield


def print_safely(text: str, end: str = "\n", file=None) -> None:
    """Print, but go on in silence if the terminal was closed, or the reader of a pipe has left."""
    file = file or sys.stdout
    try:
        print(text, end=end, file=file, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def show_progress(line: str) -> None:
    """Print a line to standard error. On a terminal it replaces the one before; "" removes that."""
    if sys.stderr.isatty():
        print_safely(f"\r\033[K{line}", end="", file=sys.stderr)
    elif line:
        print_safely(line, file=sys.stderr)


def find_model(path: str | Path) -> Path:
    """The checkpoint, or the folder of a Hugging Face model, that a path on the command line means.

    The folder of a run means its best.pt, or its last.pt where there is no best. Raises ValueError for
    anything else, and says what to do.
    """
    path = str(path)
    place = Path(path)
    if place.is_file():
        return place
    if not place.exists():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and place.suffix != ".pt":
            command = shlex.join(["hf", "download", path, "--local-dir", place.name])
            raise ValueError(f"{path}: not a folder; if it is a model on Hugging Face, fetch it:  {command}")
        others = sorted(str(file) for file in place.parent.glob("*.pt"))
        there = f", but {' and '.join(others)}" if others else "; train a model:  python train.py"
        raise ValueError(f"{path}: not there{there}")
    for name in ("best.pt", "last.pt"):
        if (place / name).exists():
            return place / name
    if (place / "adapter_config.json").exists():
        raise ValueError(f"{path}: an adapter, not a model; merge it first, with peft's merge_and_unload()")
    if not (place / "config.json").exists():
        raise ValueError(f"{path}: has no best.pt, as a run of train.py, and no config.json, as a Llama has")

    weights = lm.weight_files(place)[0]
    command = shlex.join(["hf", "download", "OWNER/NAME", "--local-dir", path])
    if not weights.exists():
        others = sorted(file.name for file in place.glob("*.bin"))
        found = f", but {others[0]}, which may contain code" if others else ""
        raise ValueError(f"{path}: has no {weights.name}{found}; fetch a model that has it:  {command}")
    with open(weights, "rb") as file:
        if file.read(20) == b"version https://git-":
            raise ValueError(f"{weights}: only a pointer of git-lfs; fetch the weights:  {command}")
    return place


@contextlib.contextmanager
def contents_of(path: Path) -> Iterator[None]:
    """Turn what wrong contents of a checkpoint lead to into one error that names the file."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
            raise ValueError(f"{path}: {error}") from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{path}: not what train.py saves ({reason})") from error


def read_checkpoint(path: Path) -> dict:
    """A checkpoint of train.py. Its tensors stay in the file until they are used."""
    state = lm.CheckpointHandler(path.parent).load(path.name)
    for key in ("model", "model_config", "tokenizer"):
        if key not in state:
            raise ValueError(f"{path}: not a checkpoint of this version of train.py: it has no {key}")
    return state


def load_config(path: Path) -> lm.ModelConfig:
    """The shape of the model at a path that find_model has returned."""
    if path.is_dir():
        return lm.pretrained_config(path)
    state = read_checkpoint(path)
    with contents_of(path):
        return lm.ModelConfig(**state["model_config"])


def load_model(path: Path, dtype: torch.dtype = torch.float32, **changes) -> lm.TransformerLM:
    """The model at a path that find_model has returned; `changes` replace fields of its ModelConfig."""
    if path.is_dir():
        return lm.load_pretrained(path, dtype, **changes)
    state = read_checkpoint(path)
    with contents_of(path):
        config = lm.ModelConfig(**{**state["model_config"], **changes})
        weights = {name: weight.to(dtype) for name, weight in state["model"].items()}
        return lm.model_from_state_dict(config, weights)


def pick_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Turn names into torch's own objects; "auto" becomes what is fastest here."""
    if device == "auto":
        if torch.cuda.is_available():
            device = "cuda"
        elif torch.backends.mps.is_available():
            device = "mps"
        else:
            device = "cpu"
    try:
        probe = torch.zeros(1, device=device)
        probe.cpu()  # fails on the meta device, which holds no data
        device = probe.device  # as "cuda" becomes cuda:0
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device={device}: not usable here: {str(error).splitlines()[0]}") from None
    if dtype == "auto":
        if device.type == "cuda":
            dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        elif device.type == "cpu" and bfloat16_is_fast():
            dtype = "bfloat16"
        else:
            dtype = "float32"
    return device, getattr(torch, dtype)


def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies matrices much faster in bfloat16 than in float32.

    The list of its instructions does not tell: a Xeon that has AVX512-BF16 took twice as long with it.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(512, 512, dtype=dtype)
        trials = timeit.repeat("matrix @ matrix", globals={"matrix": matrix}, number=1, repeat=8)
        seconds[dtype] = min(trials)
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]


if __name__ == "__main__":
    run_cli(main)
