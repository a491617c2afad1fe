"""Tasks in one process or in many: Ray schedules, retries, spreads over machines; what is done is not done again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from polyglot_jax.config import InputError

RETRIES = 3
"""How often a task is tried again whose worker has died: killed, out of memory, or with its machine."""


@contextmanager
def engine(workers: int) -> Iterator[None]:
    """With more than one worker: a Ray of this machine while it lasts, or the cluster that RAY_ADDRESS names."""
    if workers == 1:
        yield
        return
    try:
        import ray
    except ImportError as error:
        raise InputError(f"workers={workers}: needs Ray; pip install -r requirements-corpus.txt") from error
    # The tokenizer's threads: one for each worker, not one for each core in each.
    environment = {"env_vars": {"RAYON_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}}
    cluster = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers, "include_dashboard": False}
    ray.init(**cluster, log_to_driver=False, logging_level="error", runtime_env=environment)
    try:
        yield
    finally:
        ray.shutdown()


def run(name: str, function: Callable[[int], None], tasks: Sequence[object], workers: int, work: Path) -> None:
    """Call `function` with the number of each task, but for those that an earlier run finished, in `engine(workers)`.

    tasks  what each is about, as an error names it

    `function` must give the same files whenever it is called. With several workers it is pickled, and the folder
    `work` must be one that all of them see. The first exception ends the run: that of a task, or InputError for one
    whose workers keep dying.
    """
    done = work / "done" / name
    done.mkdir(parents=True, exist_ok=True)
    left = [rank for rank in range(len(tasks)) if not (done / str(rank)).exists()]

    def task(rank: int) -> None:
        function(rank)
        (done / str(rank)).touch()

    with tqdm(total=len(tasks), initial=len(tasks) - len(left), desc=name, unit="tasks") as bar:
        if workers == 1:
            for rank in left:
                task(rank)
                bar.update()
            return
        import ray

        remote = ray.remote(num_cpus=1, max_retries=RETRIES)(task)  # pickled and sent once, with the list of all files
        ranks = {remote.remote(rank): rank for rank in left}
        waiting = list(ranks)
        while waiting:
            [ready], waiting = ray.wait(waiting)
            try:
                ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error  # the task's own, as it would come from one process
            except ray.exceptions.RayError as error:
                raise InputError(
                    f"{name}: {tasks[ranks[ready]]}: its worker died {RETRIES + 1} times ({type(error).__name__}); if "
                    "memory was short, pass fewer --workers or split the file; the same command goes on where it was"
                ) from error
            bar.update()
