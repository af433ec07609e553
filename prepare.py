"""Turn text into token files: data/train.bin, data/val.bin and data/meta.json.

    python prepare.py book.txt                     # one document: its last tenth is held out for validation
    python prepare.py notes/ --out_dir=data-notes  # every file in the folder; every tenth is held out
    curl ... | python prepare.py -                 # standard input
    python prepare.py                              # the source of Python's own standard library

The tokenizers live here too, and what the three scripts share: a dataclass as a command line, the one-line
`error:`, and the choice of a device.
"""

import codecs
import contextlib
import dataclasses
import difflib
import hashlib
import inspect
import json
import os
import platform
import re
import sys
import sysconfig
import timeit
import types
import typing
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from lm import replacing

# ------------------------------------------------------------------------------- What all three scripts share


def convert(text: str, kind) -> object:
    """The value that text means for a field of type str, int, float, bool, a Literal, or one | None."""
    if isinstance(kind, types.UnionType):
        if text.lower() == "none":
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if choices := (True, False) if kind is bool else typing.get_args(kind):
        with contextlib.suppress(StopIteration):
            return next(choice for choice in choices if str(choice).lower() == text.lower())
        raise ValueError(f"must be one of {', '.join(map(str, choices))}")
    try:
        if kind is int and not re.fullmatch(r"[+-]?\d+", text):
            if float(text) != int(float(text)):  # 1e4 is a whole number too
                raise ValueError
            return int(float(text))
        return kind(text)
    except (ValueError, OverflowError):
        raise ValueError(f"must be a {'whole ' if kind is int else ''}number") from None


def parse_args(config_class: type, argv: list[str], doc: str) -> dict:
    """{key: value} of the --key=value in argv, each typed as the dataclass's field of that name.

    Words without dashes make the list `inputs`, where that is a field. --help prints doc and the keys, each
    with the comment behind its field. Raises ValueError for an unknown key or a value not of its type.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    keys, given = [name for name in fields if name != "inputs"], {}
    if {"-h", "--help"} & set(argv):
        comments = dict(
            re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config_class), re.MULTILINE)
        )
        print(doc.strip() + "\n\nKeys, with their defaults:")
        for name in keys:
            print(f"  {f'--{name}={fields[name].default}':33}  {comments[name]}")
        raise SystemExit(0)
    for arg in argv:
        key, equals, text = arg.removeprefix("--").partition("=")
        if "inputs" in fields and not arg.startswith("--"):
            given.setdefault("inputs", []).append(arg)
        elif key not in keys:
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)[0]
            raise ValueError(f"{arg}: no such key; did you mean --{near}=VALUE? (--help lists all)")
        elif not (equals and arg.startswith("--")):
            raise ValueError(f"{arg}: a key is given as --{key}=VALUE")
        else:
            try:
                given[key] = convert(text, fields[key].type)
            except ValueError as problem:
                raise ValueError(f"{arg}: {problem}") from None
    return given


def run(main) -> None:
    """Call main(argv). What the user can mend ends in one line and status 2, a bug in its traceback."""
    try:
        main(sys.argv[1:])
    except BrokenPipeError:  # who reads our output, as `| head` does, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE, as a shell reports it
    except (ValueError, OSError) as problem:
        print(f"error: {in_words(problem)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def in_words(problem: Exception) -> str:
    where = getattr(problem, "filename", None)
    return f"{where}: {problem.strerror}" if where else str(problem)


def pick_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Resolve "auto": CUDA, MPS or CPU; bfloat16 where it is fast, else float16 on CUDA, else float32."""
    if device == "auto":
        device = (
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
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
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype)
        seconds.append(min(timeit.repeat(lambda a=a: a @ a, number=1, repeat=8)))
    return seconds[1] < 0.7 * seconds[0]


# ------------------------------------------------------------------------------------------------- Tokenizers


