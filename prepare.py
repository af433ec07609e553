"""Turn text into token files: data/train.bin, data/val.bin and data/meta.json.

    python prepare.py book.txt                     # one document: its last tenth is held out for validation
    python prepare.py notes/ --out_dir=data-notes  # every file in the folder; every tenth is held out
    python prepare.py corpus.jsonl                 # a document a line: {"text": "..."}
    curl ... | python prepare.py -                 # standard input
    python prepare.py                              # the source of Python's own standard library
    python prepare.py book.txt --tokenizer=bpe --vocab_size=4096     # tokens of several bytes, learned
    python prepare.py book.txt --tokenizer=FOLDER  # the tokenizer of a Hugging Face model

The tokenizers live here too, and what the three scripts share: a dataclass as a command line, the one-line
`error:`, and the choice of a device.
"""

import codecs
import contextlib
import dataclasses
import difflib
import hashlib
import inspect
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import time
import timeit
import types
import typing
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from lm import atomic_write


# ------------------------------------------------------------------------------- What all three scripts share
def convert(arg: str, text: str, kind) -> object:
    """What text, the value in arg, means for a str, int, float, bool, a Literal, or one of them | None."""
    kind, *none = typing.get_args(kind) if isinstance(kind, types.UnionType) else [kind]
    if none and text.lower() == "none":
        return None
    if choices := (True, False) if kind is bool else typing.get_args(kind):
        with contextlib.suppress(KeyError):
            return {str(choice).lower(): choice for choice in choices}[text.lower()]
        raise ValueError(f"{arg}: must be one of {', '.join(map(str, choices))}")
    with contextlib.suppress(ValueError):
        return kind(text)
    with contextlib.suppress(ValueError):
        if (number := float(text)).is_integer():  # 1e4 is a whole number too
            return int(number)
    raise ValueError(f"{arg}: must be a {'whole ' if kind is int else ''}number")


def parse_args(config_class: type, argv: list[str], doc: str) -> dict:
    """{key: value} of the --key=value in argv, each typed as the dataclass's field of that name.

    --help prints doc and the keys, each with the comment behind its field. Raises ValueError for an unknown
    key or a value not of its type.
    """
    keys, given = {field.name: field for field in dataclasses.fields(config_class)}, {}
    if {"-h", "--help"} & set(argv):
        source = inspect.getsource(config_class)
        comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
        print(doc.strip() + "\n\nKeys, with their defaults:")
        for name, field in keys.items():
            print(f"  {f'--{name}={field.default}':33}  {comments[name]}")
        raise SystemExit(0)
    for arg in argv:
        key, equals, text = arg.removeprefix("--").partition("=")
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)[0]
            raise ValueError(f"{arg}: no such key; did you mean --{near}=VALUE? (--help lists all)")
        if not (equals and arg.startswith("--")):
            raise ValueError(f"{arg}: a key is given as --{key}=VALUE")
        given[key] = convert(arg, text, keys[key].type)
    return given


