"""Convert a Llama between Hugging Face's folder and a checkpoint file. Needs the package safetensors.

python convert.py smollm2 llama.pt             # a folder to a checkpoint, for sample.py and train.py
python convert.py out/best.pt llama-mine       # a checkpoint to a folder, for transformers
python convert.py out/best.pt tuned --like=smollm2    # with the tokenizer files and chat template of smollm2
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import lm
import prepare


@dataclass
class ConvertConfig:
    """The options of `python convert.py`; the comments are its --help."""

    paths: list[str] = field(default_factory=list)  # from and to: a folder and a checkpoint, or the reverse
    like: str | None = None  # a folder whose tokenizer files and chat template the new folder gets
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of the new folder; None: as they are


# The fields of a Llama's config.json: their names, ours, and the value where a config.json leaves one out.
FIELDS = [
    ("vocab_size", "vocab_size", 32000),
    ("max_position_embeddings", "context_length", 2048),
    ("hidden_size", "d_model", 4096),
    ("num_hidden_layers", "num_layers", 32),
    ("num_attention_heads", "num_heads", 32),
    ("num_key_value_heads", "num_kv_heads", None),
    ("intermediate_size", "d_ff", 11008),
    ("rms_norm_eps", "norm_eps", 1e-6),
    ("tie_word_embeddings", "tie_embeddings", False),
]
# Fields that change what the model computes, and the value with which it computes what ours does.
SUPPORTED = [
    ("hidden_act", "silu"),
    ("attention_bias", False),
    ("mlp_bias", False),
    ("quantization_config", None),
    ("partial_rotary_factor", 1.0),
]


# ------------------------------------------------------------------------------------------ From Hugging Face
def from_hf(folder: str | os.PathLike) -> dict:
    """The checkpoint of the Llama in a folder, its weights in the dtype that they have there.

    Raises OSError if a file cannot be read, ValueError if our model would compute something else.
    """
    folder = Path(folder)
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = model_config(fields)
    tokenizer = None
    if (folder / "tokenizer.json").exists():
        tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
    eos_id = find_eos_id(folder, fields, tokenizer)
    weights = read_weights(folder, config)
    return {"model": weights, "model_config": asdict(config), "tokenizer": tokenizer, "eos_id": eos_id}


def model_config(fields: dict) -> lm.ModelConfig:
    """The ModelConfig of the fields of a config.json. Raises ValueError for what our model does not do."""
    if fields.get("model_type") != "llama":
        raise ValueError(f"model_type is {fields.get('model_type')!r}; only 'llama' is supported")
    for name, supported in SUPPORTED:
        if fields.get(name) not in (None, supported):
            raise ValueError(f"{name} is {fields[name]!r}; only {supported!r} is supported")
    shape = {}
    for theirs, ours, default in FIELDS:
        shape[ours] = fields.get(theirs, default)
    config = lm.ModelConfig(**shape, **rope_config(fields))
    head_dim = config.d_model // config.num_heads
    if fields.get("head_dim") not in (None, head_dim):
        raise ValueError(
            f"head_dim is {fields['head_dim']}; only hidden_size / num_attention_heads is supported"
        )
    return config


def rope_config(fields: dict) -> dict:
    """The fields of ModelConfig about RoPE. A config.json may have them under "rope_parameters" or apart."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor is {rope['partial_rotary_factor']}; only 1 is supported")
    if rope_type == "default":
        return {"rope_theta": theta}
    if rope_type != "llama3":
        raise ValueError(f"rope_type is {rope_type!r}; only 'default' and 'llama3' are supported")
    names = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    return {"rope_theta": theta, "rope_scaling": {name: rope[name] for name in names}}


def read_weights(folder: Path, config: lm.ModelConfig) -> dict[str, Tensor]:
    """The state dict of our model, from one safetensors file or from those that an index names."""
    import safetensors.torch

    names = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    weights = {}
    for name in names:
        for key, tensor in safetensors.torch.load_file(folder / name).items():
            if not key.endswith("inv_freq"):  # RoPE's frequencies, in older files
                weights[key.removeprefix("model.")] = tensor
    if config.tie_embeddings:
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    return weights


