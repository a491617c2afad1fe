"""Where in a step something stopped being finite."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from polyglot_jax import steps
from polyglot_jax.checkpoint import flatten
from polyglot_jax.data import Batches
from polyglot_jax.model import Params
from polyglot_jax.program import Program
from polyglot_jax.steps import Batch


def diagnose(program: Program, batches: Batches, params: Params, step: int) -> str:
    """Which rows of the batch of `step` (from 1), and which tensors' gradients, are not finite with `params`.

    Computes the step's losses and gradients once more. Rows are those of `batches(step - 1)`, from 0.
    """
    batch = next(program.batches(batches, step - 1))

    @functools.partial(jax.jit, out_shardings=NamedSharding(batch.tokens.sharding.mesh, PartitionSpec()))
    def is_finite(params: Params, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        losses = steps.token_losses(program.model, params, batch.tokens)
        gradients = steps.gradients(program.model, params, batch, program.config.train.accumulate)[1]
        return jnp.isfinite(losses).all(1), {n: jnp.isfinite(g).all() for n, g in flatten(gradients).items()}

    rows, tensors = jax.device_get(is_finite(params, batch))
    found = [
        f"{what} {', '.join(map(str, names[:5]))}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for what, names in (
            ("the losses of rows", np.flatnonzero(~rows).tolist()),
            ("the gradients of", [name for name, good in tensors.items() if not good]),
        )
        if names
    ]
    if not found:
        return "Computed again with the weights as they are now, its losses and gradients are finite"
    return f"In the batch of step {step}, {' and '.join(found)} are not finite"
