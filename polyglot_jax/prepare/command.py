"""The command `prepare`: text files to the token files that training reads."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import __version__ as tokenizers_version

from polyglot_jax.config import InputError
from polyglot_jax.prepare.clean_report import Summary, write_report
from polyglot_jax.prepare.cleaning import CleanConfig, list_hashes
from polyglot_jax.prepare.corpus import TextCorpus, token_ids
from polyglot_jax.prepare.folder import result_folder, write_manifest
from polyglot_jax.prepare.personal_data import mask, replacements
from polyglot_jax.prepare.pipeline import Pipeline
from polyglot_jax.prepare.readers import ReaderConfig
from polyglot_jax.token_files import TokenFileWriter
from polyglot_jax.tokenizer import Tokenizer

FORMAT_VERSION = 1
NAME = "text_document"


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(ReaderConfig):
    """Tokenise text for training: every document in NFC, with personal data masked, ended by <|endoftext|>.

    The result is GPT-NeoX's .bin and .idx.
    """

    tokenizer: str
    """A tokenizer.json, or a folder that holds one."""
    out: str
    """Folder to make; it gets text_document.bin and .idx, tokenizer.json, manifest.json and any bad_rows.jsonl."""
    mask_personal_data: bool = True
    """Replace telephone, resident registration, account and card numbers and e-mail addresses by <|tel|>, <|rrn|>,
    <|acc|>, [카드번호] and [이메일]."""
    clean: bool = False
    """Run the whole pipeline of --cleaning: needs requirements-corpus.txt. A run that was stopped goes on."""
    cleaning: CleanConfig = field(default_factory=CleanConfig)
    workers: int = 1
    """Processes for --clean: above 1 on Ray, on this machine or the cluster that RAY_ADDRESS names."""
    overwrite: bool = False
    """Replace what an earlier run left in --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers < 1:
            raise InputError(f"workers={self.workers}: must be above 0")
        if not self.clean and (self.workers > 1 or self.cleaning != CleanConfig()):
            raise InputError("--workers and --cleaning change nothing without --clean; add it, or leave them out")


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Write the folder `config.out` and return its manifest.

    The token files are those of GPT-NeoX's `preprocess_data.py --append-eod` for the same texts. The same inputs give
    the same bytes. Raises InputError for bad input, and then leaves `out` as it was.
    """
    for text in config.text:
        if Path(text).resolve() in Path(config.out).resolve().parents:
            raise InputError(f"out={config.out}: lies in text={text}, where it would be read as text; choose another")
    tokenizer = Tokenizer.load(config.tokenizer)
    corpus = TextCorpus(config, pages=config.clean)
    masks = replacements(tokenizer.vocabulary) if config.mask_personal_data else {}
    source = (_Cleaned if config.clean else _Plain)(config, corpus, tokenizer, masks)
    with result_folder(config.out, config.overwrite, corpus.files) as folder:
        with TokenFileWriter(folder / NAME, tokenizer.valid_ids) as writer:
            for ids in source.documents(folder):
                writer.add_document(ids)
            counts = source.counts(folder, writer)
        masked = counts["personal_data"]
        counts["personal_data"] = {kind: {"mask": masks[kind], "count": masked[kind]} for kind in masks}
        (folder / "tokenizer.json").write_bytes(tokenizer.to_json().encode())
        settings = dataclasses.asdict(config)
        # Where the result lies is not what it is, nor who made it: two runs give the same bytes.
        del settings["out"], settings["overwrite"], settings["workers"]
        if not config.clean:
            del settings["cleaning"]
        manifest = {
            "format": "polyglot-jax-corpus",
            "version": FORMAT_VERSION,
            "documents": writer.documents,
            "tokens": writer.tokens,
            **counts,
            "valid_ids": tokenizer.valid_ids,
            "eos_id": tokenizer.eos_id,
            "sha256": {name: _sha256(folder / name) for name in (f"{NAME}.bin", f"{NAME}.idx", "tokenizer.json")},
            "skipped_files": len(corpus.skipped),
            "settings": settings,
            "tokenizers": tokenizers_version,
        }
        write_manifest(folder, manifest)
    if isinstance(source, _Cleaned):
        source.pipeline.remove()
    print(
        f"{config.out}: {writer.documents:,} documents, {writer.tokens:,} tokens; "
        f"left out: {manifest['bad_rows']:,} bad rows, {manifest['empty_rows']:,} empty ones"
    )
    if masks:
        entries = manifest["personal_data"].values()
        print("masked: " + ", ".join(f"{entry['count']:,} {entry['mask']}" for entry in entries))
    return manifest


class _Plain:
    """Every document, in this process."""

    def __init__(self, config: PrepareConfig, corpus: TextCorpus, tokenizer: Tokenizer, masks: dict[str, str]) -> None:
        self.corpus, self.tokenizer, self.masks = corpus, tokenizer, masks
        self.masked: Counter[str] = Counter()

    def documents(self, folder: Path) -> Iterator[Sequence[int]]:
        """Token ids of each document; rows that cannot be used are written to bad_rows.jsonl in `folder`."""
        start = time.monotonic()
        number = tokens = 0
        with self.corpus.bar() as bar:
            texts = self.corpus.documents(folder / "bad_rows.jsonl", bar.update)
            if self.masks:
                texts = (mask(text, self.masks, self.masked) for text in texts)
            for ids in token_ids(texts, self.tokenizer):
                yield ids
                number, tokens = number + 1, tokens + len(ids)
                if number % 1000 == 0:
                    speed = tokens / (time.monotonic() - start)
                    bar.set_postfix_str(f"{number:,} docs, {speed:,.0f} tokens/s", refresh=False)

    def counts(self, folder: Path, writer: TokenFileWriter) -> dict[str, Any]:
        """What the manifest says of the documents, once they are written."""
        names = ("characters", "utf8_bytes", "bad_rows", "empty_rows")
        return {name: self.corpus.total(name) for name in names} | {
            "personal_data": self.masked,
            "inputs": [dataclasses.asdict(count) for count in self.corpus.counts],
        }


class _Cleaned:
    """What the pipeline leaves of them; the methods are those of _Plain."""

    def __init__(self, config: PrepareConfig, corpus: TextCorpus, tokenizer: Tokenizer, masks: dict[str, str]) -> None:
        self.config, self.summary, self.lists = config, Summary(), list_hashes(config.cleaning)
        reader = ReaderConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(ReaderConfig)})
        self.pipeline = Pipeline(reader, config.cleaning, tuple(corpus.files), config.tokenizer, _work(config), masks)

    def documents(self, folder: Path) -> Iterator[Sequence[int]]:
        self.pipeline.run(self.config.workers)
        with open(folder / "bad_rows.jsonl", "w", encoding="utf-8") as bad_rows:
            yield from self.pipeline.collect(self.summary, bad_rows)

    def counts(self, folder: Path, writer: TokenFileWriter) -> dict[str, Any]:
        """And writes the report."""
        summary = self.summary
        if not summary.total("bad_rows"):
            (folder / "bad_rows.jsonl").unlink()
        for damage in summary.damaged:
            print(f"damaged: {damage}", file=sys.stderr)
        if summary.damaged and not summary.total("documents"):
            raise InputError(f"no document could be read in {len(summary.inputs)} files: {summary.damaged[0]}")
        if not writer.documents:
            raise InputError(
                f"text={', '.join(self.config.text)}: no document is left of {summary.total('documents')}; "
                f"see what the steps of --cleaning.steps drop: {summary.dropped_by()}"
            )
        write_report(folder / "report.html", summary, self.pipeline.masks, writer.documents, writer.tokens)
        print(f"dropped: {summary.dropped_by()}; {summary.totals['removed']:,} duplicates")
        return {
            "characters": summary.totals["characters"],
            "utf8_bytes": summary.totals["utf8_bytes"],
            "bad_rows": summary.total("bad_rows"),
            "empty_rows": summary.total("empty_rows"),
            "personal_data": summary.masked,
            "cleaning": {
                "read": summary.total("documents"),
                "steps": {
                    name: {key: count for key, count in counts.items() if key != "seconds"}
                    for name, counts in summary.steps.items()
                },
                "duplicates": summary.totals["removed"],
                "damaged": summary.damaged,
                "lists_sha256": self.lists,
            },
            "inputs": summary.inputs,
        }


def _work(config: PrepareConfig) -> Path:
    """Where the pipeline keeps what it makes on the way, until the result is whole."""
    out = Path(config.out).resolve()
    return out.with_name(f"{out.name}.work")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
