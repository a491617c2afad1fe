"""The loss in parts is the loss of whole logits, and whole logits are never there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import family_model, model_config, off_by, random_params

from polyglot_jax import steps
from polyglot_jax.checkpoint import flatten
from polyglot_jax.model import Transformer

ROWS, LENGTH = 3, 14
FAST = {"xla_backend_optimization_level": 0}  # compiled in half the time


def some_batch(vocab):
    rng = np.random.default_rng(5)
    weights = rng.integers(0, 3, (ROWS, LENGTH)).astype(np.float32)
    return steps.Batch(jnp.asarray(rng.integers(0, vocab, (ROWS, LENGTH + 1)), jnp.int32), jnp.asarray(weights))


def whole_loss(model, params, batch):
    logits = model.apply({"params": params}, batch.tokens[:, :-1])
    return (steps.losses_from_logits(logits, batch.tokens[:, 1:]) * batch.weights).sum()


# Parts that divide the 14 positions, that do not, and one part; an untied head, a tied one, one with a bias of its own.
@pytest.mark.parametrize("family, length", [("gpt_neox", 7), ("gpt_neox", 64), ("gpt2", 4), ("gptj", 4)])
def test_the_loss_in_parts_is_that_of_whole_logits(monkeypatch, family, length):
    config = model_config() if family == "gpt_neox" else family_model(family)
    model, params, batch = Transformer(config), random_params(config, 1), some_batch(config.vocab)
    monkeypatch.setattr(steps, "POSITIONS", ROWS * length)

    def half(loss):
        return jax.jit(jax.value_and_grad(lambda p: 0.5 * loss(model, p, batch)), compiler_options=FAST)(params)

    (loss, gradient), (expected, whole) = half(steps.loss_sum), half(whole_loss)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    errors = flatten(jax.tree.map(off_by, gradient, whole))
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}

    losses = jax.jit(lambda p: steps.token_losses(model, p, batch.tokens), compiler_options=FAST)(params)
    assert losses.shape == (ROWS, LENGTH)
    np.testing.assert_allclose((losses * batch.weights).sum(), 2 * expected, rtol=1e-6)


@pytest.mark.parametrize("positions, length", [(12, 4), (14, 4), (41, 7), (42, LENGTH), (1000, LENGTH), (2, 1)])
def test_logits_are_held_a_part_at_a_time(monkeypatch, positions, length):
    config = model_config()
    model, params, batch = Transformer(config), random_params(config, 1), some_batch(config.vocab)
    monkeypatch.setattr(steps, "POSITIONS", positions)
    for function in (steps.loss_sum, jax.grad(steps.loss_sum, argnums=1)):
        text = str(jax.make_jaxpr(lambda p, function=function: function(model, p, batch))(params))
        assert (f"f32[{ROWS},{LENGTH},{config.vocab}]" in text) == (length == LENGTH)
        assert f"f32[{ROWS},{length},{config.vocab}]" in text
