"""What training compiles: the step, its arguments' shapes and how they lie on the mesh."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polyglot_jax import attention, sharding, steps
from polyglot_jax.checkpoint import Checkpoint
from polyglot_jax.config import Config
from polyglot_jax.data import Batches
from polyglot_jax.model import Params, Transformer, abstract_params
from polyglot_jax.optimizer import make_optimizer
from polyglot_jax.steps import Batch, TrainState

# By platform. On TPUs the reduction of a layer's gradients goes on while the next ones are computed, and weights are
# gathered before a product, not passed round in as many small products as there are devices.
_COMPILER_OPTIONS = {
    "tpu": {
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
        "xla_enable_async_all_reduce": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    },
}


class Program(NamedTuple):
    """A config on a mesh. step: jitted (TrainState, Batch) -> (TrainState, metrics), its first argument given up.

    abstract and batch: shapes, dtypes and shardings of the two arguments.
    """

    config: Config
    model: Transformer
    optimizer: optax.GradientTransformation
    step: Any
    abstract: TrainState
    batch: Batch

    @property
    def mesh(self) -> Mesh:
        return self.batch.tokens.sharding.mesh

    @classmethod
    def make(cls, config: Config, mesh: Mesh) -> Program:
        """Nothing is computed or placed yet."""
        train = config.train
        platform = mesh.devices.flat[0].platform
        kernel = attention.choose(train.attention, platform, train.dtype, config.model.head_dim, train.sequence_length)
        model = Transformer(config.model, train.dtype, remat=train.remat, attention=kernel)
        optimizer = make_optimizer(config.optimizer, train.steps, model.axes())
        abstract = _abstract_state(model, optimizer, mesh)
        sharding.check_split(abstract)
        tokens, weights = (train.batch_size, train.sequence_length + 1), (train.batch_size, train.sequence_length)
        # The one token more than the length keeps tokens from being split along it: 4 bytes each, on every device.
        batch = Batch(_rows(tokens, jnp.int32, mesh), _rows(weights, jnp.float32, mesh))
        layout = _layout(abstract)
        step = jax.jit(
            functools.partial(steps.train_step, model, optimizer, train.accumulate),
            in_shardings=(layout, _layout(batch)),
            out_shardings=(layout, NamedSharding(mesh, PartitionSpec())),
            donate_argnums=0,
            compiler_options=_COMPILER_OPTIONS.get(platform),
        )
        return cls(config, model, optimizer, step, abstract, batch)

    def compile(self) -> Any:
        """The step, compiled for these shapes."""
        return self.step.lower(self.abstract, self.batch).compile()

    def random_params(self) -> Params:
        """Parameters drawn from train.seed, the same on every mesh."""
        key, tokens = jax.random.key(self.config.train.seed), jnp.zeros((1, 1), jnp.int32)
        return jax.jit(lambda: self.model.init(key, tokens)["params"], out_shardings=_layout(self.abstract.params))()

    def first_state(self, params: Params) -> TrainState:
        return TrainState(params, jax.jit(self.optimizer.init, out_shardings=_layout(self.abstract.optimizer))(params))

    def restore(self, start: Checkpoint) -> TrainState:
        """The state a run was left in; InputError if the checkpoint is another model's."""
        return TrainState(start.restore_params(self.abstract.params), start.restore_optimizer(self.abstract.optimizer))

    def place(self, batch: Batch) -> Batch:
        """A batch of NumPy arrays, the same on every process, on the mesh."""
        where = self.batch.tokens.sharding
        return jax.tree.map(lambda rows: jax.make_array_from_callback(rows.shape, where, rows.__getitem__), batch)

    def batches(self, batches: Batches, first: int) -> Iterator[Batch]:
        """The batches after step `first`, on the mesh, made ahead of time by Grain's threads."""
        shape, where = self.batch.tokens.shape, _layout(self.batch)
        ones = np.ones(self.batch.weights.shape, np.float32)

        def place(step: int) -> Batch:
            read = functools.cache(lambda start, stop: batches.rows(step, start, stop))
            return Batch(
                jax.make_array_from_callback(shape, where.tokens, lambda index: read(*index[0].indices(shape[0])[:2])),
                jax.make_array_from_callback(ones.shape, where.weights, lambda index: ones[index]),
            )

        numbers = grain.MapDataset.range(first, self.config.train.steps).map(place)
        return iter(numbers.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def _rows(shape: tuple[int, int], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    where = sharding.spec(("batch", "length"), shape, mesh)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, where))


def _layout(abstract: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _abstract_state(model: Transformer, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Moments lie where their parameters do; what belongs to no parameter is everywhere."""
    params = abstract_params(model.config, model.param_dtype)
    moments = jax.eval_shape(optimizer.init, params)
    layout = sharding.shardings(mesh, model.axes(), model.config.sizes)
    everywhere = NamedSharding(mesh, PartitionSpec())
    places = optax.tree_map_params(
        optimizer, lambda _, where: where, moments, layout, transform_non_params=lambda _: everywhere
    )
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        TrainState(params, moments),
        TrainState(layout, places),
    )
