"""KoBEST's documents: from its own TSV files, or from the hub's dataset through the `datasets` library."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polyglot_jax.config import InputError
from polyglot_jax.evaluate.tasks import TASKS, Row, Task, problem_of

HUB = "skt/kobest_v1"
_AS_IT_IS = "take the file as KoBEST has it"
_REMEDY = "give KoBEST's folder, with BoolQ/test.tsv and so on, by --data"


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
        file = roots[0] / task.folder / f"{'dev' if split == 'validation' else split}.tsv"
        where, rows = str(file), _read_tsv(file, task)
    else:
        where, rows = f"data={data}: {task.hub}/{split}", _read_hub(data, task, split)
    if not rows:
        raise InputError(f"{where}: holds no documents; {_REMEDY}")
    return rows


def _read_tsv(file: Path, task: Task) -> list[Row]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); {_REMEDY}") from error
    try:
        text = content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{file}: line {line}: is not UTF-8 ({error.reason}); {_AS_IT_IS}") from error
    records = csv.reader(io.StringIO(text, newline=""), delimiter="\t")
    try:
        return list(_rows(file, records, task))
    except csv.Error as error:
        raise InputError(f"{file}: line {records.line_num}: {error}; {_AS_IT_IS}") from error


def _rows(file: Path, records: Any, task: Task) -> Iterator[Row]:
    """Columns are found by name: the train and dev files of SentiNeg have them in another order, its test file more.

    Quotes are read as pandas reads them, which made the hub's dataset: some rows have quoted words at their start.
    """
    header = next(records, [])
    wanted = {**task.columns, "label": task.label}
    missing = [column for column in wanted.values() if column not in header]
    if missing:
        among = f"among {', '.join(header) or 'none'}"
        raise InputError(f"{file}: line 1: no column {' or '.join(missing)} {among}; {_AS_IT_IS}")
    begins = records.line_num + 1
    for record in records:
        if records.line_num != begins:  # no cell of KoBEST's has a line break: a quote too many would join documents
            problem = f"a quoted cell begins here and ends in line {records.line_num}"
            raise InputError(f"{file}: line {begins}: {problem}; {_AS_IT_IS}")
        if len(record) != len(header):
            problem = f"{len(record)} fields where the header has {len(header)}"
            raise InputError(f"{file}: line {begins}: {problem}; {_AS_IT_IS}")
        row = {field: record[header.index(column)] for field, column in wanted.items()}
        row["label"] = task.labels.get(row["label"].strip().casefold(), row["label"])
        problem = problem_of(task, row)
        if problem:
            raise InputError(f"{file}: line {begins}: {problem}; {_AS_IT_IS}")
        yield row
        begins = records.line_num + 1


def _read_hub(data: str, task: Task, split: str) -> list[Row]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise InputError(
            f"data={data}: no KoBEST files (such as {task.folder}/{split}.tsv) there, and to read it as a dataset the "
            f"`datasets` package is needed: pip install datasets, or {_REMEDY}"
        ) from error
    try:
        rows = list(datasets.load_dataset(data, task.hub, split=split))
    except Exception as error:  # many kinds: of the network, of files, of names
        raise InputError(f"data={data}: {task.hub}/{split} cannot be had ({error}); {_REMEDY}") from error
    for number, row in enumerate(rows):
        problem = problem_of(task, row)
        if problem:
            raise InputError(f"data={data}: {task.hub}/{split}: row {number}: {problem}; {_REMEDY}")
    return rows
