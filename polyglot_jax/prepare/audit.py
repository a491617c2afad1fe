"""The command `audit`: token files read back, the masks in them counted and any personal data that is left."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

from polyglot_jax.config import InputError
from polyglot_jax.data import find_corpus
from polyglot_jax.prepare.folder import MANIFEST, read_manifest
from polyglot_jax.prepare.personal_data import KINDS, mask, replacements
from polyglot_jax.token_files import TokenFile
from polyglot_jax.tokenizer import Tokenizer

# Deliberately broad: what no rule took for personal data, so that a person can judge how much of it there is.
_LONG_NUMBER = re.compile(r"[0-9](?:[-. ()/]{0,3}[0-9]){8,}")
_STATES = {"masks": "masks", "left": "personal data left"}


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Look for personal data in token files, of `prepare` or of GPT-NeoX; only counts are told, never the data."""

    data: str
    """A folder of `prepare`, or the prefix of a .bin and .idx."""
    tokenizer: str | None = None
    """The tokenizer.json they were made with; none: the one beside them."""
    json: str | None = None
    """File to write the counts to."""


def audit(config: AuditConfig) -> dict[str, Any]:
    """Decode every document of `config.data`; returns and prints the counts by kind.

    masks         how often what replaces this kind occurs
    left          pieces of this kind that `find` still finds
    long_numbers  runs of nine or more digits that are taken for none of the kinds
    documents     how many there are, and in how many of them something is left

    Raises InputError for a tokenizer other than the manifest names and for a `json` that cannot be written; and when
    anything is left, naming the kinds, after the counts are printed and written.
    """
    prefix = find_corpus(config.data)
    tokenizer = Tokenizer.load(config.tokenizer or prefix.parent)
    _check_tokenizer(config, prefix, tokenizer)
    file = TokenFile(prefix)
    if config.json:
        try:
            open(config.json, "a").close()  # found out now, not after hours of reading
        except OSError as error:
            raise InputError(f"json={config.json}: cannot be written ({error.strerror}); name another file") from error
    masks = replacements(tokenizer.vocabulary)
    seen, left = Counter[str](), Counter[str]()
    long_numbers = with_data = 0
    starts = file.document_starts
    for start, end in tqdm(pairwise(starts), total=len(starts) - 1, unit="docs", unit_scale=True):
        text = tokenizer.decode(file.tokens[start:end], skip_special_tokens=False)
        if "|" in text or "[" in text:
            seen.update({kind: count for kind, words in masks.items() if (count := text.count(words))})
        masked = mask(text, masks, left)
        with_data += masked != text
        long_numbers += sum(1 for _ in _LONG_NUMBER.finditer(masked))
    report = {
        "documents": {"all": len(starts) - 1, "with personal data": with_data},
        "masks": {kind: seen[kind] for kind in KINDS},
        "left": {kind: left[kind] for kind in KINDS},
        "long_numbers": long_numbers,
    }
    print(f"{prefix}: {report['documents']['all']:,} documents")
    for name, title in _STATES.items():
        print(f"{title}: " + ", ".join(f"{count:,} {kind}" for kind, count in report[name].items()))
    print(f"other numbers of nine and more digits: {long_numbers:,}")
    if config.json:
        Path(config.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if with_data:
        kinds = ", ".join(kind for kind in KINDS if left[kind])
        raise InputError(
            f"data={config.data}: {with_data:,} documents hold personal data ({kinds}); prepare them again"
        )
    return report


def _check_tokenizer(config: AuditConfig, prefix: Path, tokenizer: Tokenizer) -> None:
    """With another vocabulary the text is not what was written, and nothing would be found in it."""
    sums = (read_manifest(prefix.parent) or {}).get("sha256", {})
    if f"{prefix.name}.bin" in sums and sums["tokenizer.json"] != tokenizer.sha256:
        raise InputError(
            f"tokenizer={config.tokenizer or prefix.parent}: its SHA-256 is {tokenizer.sha256}, but {prefix} was made "
            f"with {sums['tokenizer.json']}, as {MANIFEST} beside it says; pass that one"
        )
