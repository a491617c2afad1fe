"""The optimizer: one optax chain of clipping, AdamW and the learning rate's schedule."""

from __future__ import annotations

from typing import Any

import jax
import optax

from polyglot_jax.config import OptimizerConfig

# Weight decay pulls on the matrices of the layers; not on embedding, head, norms or biases.
_DECAYED = ({"embed", "heads", "head_dim"}, {"embed", "mlp"})


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step -> learning rate: linear from 0 over `warmup` of the steps, then a cosine to final_learning_rate."""
    end = config.decay_steps or steps
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=round(config.warmup * end),
        decay_steps=end,
        end_value=config.final_learning_rate,
    )


def decay_mask(axes: Any) -> Any:
    """Tree of axis names -> tree of bools: whether weight decay applies to that weight."""
    return jax.tree.map(lambda names: set(names) - {"layers"} in _DECAYED, axes, is_leaf=lambda x: isinstance(x, tuple))


def make_optimizer(config: OptimizerConfig, steps: int, axes: Any) -> optax.GradientTransformation:
    """The chain for `steps` training steps of a model with these axis names (`Transformer.axes`)."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        optax.adamw(
            schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask(axes),
        ),
    )
