"""A run's checkpoints, written while training goes on."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from tqdm import tqdm

from polyglot_jax import checkpoint, hosts
from polyglot_jax.config import Config, InputError
from polyglot_jax.steps import TrainState
from polyglot_jax.two_phases import TwoPhases


class Saver:
    """Writes checkpoints one at a time in the background, deletes what need not be kept, and reports failures.

    With several processes all write, and call these methods after the same steps.
    What goes wrong raises InputError at the next `poll`, `save` or `wait`; with train.if_save_fails=continue it is a
    line on stderr instead, and the run goes on towards its next checkpoint. The last one of a process always raises,
    and so does a process that is missing.
    """

    def __init__(self, run: Path, config: Config, tokenizer: str | None):
        """`tokenizer`: the text of a tokenizer.json, for every checkpoint."""
        self._run, self._config, self._tokenizer = run, config, tokenizer
        self._step, self._is_last = 0, False
        self._pending: TwoPhases | None = None

    def __enter__(self) -> Saver:
        with hosts.together():
            if hosts.is_first():
                checkpoint.prune(self._run, keep=0)  # what a killed process left, nothing else
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """What is being written is finished, also when the run fails; its own failure is then no news."""
        if kind and self._pending is not None and not hosts.meet("save"):
            return  # the run failed on this process only; what it leaves is cleared away by the next
        with contextlib.suppress(InputError) if kind else contextlib.nullcontext():
            self.wait()

    def save(self, step: int, state: TrainState, metrics: dict[str, float], *, is_last: bool) -> None:
        """Begin to write RUN/checkpoints/STEP, once the one before is whole. The state may change afterwards."""
        self.wait()
        self._step, self._is_last = step, is_last
        try:
            self._pending = checkpoint.start_save(
                self._run / "checkpoints" / str(step),
                self._config,
                state.params,
                optimizer=state.optimizer,
                tokenizer=self._tokenizer,
                step=step,
                metrics=metrics,
            )
        except Exception as error:  # Orbax and TensorStore raise whatever they like
            self._failed(error)

    def poll(self) -> None:
        """Learn whether a checkpoint is whole, without waiting for it."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except Exception as error:
            self._failed(error)
            return
        with hosts.together():
            if hosts.is_first():
                checkpoint.prune(self._run, self._config.train.keep, self._config.train.keep_every)

    def _failed(self, error: Exception) -> None:
        newest = checkpoint.newest(self._run) or "none"
        line = f"checkpoint of step {self._step} was not written: {error} (newest checkpoint: {newest})"
        if self._config.train.if_save_fails == "stop" or self._is_last or isinstance(error, hosts.Missing):
            raise InputError(line) from error
        if hosts.is_first():
            tqdm.write(f"warning: {line}; training goes on", file=sys.stderr)  # past the progress line
