"""Results as tables in the form of the model cards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyglot_jax.evaluate import published

_TITLES = {
    "kobest_boolq": "BoolQ", "kobest_copa": "COPA", "kobest_wic": "WiC", "kobest_hellaswag": "HellaSwag",
    "kobest_sentineg": "SentiNeg",
}  # fmt: skip


def markdown(results: Mapping[str, Mapping[str, Mapping[str, Any]]], model: str, size: int, name: str | None) -> str:
    """A table for each task, of macro-F1 with its interval; what was published of the model `name` under it.

    results: task -> shots -> metric -> value; size: parameters of the model. The title says if not all documents count.
    """
    blocks = []
    for task, cells in results.items():
        one = next(iter(cells.values()))
        part = f", only the first {one['documents']} of {one['of']} documents" if one["documents"] < one["of"] else ""
        head = [
            f"### {_TITLES[task]} (macro-F1{part})",
            "",
            _row("Model", "params", *(f"n={shots}" for shots in cells)),
        ]
        head.append("|---" * (2 + len(cells)) + "|")
        metrics = ("macro_f1", "macro_f1_norm") if task == "kobest_hellaswag" else ("macro_f1",)
        blocks.append(
            "\n".join(head + [row for metric in metrics for row in _rows(task, cells, metric, model, size, name)])
        )
    return "\n\n".join(blocks)


def _rows(
    task: str, cells: Mapping[str, Mapping[str, Any]], metric: str, model: str, size: int, name: str | None
) -> list[str]:
    kind = " (per character)" if metric == "macro_f1_norm" else ""
    ours = [
        f"{cell[metric]:.4f} [{cell[f'{metric}_low']:.3f}, {cell[f'{metric}_high']:.3f}]" for cell in cells.values()
    ]
    rows = [_row(model + kind, f"{size / 1e9:.1f}B" if size >= 5e7 else f"{size / 1e6:.1f}M", *ours)]
    theirs = [published.value(name, task, int(shots), metric) for shots in cells]
    if any(value is not None for value in theirs):
        rows.append(
            _row(f"{name}, published{kind}", "", *("" if value is None else f"{value:.4f}" for value in theirs))
        )
        differences = (
            "" if value is None else f"{cell[metric] - value:+.4f}"
            for value, cell in zip(theirs, cells.values(), strict=True)
        )
        rows.append(_row("difference", "", *differences))
    return rows


def notes(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """What should be known of single cells: contexts that were cut, choices that rounding could turn."""
    lines = []
    for task, cells in results.items():
        for shots, cell in cells.items():
            if cell["truncated"]:
                lines.append(
                    f"{task}, {shots} shots: {cell['truncated']} of {cell['documents']} contexts lost their beginning"
                )
            if cell["near_ties"]:
                lines.append(f"{task}, {shots} shots: {cell['near_ties']} documents with near-ties")
    return lines


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def text_line(name: str, values: Mapping[str, Any]) -> str:
    """One line for a text's bits per byte."""
    return (
        f"{name}: {values['bits_per_byte']:.4f} bits per byte, perplexity {values['perplexity']:.2f} per token "
        f"({values['documents']:,} documents, {values['tokens']:,} tokens, {values['bytes']:,} bytes)"
    )
