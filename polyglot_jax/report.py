"""What a training run says of itself while it runs."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from polyglot_jax import checkpoint, steps
from polyglot_jax.config import InputError
from polyglot_jax.data import Batches
from polyglot_jax.hardware import peak_flops
from polyglot_jax.log import Log
from polyglot_jax.optimizer import schedule
from polyglot_jax.program import Program
from polyglot_jax.steps import Batch, TrainState
from polyglot_jax.tokenizer import Tokenizer


def is_due(every: int, step: int, total: int) -> bool:
    """Whether something done every `every` steps (0: never), and at the last one, is due after `step`."""
    return step == total or (every > 0 and step % every == 0)


class Reporter:
    """What a run says of itself: log rows, the progress line, held-out losses; stops at a loss that is not finite."""

    def __init__(self, program: Program, batches: Batches, tokenizer: Tokenizer | None, out: Path, first: int):
        """Goes on after step `first` of the run at `out`; without a tokenizer there are no bits per byte."""
        config = program.config
        self._config, self._program, self._out = config, program, out
        self._batches, self._bytes = batches, tokenizer.byte_lengths() if tokenizer else None
        self._rate = schedule(config.optimizer, config.train.steps)
        self._losses = jax.jit(
            lambda params, batch: (steps.token_losses(program.model, params, batch.tokens) * batch.weights).sum()
        )
        self._flops = 6 * config.model.parameters()
        # Causal attention adds 6 L T D a token: 2 products of T x T x D, forward and twice backward, half of it masked.
        self._attention_flops = 6 * config.model.layers * config.model.embed * config.train.sequence_length
        self._peak, source = peak_flops(config.train.dtype, program.batch.tokens.sharding.mesh.size)
        print(f"MFU is a share of {self._peak / 1e12:.3g} TFLOP/s ({source}), counting 6N FLOPs a token")
        self._log = Log(out, first)
        self._progress = tqdm(total=config.train.steps, initial=first, desc="training", unit="step")
        self._window: list[dict[str, jax.Array]] = []
        self._checked = first
        self.restart_clock()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()
        self._log.close()

    def restart_clock(self) -> None:
        """Leave out of the speed what was done since the last row: evaluation, a checkpoint."""
        self._timed, self._clock = 0, time.perf_counter()

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Take in the metrics of a step; every train.log_every steps, check, log and show them."""
        train = self._config.train
        self._window.append(metrics)
        self._timed += 1
        self._progress.update()
        if not is_due(train.log_every, step, train.steps):
            return
        values = self.check_finite(step)
        speed = self._timed * train.batch_size * train.sequence_length / (time.perf_counter() - self._clock)
        values |= {
            "learning_rate": float(self._rate(step - 1)),
            "tokens_per_second": speed,
            "mfu": speed * self._flops / self._peak,
            "mfu_with_attention": speed * (self._flops + self._attention_flops) / self._peak,
        }
        self._log.write(step, **values)
        self._progress.set_postfix_str(
            f"loss {values['loss']:.4f}, lr {values['learning_rate']:.2e}, "
            f"{speed:,.0f} tokens/s, MFU {values['mfu']:.1%}"
        )
        self.restart_clock()

    def check_finite(self, step: int) -> dict[str, float]:
        """Wait for the steps since the last check; InputError if a loss or gradient among them is not finite.

        Returns the newest step's values ({} if there is none since).
        """
        window = jax.device_get(self._window)
        self._window = []
        for number, values in enumerate(window, self._checked + 1):
            bad = [f"{name}={value}" for name, value in values.items() if not math.isfinite(value)]
            if bad:
                newest = checkpoint.newest(self._out)
                raise InputError(
                    f"steps {self._checked + 1} to {step}: {bad[0]} at step {number}; nothing after it was saved "
                    f"(newest checkpoint: {newest or 'none'}); lower optimizer.learning_rate, or look at the data there"
                )
        self._checked = step
        return {name: float(value) for name, value in window[-1].items()} if window else {}

    def heldout(self, step: int, state: TrainState) -> None:
        """Log the loss on the held-out text: nats per token and, given the tokenizer, bits per byte of UTF-8."""
        self.check_finite(step)
        size = self._config.train.batch_size // self._config.train.accumulate
        loss, count, length = 0.0, 0.0, 0
        rows = self._batches.heldout(self._config.train.eval_sequences)
        while part := list(itertools.islice(rows, size)):
            tokens, weights = map(np.stack, zip(*part, strict=True))
            missing = ((0, size - len(tokens)), (0, 0))
            batch = Batch(np.pad(tokens, missing), np.pad(weights, missing))
            loss += float(self._losses(state.params, jax.device_put(batch, self._program.batch.tokens.sharding)))
            count += float(weights.sum())
            if self._bytes is not None:
                length += int(self._bytes[tokens[:, 1:]][weights > 0].sum())
        if not count:
            return
        values = {"heldout_loss": loss / count}
        line = f"step {step}: held-out loss {loss / count:.4f} nats per token"
        if length:
            values["heldout_bits_per_byte"] = loss / math.log(2) / length
            line += f", {values['heldout_bits_per_byte']:.4f} bits per byte"
        self._log.write(step, **values)
        self._progress.write(f"{line}, over {count:,.0f} tokens")
        self.restart_clock()
