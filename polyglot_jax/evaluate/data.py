"""KoBEST's documents: from its own TSV files, or from the hub's dataset through the `datasets` library."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polyglot_jax.config import InputError
from polyglot_jax.evaluate.tasks import TASKS, Row, Task, problem_of

HUB = "skt/kobest_v1"


def read(data: str, name: str, split: str) -> list[Row]:
    """The rows of a task's split, "train", "validation" or "test", in the order of the file.

    data: KoBEST's folder, with BoolQ/test.tsv and so on in it or in its v1.0; else whatever
    `datasets.load_dataset` takes, such as the hub's name. InputError names the file, and the line that is wrong.
    """
    task, folder = TASKS[name], Path(data)
    roots = [
        root for root in (folder, folder / "v1.0") if any((root / task.folder).is_dir() for task in TASKS.values())
    ]
    if roots:
        return _read_tsv(roots[0] / task.folder / f"{'dev' if split == 'validation' else split}.tsv", task)
    return _read_hub(data, task, split)


def _read_tsv(file: Path, task: Task) -> list[Row]:
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            return list(_rows(file, csv.reader(stream, delimiter="\t"), task))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); give KoBEST's folder with --data") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: is not UTF-8 ({error}); take the file as KoBEST has it") from error


def _rows(file: Path, records: Any, task: Task) -> Iterator[Row]:
    """Columns are found by name: the train and dev files of SentiNeg have them in another order, its test file more.

    Quotes are read as pandas reads them, which made the hub's dataset: some rows have quoted words at their start.
    """
    header = next(records, [])
    wanted = {**task.columns, "label": task.label}
    missing = [column for column in wanted.values() if column not in header]
    if missing:
        raise InputError(f"{file}: line 1: no column {' or '.join(missing)} among {', '.join(header) or 'none'}")
    begins = records.line_num + 1
    for record in records:
        if len(record) != len(header):
            raise InputError(f"{file}: line {begins}: {len(record)} fields where the header has {len(header)}")
        row = {field: record[header.index(column)] for field, column in wanted.items()}
        row["label"] = task.labels.get(row["label"].strip().casefold(), row["label"])
        problem = problem_of(task, row)
        if problem:
            raise InputError(f"{file}: line {begins}: {problem}")
        yield row
        begins = records.line_num + 1


def _read_hub(data: str, task: Task, split: str) -> list[Row]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise InputError(
            f"data={data}: no KoBEST files (such as {task.folder}/{split}.tsv) there, and to read it as a dataset the "
            "`datasets` package is needed: pip install datasets, or give KoBEST's folder with --data"
        ) from error
    try:
        rows = list(datasets.load_dataset(data, task.hub, split=split))
    except Exception as error:  # many kinds: of the network, of files, of names
        raise InputError(f"data={data}: {task.hub}/{split} cannot be had: {error}") from error
    for number, row in enumerate(rows):
        problem = problem_of(task, row)
        if problem:
            raise InputError(f"data={data}: {task.hub}/{split}: row {number}: {problem}")
    return rows
