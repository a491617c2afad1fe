"""Hugging Face folders: what we write transformers opens, and there and back no bit changes."""

import json
import shutil
import zlib

import ml_dtypes
import numpy as np
import pytest
import torch
from hf_folders import MODEL, PLAIN, configure, make, raw
from models import KOREAN, model_config, off_by, random_params, random_tensors, small_tokenizer
from parity import transformers_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig

import polyglot_jax
from convert.hf import hf_to_orbax, orbax_to_hf
from convert.verify import differences
from polyglot_jax import checkpoint, hf_folder
from polyglot_jax.checkpoint import Checkpoint
from polyglot_jax.config import Config, DataConfig, InputError, ModelConfig, TrainConfig
from polyglot_jax.families import gpt_neox
from polyglot_jax.hf_folder import HfFolder

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def our_config(model: ModelConfig = MODEL) -> Config:
    return Config(model=model, data=DataConfig(valid_ids=403), train=TrainConfig(sequence_length=model.context))


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def ours(tmp_path_factory, tokenizer):
    """A checkpoint of random weights, with a tokenizer."""
    path = tmp_path_factory.mktemp("ours") / "checkpoint"
    checkpoint.save(path, our_config(), random_params(MODEL, seed=1), tokenizer=tokenizer.to_json())
    return path


@pytest.fixture(scope="module")
def exported(ours):
    path = ours.parent / "exported"
    orbax_to_hf(str(ours), path)
    return path


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "theirs")


