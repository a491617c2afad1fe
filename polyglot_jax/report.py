"""What a training run says of itself while it runs."""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from polyglot_jax import checkpoint, hosts, steps
from polyglot_jax.checkpoint import Checkpoint
from polyglot_jax.config import InputError
from polyglot_jax.data import Batches
from polyglot_jax.diagnosis import diagnose
from polyglot_jax.hardware import peak_flops, step_flops
from polyglot_jax.log import Log, NoLog
from polyglot_jax.optimizer import schedule
from polyglot_jax.program import Program
from polyglot_jax.steps import Batch, TrainState
from polyglot_jax.tokenizer import Tokenizer


def is_due(every: int, step: int, total: int) -> bool:
    """Whether something done every `every` steps (0: never), and at the last one, is due after `step`."""
    return step == total or (every > 0 and step % every == 0)


class Reporter:
    """What a run says of itself: log rows, the progress line, held-out losses, a profiler's trace of train.profile's
    steps; stops when too many steps are skipped.

    .skipped: steps of the run so far whose loss or gradient was not finite.
    """

    def __init__(
        self,
        program: Program,
        batches: Batches,
        tokenizer: Tokenizer | None,
        out: Path,
        start: Checkpoint | None = None,
    ):
        """Goes on after `start` in the run at `out`; without a tokenizer there are no bits per byte."""
        config = program.config
        self._config, self._program, self._out = config, program, out
        self._batches, self._bytes = batches, tokenizer.byte_lengths() if tokenizer else None
        self._rate = schedule(config.optimizer, config.train.steps)
        self._losses = jax.jit(
            lambda params, batch: (steps.token_losses(program.model, params, batch.tokens) * batch.weights).sum()
        )
        self._peak, source = peak_flops(config.train.dtype, program.batch.tokens.sharding.mesh.size)
        print(f"MFU is a share of {self._peak / 1e12:.3g} TFLOP/s ({source}), counting 6N FLOPs a token")
        first = start.step if start else 0
        self._log = Log(out, first, may_fail=config.train.if_save_fails == "continue") if hosts.is_first() else NoLog()
        self._progress = tqdm(
            total=config.train.steps, initial=first, desc="training", unit="step", disable=not hosts.is_first()
        )
        self._window: list[dict[str, jax.Array]] = []
        self._newest: dict[str, float] = {}
        self._taken, self._checked, self._in_a_row = first, first, 0
        self.skipped = int(start.metrics.get("skipped", 0)) if start else 0
        self._is_tracing = False
        self._restart_clock()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._stop_trace()
        self._progress.close()
        self._log.close()

    def _restart_clock(self) -> None:
        if self._config.train.watchdog:
            faulthandler.dump_traceback_later(self._config.train.watchdog, file=sys.__stderr__)
        self._timed, self._clock = 0, time.perf_counter()
        self._aside: Counter[str] = Counter()
        self._data_wait = 0.0

    @contextlib.contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """What is done in it is no training step: its seconds are a column of the next row, and not in the speed."""
        start = time.perf_counter()
        yield
        self._aside[what] += time.perf_counter() - start

    def watched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; how long the loop waits for them is noted."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._data_wait += time.perf_counter() - start
            if batch is None:
                return
            if hosts.is_first() and not self._is_tracing and self._is_profiled(self._taken + 1):
                with self.aside("profile"):
                    jax.block_until_ready(self._window)  # steps before it, which may still be running
                    jax.profiler.start_trace(self._out / "profile", create_perfetto_trace=True)
                self._is_tracing = True
            yield batch

    def _is_profiled(self, step: int) -> bool:
        return bool(at := self._config.train.profile) and at[0] <= step <= at[1]

    def _stop_trace(self) -> None:
        if self._is_tracing:
            self._is_tracing = False
            jax.profiler.stop_trace()
            self._progress.write(f"wrote the profiler's trace to {self._out / 'profile'}")

    def step(self, step: int, metrics: dict[str, jax.Array], state: TrainState) -> None:
        """Take in the metrics of a step, and the state after it; every train.log_every steps, log and show them."""
        train = self._config.train
        self._window.append(metrics)
        self._taken = step
        self._timed += 1
        self._progress.update()
        if self._is_tracing and step >= train.profile[1]:
            with self.aside("profile"):
                jax.block_until_ready(metrics)
                self._stop_trace()
        if not is_due(train.log_every, step, train.steps):
            return
        values = dict(self.settle(step, state))
        seconds = time.perf_counter() - self._clock - sum(self._aside.values())
        speed = self._timed * train.batch_size * train.sequence_length / seconds
        values |= {
            "learning_rate": float(self._rate(step - 1 - self.skipped)),  # a skipped step moves no schedule
            "skipped": self.skipped,
            "tokens_per_second": speed,
            "mfu": step_flops(self._config, False) * self._timed / seconds / self._peak,
            "mfu_with_attention": step_flops(self._config, True) * self._timed / seconds / self._peak,
            "step_seconds": seconds / self._timed,
            "data_wait": self._data_wait / seconds,
        } | {f"{what}_seconds": value for what, value in self._aside.items()}
        self._log.write(step, **values)
        self._progress.set_postfix_str(
            f"loss {values.get('loss', math.nan):.4f}, lr {values['learning_rate']:.2e}, "
            f"{speed:,.0f} tokens/s, MFU {values['mfu']:.1%}"
        )
        self._restart_clock()

    def settle(self, step: int, state: TrainState) -> dict[str, float]:
        """Wait for the steps since the last time and count those that were skipped; InputError at too many in a row,
        and if the parameters are not finite.

        Returns those of the newest step's values that are finite.
        """
        window = jax.device_get(self._window)
        self._window = []
        for number, values in enumerate(window, self._checked + 1):
            if not math.isfinite(values["parameter_norm"]):
                raise InputError(
                    f"step {number}: parameter_norm={values['parameter_norm']}: its update was too large, and nothing "
                    f"after it was saved; lower optimizer.learning_rate {self._newest_checkpoint()}"
                )
            bad = [f"{name}={values[name]}" for name in ("loss", "gradient_norm") if not math.isfinite(values[name])]
            self._in_a_row = self._in_a_row + 1 if bad else 0
            if bad:
                self.skipped += 1
                self._progress.write(f"step {number}: {bad[0]}; skipped ({self.skipped} so far)")
            if self._in_a_row > self._config.train.skip_limit:
                where = diagnose(self._program, self._batches, state.params, number)
                raise InputError(
                    f"step {number}: {bad[0]}; train.skip_limit={self._config.train.skip_limit} allows no more such "
                    f"steps in a row. {where}. Lower optimizer.learning_rate, or look at the data there "
                    f"{self._newest_checkpoint()}"
                )
            self._newest = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        self._checked = step
        return self._newest

    def _newest_checkpoint(self) -> str:
        return f"(newest checkpoint: {checkpoint.newest(self._out) or 'none'})"

    def heldout(self, step: int, state: TrainState) -> None:
        """Log the loss on the held-out text: nats per token and, given the tokenizer, bits per byte of UTF-8."""
        self.settle(step, state)
        with self.aside("heldout"):
            loss, count, length = self._heldout(state)
        if not count:
            return
        values = {"heldout_loss": loss / count}
        line = f"step {step}: held-out loss {loss / count:.4f} nats per token"
        if length:
            values["heldout_bits_per_byte"] = loss / math.log(2) / length
            line += f", {values['heldout_bits_per_byte']:.4f} bits per byte"
        self._log.write(step, **values)
        self._progress.write(f"{line}, over {count:,.0f} tokens")

    def _heldout(self, state: TrainState) -> tuple[float, float, int]:
        """Over the held-out text: the sum of losses in nats, tokens, and their bytes of UTF-8."""
        size = self._config.train.batch_size // self._config.train.accumulate
        loss, count, length = 0.0, 0.0, 0
        rows = self._batches.heldout(self._config.train.eval_sequences)
        while part := list(itertools.islice(rows, size)):
            tokens, weights = map(np.stack, zip(*part, strict=True))
            missing = ((0, size - len(tokens)), (0, 0))
            batch = self._program.place(Batch(np.pad(tokens, missing), np.pad(weights, missing)))
            loss += float(self._losses(state.params, batch))
            count += float(weights.sum())
            if self._bytes is not None:
                length += int(self._bytes[tokens[:, 1:]][weights > 0].sum())
        return loss, count, length
