"""GPT-NeoX's own checkpoints: reference ones (neox_checkpoints.py) are read right; what we write merges back."""

import errno
import json
import os
import shutil
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest
import torch
import yaml
from allpairspy import AllPairs
from models import off_by, random_params, small_tokenizer
from neox_checkpoints import EMBED, HEADS, LAYERS, MLP, VOCAB, layer_file, rank_file, reference, theirs

import polyglot_jax
from convert import neox_export
from convert.__main__ import VERBS
from convert.neox import neox_to_orbax
from convert.neox_config import vocab_divisor
from convert.neox_export import orbax_to_neox
from convert.neox_files import is_neox
from convert.neox_folder import NeoxFolder
from convert.verify import differences
from polyglot_jax import checkpoint, names, torch_files
from polyglot_jax.checkpoint import Checkpoint
from polyglot_jax.cli import run
from polyglot_jax.config import Config, DataConfig, InputError, ModelConfig, TrainConfig
from polyglot_jax.model import abstract_params

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def edit(file, change):
    """Rewrite a .pt after `change` has had what is in it."""
    value = torch.load(file, weights_only=False)
    change(value)
    torch.save(value, file)


def configure(folder, **changes):
    file = folder / "configs" / "run.yml"
    values = yaml.safe_load(file.read_text()) | changes
    file.write_text(yaml.safe_dump(values))


def merged(opened):
    """Every tensor, by Hugging Face's key."""
    return {tensor.key: opened.theirs(tensor.key) for tensor in names.tensors(opened.config.model)}


def refused(folder, message, **more):
    """Opening `folder` and reading all of it says `message`."""
    with pytest.raises(InputError) as error:
        merged(NeoxFolder(folder, **more))
    assert message in str(error.value)


def contents(path):
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def expected_logits(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 24))

# Reading