def contents(path):
    """Every file in a folder."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


# --- What we write, transformers opens ---


def test_transformers_opens_an_exported_model(exported, ours):
    theirs, info = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.config.rope_parameters == {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.5}
    assert (theirs.dtype, theirs.config.eos_token_id) == (torch.float32, 2)
    tokens = np.random.default_rng(0).integers(0, 512, (2, 20))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    assert off_by(polyglot_jax.load(ours).logits(tokens), expected) <= 1e-5
    assert off_by(polyglot_jax.load(exported).logits(tokens), expected) <= 1e-5


def test_transformers_generates_the_same_text(exported, ours):
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    lm = polyglot_jax.load(ours)
    for prompt in (KOREAN[0][:12], KOREAN[3], "마을"):
        inputs = tokenizer(prompt, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == lm.tokenizer.encode(prompt)
        padding = list(range(403, 512))
        made = theirs.generate(**inputs, max_new_tokens=24, do_sample=False, suppress_tokens=padding)
        made = made[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(made, skip_special_tokens=True) == lm.generate(prompt, max_new_tokens=24)[0]


def test_transformers_reads_the_tokenizer(exported, tokenizer):
    theirs = AutoTokenizer.from_pretrained(exported)
    assert (exported / "tokenizer.json").read_text(encoding="utf-8") == tokenizer.to_json()
    assert (theirs.eos_token, theirs.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    assert (theirs.eos_token_id, theirs.model_max_length) == (2, 64)
    text = "겨울밤에는 <|endoftext|>눈이 <|tel|> 내린다 ."
    ids = theirs(text)["input_ids"]
    assert ids == tokenizer.encode(text)
    assert theirs.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False) == text
    assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


def test_exported_config(exported):
    config = json.loads((exported / "config.json").read_text())
    released = {key: value for key, value in PLAIN.items() if key in config}
    assert {key: config[key] for key in released} == released | {"torch_dtype": "float32"}
    assert PLAIN.keys() - config.keys() <= set(gpt_neox.HARMLESS)


def test_checksums_are_those_of_the_tensors(exported):
    sums = json.loads((exported / "checksums.json").read_text())
    expected = {key: f"{zlib.crc32(data):08x}" for key, (_, _, data) in raw(exported).items()}
    assert sums == {"algorithm": "crc32", "files": {"model.safetensors": expected}}


def test_transformers_loads_shards(ours, tmp_path, exported):
    orbax_to_hf(str(ours), tmp_path / "shards", shard_bytes=60_000)
    files = sorted(tmp_path.glob("shards/*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    one, several = raw(exported), raw(tmp_path / "shards")
    assert several == one
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in one.values())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    for number, file in enumerate(files, 1):
        assert file.name == f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = load_file(file)
        assert {index["weight_map"][key] for key in tensors} == {file.name}
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 60_000 or len(tensors) == 1
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "shards", output_loading_info=True)
    assert not any(info.values()), info
    name = "gpt_neox.layers.1.attention.query_key_value.bias"
    assert theirs.state_dict()[name].numpy().tobytes() == one[name][2]


# --- Hugging Face -> Orbax -> Hugging Face ---


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back_is_bit_exact(tmp_path, dtype, tied, tokenizer):
    config = GPTNeoXConfig(
        vocab_size=403,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=80,
        max_position_embeddings=64,
        rotary_pct=0.5,
        tie_word_embeddings=tied,
        initializer_range=0.0178,
        layer_norm_eps=2e-5,
        use_parallel_residual=False,
    )
    model, _, _ = transformers_model(config, seed=3)
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    hf_to_orbax(str(tmp_path / "a"), tmp_path / "b")
    assert {leaf.dtype for leaf in Checkpoint(tmp_path / "b").params.values()} == {np.dtype(DTYPES[dtype])}
    orbax_to_hf(str(tmp_path / "b"), tmp_path / "c")
    orbax_to_hf(str(tmp_path / "b"), tmp_path / "d", shard_bytes=20_000)
    original = raw(tmp_path / "a")
    assert ("embed_out.weight" in original) != tied
    assert raw(tmp_path / "c") == raw(tmp_path / "d") == original
    assert HfFolder(tmp_path / "c").config.model == HfFolder(tmp_path / "a").config.model
    assert (tmp_path / "c" / "tokenizer.json").read_bytes() == (tmp_path / "a" / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "c" / "config.json").read_text())["torch_dtype"] == dtype
    for a, b in ("ab", "ac", "bd", "da"):
        assert list(differences(str(tmp_path / a), str(tmp_path / b))) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_unusual_bits_survive(tmp_path, dtype):
    """Zeros of either sign, subnormals, infinities and NaNs with a payload."""
    whole = np.uint32 if dtype == "float32" else np.uint16
    bits = np.random.default_rng(4).integers(0, np.iinfo(whole).max, (48,), whole, endpoint=True)
    bits[:3] = 0, 1, np.iinfo(whole).max
    tensors = {key: tensor.astype(DTYPES[dtype]) for key, tensor in random_tensors(MODEL, seed=5).items()}
    tensors["gpt_neox.layers.1.attention.dense.bias"] = bits.view(DTYPES[dtype])
    (tmp_path / "a").mkdir()
    configure(tmp_path / "a")
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    hf_to_orbax(str(tmp_path / "a"), tmp_path / "b")
    orbax_to_hf(str(tmp_path / "b"), tmp_path / "c")
    assert raw(tmp_path / "c") == raw(tmp_path / "a")
    assert list(differences(str(tmp_path / "a"), str(tmp_path / "b"))) == []


def test_another_dtype_is_rounded_once(folder, tmp_path):
    hf_to_orbax(str(folder), tmp_path / "b", "bfloat16")
    orbax_to_hf(str(tmp_path / "b"), tmp_path / "c", "float16")
    for key, tensor in load_file(folder / "model.safetensors").items():
        expected = tensor.astype(ml_dtypes.bfloat16).astype(np.float16)
        assert raw(tmp_path / "c")[key] == ("float16", tensor.shape, expected.tobytes())


@pytest.mark.parametrize("vocab", [30003, 30005, 30006, 30008])
def test_odd_vocabularies_are_kept(tmp_path, vocab):
    """Fine-tuned models have vocabularies of such sizes."""
    model = model_config(vocab=vocab, embed=16, heads=1, mlp=16, layers=1)
    (tmp_path / "a").mkdir()
    configure(tmp_path / "a", vocab_size=vocab, hidden_size=16, intermediate_size=16, num_attention_heads=1,
              num_hidden_layers=1)  # fmt: skip
    save_file(random_tensors(model, seed=6), tmp_path / "a" / "model.safetensors")
    hf_to_orbax(str(tmp_path / "a"), tmp_path / "b")
    assert Checkpoint(tmp_path / "b").params["embed/kernel"].shape == (vocab, 16)
    orbax_to_hf(str(tmp_path / "b"), tmp_path / "c")
    assert raw(tmp_path / "c") == raw(tmp_path / "a")
    assert polyglot_jax.load(tmp_path / "b").logits([[vocab - 1]]).shape == (1, 1, vocab)


# --- The destination ---


@pytest.mark.parametrize("direction", ["to orbax", "to hf"])
def test_what_exists_stays_unless_overwritten(ours, folder, tmp_path, direction):
    there = tmp_path / "there"
    to_orbax = direction == "to orbax"
    convert, source = (hf_to_orbax, folder) if to_orbax else (orbax_to_hf, ours)
    other = random_params(MODEL, seed=8)
    checkpoint.save(tmp_path / "other", our_config(), other)
    if to_orbax:
        shutil.copytree(tmp_path / "other", there)
    else:
        orbax_to_hf(str(tmp_path / "other"), there)
    before = contents(there)
    with pytest.raises(InputError, match=r"there: exists; .*--overwrite"):
        convert(str(source), there)
    assert contents(there) == before
    assert list(differences(str(source), str(there))) != []
    convert(str(source), there, overwrite=True)
    assert list(differences(str(source), str(there))) == []
    assert {path.name for path in tmp_path.iterdir()} == {"there", "theirs", "other"}


@pytest.mark.parametrize("direction", ["to orbax", "to hf"])
def test_what_is_no_model_is_never_overwritten(ours, folder, tmp_path, direction):
    there = tmp_path / "there"
    there.mkdir()
    (there / "precious.txt").write_text("precious")
    convert, source = (hf_to_orbax, folder) if direction == "to orbax" else (orbax_to_hf, ours)
    for overwrite in (False, True):
        with pytest.raises(InputError, match="there: "):
            convert(str(source), there, overwrite=overwrite)
        assert contents(there) == {"precious.txt": b"precious"}
    assert {path.name for path in tmp_path.iterdir()} == {"there", "theirs"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failed_export_leaves_nothing_behind(ours, exported, tmp_path, overwrite):
    there = tmp_path / "there"
    if overwrite:
        shutil.copytree(exported, there)
    before = contents(tmp_path)

    class Failing(Checkpoint):
        def read(self, name, layer=None, index=()):
            if (name, layer) == ("layers/mlp/down/bias", 1):
                raise OSError("the disk went away")
            return super().read(name, layer, index)

    with pytest.raises(OSError, match="the disk went away"):
        hf_folder.write(there, Failing(ours), overwrite=overwrite)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["there"] if overwrite else [])


def test_float64_is_refused(ours, tmp_path):
    with pytest.raises(InputError, match="dtype=float64"):
        orbax_to_hf(str(ours), tmp_path / "b", "float64")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_without_added_tokens_is_written(folder, tmp_path, tokenizer):
    plain = json.loads(tokenizer.to_json())
    del plain["added_tokens"]
    (folder / "tokenizer.json").write_text(json.dumps(plain), encoding="utf-8")
    hf_to_orbax(str(folder), tmp_path / "b")
    orbax_to_hf(str(tmp_path / "b"), tmp_path / "c")
    assert (tmp_path / "c" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
