"""The optimizer does what torch's AdamW does after torch's clipping, on a schedule written down a second time here."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from models import model_config, off_by

from polyglot_jax.checkpoint import flatten
from polyglot_jax.config import OptimizerConfig
from polyglot_jax.model import Transformer
from polyglot_jax.optimizer import decay_mask, make_optimizer, schedule

# The axis names of real weights, over small sizes of which no two are the same.
SIZES = {"vocab": 11, "layers": 2, "embed": 8, "heads": 3, "head_dim": 4, "mlp": 10}
AXES = Transformer(model_config()).axes()
DECAYED = {
    "layers/attention/q/kernel",
    "layers/attention/k/kernel",
    "layers/attention/v/kernel",
    "layers/attention/out/kernel",
    "layers/mlp/up/kernel",
    "layers/mlp/down/kernel",
}


def rate(step: int, peak: float, final: float, warmup_steps: int, end: int) -> float:
    """The learning rate of step 0, 1, ...: a line from 0 to the peak, half a cosine, then level."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    share = min((step - warmup_steps) / (end - warmup_steps), 1)
    return final + (peak - final) * (1 + math.cos(math.pi * share)) / 2


def random_leaves(seed: int, scale: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {name: tuple(SIZES[axis] for axis in axes) for name, axes in flatten(AXES).items()}
    return {name: np.float32(scale) * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def ours(config: OptimizerConfig, steps: int, axes: dict, gradients: list) -> list[dict]:
    """The parameters after each step."""
    optimizer = make_optimizer(config, steps, axes)
    params = random_leaves(0, 1.0)
    state = optimizer.init(params)
    history = []
    for grads in gradients:
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        history.append({name: np.asarray(leaf) for name, leaf in params.items()})
    return history


def theirs(config: OptimizerConfig, warmup_steps: int, end: int, gradients: list) -> list[dict]:
    params = {name: torch.nn.Parameter(torch.from_numpy(leaf)) for name, leaf in random_leaves(0, 1.0).items()}
    groups = [
        {"params": [leaf for name, leaf in params.items() if name in DECAYED], "weight_decay": config.weight_decay},
        {"params": [leaf for name, leaf in params.items() if name not in DECAYED], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(config.b1, config.b2), eps=config.eps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: rate(step, config.learning_rate, config.final_learning_rate, warmup_steps, end),
    )
    history = []
    for grads in gradients:
        for name, leaf in params.items():
            leaf.grad = torch.from_numpy(grads[name].copy())
        if config.clip:
            torch.nn.utils.clip_grad_norm_(params.values(), config.clip)
        optimizer.step()
        scheduler.step()
        history.append({name: leaf.detach().numpy().copy() for name, leaf in params.items()})
    return history


CASES = {
    # name: (config, warm-up steps, last step of the cosine)
    "as the presets": (OptimizerConfig(learning_rate=0.02, warmup=0.2), 4, 20),
    "decay": (OptimizerConfig(learning_rate=0.02, warmup=0.2, weight_decay=0.5, final_learning_rate=0.01), 4, 20),
    "other betas": (OptimizerConfig(learning_rate=0.03, warmup=0.25, b1=0.8, b2=0.95, eps=1e-3), 5, 20),
    "no warm-up": (OptimizerConfig(learning_rate=0.02, warmup=0.0, weight_decay=0.1), 0, 20),
    "cosine ends early": (
        OptimizerConfig(learning_rate=0.02, final_learning_rate=0.01, decay_steps=10, warmup=0.1),
        1,
        10,
    ),
    "cosine ends late": (OptimizerConfig(learning_rate=0.02, warmup=0.1, decay_steps=40), 4, 40),
    "no clipping": (OptimizerConfig(learning_rate=0.02, warmup=0.2, clip=0.0, weight_decay=0.1), 4, 20),
}


@pytest.mark.parametrize("case", CASES)
def test_as_torch_adamw(case):
    config, warmup_steps, end = CASES[case]
    # Norms from 0.3 to 3 and back: some gradients are clipped at 1 and some are not.
    norm = math.sqrt(sum(leaf.size for leaf in random_leaves(0, 1.0).values()))
    gradients = [random_leaves(step + 1, 3 ** math.sin(step) / norm) for step in range(20)]
    axes = flatten(AXES)
    for step, (a, b) in enumerate(
        zip(ours(config, 20, axes, gradients), theirs(config, warmup_steps, end, gradients), strict=True)
    ):
        errors = {name: off_by(a[name], b[name]) for name in b}
        assert {name: error for name, error in errors.items() if error > 1e-6} == {}, f"after step {step}"


def test_clipping_matters():
    """Adam forgets the scale of gradients that are all alike, so the cases above need gradients that differ."""
    gradients = [random_leaves(step, scale) for step, scale in enumerate((0.001, 1.0, 0.001))]
    axes = flatten(AXES)
    clipped = ours(OptimizerConfig(learning_rate=0.02, warmup=0, clip=1.0), 20, axes, gradients)[-1]
    free = ours(OptimizerConfig(learning_rate=0.02, warmup=0, clip=0.0), 20, axes, gradients)[-1]
    assert off_by(clipped["embed/kernel"], free["embed/kernel"]) > 1e-3


def test_clip_0_leaves_the_gradient_alone():
    grads = {"head/kernel": jnp.full((3, 4), 1e6)}
    axes = {"head/kernel": ("vocab", "embed")}
    config = OptimizerConfig(learning_rate=1.0, warmup=0, clip=0.0, b1=0.0, b2=0.0, eps=1e6)
    optimizer = make_optimizer(config, 10, axes)
    updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
    # Adam without memory: -g / (|g| + eps). Had it been clipped to a norm of 1 this would be next to 0.
    np.testing.assert_allclose(updates["head/kernel"], -0.5, rtol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_which_weights_decay(tied):
    mask = flatten(decay_mask(Transformer(model_config(tied=tied)).axes()))
    assert {name for name, decays in mask.items() if decays} == DECAYED
    assert set(mask) - DECAYED == {
        "embed/kernel",
        "layers/attention_norm/scale",
        "layers/attention_norm/bias",
        "layers/attention/q/bias",
        "layers/attention/k/bias",
        "layers/attention/v/bias",
        "layers/attention/out/bias",
        "layers/mlp_norm/scale",
        "layers/mlp_norm/bias",
        "layers/mlp/up/bias",
        "layers/mlp/down/bias",
        "final_norm/scale",
        "final_norm/bias",
    } | ({"head/kernel"} if not tied else set())


def test_only_those_weights_shrink():
    """With no gradient, decay is all that happens: a weight becomes itself times (1 - rate * decay)."""
    config = OptimizerConfig(learning_rate=0.1, warmup=0, weight_decay=0.5)
    after = ours(config, 1000, flatten(AXES), [random_leaves(1, 0.0)])[0]
    for name, before in random_leaves(0, 1.0).items():
        np.testing.assert_allclose(after[name], before * (0.95 if name in DECAYED else 1), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        # 1000 steps, 100 of them warm-up: half the peak at 50, the peak at 100, the mean of peak and end at 550.
        ({}, {0: 0, 50: 1e-4, 100: 2e-4, 550: 1.1e-4, 1000: 2e-5, 5000: 2e-5}),
        ({"final_learning_rate": 0.0}, {0: 0, 100: 2e-4, 550: 1e-4, 1000: 0}),
        ({"warmup": 0.0}, {0: 2e-4, 500: 1.1e-4, 1000: 2e-5}),
        ({"decay_steps": 500}, {0: 0, 25: 1e-4, 50: 2e-4, 275: 1.1e-4, 500: 2e-5, 1000: 2e-5}),
        ({"decay_steps": 2000}, {0: 0, 200: 2e-4, 1100: 1.1e-4, 2000: 2e-5}),
    ],
)
def test_schedule(changes, values):
    config = OptimizerConfig(**{"learning_rate": 2e-4, "final_learning_rate": 2e-5, "warmup": 0.1} | changes)
    at = schedule(config, 1000)
    for step, value in values.items():
        np.testing.assert_allclose(at(step), value, rtol=1e-6, atol=1e-12, err_msg=f"step {step}")


def test_schedule_everywhere():
    at = schedule(OptimizerConfig(learning_rate=2e-4, final_learning_rate=1e-5, warmup=0.05), 300)
    expected = [rate(step, 2e-4, 1e-5, 15, 300) for step in range(400)]
    np.testing.assert_allclose([float(at(step)) for step in range(400)], expected, rtol=0, atol=2e-4 * 1e-6)
