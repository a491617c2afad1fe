"""The command `tokenizer`: train a tokenizer on the same files that `prepare` reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tokenizers import __version__ as tokenizers_version

from polyglot_jax.prepare.corpus import TextCorpus
from polyglot_jax.prepare.folder import result_folder, write_manifest
from polyglot_jax.prepare.readers import ReaderConfig
from polyglot_jax.tokenizer import Tokenizer, train_tokenizer


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(ReaderConfig):
    """Train a byte-level BPE tokenizer of the released one's shape, on text in NFC."""

    out: str
    """Folder to make; it gets tokenizer.json, manifest.json and any bad_rows.jsonl."""
    vocab_size: int = 30_000
    """Ids before the three masks: special tokens, bytes and merges."""
    boundary: str | None = None
    """String that marks morphemes in the text; no merge crosses it, encoding deletes it. Polyglot-Ko has ೱ."""
    overwrite: bool = False
    """Replace what an earlier run left in --out."""


def make_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Write the folder `config.out`, return its tokenizer. Raises InputError for bad input, leaving `out` as it was."""
    corpus = TextCorpus(config)
    with result_folder(config.out, config.overwrite, corpus.files) as folder:
        with corpus.bar() as bar:
            documents = corpus.documents(folder / "bad_rows.jsonl", bar.update)
            tokenizer = train_tokenizer(documents, config.vocab_size, config.boundary)
        (folder / "tokenizer.json").write_bytes(tokenizer.to_json().encode())
        settings = dataclasses.asdict(config)
        del settings["out"], settings["overwrite"]
        manifest: dict[str, Any] = {
            "format": "polyglot-jax-tokenizer",
            "version": 1,
            "documents": corpus.total("documents"),
            "bad_rows": corpus.total("bad_rows"),
            "empty_rows": corpus.total("empty_rows"),
            "valid_ids": tokenizer.valid_ids,
            "sha256": {"tokenizer.json": tokenizer.sha256},
            "inputs": [dataclasses.asdict(count) for count in corpus.counts],
            "settings": settings,
            "tokenizers": tokenizers_version,
        }
        write_manifest(folder, manifest)
    print(f"{config.out}: a tokenizer of {tokenizer.valid_ids:,} ids from {manifest['documents']:,} documents")
    return tokenizer