def find_eos_id(folder: Path, fields: dict, tokenizer: str | None) -> int:
    """The eos_token of tokenizer_config.json or, without one, the eos_token_id of config.json."""
    path = folder / "tokenizer_config.json"
    if tokenizer is not None and path.exists():
        eos_token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
        if isinstance(eos_token, dict):
            eos_token = eos_token["content"]
        for token in json.loads(tokenizer)["added_tokens"]:
            if token["content"] == eos_token:
                return token["id"]
    eos_id = fields.get("eos_token_id")
    if isinstance(eos_id, list):
        eos_id = eos_id[0]
    if eos_id is None:
        raise ValueError(f"{folder} names no token that ends a text; add an eos_token_id to its config.json")
    return eos_id


# -------------------------------------------------------------------------------------------- To Hugging Face
def to_hf(checkpoint: dict, folder: str | os.PathLike, like: str | None = None, dtype=None) -> None:
    """Write a new folder that transformers loads as LlamaForCausalLM.

    like: a folder whose tokenizer files are copied. dtype: the torch.dtype of the weights; None: as they are.
    Raises OSError if a file cannot be written, ValueError if `like` has another tokenizer.
    """
    import safetensors.torch

    if like is not None:
        tokenizer = Path(like, "tokenizer.json").read_text(encoding="utf-8")
        if tokenizer != checkpoint["tokenizer"]:
            raise ValueError(f"{like} has another tokenizer than the checkpoint")
    folder = Path(folder)
    folder.mkdir(parents=True)
    config = checkpoint["model_config"]
    eos_id = checkpoint["eos_id"]
    weights = {}
    for key, tensor in checkpoint["model"].items():
        if key != "lm_head.weight":
            weights[f"model.{key}"] = tensor.to(dtype or tensor.dtype)
        elif not config["tie_embeddings"]:
            weights[key] = tensor.to(dtype or tensor.dtype)

    fields = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    for theirs, ours, _ in FIELDS:
        fields[theirs] = config[ours]
    fields["rope_theta"] = config["rope_theta"]
    if config["rope_scaling"] is not None:
        fields["rope_scaling"] = {"rope_type": "llama3", **config["rope_scaling"]}
    fields["torch_dtype"] = str(weights["model.norm.weight"].dtype).removeprefix("torch.")
    fields["bos_token_id"] = None
    fields["eos_token_id"] = eos_id

    write_tokenizer(checkpoint["tokenizer"], eos_id, folder, like)
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_id}))
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})


def write_tokenizer(tokenizer: str | None, eos_id: int, folder: Path, like: str | None) -> None:
    """Write tokenizer.json and tokenizer_config.json, or copy those of `like`. Bytes have neither."""
    if like is not None:
        for pattern in ("tokenizer*", "special_tokens_map.json", "chat_template*"):
            for path in Path(like).glob(pattern):
                shutil.copy(path, folder)
    elif tokenizer not in (None, "bytes"):
        names = {token["id"]: token["content"] for token in json.loads(tokenizer)["added_tokens"]}
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": names.get(eos_id),
            "model_input_names": ["input_ids", "attention_mask"],  # without token types, which Llama lacks
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def main() -> None:
    config = ConvertConfig(**prepare.parse_options(ConvertConfig, __doc__))
    with prepare.one_line_errors():
        if len(config.paths) != 2:
            raise ValueError("two paths are needed: from and to; see --help")
        source, target = config.paths
        if os.path.exists(target):
            raise ValueError(f"{target} exists already")
        if os.path.isdir(source):
            checkpoint = from_hf(source)
            lm.CheckpointHandler.save(checkpoint, target)
            has_tokenizer = checkpoint["tokenizer"] is not None
        else:
            checkpoint = lm.CheckpointHandler.load(source)
            dtype = None if config.dtype is None else getattr(torch, config.dtype)
            to_hf(checkpoint, target, config.like, dtype)
            has_tokenizer = checkpoint["tokenizer"] not in (None, "bytes")
    print(f"wrote {target}, with its tokenizer" if has_tokenizer else f"wrote {target}, without a tokenizer")


if __name__ == "__main__":
    main()
