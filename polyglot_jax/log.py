"""A run's record: rows in log.jsonl and TensorBoard events while it runs, a picture of it at the end."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import tqdm

from polyglot_jax.config import InputError
from polyglot_jax.files import sync


def read_log(run: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's log; each has "step" and either training or held-out values. [] if there is none.

    A row that was torn, by a process that died, ends them; InputError if the file holds what was never a row.
    """
    file = Path(run) / "log.jsonl"
    if not file.is_file():
        return []
    mend = "mend it, or move it away: a run goes on without its earlier rows"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not a log, not even UTF-8 ({error}); {mend}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not (isinstance(row, dict) and isinstance(row.get("step"), int)):
            raise InputError(f"{file}: line {number} is no row of a log, it has no step: {line[:80]}; {mend}")
        rows.append(row)
    return rows


class Log:
    """Appends rows to a run's log."""

    def __init__(self, run: str | Path, after: int, *, may_fail: bool = False):
        """Go on after step `after`: later rows, left by a run that went further, are dropped.

        0 is a new run: it logs its step 0 itself, whatever one killed before its first checkpoint left.
        may_fail: a row that cannot be written, for want of room say, is warned of, and waits in memory for the next.
        """
        self._may_fail = may_fail
        file = Path(run) / "log.jsonl"
        kept = [row for row in read_log(run) if after and row["step"] <= after]
        temporary = file.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        sync(temporary)
        temporary.replace(file)
        self._file = file.open("a", encoding="utf-8")
        folder = Path(run) / "tensorboard"
        folder.mkdir(exist_ok=True)
        # Not SummaryWriter: its thread dies quietly on a full disk, and the queue to it then blocks for ever.
        self._events = EventsWriter(str(folder / "events"), f".{after}")
        self._event(after + 1 if after else 0, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, **values: float) -> None:
        try:
            self._file.write(json.dumps({"step": step} | values) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._event(step, summary=scalar(name, value))
        except OSError as error:
            if not self._may_fail:
                raise InputError(f"{self._file.name}: {error.strerror}; the log of step {step} is not whole") from error
            tqdm.write(f"warning: {self._file.name}: {error.strerror}; training goes on", file=sys.stderr)

    def _event(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))
        self._events.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a row that was not written, which was said
            self._file.close()
            self._events.close()


class NoLog:
    """Stands for the log on a process that writes none."""

    def write(self, step: int, **values: float) -> None: ...

    def close(self) -> None: ...


# Panels of a run's picture: title, axis label, whether it is logarithmic, (column of the log, its name, style).
_PANELS = (
    ("loss", "nats per token", False, (("loss", "training", "-"), ("heldout_loss", "held out", "o-"))),
    ("norms", "global norm", True, (("gradient_norm", "gradient, unclipped", "-"), ("parameter_norm", "weights", "-"))),
    ("learning rate", "", False, (("learning_rate", "", "-"),)),
    ("speed", "tokens/s", False, (("tokens_per_second", "", "-"),)),
)


def plot_run(run: str | Path) -> Path:
    """Draw a run's log, losses, norms, learning rate and speed, to RUN/curves.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, file = read_log(run), Path(run) / "curves.png"
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(Path(run).resolve().name)
    for axes, (title, label, is_logarithmic, curves) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for key, name, style in curves:
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=name, linewidth=1, markersize=3)
        axes.set(title=title, xlabel="step", ylabel=label)
        if is_logarithmic:
            axes.set_yscale("log")
        else:
            axes.margins(y=0.1)
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend()
    figure.savefig(file, dpi=120)
    return file