CASES = [
    {"ranks": ranks, "residual": residual, "legacy": legacy, "form": form, "tied": tied, "buffers": buffers}
    for ranks, residual, legacy, form, tied, buffers in AllPairs(
        [
            [1, 2, 4],
            ["parallel", "sequential"],
            [False, True],
            ["pipeline", "sequential"],
            [False, True],
            [False, True],
        ]
    )
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_logits_are_those_of_transformers(tmp_path, case, capsys):
    model = theirs(case["residual"], case["tied"])
    folder = reference(tmp_path / "save", model=model, **{key: case[key] for key in case if key != "tied"})
    copied = neox_to_orbax(folder.parent, tmp_path / "ours")
    assert copied.non_finite == {}
    opened = Checkpoint(tmp_path / "ours")
    assert opened.config.model.residual == case["residual"]
    assert opened.config.model.tied == model.config.tie_word_embeddings
    assert off_by(polyglot_jax.load(tmp_path / "ours").logits(TOKENS), expected_logits(model, TOKENS)) <= 1e-5
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == case["buffers"] and all("computed buffers were left out" in note for note in notes)


def test_every_weight_of_one_rank_is_a_view_of_its_file(tmp_path):
    model = theirs()
    opened = NeoxFolder(reference(tmp_path))
    state = model.state_dict()
    for key, array in merged(opened).items():
        assert np.array_equal(array, state[key.replace("embed_out", "lm_head")].numpy())
        assert not array.flags.owndata


@pytest.mark.parametrize("fused", [False, True])
def test_bias_gelu_fusion_is_the_tanh_form(tmp_path, fused, capsys):
    model = theirs(activation="gelu_fast" if fused else "gelu")
    folder = reference(tmp_path / "save", model=model, bias_gelu_fusion=fused)
    neox_to_orbax(folder, tmp_path / "ours")
    assert Checkpoint(tmp_path / "ours").config.model.activation == ("gelu_fast" if fused else "gelu")
    assert ("note: bias_gelu_fusion" in capsys.readouterr().err) == fused
    assert off_by(polyglot_jax.load(tmp_path / "ours").logits(TOKENS), expected_logits(model, TOKENS)) <= 1e-5


def test_defaults_are_those_of_gpt_neox(tmp_path):
    folder = reference(tmp_path, residual="sequential", model=theirs("sequential", tied=True))
    (folder / "configs" / "model.yml").write_text("pos_emb: rotary\nrotary_pct: 1.0\nlayernorm-epsilon: 1e-6\n")
    model = NeoxFolder(folder).config.model
    assert (model.residual, model.tied, model.activation) == ("sequential", True, "gelu")
    assert (model.rotary_pct, model.rotary_base, model.norm_eps, model.init_std) == (1.0, 10000.0, 1e-6, 0.02)
    # From the tensors and from mp_rank's args.
    assert (model.layers, model.embed, model.mlp, model.vocab, model.heads) == (LAYERS, EMBED, MLP, VOCAB, HEADS)


def test_settings_given_with_config(tmp_path, capsys):
    folder = reference(tmp_path / "save")
    files = [shutil.move(folder / "configs" / name, tmp_path / name) for name in ("model.yml", "run.yml")]
    refused(folder, "pos_emb='learned': this model is implemented for 'rotary' only; no file sets pos_emb")
    arguments = ["neox-to-orbax", str(folder), str(tmp_path / "ours"), "--config", *map(str, files)]
    assert run(VERBS, "prog", arguments) == 0
    assert Checkpoint(tmp_path / "ours").config.model.heads == HEADS
    for rank in folder.glob("mp_rank*"):
        rank.unlink()
    files[0].write_text("pos_emb: rotary\nno_weight_tying: true\n")
    refused(folder, "num_attention_heads is in no .yml", config_files=files)


def test_a_head_split_over_its_input(tmp_path):
    """output_layer_parallelism: row, once the default."""
    folder = reference(tmp_path, ranks=2, output_layer_parallelism="row")
    whole = theirs().state_dict()["lm_head.weight"]
    for rank, part in enumerate(whole.chunk(2, 1)):
        torch.save({"final_linear.weight": part.clone()}, layer_file(folder, LAYERS + 4, rank))
    assert np.array_equal(NeoxFolder(folder).theirs("embed_out.weight"), whole.numpy())


def test_the_tokenizer_is_found(tmp_path):
    folder = reference(tmp_path / "save")
    assert NeoxFolder(folder).tokenizer is None
    configure(folder, vocab_file="y" * 300)  # longer than a name can be
    assert NeoxFolder(folder).tokenizer is None
    text = small_tokenizer().to_json()
    (tmp_path / "elsewhere.json").write_text(text, encoding="utf-8")
    configure(folder, vocab_file=str(tmp_path / "elsewhere.json"))
    assert NeoxFolder(folder).tokenizer == text
    neox_to_orbax(folder, tmp_path / "ours")
    assert Checkpoint(tmp_path / "ours").config.data == DataConfig(valid_ids=403, eos_id=2)
    (folder.parent / "tokenizer.json").write_text("nearer")
    assert NeoxFolder(folder.parent).tokenizer == "nearer"
    (folder.parent / "tokenizer.json").write_bytes(b'{"version": "\xff"}')
    refused(folder.parent, f"{folder.parent / 'tokenizer.json'}: not a tokenizer.json, not even UTF-8")


class Anything:
    """A class that no checkpoint may bring along."""


def test_an_unreadable_rank_state_is_a_note(tmp_path, capsys):
    folder = reference(tmp_path, ranks=2)
    for rank in (0, 1):
        edit(rank_file(folder, rank), lambda state: state.update(lr_scheduler=Anything()))
    NeoxFolder(folder)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {rank_file(folder)}: refused: ")
    assert "(and 1 more like it); weights are elsewhere" in line


def test_a_rank_state_written_with_numpy_1_is_read(tmp_path, capsys):
    """Its arrays are named numpy.core, which is numpy._core today."""
    folder = reference(tmp_path, form="sequential")
    file = rank_file(folder)
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n"))
    assert b"numpy._core.multiarray\n" in b"".join(records.values())
    assert b"numpy._core.multiarray\n" not in file.read_bytes()
    NeoxFolder(folder)
    assert capsys.readouterr().err == ""


def test_more_ranks_of_a_pipeline_than_of_tensors(tmp_path):
    """Each stage of a pipeline writes mp_rank files too."""
    folder = reference(tmp_path, ranks=2)
    for rank in (2, 3):
        shutil.copy(rank_file(folder), rank_file(folder, rank))
    assert NeoxFolder(folder).params["embed/kernel"].shape == (VOCAB, EMBED)


def test_which_folders_are_neox(tmp_path):
    folder = reference(tmp_path / "save")
    (tmp_path / "empty").mkdir()
    assert is_neox(folder)
    assert is_neox(folder.parent)
    assert not is_neox(tmp_path / "empty")
    assert not is_neox(tmp_path / "absent")
    assert not is_neox("EleutherAI/polyglot-ko-1.3b")


# What is refused


@pytest.mark.parametrize("form", ["pipeline", "sequential"])
@pytest.mark.parametrize("key", ["iteration", "global_steps"])
def test_ranks_of_different_steps_are_refused(tmp_path, form, key):
    folder = reference(tmp_path, ranks=2, form=form)
    edit(rank_file(folder, 1), lambda state: state.update({key: 8}))
    refused(folder, f"{rank_file(folder, 1)}: {key}=8, but 7 in {rank_file(folder, 0)}: ranks of different steps")


def test_a_folder_of_another_step_is_refused(tmp_path):
    folder = reference(tmp_path).rename(tmp_path / "global_step9")
    refused(folder, f"{rank_file(folder)}: is of step 7, in a folder global_step9; take all files")
    edit(rank_file(folder), lambda state: state.update(iteration=9))  # as fine-tuning leaves it
    NeoxFolder(folder)


@pytest.mark.parametrize(
    ("form", "missing", "message"),
    [
        ("pipeline", "layer_03-model_01-model_states.pt", "missing, and the model is split over 2 ranks"),
        ("sequential", "mp_rank_01_model_states.pt", "missing, and the model is split over 2 ranks"),
    ],
)
def test_a_missing_rank_is_refused(tmp_path, form, missing, message):
    folder = reference(tmp_path, ranks=2, form=form)
    (folder / missing).unlink()
    refused(folder, f"{missing}: {message}")


@pytest.mark.parametrize("number", [0, 2, 3, LAYERS + 3, LAYERS + 4])
def test_a_missing_layer_is_refused(tmp_path, number):
    folder = reference(tmp_path)
    layer_file(folder, number).unlink()
    refused(folder, f"{layer_file(folder, number)}: missing; the model's ")


def test_missing_ranks_that_only_the_settings_know_are_refused(tmp_path):
    folder = reference(tmp_path, ranks=2)
    for file in folder.glob("*-model_01-*"):
        file.unlink()
    refused(folder, f"{layer_file(folder, 0, 1)}: missing, and the model is split over 2 ranks")


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize(("form", "where"), [("pipeline", "layer"), ("pipeline", "rank"), ("sequential", "rank")])
def test_code_in_a_file_never_runs(tmp_path, form, where, capsys):
    folder = reference(tmp_path / "save", form=form)
    file = layer_file(folder, 2) if where == "layer" else rank_file(folder)
    torch.save({"module": Code(f"touch {tmp_path / 'ran'}")}, file)
    if (form, where) == ("pipeline", "rank"):
        NeoxFolder(folder)
        assert f"note: {file}: refused: " in capsys.readouterr().err
    else:
        refused(folder, f"{file}: refused: ")
    assert not (tmp_path / "ran").exists()
    torch.load(file, weights_only=False)  # it would have
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("left", [0, 10, 700, -30])
@pytest.mark.parametrize("form", ["pipeline", "sequential"])
def test_truncated_files_are_refused(tmp_path, form, left):
    folder = reference(tmp_path, form=form)
    file = layer_file(folder, 3) if form == "pipeline" else rank_file(folder)
    file.write_bytes(file.read_bytes()[:left])
    refused(folder, f"{file}: refused: it is damaged")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 48}, "hidden_size=48"),
        ({"num_layers": 3}, "num_layers=3"),
        ({"intermediate_size": 128}, "intermediate_size=128, but "),
        ({"padded_vocab_size": 1024}, "padded_vocab_size=1024"),
        ({"model_parallel_size": 4}, "model_parallel_size=4"),
        ({"num_attention_heads": 8}, "num_attention_heads=8"),
    ],
)
def test_settings_that_contradict_the_checkpoint_are_refused(tmp_path, changes, message):
    folder = reference(tmp_path, **changes)
    refused(folder, message)


