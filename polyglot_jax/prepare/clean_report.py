"""What the tasks of the pipeline have counted, and one page of HTML on it: for people to look at before they spend
accelerators on the result.
"""

from __future__ import annotations

import html
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from polyglot_jax.prepare.cleaning import korean_share

LENGTHS = [2**power for power in range(1, 21)]
"""Upper ends of the bins of the histogram of lengths, in characters; the last bin has all that is longer."""
SAMPLES = 30
"""Samples shown of each kind."""
_STYLE = (
    "body{font:14px system-ui,sans-serif;max-width:70em;margin:2em auto}table{border-collapse:collapse;width:100%}"
    "td,th{padding:.15em .6em;text-align:right;white-space:nowrap}td:first-child,th:first-child{text-align:left}"
    "td.bar{width:45%;text-align:left}.bar i{display:block;height:.9em;background:#4878a8}.bar i+i{background:#d9822b}"
    "h2 b{color:#4878a8}h2 i{color:#d9822b;font-style:normal}"
    "li{margin:.2em 0;overflow-wrap:anywhere}h2{margin-top:1.6em}"
)


def write_report(path: Path, summary: Summary, masks: dict[str, str], documents: int, tokens: int) -> None:
    """Write the page to `path`: a funnel, histograms before (blue) and after (orange), samples, duplicates, masks."""
    read = summary.total("documents")
    funnel = [("read", read, "", "", summary.total("utf8_bytes"))]
    for name, counts in summary.steps.items():
        left = counts["seen"] - counts["dropped"]
        funnel.append((name, left, f"{counts['dropped']:,}", f"{counts['changed']:,}", counts["bytes"]))
    removed = summary.totals["removed"]
    funnel.append(("duplicates", documents, f"{removed:,}", "", summary.totals["utf8_bytes"]))
    rows = (
        f"<tr><td>{name}<td>{left:,}<td>{left / max(read, 1):.1%}<td>{dropped}<td>{changed}<td>{size / 1e6:,.2f}"
        f"{_bars([left / max(read, 1)])}"
        for name, left, dropped, changed, size in funnel
    )
    page = [
        f"<!doctype html><meta charset=utf-8><title>Corpus</title><style>{_STYLE}</style>",
        f"<h1>{documents:,} of {read:,} documents, {tokens:,} tokens</h1>",
        f"<p>From {len(summary.inputs):,} files, which also held {summary.total('bad_rows'):,} bad rows and "
        f"{summary.total('empty_rows'):,} empty ones.",
        "<h2>Through the steps</h2><table><tr><th>step<th>left<th><th>dropped<th>changed<th>MB<th>",
        *rows,
        "</table><h2>Length in characters, <b>before</b> and <i>after</i> the steps, duplicates still there</h2>",
        _histogram(summary, "length", [f"to {length:,}" for length in LENGTHS] + ["longer"]),
        "<h2>Korean share, <b>before</b> and <i>after</i></h2>",
        _histogram(summary, "korean", [f"{tenth / 10:.1f} to {(tenth + 1) / 10:.1f}" for tenth in range(10)]),
        "<h2>Personal data, and what replaced it</h2>",
        _list(f"{summary.masked[kind]:,} {kind}: {words}" for kind, words in masks.items()),
        "<h2>Largest groups of duplicates</h2>",
        _list(f"{size:,} of: {text}" for size, text in summary.top),
    ]
    for name, counts in summary.steps.items():
        if texts := summary.samples.get(name):
            page += [f"<h2>{counts['dropped']:,} dropped by {name}, such as</h2>", _list(text for _, text in texts)]
    page += ["<h2>Kept, such as</h2>", _list(text for _, text in summary.samples.get("", []))]
    if summary.damaged:
        page += ["<h2>Damaged files</h2>", _list(summary.damaged)]
    path.write_text("\n".join(page) + "\n", encoding="utf-8", errors="backslashreplace")