def run_cli(main) -> None:
    """Call main(argv). What the user can mend ends in one line and status 2, a bug in its traceback."""
    try:
        main(sys.argv[1:])
    except BrokenPipeError:  # who reads our output, as `| head` does, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE, as a shell reports it
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError, MemoryError) as problem:
        if isinstance(problem, RuntimeError) and not is_out_of_memory(problem):
            raise
        show_progress("")
        print(f"error: {format_error(problem)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def is_out_of_memory(problem: Exception) -> bool:
    """Of whichever device: the CPU's allocator raises a RuntimeError."""
    return isinstance(problem, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(problem)


def format_error(problem: Exception) -> str:
    if isinstance(problem, ModuleNotFoundError):  # all but torch and numpy are imported where they are used
        return f"this needs the package {problem.name}:  pip install {problem.name}"
    where = getattr(problem, "filename", None)
    return f"{where}: {problem.strerror}" if where else str(problem)


def show_progress(line: str) -> None:
    """Print line to standard error: on a terminal in place of the one before, which "" clears."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
    elif line:
        print(line, file=sys.stderr, flush=True)


def pick_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Resolve "auto": CUDA, MPS or CPU; bfloat16 where it is fast, else float16 on CUDA, else float32."""
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as problem:
        raise ValueError(f"--device={device}: not usable here: {str(problem).splitlines()[0]}") from None
    if dtype == "auto":
        cuda = device.type == "cuda"
        fast = torch.cuda.is_bf16_supported(False) if cuda else device.type == "cpu" and bfloat16_is_fast()
        dtype = "bfloat16" if fast else "float16" if cuda else "float32"
    return device, getattr(torch, dtype)


def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies matrices much faster in bfloat16 than in float32.

    Timed, for flags do not tell: a Xeon that reports AVX512-BF16 was seen to take twice as long with it.
    """
    a = torch.ones(512, 512)
    float32, bfloat16 = (timeit.repeat(lambda m=m: m @ m, number=1, repeat=8) for m in (a, a.bfloat16()))
    return min(bfloat16) < 0.7 * min(float32)


# ------------------------------------------------------------------------------------------------- Tokenizers
class ByteTokenizer:
    """Each byte is a token: nothing to train, nothing unknown. Byte 0, unused in text, ends a document."""

    vocab_size, eos_id, start_ids = 256, 0, ()
    batch_size = 1  # how many pieces encode_batch is given at a time
    spec = types.MappingProxyType({"kind": "bytes"})  # all that load_tokenizer needs
    table = tuple(bytes([i]) for i in range(256))  # the bytes of each token

    @staticmethod
    def pieces(blocks: Iterable[bytes]) -> Iterable:
        """A document's blocks as pieces that encode_batch can take one by one."""
        return blocks

    def encode_batch(self, pieces: list) -> list[np.ndarray]:
        return [np.frombuffer(piece, np.uint8) for piece in pieces]

    def encode(self, text: bytes) -> np.ndarray:
        return np.concatenate(self.encode_batch(list(self.pieces([text]))) or [np.zeros(0, np.int64)])

    def decode(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield text as the ids come; a character that spans several is held back until it is whole."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in ids:  # a model's vocabulary may be padded beyond the tokenizer's
            yield decoder.decode(self.table[token] if token < len(self.table) else b"\xff")
        yield decoder.decode(b"", final=True)


# In a tokenizer.json each byte is a visible character: itself, or else the next from 256 on (GPT-2, 2019).
VISIBLE, BEYOND = {*range(33, 127), *range(161, 173), *range(174, 256)}, itertools.count(256)
BYTES = {chr(byte if byte in VISIBLE else next(BEYOND)): byte for byte in range(256)}
# A piece ends between a word and a space, where tokens end in any case; failing that, where a character does.
PIECE = re.compile(rb"(?s).{65536,1048576}?(?<=[0-9A-Za-z])(?=\s)|.{1048576,1048579}(?=[^\x80-\xbf])")


class BPETokenizer(ByteTokenizer):
    """Byte-pair encoding: frequent neighbours are one token. A tokenizer.json of the package `tokenizers`.

    Source: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016.
    """

    batch_size = 256  # enough for all cores

    def __init__(self, text: str, eos_id: int | None = None):
        """text: of the tokenizer.json. Raises ValueError if it is none, or not of a kind that keeps bytes."""
        import tokenizers

        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(text)
            decoder = json.dumps(json.loads(text)["decoder"])
        except Exception as problem:  # the package raises this very type
            raise ValueError(f"no tokenizer.json: {problem}") from None
        if not ("ByteLevel" in decoder or "ByteFallback" in decoder):
            raise ValueError("a tokenizer whose tokens do not stand for bytes, which is not supported")
        self.tokenizer.encode_special_tokens = True  # in a text, "<|endoftext|>" is text
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        names = {token: name for name, token in self.tokenizer.get_vocab().items()}
        usual = map(self.tokenizer.token_to_id, ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"))
        eos_id = next((token for token in (eos_id, *usual) if token is not None), None)
        if eos_id not in names:
            raise ValueError(f"its eos_token_id is {eos_id}; set one that it has in a config.json beside it")
        self.vocab_size, self.eos_id = max(names) + 1, eos_id
        self.start_ids = tuple(self.tokenizer.encode("").ids)  # what it puts before each text: Llama 2's <s>
        self.spec = {"kind": "bpe", "eos_id": eos_id, "json": text}
        self.byte_level = "ByteLevel" in decoder
        if not self.byte_level:  # then each text that is encoded gets a space before it
            self.pieces = lambda blocks: filter(None, [b"".join(blocks).decode()])
        self.table = tuple(self.spell(names.get(token, "")) for token in range(self.vocab_size))

    def spell(self, name: str) -> bytes:
        if self.byte_level:
            return bytes(BYTES[c] for c in name) if BYTES.keys() >= set(name) else name.encode()
        byte = re.fullmatch("<0x([0-9A-F]{2})>", name)
        return bytes.fromhex(byte[1]) if byte else name.replace("▁", " ").encode()

    @staticmethod
    def pieces(blocks: Iterable[bytes]) -> Iterator[str]:
        """Raises UnicodeDecodeError where the bytes are not UTF-8."""
        rest = b""
        for block in blocks:
            rest, end = rest + block, 0
            while match := PIECE.match(rest, end):
                end = match.end()
                yield match[0].decode()
            rest = rest[end:]
        if rest:
            yield rest.decode()

    def encode_batch(self, pieces: list[str]) -> list[np.ndarray]:
        encoded = self.tokenizer.encode_batch_fast(pieces, add_special_tokens=False)  # on all cores
        return [np.array(e.ids, np.int64) for e in encoded]


def train_tokenizer(pieces: Iterable[str], vocab_size: int) -> BPETokenizer:
    """A byte-level BPE of vocab_size tokens, learned from pieces; token 0, <|endoftext|>, ends a document."""
    import tokenizers

    tokenizer = tokenizers.ByteLevelBPETokenizer()
    settings = {"min_frequency": 0, "show_progress": False, "special_tokens": ["<|endoftext|>"]}
    tokenizer.train_from_iterator(pieces, vocab_size, **settings)
    return BPETokenizer(tokenizer.to_str(), 0)


def find_tokenizer(path: str) -> BPETokenizer:
    """The tokenizer of a tokenizer.json or of a folder that holds one. Raises ValueError or OSError."""
    file = Path(path, "tokenizer.json") if Path(path).is_dir() else Path(path)
    try:
        text, eos_id = file.read_text(), None
        for config in (file.with_name("generation_config.json"), file.with_name("config.json")):
            if eos_id is None and config.exists():
                eos_id = json.loads(config.read_text()).get("eos_token_id")
        return BPETokenizer(text, eos_id[0] if isinstance(eos_id, list) else eos_id)
    except (ValueError, LookupError, TypeError, AttributeError) as problem:
        raise ValueError(f"{file}: {problem}") from None


def load_tokenizer(spec: dict) -> ByteTokenizer:
    """The tokenizer that `spec`, from a meta.json or a checkpoint, describes."""
    if spec == ByteTokenizer.spec:
        return ByteTokenizer()
    if spec.keys() != {"kind", "eos_id", "json"} or spec["kind"] != "bpe":
        raise ValueError(f"the tokenizer {str(spec)[:60]!r} is not known; known are the kinds bytes and bpe")
    return BPETokenizer(spec["json"], spec["eos_id"])


def export_tokenizer(tokenizer: ByteTokenizer, folder: str) -> None:
    """Write the files from which transformers' AutoTokenizer makes the same tokenizer.

    No end-of-text token is declared, or its name would be found in texts: config.json has its id.
    """
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {"type": "BPE", "vocab": BYTES, "merges": []}  # bytes as they are
    plain = {"version": "1.0", "added_tokens": [], "pre_tokenizer": level, "decoder": level, "model": model}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    files = {"tokenizer.json": tokenizer.spec.get("json") or json.dumps(plain)}
    files["tokenizer_config.json"] = json.dumps(config | {"split_special_tokens": True})
    files["generation_config.json"] = json.dumps({"eos_token_id": tokenizer.eos_id})
    for name, text in files.items():
        with atomic_write(Path(folder, name)) as file:
            file.write(text.encode())


# -------------------------------------------------------------------------------------------------- Documents
LIBRARY = f"the standard library of Python {sys.version.split()[0]}"
EXCLUDED = re.compile(  # tables, giant literals, tests, and paths of the machine that built Python
    r"(^|/)(site-packages|dist-packages|tests?|idle_test|encodings|pydoc_data|lib2to3|idlelib|distutils"
    r"|config-[^/]*|__pycache__)/|(^|/)_sysconfigdata"
)


def standard_library() -> list[tuple]:
    """The sources of Python's standard library, as `find_parts` returns them.

    Whole top-level modules are held out, about a tenth of the bytes, so that no text stands on both sides.
    """
    root = Path(os.__file__).parent
    parts, names = [], sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    for name in itertools.filterfalse(EXCLUDED.search, names):
        path, top = root / name, name.split("/")[0].removesuffix(".py")
        parts.append((path, 0, path.stat().st_size, zlib.crc32(top.encode()) % 10 == 0))
    return parts


def find_parts(inputs: list[str], val_fraction: float, out_dir: str, copies: str) -> list[tuple]:
    """(path, first byte, end, share of its documents to hold out) of each file named or in a folder named.

    Where there are so few that none would be held out, the last val_fraction of all their bytes is. What is
    no file, as standard input, "-", is copied to one in the folder `copies` first.
    """
    # What an earlier call wrote, killed or not, is no text, should out_dir lie in a folder named, or be one.
    paths, names = [], ("train.bin", "val.bin", "meta.json", "tokenizer.json")
    made = {Path(out_dir, name + end).resolve() for name in names for end in ("", ".tmp")}
    for i, path in enumerate(map(Path, inputs)):
        if path.is_dir():
            shown = (p for p in path.rglob("*") if "/." not in f"/{p.relative_to(path)}")  # nothing hidden
            paths += sorted(p for p in shown if p.is_file() and p.resolve() not in made)
        elif (stdin := str(path) == "-") or path.is_fifo():
            paths.append(Path(copies, f"{i}{path.suffix}"))
            with open(0 if stdin else path, "rb", closefd=not stdin) as source, open(paths[-1], "wb") as copy:
                shutil.copyfileobj(source, copy, 2**20)
        else:
            paths.append(path)
    sizes = [path.stat().st_size for path in paths]
    if len(paths) * val_fraction >= 1 or any(path.suffix == ".jsonl" for path in paths):
        return [(path, 0, size, val_fraction) for path, size in zip(paths, sizes, strict=True)]
    parts, cut = [], sum(sizes) - int(sum(sizes) * val_fraction)
    for path, size in zip(paths, sizes, strict=True):
        here = min(max(cut, 0), size)
        with open(path, "rb") as file:
            file.seek(here)  # not inside of a character
            here += len(re.match(rb"[\x80-\xbf]{0,3}", file.read(3))[0])
        parts += [(path, 0, here, 0), (path, here, size, 1)]
        cut -= size
    return parts


def read_documents(parts: list[tuple]) -> Iterator[tuple[Path, float, Iterable[bytes]]]:
    """(path, share to hold out, blocks) of each document: of a .jsonl file, the field `text` of each line."""
    for path, start, end, share in parts:
        with open(path, "rb") as file:
            if path.suffix != ".jsonl":
                file.seek(start)
                yield path, share, (file.read(min(2**18, end - at)) for at in range(start, end, 2**18))
                continue
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield path, share, [json.loads(line)["text"].encode()]
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
                    raise ValueError(f'{path}, line {number}: no {{"text": "..."}} ({problem})') from None


class Reader:
    """Reads the documents of `parts`, and keeps their sizes and digest; says how long the rest will take.

    After the first second that is a line on standard error: each second anew, in a log each minute.
    """

    def __init__(self, what: str, parts: list[tuple]):
        self.what, self.parts, self.total = what, parts, sum(end - start for _, start, end, _ in parts)
        self.sizes, self.digest = [0, 0], hashlib.sha256()  # bytes to train on, bytes held out
        self.start, self.next = time.perf_counter(), 1.0

    def pieces(self, tokenizer) -> Iterator[tuple]:
        """(held out?, first of its document?, piece) of all documents."""
        for i, (path, share, blocks) in enumerate(read_documents(self.parts)):
            held_out = int((i + 1) * share) > int(i * share)  # a share of 0.1: every tenth
            try:
                for j, piece in enumerate(tokenizer.pieces(self.count(blocks, held_out))):
                    yield held_out, j == 0, piece
            except UnicodeDecodeError as problem:
                raise ValueError(f"{path}: not UTF-8 ({problem}); --tokenizer=bytes takes any file") from None

    def count(self, blocks: Iterable[bytes], held_out: bool) -> Iterator[bytes]:
        for block in blocks:
            yield block
            self.sizes[held_out] += len(block)
            self.digest.update(block)
            if (seconds := time.perf_counter() - self.start) > self.next:
                self.next = seconds + (1 if sys.stderr.isatty() else 60)
                done, total = sum(self.sizes) / 1e6, self.total / 1e6
                left = max(0, int(seconds * (total / max(done, 1e-6) - 1)))
                rate = f"{done / seconds:,.1f} MB/s  {left // 60}:{left % 60:02} left"
                show_progress(f"{self.what} {done:,.0f} of {total:,.0f} MB  {rate}")


# ---------------------------------------------------------------------------------------------------- Writing
def prepare(parts: list[tuple], out_dir: str, tokenizer, source: str) -> None:
    """Write the documents' tokens to out_dir/train.bin and val.bin, and what they are to out_dir/meta.json.

    Files appear whole or not at all. Raises ValueError where there is too little text, OSError where a file
    cannot be read or written.
    """
    out, spec, reader = Path(out_dir), dict(tokenizer.spec), Reader("preparing", parts)
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1).newbyteorder("<")  # the smallest for all ids
    seam = np.array([tokenizer.eos_id, *tokenizer.start_ids], dtype)  # between documents
    with atomic_write(out / "val.bin") as val, atomic_write(out / "train.bin") as train:
        pieces = reader.pieces(tokenizer)
        while batch := list(itertools.islice(pieces, tokenizer.batch_size)):
            encoded = tokenizer.encode_batch([piece for _, _, piece in batch])
            for (held_out, first, _), ids in zip(batch, encoded, strict=True):
                file = val if held_out else train
                if first:
                    file.write(seam if file.tell() else seam[1:])
                file.write(ids.astype(dtype, copy=False))
        tokens, sizes = [file.tell() // dtype.itemsize for file in (train, val)], reader.sizes
        if not all(tokens):
            few = f"{sizes[0]:,} bytes to train on and {sizes[1]:,} to validate with are too few"
            raise ValueError(f"{source}: {few}; use more text, or another --val_fraction")
    if text := spec.pop("json", None):
        with atomic_write(out / "tokenizer.json") as file:
            file.write(text.encode())
        spec["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    meta = {"tokenizer": spec, "vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}
    meta |= {"dtype": dtype.name, "train_tokens": tokens[0], "val_tokens": tokens[1]}
    meta |= {"train_bytes": sizes[0], "val_bytes": sizes[1], "source": source}
    with atomic_write(out / "meta.json") as file:
        file.write(json.dumps(meta | {"sha256": reader.digest.hexdigest()}, indent=2).encode() + b"\n")
    show_progress("")
    print(f"{out}: {tokens[0]:,} tokens to train on, {tokens[1]:,} to validate with, from {source}")


def load_meta(data_dir: str) -> dict:
    """data_dir/meta.json. Raises ValueError where it is missing or damaged, with the remedy."""
    path, kinds = Path(data_dir, "meta.json"), {"tokenizer": dict, "dtype": str, "source": str, "sha256": str}
    counts = ("vocab_size", "eos_id", "train_tokens", "val_tokens", "train_bytes", "val_bytes")
    try:
        meta = json.loads(path.read_text())
        for key, kind in (kinds | dict.fromkeys(counts, int)).items():
            if type(meta[key]) is not kind or (kind is int and not 0 <= meta[key] < 2**63):
                raise ValueError(f"{key} is {meta[key]!r}")
        if meta["dtype"] not in ("uint8", "uint16", "uint32"):
            raise ValueError(f"dtype is {meta['dtype']!r}")
        if "sha256" in meta["tokenizer"]:
            text = path.with_name("tokenizer.json").read_text()
            if hashlib.sha256(text.encode()).hexdigest() != meta["tokenizer"].pop("sha256"):
                raise ValueError("tokenizer.json is another than the tokens were made with")
            meta["tokenizer"]["json"] = text
    except FileNotFoundError as problem:
        command = f"python prepare.py TEXT --out_dir={data_dir}"
        raise ValueError(f"{problem.filename}: not there; make it:  {command}") from None
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"{path}: damaged ({problem!r}); prepare the data again") from None
    return meta


@dataclasses.dataclass
class PrepareConfig:
    """Every key of `python prepare.py --key=value`; the comments are its --help."""

    out_dir: str = "data"  # the folder to write
    tokenizer: str = "bytes"  # bytes; bpe: learned from the text; or a tokenizer.json, or a folder with one
    vocab_size: int | None = None  # with --tokenizer=bpe: how many tokens to learn; None: 4096
    val_fraction: float = 0.1  # share held out: of many documents every tenth, of one its last tenth


def make_tokenizer(c: PrepareConfig, parts: list[tuple]) -> ByteTokenizer:
    if c.vocab_size is not None and (c.tokenizer != "bpe" or not 257 <= c.vocab_size < 2**31):
        raise ValueError(f"--vocab_size={c.vocab_size}: goes with --tokenizer=bpe, and must be at least 257")
    if c.tokenizer != "bpe":
        return ByteTokenizer() if c.tokenizer == "bytes" else find_tokenizer(c.tokenizer)
    pieces = Reader("learning tokens from", parts).pieces(BPETokenizer)
    learned = (piece for held_out, _, piece in pieces if not held_out)
    return train_tokenizer(learned, c.vocab_size or 4096)


def main(argv: list[str]) -> None:
    inputs, keys = [], []
    for arg in argv:
        (inputs if arg == "-" or not arg.startswith("-") else keys).append(arg)
    c = PrepareConfig(**parse_args(PrepareConfig, keys, __doc__))
    if not 0 < c.val_fraction < 1:
        raise ValueError(f"--val_fraction={c.val_fraction}: must be above 0 and below 1")
    Path(c.out_dir).mkdir(parents=True, exist_ok=True)  # if it cannot be made, that is an error now
    with tempfile.TemporaryDirectory() as copies:
        parts = find_parts(inputs, c.val_fraction, c.out_dir, copies) if inputs else standard_library()
        source = " ".join("standard input" if name == "-" else name for name in inputs) or LIBRARY
        prepare(parts, c.out_dir, make_tokenizer(c, parts), source)


if __name__ == "__main__":
    run_cli(main)
