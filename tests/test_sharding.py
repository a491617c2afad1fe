"""Where tensors lie on a mesh."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from models import model_config

from polyglot_jax import sharding
from polyglot_jax.compile.explain import explain
from polyglot_jax.config import Config, InputError, MeshConfig, TrainConfig
from polyglot_jax.model import Transformer
from polyglot_jax.program import Program
from polyglot_jax.sharding import check_model, check_split, make_mesh, spec, weight_spec

ON_EIGHT = MeshConfig(data=1, fsdp=4, tensor=2)


def config(mesh=ON_EIGHT, **model):
    train = TrainConfig(steps=4, batch_size=8, sequence_length=16, dtype="float32", remat="none")
    return Config(model=model_config(**model), mesh=mesh, train=train)


def test_every_matrix_is_split_over_fsdp_once_and_outermost_where_it_can_be():
    split = {"embed": "fsdp", "mlp": "fsdp"}
    for axes in jax.tree.leaves(Transformer(model_config()).axes(), is_leaf=lambda x: isinstance(x, tuple)):
        parts = [part if isinstance(part, tuple) else (part,) for part in weight_spec(axes)]
        expected = 1 if set(axes) & set(split) else 0
        assert sum("fsdp" in part for part in parts) == expected, axes
    assert weight_spec(("layers", "embed", "mlp")) == PartitionSpec(None, "fsdp", "tensor")
    assert weight_spec(("layers", "mlp", "embed")) == PartitionSpec(None, ("tensor", "fsdp"), None)
    assert weight_spec(("layers", "heads", "head_dim", "embed")) == PartitionSpec(None, "tensor", None, "fsdp")


def test_an_axis_without_a_rule_is_refused():
    with pytest.raises(KeyError, match="no rule"):
        spec(("batch", "wings"))


@pytest.mark.parametrize(
    "mesh, model, message",
    [
        (MeshConfig(data=1, fsdp=8), {"mlp": 100}, "mesh.tensor=1 x mesh.fsdp=8: does not divide model.mlp=100"),
        (MeshConfig(data=1, tensor=8), {}, "mesh.tensor=8: does not divide model.heads=4"),
    ],
)
def test_sizes_that_do_not_divide_are_named(mesh, model, message):
    with pytest.raises(InputError, match=message):
        check_model(model_config(**model), make_mesh(mesh))


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


def test_explain_wants_as_many_devices_as_the_mesh_has():
    with pytest.raises(InputError, match="16 devices to simulate, but 8 are here"):
        explain(config(MeshConfig(data=16)), None)
