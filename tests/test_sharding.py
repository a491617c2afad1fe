"""Where tensors lie on a mesh."""

import dataclasses
import functools
import re
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from models import KOREAN, model_config, random_params, small_tokenizer

import polyglot_jax
from polyglot_jax import checkpoint, sharding, steps
from polyglot_jax.compile.explain import explain
from polyglot_jax.config import Config, DataConfig, InputError, MeshConfig, TrainConfig
from polyglot_jax.model import Transformer, init_cache
from polyglot_jax.preflight import Memory
from polyglot_jax.program import Program
from polyglot_jax.sharding import check, check_model, check_split, make_mesh, spec, weight_spec

ON_EIGHT = MeshConfig(data=1, fsdp=4, tensor=2)


def config(mesh=ON_EIGHT, **model):
    train = TrainConfig(steps=4, batch_size=8, sequence_length=16, dtype="float32", remat="none")
    return Config(model=model_config(**model), mesh=mesh, train=train)


def axes_of(model):
    return jax.tree.leaves(Transformer(model).axes(), is_leaf=lambda x: isinstance(x, tuple))


def test_every_matrix_is_split_over_fsdp_and_sequence_once_and_outermost_where_it_can_be():
    model = model_config()
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, sequence=2))

    def split(*axes):
        return weight_spec(axes, [model.sizes[name] for name in axes], mesh)

    for axes in axes_of(model):
        taken = [part for part in split(*axes) if part is not None and "fsdp" in part]
        assert len(taken) == (1 if {"embed", "mlp"} & set(axes) else 0), axes
        assert all("sequence" in part for part in taken), axes
    assert split("layers", "embed", "mlp") == PartitionSpec(None, ("fsdp", "sequence"), "tensor")
    assert split("layers", "mlp", "embed") == PartitionSpec(None, ("tensor", "fsdp", "sequence"), None)
    assert split("layers", "heads", "head_dim", "embed") == PartitionSpec(None, "tensor", None, ("fsdp", "sequence"))


def test_decoding_splits_over_every_axis_that_divides_and_gathers_no_weight():
    model = model_config(mlp=100)  # 100 divides by 4 and not by 8
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, sequence=2))

    def split(*axes):
        return weight_spec(axes, [model.sizes[name] for name in axes], mesh, "decoding")

    assert split("vocab", "embed") == PartitionSpec(("tensor", "sequence", "fsdp"), None)
    assert split("embed", "heads", "head_dim") == PartitionSpec(None, ("tensor", "sequence"), None)  # 4 heads
    assert split("embed", "mlp") == PartitionSpec(None, ("tensor", "sequence"))
    assert spec(("batch", "length"), (1, 16), mesh, "decoding") == PartitionSpec(None, None)


def test_an_axis_without_a_rule_is_refused():
    with pytest.raises(KeyError, match="'wings' has no rule"):
        spec(("batch", "wings"), (8, 2), make_mesh(ON_EIGHT))


