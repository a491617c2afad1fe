"""Polyglot JAX: train, convert and run Polyglot-Ko models on JAX.

import polyglot_jax
lm = polyglot_jax.load("demo/run")
lm.generate(["옛날 옛적에"], max_new_tokens=32)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyglot_jax.language_model import LanguageModel, load

__all__ = ["LanguageModel", "load"]


def __getattr__(name: str) -> Any:
    # On demand, so that importing the package (for its config, its tokenizer or --help) does not import JAX.
    if name in __all__:
        from polyglot_jax import language_model

        return getattr(language_model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
