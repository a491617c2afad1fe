"""The command `prepare`: text files to the token files that training reads."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import __version__ as tokenizers_version

from polyglot_jax.prepare.corpus import TextCorpus
from polyglot_jax.prepare.folder import result_folder, write_manifest
from polyglot_jax.prepare.personal_data import mask, replacements
from polyglot_jax.prepare.readers import ReaderConfig
from polyglot_jax.token_files import TokenFileWriter
from polyglot_jax.tokenizer import Tokenizer

FORMAT_VERSION = 1
NAME = "text_document"
BATCH_CHARACTERS = 1 << 20
"""Text that is tokenised at a time; the library needs some hundred bytes for each of its tokens."""


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
    overwrite: bool = False
    """Replace what an earlier run left in --out."""


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Write the folder `config.out` and return its manifest.

    The token files are those of GPT-NeoX's `preprocess_data.py --append-eod` for the same texts. The same inputs give
    the same bytes. Raises InputError for bad input, and then leaves `out` as it was.
    """
    tokenizer = Tokenizer.load(config.tokenizer)
    eos = tokenizer.eos_id
    corpus = TextCorpus(config)
    masks = replacements(tokenizer.vocabulary) if config.mask_personal_data else {}
    masked: Counter[str] = Counter()
    with result_folder(config.out, config.overwrite, corpus.files) as folder:
        start = time.monotonic()
        with corpus.bar() as bar, TokenFileWriter(folder / NAME, tokenizer.valid_ids) as writer:
            documents = corpus.documents(folder / "bad_rows.jsonl", bar.update)
            if config.mask_personal_data:
                documents = (mask(text, masks, masked) for text in documents)
            for batch in _batches(documents):
                for ids in tokenizer.encode_batch(batch):
                    writer.add_document([*ids, eos])
                speed = writer.tokens / (time.monotonic() - start)
                bar.set_postfix_str(f"{writer.documents:,} docs, {speed:,.0f} tokens/s")
        (folder / "tokenizer.json").write_bytes(tokenizer.to_json().encode())
        settings = dataclasses.asdict(config)
        # Where the result lies is not what it is: two runs give the same bytes.
        del settings["out"], settings["overwrite"]
        manifest = {
            "format": "polyglot-jax-corpus",
            "version": FORMAT_VERSION,
            "documents": writer.documents,
            "tokens": writer.tokens,
            "characters": corpus.total("characters"),
            "utf8_bytes": corpus.total("utf8_bytes"),
            "bad_rows": corpus.total("bad_rows"),
            "empty_rows": corpus.total("empty_rows"),
            "personal_data": {kind: {"mask": masks[kind], "count": masked[kind]} for kind in masks},
            "valid_ids": tokenizer.valid_ids,
            "eos_id": eos,
            "sha256": {name: _sha256(folder / name) for name in (f"{NAME}.bin", f"{NAME}.idx", "tokenizer.json")},
            "inputs": [dataclasses.asdict(count) for count in corpus.counts],
            "skipped_files": len(corpus.skipped),
            "settings": settings,
            "tokenizers": tokenizers_version,
        }
        write_manifest(folder, manifest)
    print(
        f"{config.out}: {writer.documents:,} documents, {writer.tokens:,} tokens; "
        f"left out: {manifest['bad_rows']:,} bad rows, {manifest['empty_rows']:,} empty ones"
    )
    if masks:
        print("masked: " + ", ".join(f"{masked[kind]:,} {masks[kind]}" for kind in masks))
    return manifest


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts of about BATCH_CHARACTERS: by count, long documents would fill the memory."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
