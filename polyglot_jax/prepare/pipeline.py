"""`prepare --clean`: every file is a task; documents are cleaned and masked, duplicates found, what is left tokenised.

All that is made on the way lies in a folder beside the result. A task writes its files under other names and renames
them, so a run that was killed goes on where it was, and gives what it would have given. Nothing depends on how many
workers there are: files are read in sorted order, tasks know only their number.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from polyglot_jax.config import InputError
from polyglot_jax.prepare import engine
from polyglot_jax.prepare.clean_report import Histograms, Samples, Summary
from polyglot_jax.prepare.cleaning import CleanConfig, Cleaner, list_hashes
from polyglot_jax.prepare.corpus import TextCorpus, token_ids
from polyglot_jax.prepare.personal_data import KINDS, mask
from polyglot_jax.prepare.readers import MissingLibrary, ReaderConfig
from polyglot_jax.token_files import TokenFile, TokenFileWriter
from polyglot_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    from polyglot_jax.prepare.duplicates import Duplicates

WORK_VERSION = 2
"""To be raised with any change of what the tasks write: they do not go on with the work of other versions."""
SHOWN = 300
"""Characters of a sample that are shown."""


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """One run over `files`; pickled and sent to each worker.

    reader     how the files are read (its `text` is not used)
    work       folder for what is made on the way, seen by all workers
    masks      what replaces each kind of personal data; empty: nothing is masked
    """

    reader: ReaderConfig
    cleaning: CleanConfig
    files: tuple[Path, ...]
    tokenizer: str
    work: Path
    masks: dict[str, str]

    def run(self, workers: int) -> None:
        """Make one shard of tokens for each file that any document is left of. Raises InputError for bad input."""
        Cleaner(self.cleaning)  # what is wrong with the settings is said before anything is read
        if self.cleaning.deduplicate:
            self._duplicates.check(len(self.files))
        self._claim()
        with engine.engine(workers):
            engine.run("clean", self._clean, self.files, workers, self.work)
            if self.cleaning.deduplicate:
                buckets = [f"bucket {bucket}" for bucket in range(self.cleaning.buckets)]
                engine.run("match", self._duplicates.match, buckets, workers, self.work)
                engine.run("cluster", self._duplicates.cluster, ["all buckets"], workers, self.work)
            engine.run("tokenise", self._tokenise, self.files, workers, self.work)

    @cached_property
    def _duplicates(self) -> Duplicates:
        from polyglot_jax.prepare.duplicates import Duplicates  # needs datatrove

        return Duplicates(self.cleaning, self.work / "duplicates")

    def _claim(self) -> None:
        """Begin in the folder `work`, or go on if what it holds is of the same files and settings."""
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        settings = (
            dataclasses.asdict(self.reader), dataclasses.asdict(self.cleaning), list_hashes(self.cleaning), self.masks
        )  # fmt: skip
        tokenizer = Tokenizer.load(self.tokenizer).sha256
        key = hashlib.sha256(json.dumps([WORK_VERSION, stats, settings, tokenizer]).encode()).hexdigest()
        claim = self.work / "claim"
        if claim.is_file() and claim.read_text() == key:
            return
        if self.work.exists():
            if not claim.is_file():
                raise InputError(f"{self.work}: is in the way and was not made by this command; move it away")
            self.remove()
        self.work.mkdir(parents=True)
        claim.write_text(key)

    def remove(self) -> None:
        """Delete the folder `work`. Stopped half way, what is left is still known as its own, and not gone on with."""
        claim = self.work / "claim"
        claim.write_text("")
        for folder in ("done", "documents", "duplicates", "shards"):
            shutil.rmtree(self.work / folder, ignore_errors=True)
        claim.unlink()
        shutil.rmtree(self.work)

    def _clean(self, rank: int) -> None:
        """One file: its documents cleaned and masked, their signatures, and a report."""
        file = self.files[rank]
        corpus = TextCorpus(dataclasses.replace(self.reader, text=(str(file),)), pages=True)
        cleaner = Cleaner(self.cleaning)
        masked: Counter[str] = Counter()
        before, after = Histograms(), Histograms()
        samples: defaultdict[str, Samples] = defaultdict(lambda: Samples(self.cleaning.samples, self._shown))
        damage = ""

        def documents() -> Iterator[str]:
            nonlocal damage
            try:
                for text in corpus.documents_of(file, record, lambda size: None):
                    before.add(text)
                    cleaned, step = cleaner(text)
                    if step:
                        samples[step].add(cleaned)
                        continue
                    if self.masks:
                        cleaned = mask(cleaned, self.masks, masked)
                    after.add(cleaned)
                    samples[""].add(cleaned)
                    out.write(json.dumps(cleaned, ensure_ascii=False) + "\n")
                    yield cleaned
            except MissingLibrary:
                raise
            except InputError as error:  # of this file: what was read of it stays, the others go on
                damage = str(error)

        folder = self.work / "documents"
        folder.mkdir(exist_ok=True)
        with (
            open(folder / f"{rank}.tmp", "w", encoding="utf-8") as out,
            open(folder / f"{rank}.bad", "w", encoding="utf-8", errors="backslashreplace") as record,
        ):
            if self.cleaning.deduplicate:
                self._duplicates.sign(rank, documents())
            else:
                for _ in documents():
                    pass
        (folder / f"{rank}.tmp").rename(folder / f"{rank}.jsonl")
        report = {
            "input": dataclasses.asdict(corpus.counts[0]),
            "damage": damage,
            "steps": {name: dataclasses.asdict(count) for name, count in cleaner.counts.items()},
            "masked": masked,
            "before": before.counts,
            "after": after.counts,
            "samples": {step: texts.least for step, texts in samples.items()},
        }
        _write_json(folder / f"{rank}.json", report)

    def _tokenise(self, rank: int) -> None:
        """One file: the token files of its documents that are no duplicates, and the number of those that are."""
        tokenizer = _only_one(Tokenizer.load(self.tokenizer))
        removed: set[int] = set()
        sizes: dict[int, int] = {}
        if self.cleaning.deduplicate:
            removed, sizes = self._duplicates.removed(rank), self._duplicates.sizes(rank)
        report: dict[str, Any] = {"removed": 0, "characters": 0, "utf8_bytes": 0, "top": []}

        def left() -> Iterator[str]:
            for number, text in enumerate(self._documents(rank)):
                if number in removed:
                    report["removed"] += 1
                    continue
                report["characters"] += len(text)
                report["utf8_bytes"] += len(text.encode())
                if number in sizes:
                    report["top"] = sorted([*report["top"], (-sizes[number], self._shown(text))])[
                        : self.cleaning.samples
                    ]
                yield text

        folder = self.work / "shards"
        folder.mkdir(exist_ok=True)
        texts = left()
        first = next(texts, None)
        if first is not None:
            with TokenFileWriter(folder / str(rank), tokenizer.valid_ids) as writer:
                for ids in token_ids(itertools.chain([first], texts), tokenizer):
                    writer.add_document(ids)
        _write_json(folder / f"{rank}.json", report)

    def _shown(self, text: str) -> str:
        """The beginning of a text, for the report: masked even where the result is not, and before it is cut."""
        return mask(text[: 10 * SHOWN], self.masks or KINDS, Counter())[:SHOWN]

    def _documents(self, rank: int) -> Iterator[str]:
        with open(self.work / "documents" / f"{rank}.jsonl", encoding="utf-8") as lines:
            yield from map(json.loads, lines)

    def collect(self, summary: Summary, bad_rows: IO[str]) -> Iterator[np.ndarray]:
        """The token ids of every document that is left, in order; the others get what the tasks report."""
        for rank in range(len(self.files)):
            summary.add(*(_read_json(self.work / name / f"{rank}.json") for name in ("documents", "shards")))
            bad_rows.write((self.work / "documents" / f"{rank}.bad").read_text(encoding="utf-8"))
            prefix = self.work / "shards" / str(rank)
            if prefix.with_name(f"{rank}.idx").exists():
                shard = TokenFile(prefix)
                for start, end in zip(shard.document_starts[:-1], shard.document_starts[1:], strict=True):
                    yield shard.tokens[start:end]


_TOKENIZERS: dict[str, Tokenizer] = {}


def _only_one(tokenizer: Tokenizer) -> Tokenizer:
    """The one like it that all tasks of a process use: any that has encoded leaves 6 MB behind in each thread."""
    return _TOKENIZERS.setdefault(tokenizer.sha256, tokenizer)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8", errors="backslashreplace")
    temporary.rename(path)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
