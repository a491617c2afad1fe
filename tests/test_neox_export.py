"""Checkpoints written for GPT-NeoX: every bit merges back, on any number of ranks; nothing is replaced unasked."""

import errno
import json
import zlib

import ml_dtypes
import numpy as np
import pytest
import torch
import yaml
from allpairspy import AllPairs
from models import random_params, small_tokenizer
from neox_checkpoints import (
    EMBED,
    HEADS,
    LAYERS,
    MLP,
    VOCAB,
    edit,
    layer_file,
    rank_file,
    reference,
    theirs,
)

from convert import neox_export
from convert.__main__ import VERBS
from convert.neox import neox_to_orbax
from convert.neox_export import orbax_to_neox
from convert.neox_folder import NeoxFolder
from convert.verify import differences
from polyglot_jax import checkpoint, torch_files
from polyglot_jax.checkpoint import Checkpoint
from polyglot_jax.cli import run
from polyglot_jax.config import Config, DataConfig, InputError, ModelConfig, TrainConfig
from polyglot_jax.model import abstract_params

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
MODEL = ModelConfig(
    vocab=VOCAB, layers=LAYERS, embed=EMBED, heads=HEADS, mlp=MLP, context=64, norm_eps=2e-5, init_std=0.017
)


def contents(path):
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


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


def test_the_form_and_the_names_are_those_asked_for(ours, tmp_path):
    options = ["--tensor-parallel", "2", "--form", "sequential", "--legacy-names"]
    assert run(VERBS, "prog", ["orbax-to-neox", str(ours()), str(tmp_path / "neox"), *options]) == 0
    for rank in (0, 1):
        module = torch.load(rank_file(tmp_path / "neox" / "global_step3", rank))["module"]
        assert "sequential.2.mlp.dense_h_to_4h.weight" in module and "sequential.2.mlp.linear1.weight" not in module