def test_sizes_are_held_against_the_tensors(tmp_path):
    folder = reference(tmp_path, num_layers=3)
    rank_file(folder).unlink()
    refused(folder, f"{folder / 'configs' / 'run.yml'}: num_layers=3, but {folder} has 2: these are not its settings")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "rmsnorm"}, "norm='rmsnorm': this model is implemented for 'layernorm' only"),
        ({"pos_emb": "alibi"}, "pos_emb='alibi': this model is implemented for 'rotary' only"),
        ({"gpt_j_tied": True}, "gpt_j_tied=True: this model"),
        ({"mlp_type": "llama"}, "mlp_type='llama': this model"),
        ({"use_bias_in_mlp": False}, "use_bias_in_mlp=False: this model"),
        ({"use_bias_in_norms": False}, "use_bias_in_norms=False: this model"),
        ({"num_kv_heads": 1}, "num_kv_heads=1: this model is implemented for num_attention_heads only, 4 here"),
        ({"num_unique_layers": 1}, "num_unique_layers=1: this model"),
        ({"use_qk_layernorm": True}, "use_qk_layernorm=True: this model"),
        ({"sliding_window_width": 32}, "sliding_window_width=32: this model"),
        ({"attention_config": [[["global", "sparse_fixed"], "all"]]}, "attention_config has 'sparse_fixed'"),
        (
            {"attention_config": [[["mamba"], 2]]},
            "attention_config has 'mamba': this model is implemented for global and",
        ),
        ({"soft_prompt_tuning": {"enabled": True}}, "soft_prompt_tuning=True: this model"),
        ({"moe_num_experts": 8}, "moe_num_experts=8: this model"),
        ({"use_mup": True}, "use_mup=True: this model"),
        ({"te_layernorm_mlp": True}, "te_layernorm_mlp=True: this model"),
        ({"activation": "swiglu"}, "activation='swiglu': this model has gelu, relu"),
        ({"gpt_j_residual": "yes"}, "gpt_j_residual='yes': must be true or false"),
        ({"gpt_j_residual": [[]]}, "gpt_j_residual=[[]]: must be true or false"),
        ({"no_weight_tying": False}, "final_linear.weight is there, but no_weight_tying is false or in no .yml"),
        ({"rotary_pct": 0.1}, "model.rotary_pct=0.1: gives 0 rotary dimensions of a head's 8"),
        ({"rotary_pct": "half"}, "model.rotary_pct='half': must be of type float"),
    ],
)
def test_other_models_are_refused(tmp_path, changes, message):
    folder = reference(tmp_path)
    configure(folder, **changes)
    model = yaml.safe_load((folder / "configs" / "model.yml").read_text())
    kept = {key: value for key, value in model.items() if key.replace("-", "_") not in changes}
    (folder / "configs" / "model.yml").write_text(yaml.safe_dump(kept))
    refused(folder, message)
    refused(folder, str(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_kv_heads": HEADS},
        {"num_unique_layers": LAYERS},
        {"attention_config": [[["flash"], "all"]]},
        {"soft_prompt_tuning": {"enabled": False}},
        {"layernorm_epsilon": "1e-5"},
        {"mlp_type": "regular"},
    ],
)
def test_other_spellings_of_this_model_are_taken(tmp_path, changes):
    folder = reference(tmp_path)
    before = NeoxFolder(folder).config
    configure(folder, **changes)
    assert NeoxFolder(folder).config == before