def _histogram(summary: Summary, name: str, bins: Sequence[str]) -> str:
    before, after = summary.histograms["before"][name], summary.histograms["after"][name]
    most = max(*before, *after, 1)
    rows = (
        f"<tr><td>{label}<td>{old:,}<td>{new:,}{_bars([old / most, new / most])}"
        for label, old, new in zip(bins, before, after, strict=True)
        if old or new
    )
    return f"<table><tr><th><th>before<th>after<th>{''.join(rows)}</table>"


def _bars(shares: Iterable[float]) -> str:
    return "<td class=bar>" + "".join(f'<i style="width:{100 * share:.1f}%"></i>' for share in shares)


def _list(texts: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(text)}" for text in texts) + "</ul>"


class Histograms:
    """Documents by length (LENGTHS) and by Korean share (tenths)."""

    def __init__(self) -> None:
        self.counts = {"length": [0] * (len(LENGTHS) + 1), "korean": [0] * 10}

    def add(self, text: str) -> None:
        self.counts["length"][min(max((len(text) - 1).bit_length() - 1, 0), len(LENGTHS))] += 1
        self.counts["korean"][min(int(10 * korean_share(text)), 9)] += 1


class Samples:
    """Some of many texts, from anywhere among them and the same in any order: those with the least CRC-32.

    least  [CRC-32, what `show` makes of the text] of at most `size` texts
    """

    def __init__(self, size: int, show: Callable[[str], str]) -> None:
        self.size, self.show = size, show
        self.least: list[list[Any]] = []

    def add(self, text: str) -> None:
        key = zlib.crc32(text.encode())
        if len(self.least) >= self.size and (not self.size or key >= self.least[-1][0]):
            return
        if all(key != other for other, _ in self.least):
            self.least = sorted([*self.least, [key, self.show(text)]])[: self.size]


class Summary:
    """The reports of all tasks added up, with samples (of what a step dropped, by its name; of what was kept, by "")
    and the greatest clusters of duplicates.
    """

    def __init__(self) -> None:
        self.inputs: list[dict[str, Any]] = []
        self.damaged: list[str] = []
        self.totals: Counter[str] = Counter()
        self.masked: Counter[str] = Counter()
        self.steps: dict[str, dict[str, float]] = {}
        self.histograms: dict[str, dict[str, list[int]]] = {}
        self.samples: dict[str, list[tuple[int, str]]] = {}
        self.top: list[tuple[int, str]] = []

    def add(self, cleaned: dict[str, Any], tokenised: dict[str, Any]) -> None:
        self.inputs.append(cleaned["input"])
        self.damaged += [cleaned["damage"]] if cleaned["damage"] else []
        self.totals.update({key: tokenised[key] for key in ("removed", "characters", "utf8_bytes")})
        self.masked.update(cleaned["masked"])
        for name, counts in cleaned["steps"].items():
            total = self.steps.setdefault(name, dict.fromkeys(counts, 0))
            for key, value in counts.items():
                total[key] += value
        for when in ("before", "after"):
            for name, counts in cleaned[when].items():
                total = self.histograms.setdefault(when, {}).setdefault(name, [0] * len(counts))
                total[:] = map(sum, zip(total, counts, strict=True))
        for name, samples in cleaned["samples"].items():
            self.samples[name] = sorted({*self.samples.get(name, []), *map(tuple, samples)})[:SAMPLES]
        self.top = sorted([*self.top, *((-size, text) for size, text in tokenised["top"])], reverse=True)[:20]

    def dropped_by(self) -> str:
        """Which steps dropped how many documents, in words."""
        drops = {name: int(counts["dropped"]) for name, counts in self.steps.items() if counts["dropped"]}
        return ", ".join(f"{name} {count:,}" for name, count in drops.items()) or "nothing"

    def total(self, name: str) -> int:
        """Sum over the files of one field of FileCount."""
        return sum(counts[name] for counts in self.inputs)
