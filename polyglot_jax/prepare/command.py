"""The command `prepare`: text files to the token files that training reads."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import __version__ as tokenizers_version

from polyglot_jax.config import InputError
from polyglot_jax.prepare.clean_report import write_report
from polyglot_jax.prepare.cleaning import CleanConfig
from polyglot_jax.prepare.corpus import TextCorpus, batches
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
    tokenizer = Tokenizer.load(config.tokenizer)
    corpus = TextCorpus(config)
    masks = replacements(tokenizer.vocabulary) if config.mask_personal_data else {}
    make = _cleaned if config.clean else _plain
    with result_folder(config.out, config.overwrite, corpus.files) as folder:
        with TokenFileWriter(folder / NAME, tokenizer.valid_ids) as writer:
            counts = make(config, corpus, tokenizer, masks, folder, writer)
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
    if config.clean:
        shutil.rmtree(_work(config))
    print(
        f"{config.out}: {writer.documents:,} documents, {writer.tokens:,} tokens; "
        f"left out: {manifest['bad_rows']:,} bad rows, {manifest['empty_rows']:,} empty ones"
    )
    if config.clean:
        dropped = {name: step["dropped"] for name, step in counts["cleaning"]["steps"].items() if step["dropped"]}
        print("dropped: " + ", ".join(f"{count:,} {name}" for name, count in dropped.items()))
    if masks:
        print(
            "masked: " + ", ".join(f"{entry['count']:,} {entry['mask']}" for entry in counts["personal_data"].values())
        )
    return manifest


def _plain(
    config: PrepareConfig,
    corpus: TextCorpus,
    tokenizer: Tokenizer,
    masks: dict[str, str],
    folder: Path,
    writer: TokenFileWriter,
) -> dict[str, Any]:
    """Every document, in this process; returns what the manifest says of it."""
    start = time.monotonic()
    masked: Counter[str] = Counter()
    with corpus.bar() as bar:
        documents = corpus.documents(folder / "bad_rows.jsonl", bar.update)
        if masks:
            documents = (mask(text, masks, masked) for text in documents)
        for batch in batches(documents):
            for ids in tokenizer.encode_batch(batch):
                writer.add_document([*ids, tokenizer.eos_id])
            speed = writer.tokens / (time.monotonic() - start)
            bar.set_postfix_str(f"{writer.documents:,} docs, {speed:,.0f} tokens/s")
    names = ("characters", "utf8_bytes", "bad_rows", "empty_rows")
    return {name: corpus.total(name) for name in names} | {
        "personal_data": _masked(masks, masked),
        "inputs": [dataclasses.asdict(count) for count in corpus.counts],
    }


def _cleaned(
    config: PrepareConfig,
    corpus: TextCorpus,
    tokenizer: Tokenizer,
    masks: dict[str, str],
    folder: Path,
    writer: TokenFileWriter,
) -> dict[str, Any]:
    """What the pipeline leaves; beside the token files its report is written."""
    reader = ReaderConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(ReaderConfig)})
    pipeline = Pipeline(reader, config.cleaning, tuple(corpus.files), config.tokenizer, _work(config), masks)
    pipeline.run(config.workers)
    with open(folder / "bad_rows.jsonl", "w", encoding="utf-8") as bad_rows:
        summary = pipeline.collect(writer, bad_rows)
    if not summary.total("bad_rows"):
        (folder / "bad_rows.jsonl").unlink()
    if not writer.documents:
        raise InputError(
            f"text={', '.join(config.text)}: no document is left of {summary.total('documents')}; "
            f"see what the steps of --cleaning.steps drop: {summary.dropped_by()}"
        )
    write_report(folder / "report.html", summary, writer.documents, writer.tokens)
    for damage in summary.damaged:
        print(f"damaged: {damage}", file=sys.stderr)
    return {
        "characters": summary.totals["characters"],
        "utf8_bytes": summary.totals["utf8_bytes"],
        "bad_rows": summary.total("bad_rows"),
        "empty_rows": summary.total("empty_rows"),
        "personal_data": _masked(masks, summary.masked),
        "cleaning": {
            "read": summary.total("documents"),
            "steps": {
                name: {key: count for key, count in counts.items() if key != "seconds"}
                for name, counts in summary.steps.items()
            },
            "duplicates": summary.totals["removed"],
            "damaged": summary.damaged,
        },
        "inputs": summary.inputs,
    }


def _work(config: PrepareConfig) -> Path:
    """Where the pipeline keeps what it makes on the way, until the result is whole."""
    out = Path(config.out).resolve()
    return out.with_name(f"{out.name}.work")


def _masked(masks: dict[str, str], counts: Counter[str]) -> dict[str, dict[str, Any]]:
    return {kind: {"mask": masks[kind], "count": counts[kind]} for kind in masks}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
