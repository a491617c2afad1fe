"""Hugging Face folders: what we write transformers opens, what they write we read, and neither changes a bit."""

import json
import shutil
import zlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from models import KOREAN, model_config, off_by, random_params, random_tensors, small_tokenizer
from parity import transformers_model
from safetensors import safe_open
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

MODEL = model_config(vocab=512, embed=48, heads=3, mlp=80, context=64)
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# What Polyglot-Ko's own config.json say besides the sizes.
PLAIN = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "classifier_dropout": 0.1,
    "hidden_act": "gelu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 64,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "num_steps": "global_step320000",
    "rotary_emb_base": 10000,
    "rotary_pct": 0.5,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.29.2",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 512,
}


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
    """A Hugging Face folder written without our code: config.json as Polyglot-Ko's, one file of tensors."""
    path = tmp_path / "theirs"
    path.mkdir()
    configure(path)
    save_file(random_tensors(MODEL, seed=2), path / "model.safetensors")
    return path


def configure(path, without=(), **changes):
    config = {key: value for key, value in PLAIN.items() if key not in without} | changes
    (path / "config.json").write_text(json.dumps(config))


def edit(path, change):
    """Rewrite the file of tensors after `change` has had them."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def contents(path):
    """Every file in a folder."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def raw(path):
    """Key -> (dtype, shape, bytes) over all safetensors of a folder, read without our code."""
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                array = opened.get_tensor(key)
                assert key not in tensors
                tensors[key] = (str(array.dtype), array.shape, array.tobytes())
    return tensors


# What we write, transformers opens


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


# HF -> Orbax -> HF


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


# verify


@pytest.mark.parametrize("bit", [0, 15, 31])
@pytest.mark.parametrize("key", ["gpt_neox.embed_in.weight", "gpt_neox.layers.1.attention.query_key_value.weight"])
def test_a_single_flipped_bit_is_found(folder, ours, tmp_path, key, bit):
    hf_to_orbax(str(folder), tmp_path / "b")
    assert list(differences(str(folder), str(tmp_path / "b"))) == []

    def flip(tensors):
        tensors[key].view(np.uint32).reshape(-1)[-1] ^= np.uint32(1 << bit)

    edit(folder, flip)
    # The last row of the fused tensor is the last of v.
    where = "layers/attention/v/kernel, layer 1" if "layers" in key else "embed/kernel"
    for a, b in ((folder, tmp_path / "b"), (tmp_path / "b", folder)):
        (line,) = differences(str(a), str(b))
        assert line.startswith(f"{where}: 1 of ")


def test_verify_notices_other_dtypes_and_other_models(folder, tmp_path):
    hf_to_orbax(str(folder), tmp_path / "half", "float16")
    lines = list(differences(str(folder), str(tmp_path / "half")))
    assert lines == [f"embed/kernel: float32 in {folder}, float16 in {tmp_path / 'half'}"]
    hf_to_orbax(str(folder), tmp_path / "b")
    configure(folder, initializer_range=0.5)
    assert list(differences(str(folder), str(tmp_path / "b"))) == []  # no weight differs
    other = model_config(mlp=32, embed=48, heads=3, context=64)
    checkpoint.save(tmp_path / "other", our_config(other), random_params(other, 0))
    lines = list(differences(str(tmp_path / "b"), str(tmp_path / "other")))
    assert any(line.startswith("layers/mlp/up/kernel: (2, ") for line in lines)


# Older and newer revisions