def test_contradicting_files_are_refused(tmp_path):
    folder = reference(tmp_path)
    configure(folder, rotary_pct=0.25)
    configs = folder / "configs"
    refused(folder, f"{configs / 'run.yml'}: rotary_pct=0.25 contradicts rotary_pct=0.5 in {configs / 'model.yml'}")


@pytest.mark.parametrize(
    "text", ["{", "- 1\n", "", "a: &a [*a, {", "!!python/object/apply:os.system ['touch ran']", "\x00"]
)
def test_what_is_no_settings_file_is_refused(tmp_path, text):
    folder = reference(tmp_path)
    (folder / "configs" / "run.yml").write_text(text)
    refused(folder, "run.yml: not a config of GPT-NeoX: ")


def rename(old, new):
    return lambda state: state.update({new: state.pop(old)})


def add(name, value):
    return lambda state: state.update({name: value})


BOTH = add("mlp.dense_4h_to_h.bias", torch.ones(EMBED))


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (2, add("attention.gate.weight", torch.ones(3)), "attention.gate.weight belongs to no weight of this model"),
        (2, add("attention.rotary_emb.scale", torch.ones(3)), "attention.rotary_emb.scale belongs to no weight"),
        (0, add("position_embeddings.weight", torch.ones(3)), "position_embeddings.weight belongs to no weight"),
        (2, rename("mlp.linear1.weight", "mlp.fc1_weight"), "mlp.fc1_weight is of a layer of Transformer Engine"),
        (2, add("attention.dense._extra_state", None), "_extra_state is of a layer of Transformer Engine"),
        (2, add("mlp.linear1.weight", 3), "mlp.linear1.weight is no tensor"),
        (3, rename("mlp.linear2.bias", "mlp.bias"), "has no mlp.linear2.bias or mlp.dense_4h_to_h.bias; it is not of"),
        (3, BOTH, "has both mlp.linear2.bias and mlp.dense_4h_to_h.bias; it is not of this model"),
        (3, add("mlp.linear2.bias", torch.ones(3)), "has shape (3,); the config makes it (32,)"),
        (3, add("mlp.linear2.bias", torch.ones(EMBED).double()), "is float64; weights are"),
        (3, add("mlp.linear2.bias", torch.ones(EMBED).to_sparse()), "is sparse or without values; weights are"),
        (3, add("mlp.linear2.bias", torch.ones(EMBED, device="meta")), "is sparse or without values; weights are"),
        (0, add("word_embeddings.weight", torch.ones(EMBED)), "has a weight of shape (32,); a matrix is expected"),
        (2, dict.clear, "holds no tensors by name"),
    ],
)
def test_other_tensors_are_refused(tmp_path, number, change, message):
    folder = reference(tmp_path)
    edit(layer_file(folder, number), change)
    refused(folder, message)
    refused(folder, layer_file(folder, number).name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s["input_layernorm.weight"].add_(1e-3),
            "gpt_neox.layers.0.input_layernorm.weight differs from the copy",
        ),
        (lambda s: s.pop("input_layernorm.weight"), "input_layernorm.weight is not on every rank"),
        (lambda s: s.update({"attention.x": torch.ones(1)}), "attention.x is not on every rank"),
        (lambda s: s.update({"attention.dense.bias": torch.ones(32).half()}), "is float16 (32,), but float32 (32,) in"),
    ],
)
def test_ranks_that_disagree_are_refused(tmp_path, change, message):
    folder = reference(tmp_path, ranks=2)
    edit(layer_file(folder, 2, 1), change)
    refused(folder, message)


def test_biases_of_a_sequential_residual_must_be_copies(tmp_path):
    folder = reference(tmp_path, ranks=2, residual="sequential")
    edit(layer_file(folder, 2, 1), lambda state: state["attention.dense.bias"].neg_())
    refused(folder, "gpt_neox.layers.0.attention.dense.bias differs from the copy in")


