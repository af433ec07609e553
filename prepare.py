"""Turn text into token files: data/train.bin, data/val.bin and data/meta.json.

    python prepare.py book.txt                     # one document: its last tenth is held out for validation
    python prepare.py notes/ --out_dir=data-notes  # every file in the folder; every tenth is held out
    curl ... | python prepare.py -                 # standard input
    python prepare.py                              # the source of Python's own standard library

The tokenizers live here, and the helpers that the three scripts share: a dataclass as a command line, the one-line
`error:`, and the choice of a device.
"""

import codecs
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
import time
import types
import typing
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

# ------------------------------------------------------------------------------------- What all three scripts share


def convert(text: str, kind) -> object:
    """The value that `text` means for a field of type `kind`: str, int, float, bool, a Literal, any of them | None."""
    if isinstance(kind, types.UnionType):
        if text.lower() == "none":
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if kind is bool:
        kind = typing.Literal[True, False]
    if choices := typing.get_args(kind):
        for choice in choices:
            if str(choice).lower() == text.lower():
                return choice
        raise ValueError(f"must be one of {', '.join(map(str, choices))}")
    if kind is int and not re.fullmatch(r"[+-]?\d+", text):
        if (value := float(text)) != value // 1:  # 1e4 is a whole number
            raise ValueError("must be a whole number")
        return int(value)
    return kind(text)


def parse_args(config_class: type, argv: list[str], doc: str) -> tuple[dict, list[str]]:
    """The command line `argv` → ({key: value} of the --key=value given, [the other words]).

    The keys are the fields of the dataclass; the comment behind each is its line of --help.
    Raises ValueError for an unknown key and for a value that is not of the key's type.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    if {"-h", "--help"} & set(argv):
        comments = dict(
            re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config_class), re.MULTILINE)
        )
        print(doc.strip() + "\n\nKeys, with their defaults:")
        for name, field in fields.items():
            print(f"  {f'--{name}={field.default}':34}  {comments[name]}")
        raise SystemExit(0)
    given, words = {}, []
    for arg in argv:
        key, equals, text = arg.removeprefix("--").partition("=")
        if not arg.startswith("--"):
            words.append(arg)
        elif key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)[0]
            raise ValueError(f"--{key}: no such key; did you mean --{near}? (--help lists all)")
        elif not equals:
            raise ValueError(f"--{key}: give its value as --{key}=VALUE")
        else:
            try:
                given[key] = convert(text, fields[key].type)
            except (ValueError, OverflowError) as problem:
                kind = getattr(fields[key].type, "__name__", str(fields[key].type))
                reason = problem if str(problem).startswith("must") else f"must be of type {kind}"
                raise ValueError(f"--{key}={text}: {reason}") from None
    return given, words


def run(main) -> None:
    """Call main(argv); what the user can mend ends in one line on stderr and status 2, a bug in its traceback."""
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as problem:
        sys.exit(fail(problem))


def fail(problem: Exception) -> int:
    where = f"{problem.filename}: {problem.strerror}" if getattr(problem, "filename", None) else str(problem)
    print(f"error: {where}", file=sys.stderr)
    return 2


def pick_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Resolve "auto": CUDA, then MPS, then the CPU; bfloat16 where it is fast, else float16 on CUDA, else float32."""
    if device == "auto":
        device = (
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as problem:
        raise ValueError(f"--device={device}: not usable here: {str(problem).splitlines()[0]}") from None
    if dtype != "auto":
        return device, getattr(torch, dtype)
    if device.type == "cuda":
        return device, torch.bfloat16 if torch.cuda.is_bf16_supported(
            including_emulation=False
        ) else torch.float16
    return device, torch.bfloat16 if device.type == "cpu" and bfloat16_is_fast() else torch.float32


def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies matrices faster in bfloat16: timed, because the instructions alone do not tell.

    Zen 4 gains by them; some Xeons have them and are slower with them than without.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, times = torch.ones(512, 512, dtype=dtype), []
        for _ in range(8):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]


# ------------------------------------------------------------------------------------------------------ Tokenizers