class ByteTokenizer:
    """Each byte is a token: nothing to train, nothing unknown. Byte 0, unused in text, ends a document."""

    vocab_size, eos_id = 256, 0
    spec = types.MappingProxyType({"kind": "bytes"})  # all that load_tokenizer needs

    def encode(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, np.uint8)

    def decode(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield text as the ids come; a character that spans several is held back until it is whole."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in ids:
            yield decoder.decode(bytes([token]) if token < 256 else b"\xff")  # 256 and up: padding, no byte
        yield decoder.decode(b"", final=True)


def load_tokenizer(spec: dict) -> ByteTokenizer:
    """The tokenizer that `spec`, from a meta.json or a checkpoint, describes."""
    if spec != ByteTokenizer.spec:
        raise ValueError(f"the tokenizer {spec!r} is not known; what is known: {dict(ByteTokenizer.spec)}")
    return ByteTokenizer()


# -------------------------------------------------------------------------------------------------- Documents

EXCLUDED = re.compile(  # tables, giant literals, tests, and paths of the machine that built Python
    r"(^|/)(site-packages|dist-packages|tests?|idle_test|encodings|pydoc_data|lib2to3|idlelib|distutils"
    r"|config-[^/]*|__pycache__)/|(^|/)_sysconfigdata"
)


def standard_library() -> list[tuple[Path, bool]]:
    """(path, held out?) of the sources of Python's standard library.

    Whole top-level modules are held out, about a tenth of the bytes, so that no text stands on both sides.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    tops = {name: name.split("/")[0].removesuffix(".py") for name in names if not EXCLUDED.search(name)}
    if not tops:
        raise ValueError(f"{root}: this Python has no source of its library; prepare a text of your own")
    return [(root / name, zlib.crc32(top.encode()) % 10 == 0) for name, top in tops.items()]


def find_documents(inputs: list[str], val_fraction: float) -> list[tuple[Path, bool]]:
    """(path, held out?) of each file named and each file in a folder named; "-" is standard input."""
    paths = []
    for path in map(Path, inputs):
        files = sorted(p for p in path.rglob("*") if p.is_file() and "/." not in f"/{p.relative_to(path)}")
        paths += files if path.is_dir() else [path]  # nothing hidden, such as .git
    return [(path, int((i + 1) * val_fraction) > int(i * val_fraction)) for i, path in enumerate(paths)]


def read_blocks(path: Path) -> Iterator[bytes]:
    with sys.stdin.buffer if str(path) == "-" else open(path, "rb") as file:
        while block := file.read(2**20):
            yield block


# ---------------------------------------------------------------------------------------------------- Writing


def prepare(
    documents: list[tuple[Path, bool]], out_dir: str, tokenizer, val_fraction: float, source: str
) -> None:
    """Write the documents' tokens to out_dir/train.bin and val.bin, and what they are to out_dir/meta.json.

    Where no document is held out, the last val_fraction of the tokens is. Files appear whole or not at all.
    Raises ValueError where there is too little text, OSError where a file cannot be read or written.
    """
    out, largest, digest = Path(out_dir), tokenizer.vocab_size - 1, hashlib.sha256()
    dtype = np.dtype("<u1" if largest < 2**8 else "<u2" if largest < 2**16 else "<u4")
    eos, sizes = np.array([tokenizer.eos_id], dtype).tobytes(), [0, 0]
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "val.bin") as val, replacing(out / "train.bin") as train:
        for path, held_out in documents:
            file = val if held_out else train
            file.write(eos if file.tell() else b"")
            for block in read_blocks(path):
                file.write(tokenizer.encode(block).astype(dtype, copy=False))
                sizes[held_out] += len(block)
                digest.update(block)
        if not val.tell():
            total = train.tell() // dtype.itemsize
            cut = total - int(total * val_fraction)
            train.seek(cut * dtype.itemsize)
            while block := train.read(2**20):
                val.write(block)
            train.truncate(cut * dtype.itemsize)
            held = sizes[0] * (total - cut) // max(total, 1)
            sizes = [sizes[0] - held, held]
        tokens = [file.seek(0, 2) // dtype.itemsize for file in (train, val)]
        if not all(tokens):
            raise ValueError(
                f"{source}: {sum(sizes)} bytes are too little text to train on and to validate with"
            )
    meta = {"tokenizer": dict(tokenizer.spec), "vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}
    meta |= {"dtype": f"uint{8 * dtype.itemsize}", "train_tokens": tokens[0], "val_tokens": tokens[1]}
    meta |= {"train_bytes": sizes[0], "val_bytes": sizes[1], "source": source, "sha256": digest.hexdigest()}
    with replacing(out / "meta.json") as file:
        file.write(json.dumps(meta, indent=2).encode() + b"\n")
    print(f"{out}: {tokens[0]:,} tokens to train on, {tokens[1]:,} to validate with, from {source}")


def prepare_default(out_dir: str) -> None:
    """Prepare the corpus that needs no download: the standard library of the Python that runs this."""
    source = f"the standard library of Python {platform.python_version()}"
    prepare(standard_library(), out_dir, ByteTokenizer(), 0.1, source)


def load_meta(data_dir: str) -> dict:
    """data_dir/meta.json. Raises ValueError where it is missing or damaged, with the remedy."""
    path, counts = Path(data_dir, "meta.json"), ("train_tokens", "val_tokens", "train_bytes", "val_bytes")
    kinds = {"tokenizer": dict, "vocab_size": int, "eos_id": int, "dtype": str, "source": str, "sha256": str}
    try:
        meta = json.loads(path.read_text())
        for key, kind in (kinds | dict.fromkeys(counts, int)).items():
            if type(meta[key]) is not kind or (kind is int and not 0 <= meta[key] < 2**63):
                raise ValueError(f"{key} is {meta[key]!r}")
        if meta["dtype"] not in ("uint8", "uint16", "uint32") or not meta["eos_id"] < meta["vocab_size"]:
            raise ValueError(
                f"dtype, eos_id, vocab_size: {meta['dtype']}, {meta['eos_id']}, {meta['vocab_size']}"
            )
    except FileNotFoundError:
        raise ValueError(
            f"{path}: not there; make it:  python prepare.py TEXT --out_dir={data_dir}"
        ) from None
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(
            f"{path}: damaged ({type(problem).__name__}: {problem}); prepare the data again"
        ) from None
    return meta


@dataclasses.dataclass
class PrepareConfig:
    """Every key of `python prepare.py --key=value`; the comments are its --help."""

    inputs: list[str] = dataclasses.field(default_factory=list)
    out_dir: str = "data"  # the folder to write
    tokenizer: typing.Literal["bytes"] = "bytes"  # how text becomes tokens
    val_fraction: float = 0.1  # share held out: of many documents every tenth, of one its last tenth


def main(argv: list[str]) -> None:
    c = PrepareConfig(**parse_args(PrepareConfig, argv, __doc__))
    if not 0 < c.val_fraction < 1:
        raise ValueError(f"--val_fraction={c.val_fraction}: must be above 0 and below 1")
    if not c.inputs:
        prepare_default(c.out_dir)
    else:
        documents = find_documents(c.inputs, c.val_fraction)
        source = " ".join("standard input" if name == "-" else name for name in c.inputs)
        prepare(documents, c.out_dir, ByteTokenizer(), c.val_fraction, source)


if __name__ == "__main__":
    run(main)