def test_names_outside_the_sequential_form_are_refused(tmp_path):
    folder = reference(tmp_path, form="sequential")
    edit(rank_file(folder), lambda state: state["module"].update({"lm_head.weight": torch.ones(1)}))
    refused(folder, f"{rank_file(folder)}: lm_head.weight belongs to no layer")
    edit(rank_file(folder), lambda state: state.update(module=None))
    refused(folder, f"{rank_file(folder)}: holds no weights, and there are no layer files either")


def test_an_array_of_numpy_is_no_tensor(tmp_path):
    """A mp_rank file may hold some, in the state of its random numbers."""
    folder = reference(tmp_path, form="sequential")
    array = np.ones(EMBED, np.float32)
    edit(rank_file(folder), lambda state: state["module"].update({"sequential.2.attention.dense.bias": array}))
    refused(folder, f"{rank_file(folder)}: attention.dense.bias is no tensor; it is not of this model")


def test_folders_that_hold_no_checkpoint_are_refused(tmp_path):
    refused(tmp_path, f"{tmp_path}: no checkpoint of GPT-NeoX")
    folder = reference(tmp_path)
    for name in ("global_step8", "../save", ""):
        (tmp_path / "latest").write_text(name)
        refused(tmp_path, f"{tmp_path / 'latest'}: names {name!r}, which is not there")
    (tmp_path / "latest").write_text(folder.name)
    for file in folder.glob("*.pt"):
        file.unlink()
    refused(tmp_path, f"{folder}: has neither layer files nor mp_rank files")


# Writing

MODEL = ModelConfig(
    vocab=VOCAB, layers=LAYERS, embed=EMBED, heads=HEADS, mlp=MLP, context=64, norm_eps=2e-5, init_std=0.017
)


def awkward_bits(shape, dtype, seed):
    """Every kind of value: zeros of either sign, subnormals, infinities, NaNs with payloads and signs."""
    whole = np.uint32 if dtype == "float32" else np.uint16
    bits = np.random.default_rng(seed).integers(0, np.iinfo(whole).max, shape, whole, endpoint=True)
    zero = np.array(-0.0, DTYPES[dtype]).view(whole)
    infinity = np.array(np.inf, DTYPES[dtype]).view(whole)
    edges = [
        0,
        1,
        2,
        3,
        zero,
        zero | 1,
        infinity,
        infinity | zero,
        infinity | 1,
        infinity | zero | 5,
        np.iinfo(whole).max,
    ]
    bits.reshape(-1)[: len(edges)] = edges
    return bits.view(DTYPES[dtype])


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """dtype, residual -> a checkpoint whose every weight is awkward, with a tokenizer; at step 3."""
    made = {}

    def make(dtype="float32", residual="parallel", tied=False):
        key = dtype, residual, tied
        if key not in made:
            made[key] = tmp_path_factory.mktemp("ours") / "checkpoint"
            model = ModelConfig(**(MODEL.__dict__ | {"residual": residual, "tied": tied}))
            config = Config(model=model, data=DataConfig(valid_ids=403), train=TrainConfig(sequence_length=64))
            shapes = checkpoint.flatten(abstract_params(model))
            leaves = {name: awkward_bits(leaf.shape, dtype, seed) for seed, (name, leaf) in enumerate(shapes.items())}
            checkpoint.save(
                made[key], config, checkpoint.unflatten(leaves), tokenizer=small_tokenizer().to_json(), step=3
            )
        return made[key]

    return make


WRITTEN = [
    {"dtype": dtype, "ranks": ranks, "residual": residual, "legacy": legacy, "form": form, "tied": tied}
    for dtype, ranks, residual, legacy, form, tied in AllPairs(
        [
            list(DTYPES),
            [1, 2, 4],
            ["parallel", "sequential"],
            [False, True],
            ["pipeline", "sequential"],
            [False, True],
        ]
    )
]


