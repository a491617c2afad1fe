"""Bits per byte and perplexity of texts and prepared corpora, by windows that overlap."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polyglot_jax.config import InputError
from polyglot_jax.data import find_corpus
from polyglot_jax.scoring import Pair
from polyglot_jax.token_files import TokenFile
from polyglot_jax.tokenizer import Tokenizer


def windows(tokens: Sequence[int], start: int, context: int, stride: int) -> Iterator[Pair]:
    """Pairs that together score each of `tokens` exactly once, the first after the id `start`.

    Every window but the first scores at most `stride` tokens after as many as `context` leaves room for.
    """
    ids = [start, *tokens]
    done = 1
    while done < len(ids):
        end = min(len(ids), done + (context if done == 1 else stride))
        yield Pair(ids[max(0, end - context - 1) : done], ids[done:end])
        done = end


class Document(NamedTuple):
    """A text as ids, without <|endoftext|>, and its length in bytes of UTF-8."""

    ids: list[int]
    bytes: int


def text_files(path: str) -> list[Path]:
    """The text file or the folder's .txt files at `path`; none if token files are there. InputError if neither are."""
    place = Path(path)
    if not path or (not place.exists() and not place.with_name(place.name + ".idx").exists()):
        raise InputError(f"text={path}: no such file or folder, and no token files {place.name}.bin and .idx")
    files = sorted(place.rglob("*.txt")) if place.is_dir() and not list(place.glob("*.idx")) else [place]
    if not files:
        raise InputError(f"text={path}: holds neither .txt files nor token files; name a file, or another folder")
    if all(file.is_file() and file.suffix not in (".bin", ".idx") for file in files):
        return files
    find_corpus(path)
    return []


def check(path: str, tokenizer: Tokenizer) -> None:
    """InputError where `documents` would raise it, or if there is no text; encodes nothing, and so is quick."""
    files = text_files(path)
    if not files:
        _corpus(path, tokenizer)
    elif not sum(len(_text(file)) for file in files):
        raise InputError(f"text={path}: holds no text")


def documents(path: str, tokenizer: Tokenizer) -> Iterator[Document]:
    """Of a text file (one document), a folder of .txt files, or token files that `prepare` or GPT-NeoX wrote.

    InputError if it is none of these, is not UTF-8, or has ids that the tokenizer does not know.
    """
    files = text_files(path)
    return _texts(files, tokenizer) if files else _token_files(_corpus(path, tokenizer), tokenizer)


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"text={file}: is not UTF-8 ({error})") from error


def _texts(files: list[Path], tokenizer: Tokenizer) -> Iterator[Document]:
    for text in map(_text, files):
        yield Document(tokenizer.encode(text), len(text.encode()))


def _corpus(path: str, tokenizer: Tokenizer) -> TokenFile:
    prefix = find_corpus(path)
    corpus, known = TokenFile(prefix), len(tokenizer.byte_lengths())
    if corpus.tokens.max() >= known:
        raise InputError(f"text={prefix}: has the id {corpus.tokens.max()}, which this model's tokenizer does not know")
    return corpus


def _token_files(corpus: TokenFile, tokenizer: Tokenizer) -> Iterator[Document]:
    starts, lengths = corpus.document_starts, tokenizer.byte_lengths()
    for begin, end in itertools.pairwise(starts):
        ids = np.asarray(corpus.tokens[begin:end], np.int64)
        if ids.size and ids[-1] == tokenizer.eos_id:
            ids = ids[:-1]
        yield Document(ids.tolist(), int(lengths[ids].sum()))


@dataclass
class Counts:
    """What a text came to. nats: minus the sum of the log-probabilities of its tokens."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    nats: float = 0.0

    def add(self, document: Document) -> None:
        self.documents += 1
        self.tokens += len(document.ids)
        self.bytes += document.bytes

    def summary(self) -> dict[str, Any]:
        """The counts, bits_per_byte, and perplexity, which is per token."""
        return dataclasses.asdict(self) | {
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
            "perplexity": math.exp(self.nats / self.tokens),
        }
