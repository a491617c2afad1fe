"""Whatever is wrong with a source, a disk or a process: a named error or an exact result, and nothing is lost.

Random damage: 200 cases in the quick suite, 1,000 in the long one, and any number by

    python -m pytest tests/test_faults.py -k random_damage --mutations 5000 --mutation-seed 20000

Case N depends on N alone, so a failing one is run again with `--mutations 1 --mutation-seed N`.
"""

import contextlib
import json
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.torch
import torch
from models import model_config, random_tensors, small_tokenizer, to_ours
from mutations import mutate

from convert.hf import hf_to_orbax, orbax_to_hf
from polyglot_jax import checkpoint, store
from polyglot_jax.config import Config, DataConfig, InputError, TrainConfig

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
Bits = dict[str, tuple[str, tuple[int, ...], bytes]]


@pytest.fixture(scope="module")
def tokenizer() -> str:
    return small_tokenizer().to_json()


def random_weights(dtype: str, model=MODEL, seed: int = 0) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(array).to(TORCH[dtype]) for key, array in random_tensors(model, seed).items()}


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


# --- Formats: how each is made, and read again without our code ---


def write_config(folder: Path, tokenizer: str | None, **changes: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(PLAIN | changes))
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")


def make_safetensors(folder: Path, tokenizer: str) -> None:
    write_config(folder, tokenizer)
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


def make_safetensors_shards(folder: Path, tokenizer: str) -> None:
    write_config(folder, tokenizer)
    in_shards(folder, "model.safetensors", random_weights("bfloat16"), safetensors.torch.save_file)


def make_bin(folder: Path, tokenizer: str) -> None:
    write_config(folder, tokenizer)
    torch.save(random_weights("float16"), folder / "pytorch_model.bin")


def make_bin_shards(folder: Path, tokenizer: str) -> None:
    write_config(folder, None)
    in_shards(folder, "pytorch_model.bin", random_weights("float32"), torch.save)


OUR_CONFIG = Config(model=MODEL, data=DataConfig(valid_ids=403), train=TrainConfig(sequence_length=64))


def make_trained(folder: Path, tokenizer: str) -> None:
    params = to_ours(MODEL, random_tensors(MODEL, 0))
    checkpoint.save(folder, OUR_CONFIG, params, tokenizer=tokenizer, step=3)


def make_converted(folder: Path, tokenizer: str) -> None:
    source = folder.with_name("before")
    make_safetensors(source, tokenizer)
    hf_to_orbax(str(source), folder)
    shutil.rmtree(source)


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


class Format(NamedTuple):
    """A format that is converted from. make(folder, text of a tokenizer.json); convert(source, destination);
    may_differ: whether damaged values may be converted as they stand, having no checksum."""

    make: Callable[[Path, str], None]
    convert: Callable[[str, Path], object]
    may_differ: bool


FORMATS = {
    "safetensors": Format(make_safetensors, hf_to_orbax, True),
    "safetensors in shards": Format(make_safetensors_shards, hf_to_orbax, True),
    "bin": Format(make_bin, hf_to_orbax, True),
    "bin in shards": Format(make_bin_shards, hf_to_orbax, True),
    "trained": Format(make_trained, orbax_to_hf, False),
    "converted": Format(make_converted, orbax_to_hf, False),
}


# --- What a result must be ---

SETTINGS = {
    "vocab_size": ("vocab", 50432),
    "num_hidden_layers": ("layers", 44),
    "hidden_size": ("embed", 6144),
    "num_attention_heads": ("heads", 64),
    "intermediate_size": ("mlp", 24576),
    "max_position_embeddings": ("context", 2048),
    "rotary_pct": ("rotary_pct", 0.25),
    "rotary_emb_base": ("rotary_base", 10000),
    "use_parallel_residual": ("residual", True),
    "hidden_act": ("activation", "gelu"),
    "tie_word_embeddings": ("tied", False),
    "layer_norm_eps": ("norm_eps", 1e-5),
    "initializer_range": ("init_std", 0.02),
}  # fmt: skip
COMPUTED = ("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq")


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
        for theirs, ours in (("input_layernorm", "attention_norm"), ("post_attention_layernorm", "mlp_norm")):
            found[f"{name}.{theirs}.weight"] = layers[ours]["scale"][number]
            found[f"{name}.{theirs}.bias"] = layers[ours]["bias"][number]
        # [embed, heads, head_dim] of each of q, k and v; theirs has them side by side in each head.
        fused = np.stack([attention[part]["kernel"][number] for part in "qkv"], axis=2)
        found[f"{name}.attention.query_key_value.weight"] = matrix(fused, embed)
        found[f"{name}.attention.query_key_value.bias"] = np.stack(
            [attention[part]["bias"][number] for part in "qkv"], axis=1
        ).reshape(-1)
        out, up, down = attention["out"], mlp["up"], mlp["down"]
        for theirs, ours, rows in (("attention.dense", out, embed), ("mlp.dense_h_to_4h", up, embed),
                                   ("mlp.dense_4h_to_h", down, down["kernel"].shape[1])):  # fmt: skip
            found[f"{name}.{theirs}.weight"] = matrix(ours["kernel"][number], rows)
            found[f"{name}.{theirs}.bias"] = ours["bias"][number]
    found["gpt_neox.final_layer_norm.weight"] = tree["final_norm"]["scale"]
    found["gpt_neox.final_layer_norm.bias"] = tree["final_norm"]["bias"]
    if "head" in tree:
        found["embed_out.weight"] = tree["head"]["kernel"]
    return {key: (str(array.dtype), array.shape, array.tobytes()) for key, array in found.items()}


