"""Folders of every format that is converted from: small seeded models, written without the converters where theirs."""

import contextlib
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import safetensors.torch
import torch
import yaml
from models import model_config, random_tensors, small_tokenizer, to_ours
from neox_checkpoints import reference, theirs

from convert.hf import hf_to_orbax, orbax_to_hf
from convert.neox import neox_to_orbax
from polyglot_jax import checkpoint
from polyglot_jax.config import Config, DataConfig, TrainConfig

MODEL = model_config(vocab=404, embed=16, heads=2, mlp=24, context=64)
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PLAIN = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.5,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 404,
}


def random_weights(dtype: str) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(array).to(TORCH[dtype]) for key, array in random_tensors(MODEL, 0).items()}


@functools.cache
def tokenizer() -> str:
    """The text of a tokenizer.json."""
    return small_tokenizer().to_json()


def write_config(folder: Path, *, with_tokenizer: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(PLAIN))
    if with_tokenizer:
        (folder / "tokenizer.json").write_text(tokenizer(), encoding="utf-8")


def make_safetensors(folder: Path) -> None:
    write_config(folder)
    safetensors.torch.save_file(random_weights("float32"), folder / "model.safetensors")


def in_shards(folder: Path, name: str, weights: dict[str, torch.Tensor], save: Callable) -> None:
    """Three files and an index; `name` is that of a single file."""
    stem, suffix = name.split(".")
    shards = [{}, {}, {}]
    for i, (key, tensor) in enumerate(weights.items()):
        shards[i % 3][key] = tensor
    index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": {}}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-00003.{suffix}"
        save(shard, folder / file)
        index["weight_map"] |= dict.fromkeys(shard, file)
    (folder / f"{name}.index.json").write_text(json.dumps(index))


def make_safetensors_shards(folder: Path) -> None:
    write_config(folder)
    in_shards(folder, "model.safetensors", random_weights("bfloat16"), safetensors.torch.save_file)


def make_bin(folder: Path) -> None:
    write_config(folder)
    torch.save(random_weights("float16"), folder / "pytorch_model.bin")


def make_bin_shards(folder: Path) -> None:
    write_config(folder, with_tokenizer=False)
    in_shards(folder, "pytorch_model.bin", random_weights("float32"), torch.save)


OUR_CONFIG = Config(model=MODEL, data=DataConfig(valid_ids=403), train=TrainConfig(sequence_length=64))


def make_trained(folder: Path) -> None:
    params = to_ours(MODEL, random_tensors(MODEL, 0))
    checkpoint.save(folder, OUR_CONFIG, params, tokenizer=tokenizer(), step=3)


def make_converted(folder: Path) -> None:
    source = folder.with_name("before")
    make_safetensors(source)
    hf_to_orbax(str(source), folder)
    shutil.rmtree(source)


def make_neox(folder: Path) -> None:
    """Layers on two ranks, in half precision, named as in 2022."""
    reference(folder, model=theirs().half(), ranks=2, legacy=True, buffers=True)
    _finish_neox(folder)


def make_neox_sequential(folder: Path) -> None:
    """Everything in one file, the state of a run among it."""
    reference(folder, form="sequential", residual="sequential")
    _finish_neox(folder)


