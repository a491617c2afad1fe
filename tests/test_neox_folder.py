"""GPT-NeoX's own checkpoints are read right, and what is wrong with one is named. References: neox_checkpoints.py."""

import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from allpairspy import AllPairs
from models import off_by, small_tokenizer
from neox_checkpoints import (
    EMBED,
    LAYERS,
    VOCAB,
    configure,
    edit,
    layer_file,
    merged,
    rank_file,
    reference,
    refused,
    theirs,
)

import polyglot_jax
from convert.neox import neox_to_orbax
from convert.neox_files import is_neox
from convert.neox_folder import NeoxFolder
from polyglot_jax.checkpoint import Checkpoint
from polyglot_jax.config import DataConfig


def expected_logits(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


# --- What is read ---

TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 24))
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
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == case["buffers"] and all("computed buffers were left out" in note for note in notes)
    assert copied.non_finite == {}
    opened = Checkpoint(tmp_path / "ours")
    assert opened.config.model.residual == case["residual"]
    assert opened.config.model.tied == model.config.tie_word_embeddings
    assert off_by(polyglot_jax.load(tmp_path / "ours").logits(TOKENS), expected_logits(model, TOKENS)) <= 1e-5


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


# --- What is refused ---


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
