"""Weights in int8: each output of a product has a scale, the largest of its weights over 127; no zero points or groups.

kernel = int8 * scale, so x @ kernel is (x @ int8) * scale, and nothing but the weights is rounded.
"""

from __future__ import annotations

import numpy as np

SCALE = "_scale"
"""Ends the name of the parameter with the scales; what is before it is the name of the int8 weights."""


def is_quantised(name: str) -> bool:
    """Whether the parameter `name` is one of a product's weights; norms, biases and tables of positions stay."""
    return name.endswith("/kernel") and not name.startswith("positions/")


def inputs_of(name: str) -> tuple[int, ...]:
    """The axes over which the weights `name` (of one layer) are summed; the others are its outputs."""
    if name in ("embed/kernel", "head/kernel"):
        return (1,)
    return (0, 1) if name.endswith("/attention/out/kernel") else (0,)


def quantised(values: np.ndarray, inputs: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Weights -> int8 of the same shape, and float32 scales of the outputs. An output of zeros has the scale 0."""
    values = values.astype(np.float32)
    scale = np.abs(values).max(inputs, keepdims=True) / np.float32(127)
    values /= np.where(scale > 0, scale, 1)
    return np.rint(values, out=values).astype(np.int8), scale.squeeze(inputs)
