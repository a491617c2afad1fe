"""The five tasks of KoBEST: columns, labels, prompts and choices.

Prompts as in lm-evaluation-harness, branch polyglot, lm_eval/tasks/kobest.py (which made the published tables), and in
its tasks/kobest/*.yaml of today, which differ in one space. Text is never stripped: cells with spaces around them were
scored with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from polyglot_jax.config import InputError

Protocol = Literal["branch", "harness"]
Row = Mapping[str, Any]
"""Fields by the hub's names; "label" is the number of the right choice."""

_TRUTH = {"false": 0, "true": 1}
_CONNECTORS = {"원인": "왜냐하면", "결과": "그래서"}


@dataclass(frozen=True)
class Task:
    """columns: the hub's field -> the column of KoBEST's own files; labels: what the label's column may hold.

    text and choices make a prompt, and the answers without the space that stands before each, from a row.
    """

    folder: str
    hub: str
    columns: Mapping[str, str]
    label: str
    labels: Mapping[str, int]
    text: Callable[[Row, Protocol], str]
    choices: Callable[[Row], tuple[str, ...]]


def _copa(row: Row, protocol: Protocol) -> str:
    # The yaml's connector begins with a space, and another one stands before it.
    return f"{row['premise']}{'  ' if protocol == 'harness' else ' '}{_CONNECTORS[row['question'].strip()]}"


TASKS: dict[str, Task] = {
    "kobest_boolq": Task(
        folder="BoolQ",
        hub="boolq",
        columns={"paragraph": "Text", "question": "Question"},
        label="Answer",
        labels=_TRUTH,
        text=lambda row, _: f"{row['paragraph']} 질문: {row['question']} 답변: ",
        choices=lambda _: ("아니오", "예"),
    ),
    "kobest_copa": Task(
        folder="COPA",
        hub="copa",
        columns={"premise": "sentence", "question": "question", "alternative_1": "1", "alternative_2": "2"},
        label="Answer",
        labels={"1": 0, "2": 1},
        text=_copa,
        choices=lambda row: (row["alternative_1"], row["alternative_2"]),
    ),
    "kobest_wic": Task(
        folder="WiC",
        hub="wic",
        columns={"word": "Target", "context_1": "SENTENCE1", "context_2": "SENTENCE2"},
        label="ANSWER",
        labels=_TRUTH,
        text=lambda row, _: (
            f"문장1: {row['context_1']} 문장2: {row['context_2']} 두 문장에서 {row['word']}가 같은 뜻으로 쓰였나?"
        ),
        choices=lambda _: ("아니오", "예"),
    ),
    "kobest_hellaswag": Task(
        folder="HellaSwag",
        hub="hellaswag",
        columns={"context": "context"} | {f"ending_{i}": f"choice{i}" for i in range(1, 5)},
        label="label",
        labels={"0": 0, "1": 1, "2": 2, "3": 3},
        text=lambda row, _: f"문장: {row['context']}",
        choices=lambda row: tuple(row[f"ending_{i}"] for i in range(1, 5)),
    ),
    "kobest_sentineg": Task(
        folder="SentiNeg",
        hub="sentineg",
        columns={"sentence": "Text"},
        label="Label",
        labels={"0": 0, "1": 1},
        text=lambda row, _: f"문장: {row['sentence']} 긍부정:",
        choices=lambda _: ("부정", "긍정"),
    ),
}


def problem_of(task: Task, row: Row) -> str | None:
    """What keeps a row from being used, in a few words, or None."""
    for field, column in task.columns.items():
        if not isinstance(row.get(field), str) or not row[field].strip():
            return f"{column} is empty"
    if "label" not in row:
        return f"label is missing among {', '.join(row)}"
    if not isinstance(row["label"], int) or row["label"] not in range(len(task.choices(row))):
        return f"{task.label}={row['label']!r} is not understood; it is one of {', '.join(task.labels)}"
    if task.hub == "copa" and row["question"].strip() not in _CONNECTORS:
        return f"question={row['question']!r} is not understood; it is one of {', '.join(_CONNECTORS)}"
    return None


def find_tasks(names: str) -> list[str]:
    """The tasks of a list with commas; "kobest" is all of them. InputError, naming those there are."""
    found: list[str] = []
    for name in (part.strip() for part in names.split(",")):
        if name != "kobest" and name not in TASKS:
            raise InputError(f"tasks={name}: no such task; there are {', '.join(TASKS)}, and kobest for all five")
        found += list(TASKS) if name == "kobest" else [name]
    return list(dict.fromkeys(found))
