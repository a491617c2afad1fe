"""Random models of `transformers`, and how ours are compared: logits, and every gradient of the mean cross-entropy."""

import json
from collections.abc import Callable

import jax
import numpy as np
import torch
from models import off_by, random_tensors, to_ours, to_theirs
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from polyglot_jax import names, steps
from polyglot_jax.config import Config, ModelConfig
from polyglot_jax.model import Transformer, split_layers

TOLERANCE = 1e-4

# Code that is not optimised is compiled in half the time; it computes the same.
FAST = {"xla_backend_optimization_level": 0}


def transformers_model(theirs: PreTrainedConfig, seed: int) -> tuple[PreTrainedModel, Config, dict[str, np.ndarray]]:
    """A random model of transformers', our config as read from theirs, and the weights."""
    config = names.config_from_theirs(json.loads(theirs.to_json_string()))
    tensors = random_tensors(config.model, seed)
    model = AutoModelForCausalLM.from_config(theirs, attn_implementation="eager").eval()
    state = {in_memory(key): torch.from_numpy(array.copy()) for key, array in tensors.items()}
    if config.model.tied:  # in memory, unlike in their files, the head is there all the same
        (embedding,) = (tensor.key for tensor in names.tensors(config.model) if "embed/kernel" in tensor.paths)
        state["lm_head.weight"] = state[embedding]
    model.load_state_dict(state)
    return model, config, tensors


def in_memory(key: str) -> str:
    """transformers' name, while a model is loaded, of what its file calls `key`."""
    return key.replace("embed_out.", "lm_head.")


def some_tokens(vocab: int, batch: int = 2, length: int = 13) -> np.ndarray:
    return np.random.default_rng(7).integers(0, vocab, (batch, length))


Results = tuple[np.ndarray, dict[str, np.ndarray]]


def their_results(model: PreTrainedModel, tokens: np.ndarray) -> Results:
    """Logits, and the gradient of the mean cross-entropy under transformers' names."""
    inputs = torch.from_numpy(tokens)
    model.zero_grad()
    logits = model(inputs[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs[:, 1:].flatten()).backward()
    return logits.detach().numpy(), {name: p.grad.numpy() for name, p in model.named_parameters()}


def our_results(
    config: ModelConfig,
    tensors: dict[str, np.ndarray],
    tokens: np.ndarray,
    form: str,
    jitted: bool = True,
    fault: Callable[[ModelConfig, dict], tuple[ModelConfig, dict]] | None = None,
) -> Results:
    """The same of ours. Without jit, models of the same sizes share what is compiled.

    fault: (architecture, parameters) -> those to compute with instead.
    """
    params = to_ours(config, tensors)
    faulty, params = (config, params) if fault is None else fault(config, params)
    model = Transformer(faulty)

    def loss(params, tokens):
        logits = model.apply({"params": params}, tokens[:, :-1])
        return steps.losses_from_logits(logits, tokens[:, 1:]).mean(), logits

    results = jax.grad(loss, has_aux=True)
    params = split_layers(params) if form == "split" else params
    grads, logits = (jax.jit(results, compiler_options=FAST) if jitted else results)(params, tokens)
    if form == "split":
        parts = [grads.pop(f"layer_{i}") for i in range(config.layers)]
        grads["layers"] = jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
    return np.asarray(logits), {in_memory(key): grad for key, grad in to_theirs(config, grads).items()}


def assert_same(ours: Results, theirs: Results) -> None:
    (our_logits, our_grads), (their_logits, their_grads) = ours, theirs
    assert our_grads.keys() == their_grads.keys()
    errors = {"logits": off_by(our_logits, their_logits)}
    for key, grad in their_grads.items():
        # A bias of k moves all scores of a query alike: without rotary its gradient is nothing but rounding errors.
        scale = their_grads[key.replace("k_proj.bias", "q_proj.bias")]
        errors[f"gradient of {key}"] = off_by(our_grads[key], grad, scale)
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


def check_parity(theirs: PreTrainedConfig, seed: int, forms: dict[str, bool]) -> None:
    """`forms`: "stacked" or "split" -> whether to jit it."""
    model, config, tensors = transformers_model(theirs, seed)
    tokens = some_tokens(config.model.vocab)
    reference = their_results(model, tokens)
    for form, jitted in forms.items():
        assert_same(our_results(config.model, tensors, tokens, form, jitted), reference)
