"""Hugging Face folders of all revisions are read as transformers reads them; what is wrong with one is named."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from formats import FORMATS
from hf_folders import configure, edit, make, raw
from models import off_by
from transformers import AutoModelForCausalLM

import polyglot_jax
from convert.hf import hf_to_orbax, orbax_to_hf
from polyglot_jax.config import InputError
from polyglot_jax.hf_folder import HfFolder


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "theirs")


# --- Older and newer revisions ---


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
    """Where it is the embedding; transformers uses one that is not, in spite of the config."""
    configure(folder, tie_word_embeddings=True)
    with pytest.raises(InputError, match=r"embed_out\.weight is not gpt_neox\.embed_in\.weight, though"):
        HfFolder(folder)
    edit(folder, lambda tensors: tensors.update({"embed_out.weight": tensors["gpt_neox.embed_in.weight"].copy()}))
    found = HfFolder(folder)
    assert "head/kernel" not in found.params
    assert "embed_out.weight is the embedding once more, and was left out" in found.notes
    edit(folder, lambda tensors: tensors["embed_out.weight"].__setitem__((-1, -1), 0))
    with pytest.raises(InputError, match=r"set tie_word_embeddings to false to use it, or remove it"):
        HfFolder(folder)


def test_a_tokenizer_of_another_kind_is_noted(folder):
    (folder / "tokenizer.json").unlink(missing_ok=True)
    assert not any("tokenizer" in note for note in HfFolder(folder).notes)
    (folder / "vocab.json").touch()
    assert any(note.startswith("vocab.json is left out: tokenizers are read from ") for note in HfFolder(folder).notes)


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


# --- What is refused, by name ---


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
def shards(tmp_path):
    FORMATS["safetensors in shards"].make(tmp_path / "shards")
    return tmp_path / "shards"


def test_an_index_naming_a_missing_file_is_refused(shards):
    file = sorted(shards.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(InputError, match=r"model-00002-of-\d+\.safetensors: missing, though the index names it"):
        HfFolder(shards)


def test_an_index_naming_a_missing_tensor_is_refused(shards):
    file = shards / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    first, last = index["weight_map"]["gpt_neox.embed_in.weight"], index["weight_map"]["gpt_neox.final_layer_norm.bias"]
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


def test_what_is_no_model_is_refused(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(InputError, match=str(path)):
            polyglot_jax.load(path)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not JSON"):
        HfFolder(folder)