class ByteTokenizer:
    """Each byte is a token: nothing to train, nothing unknown. Byte 0, which text does not use, ends a document."""

    vocab_size, eos_id = 256, 0
    spec = {"kind": "bytes"}  # what meta.json and checkpoints hold, enough for load_tokenizer

    def encode(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, np.uint8)

    def decode(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield text as the ids come; a character that spans several is held back until it is whole."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in ids:
            yield decoder.decode(bytes([token]))
        yield decoder.decode(b"", final=True)


def load_tokenizer(spec: dict) -> ByteTokenizer:
    """The tokenizer that `spec` of a meta.json or a checkpoint describes."""
    if spec != ByteTokenizer.spec:
        raise ValueError(f"tokenizer {spec!r} is not known; this version knows {ByteTokenizer.spec}")
    return ByteTokenizer()


# ------------------------------------------------------------------------------------------------------- Documents

EXCLUDED = re.compile(  # tables, giant literals, tests, and paths of the machine that built Python
    r"(^|/)(site-packages|dist-packages|tests?|idle_test|encodings|pydoc_data|lib2to3|idlelib|distutils|config-[^/]*"
    r"|__pycache__)/|(^|/)_sysconfigdata"
)


def standard_library() -> list[tuple[Path, bool]]:
    """The .py files of Python's standard library; whole top-level modules, about a tenth of the bytes, are held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [name for name in names if not EXCLUDED.search(name)]
    if not names:
        raise ValueError(
            f"{root}: this Python carries no source of its standard library; run prepare.py on your text"
        )
    return [
        (root / name, zlib.crc32(name.split("/")[0].removesuffix(".py").encode()) % 10 == 0) for name in names
    ]


def find_documents(inputs: list[str], val_fraction: float) -> list[tuple[Path, bool]]:
    """(path, whether held out) of each file named, each file in the folders named, and "-", standard input."""
    paths = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            paths += sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        elif name != "-" and not path.exists():
            raise ValueError(f"{name}: no such file or folder")
        else:
            paths.append(path)
    return [(path, int((i + 1) * val_fraction) > int(i * val_fraction)) for i, path in enumerate(paths)]


def read_blocks(path: Path) -> Iterator[bytes]:
    with sys.stdin.buffer if str(path) == "-" else open(path, "rb") as file:
        while block := file.read(2**20):
            yield block


# --------------------------------------------------------------------------------------------------------- Writing


def prepare(
    documents: list[tuple[Path, bool]], out_dir: str, tokenizer, val_fraction: float, source: str
) -> dict:
    """Write the documents' tokens to out_dir/train.bin and val.bin, then out_dir/meta.json, which is returned.

    Files appear whole or not at all. Where no document is held out, the last tenth of all tokens is.
    Raises ValueError if there is no text, OSError if a file cannot be read or written.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    largest = tokenizer.vocab_size - 1
    dtype = np.dtype("<u1" if largest < 2**8 else "<u2" if largest < 2**16 else "<u4")
    names = ("train.bin", "val.bin")
    tokens, sizes, digest = [0, 0], [0, 0], hashlib.sha256()
    try:
        with open(out / "train.bin.tmp", "w+b") as train, open(out / "val.bin.tmp", "w+b") as val:
            for path, held_out in documents:
                file = (train, val)[held_out]
                if tokens[held_out]:
                    tokens[held_out] += file.write(dtype.type(tokenizer.eos_id).tobytes()) // dtype.itemsize
                for block in read_blocks(path):
                    ids = tokenizer.encode(block).astype(dtype, copy=False)
                    tokens[held_out] += file.write(ids) // dtype.itemsize
                    sizes[held_out] += len(block)
                    digest.update(block)
            if not tokens[1]:
                cut = tokens[0] - int(tokens[0] * val_fraction)
                train.seek(cut * dtype.itemsize)
                while block := train.read(2**20):
                    val.write(block)
                train.truncate(cut * dtype.itemsize)
                tokens, sizes = [cut, tokens[0] - cut], [cut, sizes[0] - cut]
            for file in (train, val):
                file.flush()
                os.fsync(file.fileno())
        if not tokens[0] or not tokens[1]:
            raise ValueError(
                f"{source}: {sum(sizes)} bytes of text are too few to train on and to validate with"
            )
        for name in names:
            os.replace(out / f"{name}.tmp", out / name)
    finally:
        for name in names:
            (out / f"{name}.tmp").unlink(missing_ok=True)
    meta = {
        "tokenizer": tokenizer.spec,
        "vocab_size": tokenizer.vocab_size,
        "dtype": f"uint{8 * dtype.itemsize}",
        "eos_id": tokenizer.eos_id,
        "train_tokens": tokens[0],
        "val_tokens": tokens[1],
        "train_bytes": sizes[0],
        "val_bytes": sizes[1],
        "source": source,
        "sha256": digest.hexdigest(),
    }
    (out / "meta.json.tmp").write_text(json.dumps(meta, indent=2) + "\n")
    os.replace(out / "meta.json.tmp", out / "meta.json")
    print(
        f"{out}: {tokens[0]:,} tokens to train on and {tokens[1]:,} to validate with, from {source} "
        f"(sha256 {meta['sha256'][:12]})"
    )
    return meta


def prepare_default(out_dir: str) -> dict:
    """Prepare the corpus that needs no download, the standard library of the Python that runs."""
    source = f"the standard library of Python {platform.python_version()}"
    return prepare(standard_library(), out_dir, ByteTokenizer(), 0.1, source)


def load_meta(data_dir: str) -> dict:
    """data_dir/meta.json. Raises ValueError where it is missing or damaged, with the remedy."""
    path = Path(data_dir, "meta.json")
    try:
        meta = json.loads(path.read_text())
        missing = {"tokenizer", "vocab_size", "dtype", "eos_id", "val_tokens", "val_bytes"} - set(meta)
    except FileNotFoundError:
        raise ValueError(
            f"{path}: not there; make it with: python prepare.py TEXT --out_dir={data_dir}"
        ) from None
    except (ValueError, TypeError) as problem:
        raise ValueError(f"{path}: damaged ({problem}); prepare the data again") from None
    if missing:
        raise ValueError(f"{path}: {', '.join(sorted(missing))} missing; prepare the data again")
    return meta


@dataclasses.dataclass
class PrepareConfig:
    out_dir: str = "data"  # the folder to write
    tokenizer: typing.Literal["bytes"] = "bytes"  # how text becomes tokens
    val_fraction: float = 0.1  # share held out: of many documents every tenth, of one its last tenth


def main(argv: list[str]) -> None:
    given, inputs = parse_args(PrepareConfig, argv, __doc__)
    config = PrepareConfig(**given)
    if not 0 < config.val_fraction < 1:
        raise ValueError(f"--val_fraction={config.val_fraction}: must be between 0 and 1")
    if not inputs:
        prepare_default(config.out_dir)
    else:
        documents = find_documents(inputs, config.val_fraction)
        source = " ".join("standard input" if name == "-" else name for name in inputs)
        prepare(documents, config.out_dir, ByteTokenizer(), config.val_fraction, source)


if __name__ == "__main__":
    run(main)