@pytest.mark.parametrize(
    "mesh, model, message",
    [
        (MeshConfig(fsdp=8), {"mlp": 100}, "mesh.fsdp=8: does not divide model.mlp=100; 1, 2, 4, 5 or 10 would"),
        (MeshConfig(tensor=8), {}, "mesh.tensor=8: does not divide model.heads=4; 1, 2 or 4 would"),
        (MeshConfig(tensor=2, sequence=4), {}, "mesh.tensor=2 x mesh.sequence=4: does not divide model.heads=4; 1, 2"),
        (
            MeshConfig(sequence=4),
            {"embed": 66, "heads": 33},
            "mesh.sequence=4: does not divide model.embed=66; 1, 2, 3",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_named_with_those_that_would(mesh, model, message):
    with pytest.raises(InputError, match=re.escape(message)):
        check_model(model_config(**{"rotary_pct": 1.0} | model), make_mesh(mesh))


@pytest.mark.parametrize(
    "mesh, train, message",
    [
        (MeshConfig(data=4), {"batch_size": 6}, "over mesh.data=4; 4 or 8 would"),
        (MeshConfig(slices=2, data=2), {"batch_size": 6, "accumulate": 2}, "over mesh.slices=2 x mesh.data=2; 8 would"),
        (MeshConfig(sequence=4), {"sequence_length": 30}, "does not divide train.sequence_length=30; 1, 2, 3, 5 or 6"),
    ],
)
def test_batches_that_do_not_divide_are_named_with_those_that_would(mesh, train, message):
    asked = config(mesh)
    asked = dataclasses.replace(asked, train=dataclasses.replace(asked.train, **train))
    with pytest.raises(InputError, match=re.escape(message)):
        check(asked, make_mesh(mesh))


class Device(NamedTuple):
    """As much of a jax.Device as tells where it is."""

    id: int
    slice_index: int
    process_index: int
    platform: str = "tpu"


def test_slices_are_what_the_devices_say_or_else_their_order(monkeypatch):
    monkeypatch.setattr(jax, "make_mesh", lambda shape, *_, devices, **__: SimpleNamespace(
        devices=np.array([device.id for device in devices]).reshape(shape)))  # fmt: skip
    monkeypatch.setattr(sharding, "Mesh", lambda devices, *_, **__: devices)

    def order(devices, **sizes):
        return make_mesh(MeshConfig(**sizes), devices).reshape(sizes["slices"], -1).tolist()

    mixed = [Device(i, slice_index=i % 2, process_index=i // 2) for i in range(8)]
    assert order(mixed, slices=2, fsdp=4) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert order(mixed, slices=2, data=1, fsdp=2) == [[0, 2], [1, 3]]  # fewer than there are, of each slice
    with pytest.raises(InputError, match=r"mesh.slices=1: these devices lie on 2 slices; give --mesh.slices 2"):
        make_mesh(MeshConfig(), mixed)
    nodes = [Device(i, slice_index=0, process_index=i % 4) for i in range(8)]
    assert order(nodes, slices=2, fsdp=2) == [[0, 4, 1, 5], [2, 6, 3, 7]]
    with pytest.raises(InputError, match=r"mesh.slices=3: does not divide the 8 devices here; 1, 2, 4 or 8 would"):
        make_mesh(MeshConfig(data=1, slices=3), nodes)


def test_a_big_tensor_that_is_whole_on_a_mesh_that_splits_is_refused(monkeypatch):
    def lie(mesh, split, size=sharding.WHOLE // 4 + 4):
        where = jax.sharding.NamedSharding(make_mesh(mesh), PartitionSpec("fsdp" if split else None))
        check_split({"params": {"kernel": jax.ShapeDtypeStruct((size,), jnp.float32, sharding=where)}})

    with pytest.raises(InputError, match=r"params/kernel: .*, 16 MB, would be whole .* mesh.fsdp=4"):
        lie(ON_EIGHT, split=False)
    lie(ON_EIGHT, split=True)
    lie(ON_EIGHT, split=False, size=sharding.WHOLE // 4)  # not above the limit
    lie(MeshConfig(data=8), split=False)  # eight whole copies were asked for

    # And a program is checked: without fsdp no axis splits a table of positions.
    monkeypatch.setattr(sharding, "WHOLE", 1024)
    learned = config(MeshConfig(data=4, tensor=2), positions="learned")
    with pytest.raises(InputError, match="positions/kernel"):
        Program.make(learned, make_mesh(learned.mesh))


def test_explain_shows_every_tensor_with_its_bytes_and_the_collectives():
    text = explain(config(), None)
    lines = [line.split() for line in text.splitlines()]
    rows = {line[0]: line for line in lines if line}
    # float32[2, 64, 96] over fsdp 4 and tensor 2.
    for name in ("params/layers/mlp/up/kernel", "optimizer/1/0/mu/layers/mlp/up/kernel"):
        assert rows[name][1:4] == ["(2,", "64,", "96)"] and rows[name][-1] == f"{2 * 64 * 96 * 4 // 8:,}"
    assert rows["params/layers/attention_norm/scale"][-1] == f"{2 * 64 * 4 // 4}"
    # Each layer's two matrices of 64 x 96, split over tensor 2, are gathered over fsdp 4, forward and backward.
    gathers = [line for line in lines if line[2:4] == ["all-gather", "over"] and line[5] == "12,288"]
    assert [(line[0], line[4]) for line in gathers] == [("2", "4")] * 4
    assert lines[-1][1] == "collectives,"


def test_a_sequence_is_split_but_for_attention_which_splits_heads(monkeypatch):
    """Of activations only q, k, v and the result move, heads against positions: once forward, once backward."""
    monkeypatch.setattr(steps, "POSITIONS", 8)  # so that the loss takes 2 chunks of 4 x 2 positions
    lines = [line.split() for line in explain(config(MeshConfig(data=2, sequence=4)), None).splitlines()]
    rows = {line[0]: line for line in lines if line}
    assert rows["weights"][1:5] == ["(8,", "16)", "(data,", "sequence)"]
    found = [line for line in lines if line[1:2] == ["x"]]
    # A layer's 4 arrays float32[4, 16 / 4, 4, 16] of a device.
    assert [line[0] for line in found if line[2] == "all-to-all"] == ["2"] * 8
    assert {line[5] for line in found if line[2] == "all-to-all"} == {"4,096"}
    # Whatever else is gathered is a weight: features would be 4 x 16 x 64 floats, or half as much in a chunk.
    gathers = {int(line[5].replace(",", "")) // 4 for line in found if line[2] == "all-gather"}
    assert gathers == {512 * 64, 64 * 96, 64 * 64, 96, 64}


def test_logits_stay_where_the_sequence_is_split_whatever_its_length(monkeypatch):
    """Of 40 positions over 4 devices each has 10. A part holds 2 of each; there is room for 4, but 4 do not divide."""
    monkeypatch.setattr(steps, "POSITIONS", 4)
    asked = config(MeshConfig(sequence=4), context=40)
    asked = dataclasses.replace(asked, train=dataclasses.replace(asked.train, batch_size=1, sequence_length=40))
    found = [line.split() for line in explain(asked, None).splitlines() if " x all-" in line]
    logits = {f"{positions * 512 * 4:,}" for positions in range(1, 43)}
    assert found and not [line for line in found if line[5] in logits and "logits" in line[-1]]


def test_splitting_the_sequence_saves_activations():
    def temporaries(mesh):
        asked = config(mesh, context=512)
        asked = dataclasses.replace(asked, train=dataclasses.replace(asked.train, batch_size=1, sequence_length=512))
        mesh = make_mesh(asked.mesh)
        with jax.set_mesh(mesh):
            return Memory.of(Program.make(asked, mesh).compile()).temporaries

    assert temporaries(MeshConfig(data=1, sequence=4)) < 0.35 * temporaries(MeshConfig(data=1))


def test_explain_wants_as_many_devices_as_the_mesh_has():
    with pytest.raises(InputError, match="16 devices to simulate, but 8 are here"):
        explain(config(MeshConfig(data=16)), None)


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    """A checkpoint, and the greedy continuations it gives on one device."""
    model, tokenizer = model_config(), small_tokenizer()
    path = tmp_path_factory.mktemp("decoded") / "checkpoint"
    settings = Config(model=model, data=DataConfig(valid_ids=403), train=TrainConfig(sequence_length=64))
    checkpoint.save(path, settings, random_params(model, seed=21), tokenizer=tokenizer.to_json())
    return path, decode(polyglot_jax.load(path))


def decode(lm):
    prompts = [KOREAN[0][:9], "마을", KOREAN[1]]
    return [lm.generate(some, max_new_tokens=16, stop=[]) for some in (prompts[:1], prompts)], lm.logits([[5, 6, 7]])


@pytest.mark.parametrize(
    "mesh, rows, heads",  # of 8 and 4, on a device
    [
        (MeshConfig(fsdp=2, tensor=2), 4, 1),
        pytest.param(MeshConfig(data=8), 1, 4, marks=pytest.mark.slow),
        pytest.param(MeshConfig(fsdp=8), 8, 4, marks=pytest.mark.slow),  # does not divide 4 heads
        pytest.param(MeshConfig(tensor=4, sequence=2), 8, 1, marks=pytest.mark.slow),
        pytest.param(MeshConfig(slices=2, fsdp=4), 4, 1, marks=pytest.mark.slow),
    ],
)
def test_one_prompt_and_three_give_the_same_tokens_on_any_mesh(decoded, mesh, rows, heads):
    path, (texts, logits) = decoded
    lm = polyglot_jax.load(path, make_mesh(mesh))
    assert len(jax.tree.leaves(lm.params)[0].sharding.device_set) == 8
    found, found_logits = decode(lm)
    assert found == texts
    np.testing.assert_allclose(found_logits, logits, rtol=0, atol=1e-4)

    cache = init_cache(lm.config.model, 8, 16, lm.model.dtype)
    with jax.set_mesh(lm.mesh):
        prefill = jax.jit(functools.partial(steps.prefill, lm.model))
        _, cache = prefill(lm.params, jnp.ones((8, 4), jnp.int32), jnp.full(8, 4), cache)
    assert {leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(cache)} == {(rows, heads, 16, 16)}