def check_is_what_stands_there(source: Path, result: Path) -> None:
    """That a checkpoint holds exactly what is in the Hugging Face folder it was made from."""
    theirs, ours = read_hf(source), read_orbax(result)
    plain = json.loads((source / "config.json").read_bytes())
    left = {key for key in theirs.keys() - ours.keys() if not key.endswith(COMPUTED)}
    assert left <= ({"embed_out.weight"} if plain.get("tie_word_embeddings") else set())
    assert ours == {key: theirs[key] for key in ours}
    config = json.loads((result / "config.json").read_bytes())
    rotary = plain.get("rope_parameters") or {}
    plain |= {"rotary_pct": plain.get("rotary_pct", rotary.get("partial_rotary_factor")),
              "rotary_emb_base": plain.get("rotary_emb_base", rotary.get("rope_theta"))}  # fmt: skip
    for key, (name, default) in SETTINGS.items():
        value = default if plain.get(key) is None else plain[key]
        if key == "use_parallel_residual":
            value = "parallel" if value else "sequential"
        assert config["model"][name] == value, key
    tokenizer = source / "tokenizer.json"
    assert (result / "tokenizer.json").is_file() == tokenizer.is_file()
    if tokenizer.is_file():
        assert (result / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    # What was made can be converted on.
    back = result.with_name("back")
    orbax_to_hf(str(result), back)
    assert read_hf(back) == ours
    shutil.rmtree(back)


def contents(path: Path) -> dict[str, bytes | None]:
    """Every file in a folder, and its folders as None."""
    return {
        item.relative_to(path).as_posix(): item.read_bytes() if item.is_file() else None
        for item in sorted(path.rglob("*"))
    }


# --- Random damage ---


class Hang(BaseException):
    pass


@contextlib.contextmanager
def limits(seconds: int = 60, gigabytes: int = 4) -> Iterator[None]:
    """Stops what runs for too long, and gives it little more memory than the process has already."""

    def stop(*_: object) -> None:
        raise Hang(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    status = Path("/proc/self/statm")
    if status.is_file():
        used = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + gigabytes * 2**30, hard))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def originals(tmp_path_factory, tokenizer) -> Path:
    """An undamaged folder of each format, and what each is converted to."""
    folder = tmp_path_factory.mktemp("originals")
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(store, "CHUNK", 3000)
        for name, format in FORMATS.items():
            format.make(folder / name, tokenizer)
            format.convert(str(folder / name), folder / f"{name} converted")
    return folder


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "number" in metafunc.fixturenames:
        count, first = metafunc.config.getoption("--mutations"), metafunc.config.getoption("--mutation-seed")
        quick = 200 if count is None else count
        cases = [pytest.param(first + i, marks=[pytest.mark.slow] if i >= quick else []) for i in range(count or 1000)]
        metafunc.parametrize("number", cases)


def test_random_damage_is_refused_by_name_or_converted_as_it_stands(number, originals, tmp_path):
    rng = random.Random(number)
    name = list(FORMATS)[number % len(FORMATS)]
    source, result = tmp_path / "source", tmp_path / "result"
    shutil.copytree(originals / name, source)
    how = f"case {number}, {name}: {mutate(source, rng)}"
    damaged = contents(source)
    try:
        with limits():
            FORMATS[name].convert(str(source), result)
    except (InputError, OSError) as error:
        assert str(source) in str(error), how
        assert [item.name for item in tmp_path.iterdir()] == ["source"], how
    except BaseException as error:
        raise AssertionError(f"{how}: {type(error).__name__}: {error}") from error
    else:
        try:
            if FORMATS[name].may_differ:
                check_is_what_stands_there(source, result)
            else:
                assert contents(result) == contents(originals / f"{name} converted")
        except Exception as error:
            raise AssertionError(f"{how}: {error}") from error
        assert sorted(item.name for item in tmp_path.iterdir()) == ["result", "source"], how
    assert contents(source) == damaged, how