def _finish_neox(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(tokenizer(), encoding="utf-8")
    for file in folder.glob("*/configs/*.yml"):  # JSON is YAML, and how most of these files are written
        file.write_text(json.dumps(yaml.safe_load(file.read_text())))


class Format(NamedTuple):
    """A format that is converted from. make(folder); convert(source, destination);
    may_differ: whether damaged values may be converted as they stand, having no checksum."""

    make: Callable[[Path], None]
    convert: Callable[[str, Path], object]
    may_differ: bool


FORMATS = {
    "safetensors": Format(make_safetensors, hf_to_orbax, True),
    "safetensors in shards": Format(make_safetensors_shards, hf_to_orbax, True),
    "bin": Format(make_bin, hf_to_orbax, True),
    "bin in shards": Format(make_bin_shards, hf_to_orbax, True),
    "neox": Format(make_neox, neox_to_orbax, True),
    "neox, sequential": Format(make_neox_sequential, neox_to_orbax, True),
    "trained": Format(make_trained, orbax_to_hf, False),
    "converted": Format(make_converted, orbax_to_hf, False),
}


# --- Read again without our code ---

Bits = dict[str, tuple[str, tuple[int, ...], bytes]]


def bits(tensors: dict[str, torch.Tensor]) -> Bits:
    """dtype, shape and bytes of each tensor."""
    return {
        key: (
            str(t.dtype).removeprefix("torch."),
            tuple(t.shape),
            t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for key, t in tensors.items()
    }


def read_hf(folder: Path) -> Bits:
    """Every tensor of a Hugging Face folder by safetensors or torch; of files, those that transformers takes."""
    for name, load in (("model.safetensors", safetensors.torch.load_file), ("pytorch_model.bin", _load_bin)):
        if (folder / name).is_file():
            return bits(load(folder / name))
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            return {key: value for file in files for key, value in bits(load(folder / file)).items()}
    raise AssertionError(f"{folder}: no weights")


def _load_bin(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)


def read_neox(folder: Path) -> tuple[Bits, dict[str, Any]]:
    """A checkpoint of GPT-NeoX, ranks merged, under Hugging Face's names; and its settings."""
    step = folder / (folder / "latest").read_text().strip()
    files = [file for file in (step / "configs").iterdir() if file.suffix in (".yml", ".yaml", ".json")]
    given = [yaml.safe_load(file.read_bytes()) for file in files]
    parts: dict[str, list[torch.Tensor]] = {}
    for file in sorted(step.glob("layer_*.pt")):
        for name, part in _load_bin(file).items():
            parts.setdefault(_hf_name(int(file.name[6:8]), name), []).append(part)
    for file in sorted(step.glob("mp_rank_*.pt")):
        # Where the weights are elsewhere, it need not be readable.
        with contextlib.suppress(*[Exception] if parts else []), torch.serialization.safe_globals(STATE_OF_NUMPY):
            state = _load_bin(file)
            given.append(state["args"])
            for key, part in (state["module"] or {}).items():
                _, number, name = key.split(".", 2)
                parts.setdefault(_hf_name(int(number), name), []).append(part)
    settings: dict[str, Any] = {}
    for values in given:
        settings = {str(key).replace("-", "_"): v for key, v in values.items() if v is not None} | settings
    return bits({name: _merged(name, each, settings) for name, each in parts.items()}), settings


STATE_OF_NUMPY = [np.empty(0).__reduce__()[0], np.ndarray, np.dtype, type(np.dtype(np.uint32))]
OUTER_NAMES = {
    "word_embeddings.weight": "gpt_neox.embed_in.weight",
    "norm.weight": "gpt_neox.final_layer_norm.weight",
    "norm.bias": "gpt_neox.final_layer_norm.bias",
    "final_linear.weight": "embed_out.weight",
}


def _hf_name(number: int, name: str) -> str:
    name = name.replace("linear1", "dense_h_to_4h").replace("linear2", "dense_4h_to_h")
    return OUTER_NAMES.get(name, f"gpt_neox.layers.{number - 2}.{name}")


ROWS = ("embed_in.weight", "embed_out.weight", "query_key_value.weight", "query_key_value.bias", "h_to_4h.weight",
        "h_to_4h.bias")  # fmt: skip


def _merged(name: str, parts: list[torch.Tensor], settings: dict[str, Any]) -> torch.Tensor:
    """A tensor from its parts on each rank."""
    if name.endswith(("attention.dense.weight", "4h_to_h.weight")):
        return torch.cat(parts, 1)
    if name.endswith(("attention.dense.bias", "4h_to_h.bias")) and settings.get("gpt_j_residual"):
        with np.errstate(all="ignore"):
            return torch.from_numpy(sum(part.float().numpy() for part in parts)).to(parts[0].dtype)
    return torch.cat(parts) if name.endswith(ROWS) else parts[0]


def read_orbax(folder: Path) -> Bits:
    """A checkpoint of ours by Orbax alone, its parameters under Hugging Face's names."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(folder / "params")
    layers, found = tree["layers"], {}

    def matrix(kernel: np.ndarray, rows: int) -> np.ndarray:
        """Inputs by outputs, in as many axes as there are -> Hugging Face's outputs by inputs."""
        return kernel.reshape(rows, -1).T

    embed = tree["embed"]["kernel"].shape[1]
    found["gpt_neox.embed_in.weight"] = tree["embed"]["kernel"]
    for number in range(layers["mlp_norm"]["scale"].shape[0]):
        attention, mlp = layers["attention"], layers["mlp"]
        name = f"gpt_neox.layers.{number}"
        for norm, ours in (("input_layernorm", "attention_norm"), ("post_attention_layernorm", "mlp_norm")):
            found[f"{name}.{norm}.weight"] = layers[ours]["scale"][number]
            found[f"{name}.{norm}.bias"] = layers[ours]["bias"][number]
        # [embed, heads, head_dim] of each of q, k and v; theirs has them side by side in each head.
        fused = np.stack([attention[part]["kernel"][number] for part in "qkv"], axis=2)
        found[f"{name}.attention.query_key_value.weight"] = matrix(fused, embed)
        found[f"{name}.attention.query_key_value.bias"] = np.stack(
            [attention[part]["bias"][number] for part in "qkv"], axis=1
        ).reshape(-1)
        out, up, down = attention["out"], mlp["up"], mlp["down"]
        for key, ours, rows in (("attention.dense", out, embed), ("mlp.dense_h_to_4h", up, embed),
                                   ("mlp.dense_4h_to_h", down, down["kernel"].shape[1])):  # fmt: skip
            found[f"{name}.{key}.weight"] = matrix(ours["kernel"][number], rows)
            found[f"{name}.{key}.bias"] = ours["bias"][number]
    found["gpt_neox.final_layer_norm.weight"] = tree["final_norm"]["scale"]
    found["gpt_neox.final_layer_norm.bias"] = tree["final_norm"]["bias"]
    if "head" in tree:
        found["embed_out.weight"] = tree["head"]["kernel"]
    return {key: (str(array.dtype), array.shape, array.tobytes()) for key, array in found.items()}