@pytest.mark.parametrize("case", WRITTEN, ids=lambda case: "-".join(map(str, case.values())))
def test_there_and_back_is_bit_exact(ours, tmp_path, case):
    source = ours(case["dtype"], case["residual"], case["tied"])
    orbax_to_neox(
        str(source), tmp_path / "neox", case["ranks"], form=case["form"], legacy_names=case["legacy"]
    )  # fmt: skip
    assert list(differences(str(source), str(tmp_path / "neox"))) == []
    copied = neox_to_orbax(tmp_path / "neox", tmp_path / "back")
    assert copied.non_finite  # counted, and kept
    assert list(differences(str(source), str(tmp_path / "back"))) == []
    assert Checkpoint(tmp_path / "back").config.model == Checkpoint(source).config.model
    assert Checkpoint(tmp_path / "back").config.data == DataConfig(valid_ids=403, eos_id=2)
    assert Checkpoint(tmp_path / "back").tokenizer == small_tokenizer().to_json()
    orbax_to_neox(
        str(tmp_path / "back"), tmp_path / "again", case["ranks"], form=case["form"], legacy_names=case["legacy"]
    )
    for file in (tmp_path / "neox" / "global_step3").glob("*.pt"):
        first = torch.load(file)
        second = torch.load(tmp_path / "again" / "global_step0" / file.name)
        first, second = (state.get("module") or state for state in (first, second))
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            if isinstance(tensor, torch.Tensor):
                raw = [t.contiguous().view(torch.uint8).numpy().tobytes() for t in (tensor, second[name])]
                assert raw[0] == raw[1], name


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checkpoint_of_gpt_neox_comes_back_bit_for_bit(tmp_path, dtype):
    """From a reference, not from what we write: one rank."""
    model = theirs().to(getattr(torch, dtype))
    folder = reference(tmp_path / "save", model=model, ranks=1)
    for seed, file in enumerate(sorted(folder.glob("layer*.pt"))):

        def change(state, seed=seed):
            for name, tensor in state.items():
                state[name] = torch_files.from_numpy(awkward_bits(tuple(tensor.shape), dtype, seed).copy())

        edit(file, change)
    neox_to_orbax(folder, tmp_path / "ours")
    orbax_to_neox(str(tmp_path / "ours"), tmp_path / "back")
    for file in sorted(folder.glob("layer*.pt")):
        before, after = torch.load(file), torch.load(tmp_path / "back" / "global_step0" / file.name)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert torch_files.to_numpy(tensor).tobytes() == torch_files.to_numpy(after[name]).tobytes(), name


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("residual", ["parallel", "sequential"])
def test_shards_merged_by_hand_are_the_weights(tmp_path, ranks, residual):
    model = theirs(residual)
    neox_to_orbax(reference(tmp_path / "save", model=model, residual=residual), tmp_path / "ours")
    orbax_to_neox(str(tmp_path / "ours"), tmp_path / "neox", ranks, legacy_names=True)
    folder, state = tmp_path / "neox" / "global_step0", model.state_dict()

    def parts(number, name):
        return [torch.load(layer_file(folder, number, rank))[name] for rank in range(ranks)]

    assert torch.equal(torch.cat(parts(0, "word_embeddings.weight")), state["gpt_neox.embed_in.weight"])
    assert torch.equal(torch.cat(parts(LAYERS + 4, "final_linear.weight")), state["lm_head.weight"])
    for i in range(LAYERS):
        key = f"gpt_neox.layers.{i}."
        for name in ("attention.query_key_value.weight", "attention.query_key_value.bias", "mlp.dense_h_to_4h.weight"):
            assert torch.equal(torch.cat(parts(i + 2, name)), state[key + name])
        for name in ("attention.dense.weight", "mlp.dense_4h_to_h.weight"):
            assert torch.equal(torch.cat(parts(i + 2, name), 1), state[key + name])
        for name in ("attention.dense.bias", "mlp.dense_4h_to_h.bias"):
            if residual == "parallel":
                assert torch.equal(sum(parts(i + 2, name)), state[key + name])
            else:
                assert all(torch.equal(part, state[key + name]) for part in parts(i + 2, name))
        assert all(
            torch.equal(part, state[key + "input_layernorm.bias"]) for part in parts(i + 2, "input_layernorm.bias")
        )
        (frequencies, *_) = parts(i + 2, "attention.rotary_emb.inv_freq")
        assert torch.equal(frequencies, 1 / (10000 ** (torch.arange(0, 4, 2).float() / 4)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_split_biases_sum_to_the_bias(dtype, ranks):
    bias = awkward_bits((20_000,), dtype, 1)
    parts = neox_export.split(bias, "sum", ranks)
    bits = bias.view(f"u{bias.itemsize}")
    with np.errstate(invalid="ignore"):
        # In any order, in its own precision and in float32.
        for order in (parts, parts[::-1]):
            total = order[0]
            for part in order[1:]:
                total = total + part
            numbers = ~np.isnan(bias.astype(np.float32))
            assert np.array_equal(total.view(bits.dtype)[numbers], bits[numbers])
            assert np.isnan(total.astype(np.float32))[~numbers].all()


def test_unequal_summands_are_summed_in_float32(tmp_path):
    """In half precision 2048 + 1 + 1 would stay 2048."""
    model = theirs().half()
    folder = reference(tmp_path, model=model, ranks=4)
    for rank, value in enumerate((2048.0, 1.0, 1.0, -0.0)):
        edit(layer_file(folder, 2, rank), lambda s, v=value: s["attention.dense.bias"].fill_(v))
    assert (NeoxFolder(folder).theirs("gpt_neox.layers.0.attention.dense.bias") == 2050).all()
    for rank, value in enumerate((np.inf, -np.inf, 65504.0, 65504.0)):
        edit(layer_file(folder, 2, rank), lambda s, v=value: s["attention.dense.bias"].fill_(v))
    assert np.isnan(NeoxFolder(folder).theirs("gpt_neox.layers.0.attention.dense.bias")).all()


@pytest.mark.parametrize("form", ["pipeline", "sequential"])
def test_what_lies_in_an_exported_folder(ours, tmp_path, form):
    target = tmp_path / "저장"
    orbax_to_neox(str(ours("float16")), target, 2, form=form)
    folder = target / "global_step3"
    assert (target / "latest").read_text() == "global_step3"
    assert (target / "tokenizer.json").read_text(encoding="utf-8") == small_tokenizer().to_json()
    layers = [f"layer_{n:02d}-model_{r:02d}-model_states.pt" for n in (0, 2, 3, 5, 6) for r in (0, 1)]
    files = ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt", *(layers if form == "pipeline" else [])]
    assert {path.name for path in folder.iterdir()} == {"configs", "checksums.json", *files}
    sums = json.loads((folder / "checksums.json").read_text())["files"]
    assert sums.keys() == {*(layers if form == "pipeline" else files)}
    for file, tensors in sums.items():
        state = torch.load(folder / file, weights_only=True)
        state = state["module"] if form == "sequential" else state
        assert tensors == {name: f"{zlib.crc32(tensor.numpy().tobytes()):08x}" for name, tensor in state.items()}
    given = {}
    for file in (folder / "configs").iterdir():
        given |= yaml.safe_load(file.read_text(encoding="utf-8"))
    assert given["load"] == str(target)
    assert given["vocab_file"] == str(target / "tokenizer.json")
    assert given["finetune"] is True
    assert given["fp16"]["enabled"] is True
    wanted = {
        "pipe_parallel_size": int(form == "pipeline"), "model_parallel_size": 2, "num_layers": LAYERS,
        "hidden_size": EMBED, "num_attention_heads": HEADS, "max_position_embeddings": 64, "seq_length": 64,
        "rotary_pct": 0.5, "rotary_emb_base": 10000, "gpt_j_residual": True, "no_weight_tying": True,
        "layernorm_epsilon": 2e-5, "init_method_std": 0.017, "activation": "gelu", "bias_gelu_fusion": False,
        "pos_emb": "rotary", "norm": "layernorm", "output_layer_parallelism": "column", "precision": "fp16",
        "tokenizer_type": "HFTokenizer", "make_vocab_size_divisible_by": 128, "intermediate_size": MLP,
    }  # fmt: skip
    assert {key: given[key] for key in wanted} == wanted
    assert type(given["rotary_emb_base"]) is int
    for rank in (0, 1):
        state = torch.load(rank_file(folder, rank), weights_only=True)
        assert (state["iteration"], state["global_steps"], state["mp_world_size"]) == (3, 3, 2)
        # GPT-NeoX compares these with its settings.
        args = {key: given[key] for key in state["args"] if key != "padded_vocab_size"}
        assert state["args"] == args | {"padded_vocab_size": VOCAB}
        assert (state["module"] is None) == (form == "pipeline")


@pytest.mark.parametrize(
    ("vocab", "ids", "ranks"),
    [
        (30080, 30003, 1),
        (30080, 30003, 2),
        (30208, 30003, 2),
        (30080, 30080, 4),
        (30005, 30005, 1),
        (30008, 30003, 4),
        (50432, 50257, 8),
        (512, 403, 4),
    ],
)
def test_the_vocabulary_is_padded_as_gpt_neox_pads_it(vocab, ids, ranks):
    multiple, padded = vocab_divisor(vocab, ids, ranks) * ranks, ids
    while padded % multiple:
        padded += 1
    assert padded == vocab


def test_other_dtypes_are_written(ours, tmp_path):
    neox_to_orbax(reference(tmp_path / "save"), tmp_path / "a")
    orbax_to_neox(str(tmp_path / "a"), tmp_path / "neox", dtype="bfloat16")
    folder = tmp_path / "neox" / "global_step0"
    assert yaml.safe_load((folder / "configs" / "model.yml").read_text())["precision"] == "bfloat16"
    assert {tensor.dtype for tensor in torch.load(layer_file(folder, 2)).values()} == {torch.bfloat16}
    with pytest.raises(InputError, match="dtype=float64"):
        orbax_to_neox(str(ours()), tmp_path / "double", dtype="float64")


@pytest.mark.parametrize("activation", ["gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "relu"])
def test_activations_there_and_back(tmp_path, activation):
    model = ModelConfig(**(MODEL.__dict__ | {"activation": activation, "rotary_base": 5000.5, "mlp": 4 * EMBED}))
    checkpoint.save(
        tmp_path / "a", Config(model=model, train=TrainConfig(sequence_length=64)), random_params(model, seed=1)
    )
    orbax_to_neox(str(tmp_path / "a"), tmp_path / "neox")
    written = yaml.safe_load((tmp_path / "neox" / "global_step0" / "configs" / "model.yml").read_text())
    assert "intermediate_size" not in written
    run_file = tmp_path / "neox" / "global_step0" / "configs" / "run.yml"
    assert "vocab_file" not in yaml.safe_load(run_file.read_text())  # there is no tokenizer
    assert written["activation"] == ("relu" if activation == "relu" else "gelu")
    back = NeoxFolder(tmp_path / "neox").config.model
    assert back.rotary_base == 5000.5
    assert back.activation == ("gelu_fast" if activation.startswith("gelu_") else activation)


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"heads": 4}, 8, "model.heads=4: does not divide over --tensor-parallel 8"),
        ({"vocab": 510}, 4, "model.vocab=510: does not divide"),
        ({"mlp": 66}, 4, "model.mlp=66: does not divide"),
        ({}, 0, "tensor_parallel=0: must be above 0"),
    ],
)
def test_what_does_not_divide_is_refused(tmp_path, changes, ranks, message):
    model = ModelConfig(**(MODEL.__dict__ | changes))
    config = Config(model=model, train=TrainConfig(sequence_length=64))
    checkpoint.save(tmp_path / "a", config, random_params(model, seed=1))
    with pytest.raises(InputError, match=message):
        orbax_to_neox(str(tmp_path / "a"), tmp_path / "neox", ranks)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_exists_stays_unless_overwritten(ours, tmp_path):
    there = tmp_path / "there"
    orbax_to_neox(str(ours()), there)
    before = contents(there)
    with pytest.raises(InputError, match=r"there: exists; .*--overwrite"):
        orbax_to_neox(str(ours()), there)
    assert contents(there) == before
    orbax_to_neox(str(ours()), there, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(
    "extra", ["global_step4/x", "global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt", "notes.txt"]
)
def test_a_training_run_is_never_overwritten(ours, tmp_path, extra):
    there = tmp_path / "there"
    orbax_to_neox(str(ours()), there)
    (there / extra).parent.mkdir(exist_ok=True)
    (there / extra).write_text("precious")
    before = contents(there)
    with pytest.raises(InputError, match="there: was not made by this command"):
        orbax_to_neox(str(ours()), there, overwrite=True)
    assert contents(there) == before


class FullDisk:
    """A file on a disk with room for a few bytes."""

    def __init__(self, file):
        self.file, self.room = file, 5000

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("form", ["pipeline", "sequential"])
@pytest.mark.parametrize("module", [torch_files, neox_export])
def test_a_full_disk_is_an_input_error(ours, tmp_path, monkeypatch, form, module):
    monkeypatch.setattr(module, "open", lambda *arguments: FullDisk(open(*arguments)), raising=False)  # noqa: SIM115
    with pytest.raises(InputError, match="the disk is full"):
        orbax_to_neox(str(ours()), tmp_path / "there", form=form)
    assert list(tmp_path.iterdir()) == []


def test_attention_without_biases_there_and_back(tmp_path):
    model = ModelConfig(vocab=VOCAB, layers=2, embed=EMBED, heads=HEADS, mlp=MLP, context=64, attention_bias=False)
    config = Config(model=model, train=TrainConfig(sequence_length=64))
    checkpoint.save(tmp_path / "ours", config, random_params(model, seed=0))
    orbax_to_neox(str(tmp_path / "ours"), tmp_path / "neox", 2)
    settings = yaml.safe_load((tmp_path / "neox" / "global_step0" / "configs" / "model.yml").read_text())
    assert settings["use_bias_in_attn_linear"] is False
    layer = torch.load(layer_file(tmp_path / "neox" / "global_step0", 2))
    assert [name for name in layer if name.startswith("attention") and name.endswith("bias")] == []
    assert "mlp.linear1.bias" in layer
    assert list(differences(str(tmp_path / "ours"), str(tmp_path / "neox"))) == []
    assert NeoxFolder(tmp_path / "neox").config.model == model


def test_another_architecture_is_refused(tmp_path):
    model = ModelConfig(vocab=VOCAB, layers=1, embed=EMBED, heads=HEADS, mlp=MLP, context=64, positions="learned",
                        residual="sequential", tied=True, activation="gelu_new")  # fmt: skip
    config = Config(model=model, train=TrainConfig(sequence_length=64))
    checkpoint.save(tmp_path / "gpt2", config, random_params(model, seed=0))
    with pytest.raises(InputError, match="gpt2: is a gpt2 model; GPT-NeoX's checkpoints hold gpt_neox models only"):
        orbax_to_neox(str(tmp_path / "gpt2"), tmp_path / "neox")
    assert not (tmp_path / "neox").exists()


def test_sources_of_another_kind_are_refused(tmp_path):
    theirs().save_pretrained(tmp_path / "hf")
    with pytest.raises(InputError, match="is a Hugging Face folder, not a checkpoint"):
        orbax_to_neox(str(tmp_path / "hf"), tmp_path / "neox")


def test_commands(ours, tmp_path, capsys):
    neox, back = str(tmp_path / "neox"), str(tmp_path / "back")
    source = str(ours("bfloat16"))
    assert run(VERBS, "prog", ["orbax-to-neox", source, neox, "--tensor-parallel", "2", "--legacy-names"]) == 0
    assert run(VERBS, "prog", ["neox-to-orbax", neox, back]) == 0
    assert run(VERBS, "prog", ["verify", neox, back]) == 0
    assert run(VERBS, "prog", ["verify", neox, str(ours("float16"))]) == 1
    assert "hold the same weights, bit for bit" in capsys.readouterr().out