def test_buffers_of_old_revisions_are_dropped(folder):
    expected = dict(raw(folder))

    def add_buffers(tensors):
        for layer in (0, 1):
            attention = f"gpt_neox.layers.{layer}.attention"
            tensors[f"{attention}.bias"] = np.tril(np.ones((1, 1, 64, 64), bool))
            tensors[f"{attention}.masked_bias"] = np.float32([-1e9]).reshape(())
            tensors[f"{attention}.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    edit(folder, add_buffers)
    assert len(raw(folder)) == len(expected) + 6
    hf_to_orbax(str(folder), folder.parent / "b")
    orbax_to_hf(str(folder.parent / "b"), folder.parent / "c")
    assert raw(folder.parent / "c") == expected


def test_a_tied_head_stored_all_the_same_is_dropped(folder):
    configure(folder, tie_word_embeddings=True)
    assert "head/kernel" not in HfFolder(folder).params


def test_absent_settings_take_their_defaults(folder):
    """The first revisions have neither use_parallel_residual nor tie_word_embeddings; transformers is asked too."""
    absent = ("use_parallel_residual", "tie_word_embeddings", "rotary_pct", "rotary_emb_base", "hidden_act",
              "layer_norm_eps", "initializer_range", "max_position_embeddings", "eos_token_id")  # fmt: skip
    configure(folder, without=absent)
    config = HfFolder(folder).config
    model = config.model
    assert (model.residual, model.tied, model.activation) == ("parallel", False, "gelu")
    assert (model.rotary_pct, model.rotary_base, model.norm_eps, model.init_std) == (0.25, 10000.0, 1e-5, 0.02)
    assert (model.context, config.data.eos_id) == (2048, 2)
    theirs = AutoModelForCausalLM.from_pretrained(folder).config
    assert theirs.use_parallel_residual
    assert theirs.rope_parameters["partial_rotary_factor"] == 0.25
    assert (theirs.max_position_embeddings, theirs.eos_token_id, theirs.tie_word_embeddings) == (2048, 2, False)


def test_an_end_of_text_that_is_id_0(folder):
    configure(folder, eos_token_id=0)
    assert HfFolder(folder).config.data.eos_id == 0


ROPE = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    "changes",
    [
        {"rotary_pct": 0.5, "rotary_emb_base": 5000},
        {"rope_parameters": ROPE},
        {"rope_parameters": ROPE, "rotary_pct": 0.5, "rotary_emb_base": 5000},
        {"rope_parameters": None, "rope_scaling": None, "rotary_pct": 0.5, "rotary_emb_base": 5000},
    ],
)
def test_rotary_settings_old_and_new(folder, changes):
    configure(folder, without=("rotary_pct", "rotary_emb_base"), **changes)
    model = HfFolder(folder).config.model
    assert (model.rotary_pct, model.rotary_base) == (0.5, 5000.0)
    tokens = np.arange(40)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.from_numpy(tokens)).logits
    assert off_by(polyglot_jax.load(folder, dtype=jnp.float32).logits(tokens), expected) <= 1e-5


# What is refused, by name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": None}, "model.attention_bias=None: must be of type bool"),
        ({"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.rope_type='linear': "),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling={'type': 'linear'"),
        ({"rope_parameters": ROPE},
         "rotary_emb_base=10000 and rope_parameters.rope_theta=5000.0 contradict each other"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}},
         "rotary_pct=0.5 and rope_parameters.partial_rotary_factor=0.25 contradict each other"),
        ({"sliding_window": 4096}, "sliding_window=4096: unknown setting"),
        ({"use_parallel_residual": "yes"}, "use_parallel_residual='yes': must be one of True, False"),
        ({"hidden_act": "silu"}, "model.activation='silu': must be one of "),
        ({"rotary_pct": 0.2}, "model.rotary_pct=0.2: gives 3 rotary dimensions"),
        ({"hidden_size": "48"}, "model.embed='48': must be of type int"),
        ({"num_attention_heads": 5}, "model.heads=5: does not divide model.embed=48"),
        ({"model_type": "llama"}, "model_type='llama': not an architecture this project has"),
    ],
)  # fmt: skip
def test_settings_refused(folder, changes, message):
    configure(folder, **changes)
    with pytest.raises(InputError) as error:
        HfFolder(folder)
    assert message in str(error.value)
    assert str(folder / "config.json") in str(error.value)


def test_a_config_without_model_type_is_refused(folder):
    configure(folder, without=["model_type"])
    with pytest.raises(InputError, match=r"config\.json: has no model_type"):
        HfFolder(folder)


def remove_bias(tensors):
    del tensors["gpt_neox.layers.1.mlp.dense_4h_to_h.bias"]


def add_weight(tensors):
    tensors["gpt_neox.layers.1.attention.gate.weight"] = np.ones(3, np.float32)


def add_layer(tensors):
    tensors["gpt_neox.layers.2.attention.dense.bias"] = np.ones(48, np.float32)


