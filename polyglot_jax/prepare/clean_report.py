"""One page of HTML on what the pipeline did: for people to look at before they spend accelerators on the result."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyglot_jax.prepare.pipeline import Summary

_STYLE = (
    "body{font:14px system-ui,sans-serif;max-width:70em;margin:2em auto}table{border-collapse:collapse;width:100%}"
    "td,th{padding:.15em .6em;text-align:right;white-space:nowrap}td:first-child,th:first-child{text-align:left}"
    "td.bar{width:45%;text-align:left}.bar i{display:block;height:.9em;background:#4878a8}.bar i+i{background:#d9822b}"
    "li{margin:.2em 0;overflow-wrap:anywhere}h2{margin-top:1.6em}"
)


def write_report(path: Path, summary: Summary, documents: int, tokens: int) -> None:
    """Write the page to `path`: a funnel, histograms before (blue) and after (orange), samples, duplicates, masks."""
    read, read_bytes = summary.total("documents"), summary.total("utf8_bytes")
    funnel = [("read", read, "", "", read_bytes)]
    for name, counts in summary.steps.items():
        left = counts["seen"] - counts["dropped"]
        funnel.append((name, left, f"{counts['dropped']:,}", f"{counts['changed']:,}", counts["bytes"]))
    removed = summary.totals["removed"]
    funnel.append(("duplicates", documents, f"{removed:,}", "", summary.totals["utf8_bytes"]))
    rows = (
        f"<tr><td>{name}<td>{left:,}<td>{dropped}<td>{changed}<td>{size / 1e6:,.2f}{_bars([left / max(read, 1)])}"
        for name, left, dropped, changed, size in funnel
    )
    page = [
        f"<!doctype html><meta charset=utf-8><title>Corpus</title><style>{_STYLE}</style>",
        f"<h1>{documents:,} of {read:,} documents, {tokens:,} tokens</h1>",
        "<h2>Through the steps</h2><table><tr><th>step<th>left<th>dropped<th>changed<th>MB<th>",
        *rows,
        "</table><h2>Length in characters, before and after</h2>",
        _histogram(summary, "length", [f"to {2**power:,}" for power in range(1, 21)] + ["longer"]),
        "<h2>Korean share, before and after</h2>",
        _histogram(summary, "korean", [f"{tenth / 10:.1f} to {(tenth + 1) / 10:.1f}" for tenth in range(10)]),
        "<h2>Masks</h2>",
        _list(f"{kind}: {count:,}" for kind, count in sorted(summary.masked.items())),
        "<h2>Largest groups of duplicates</h2>",
        _list(f"{size:,} of: {text}" for size, text in summary.top),
        *(f"<h2>Dropped by {name}</h2>{_list(texts[:20])}" for name, texts in summary.dropped.items()),
        "<h2>Kept</h2>",
        _list(summary.kept[:40]),
    ]
    if summary.damaged:
        page += ["<h2>Damaged files</h2>", _list(summary.damaged)]
    path.write_text("\n".join(page) + "\n", encoding="utf-8", errors="backslashreplace")


def _histogram(summary: Summary, name: str, bins: Sequence[str]) -> str:
    before, after = summary.histograms["before"][name], summary.histograms["after"][name]
    most = max(*before, 1)
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