def transpose(tensors):
    key = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    tensors[key] = np.ascontiguousarray(tensors[key].T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_bias, "gpt_neox.layers.1.mlp.dense_4h_to_h.bias is missing"),
        (add_weight, "gpt_neox.layers.1.attention.gate.weight belongs to no weight of this model (1 such"),
        (add_layer, "gpt_neox.layers.2.attention.dense.bias belongs to no weight of this model"),
        (transpose, "gpt_neox.layers.0.mlp.dense_h_to_4h.weight has shape (48, 80); the config makes it (80, 48)"),
    ],
)
def test_tensors_refused(folder, change, message):
    edit(folder, change)
    with pytest.raises(InputError) as error:
        HfFolder(folder)
    assert message in str(error.value)


@pytest.mark.parametrize("left", [0, 5, 500, -1])
def test_truncated_safetensors_are_refused(folder, left):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(InputError, match=r"model\.safetensors: damaged or not safetensors"):
        HfFolder(folder)


@pytest.fixture
def shards(ours, tmp_path):
    orbax_to_hf(str(ours), tmp_path / "shards", shard_bytes=60_000)
    return tmp_path / "shards"


def test_an_index_naming_a_missing_file_is_refused(shards):
    file = sorted(shards.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(InputError, match=r"model-00002-of-\d+\.safetensors: missing, though the index names it"):
        HfFolder(shards)


def test_an_index_naming_a_missing_tensor_is_refused(shards):
    file = shards / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    first, last = index["weight_map"]["gpt_neox.embed_in.weight"], index["weight_map"]["embed_out.weight"]
    assert first != last
    index["weight_map"]["gpt_neox.embed_in.weight"] = last
    file.write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"gpt_neox\.embed_in\.weight is missing, though"):
        HfFolder(shards)


@pytest.mark.parametrize("text", ["{}", "[]", '{"weight_map": 3}', "{"])
def test_a_damaged_index_is_refused(shards, text):
    (shards / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json: "):
        HfFolder(shards)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_without_a_file_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(InputError, match=str(folder)) as error:
        HfFolder(folder)
    assert name in str(error.value)


def test_what_is_no_model_is_refused(tmp_path, ours, folder):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(InputError, match=str(path)):
            polyglot_jax.load(path)
    with pytest.raises(InputError, match="is a checkpoint already"):
        hf_to_orbax(str(ours), tmp_path / "b")
    with pytest.raises(InputError, match="is a Hugging Face folder already"):
        orbax_to_hf(str(folder), tmp_path / "b")
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not JSON"):
        HfFolder(folder)
    assert not (tmp_path / "b").exists()


# The destination


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


def test_a_full_disk_is_an_input_error(ours, tmp_path):
    source = Checkpoint(ours)

    def read(*_):
        raise OSError(28, "No space left on device")

    source.read = read
    with pytest.raises(InputError, match="the disk is full"):
        hf_folder.write(tmp_path / "there", source)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_source_leaves_nothing_behind(folder, tmp_path):
    edit(folder, remove_bias)
    with pytest.raises(InputError):
        hf_to_orbax(str(folder), tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_float64_is_refused(ours, tmp_path):
    with pytest.raises(InputError, match="dtype=float64"):
        orbax_to_hf(str(ours), tmp_path / "b", "float64")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("where", ["head/kernel", "embed/kernel", "final_norm/bias"])
def test_non_finite_values_are_counted_wherever_they_lie(tmp_path, where, shard_bytes, capsys):
    """The last value of a tensor, which may be the last of a file."""
    params = random_params(MODEL, seed=1)
    checkpoint.flatten(params)[where].flat[-1] = np.nan
    checkpoint.save(tmp_path / "a", our_config(), params)
    orbax_to_hf(str(tmp_path / "a"), tmp_path / "b", shard_bytes=shard_bytes)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert line.endswith(" has 1 infinite or NaN values")


def test_a_tokenizer_without_added_tokens_is_written(folder, tmp_path, tokenizer):
    plain = json.loads(tokenizer.to_json())
    del plain["added_tokens"]
    (folder / "tokenizer.json").write_text(json.dumps(plain), encoding="utf-8")
    hf_to_orbax(str(folder), tmp_path / "b")
    orbax_to_hf(str(tmp_path / "b"), tmp_path / "c")
    assert (tmp_path / "c" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
