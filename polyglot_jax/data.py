"""Token files -> batch(step): a pure function of (files, seed, step), the same for any number of hosts.

As GPT-NeoX makes its samples: the documents of a corpus are shuffled, joined end to end and cut into pieces of
sequence_length + 1 tokens that overlap by one, with no reset at document ends; then the pieces are shuffled, anew for
each pass. The end of every corpus is held out. Shuffling, repeating and mixing are Grain's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np

from polyglot_jax.config import Config, DataConfig, InputError
from polyglot_jax.token_files import TokenFile
from polyglot_jax.tokenizer import Tokenizer


def find_corpus(path: str | Path) -> Path:
    """The prefix of the token files at `path`: a folder of `prepare`, or itself a prefix, or PREFIX.bin."""
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.idx"))
        if len(found) != 1:
            state = (
                "no .idx file; make one with `python -m polyglot_jax prepare`" if not found else "several .idx files"
            )
            raise InputError(f"data.paths={path}: {state}")
        return found[0].with_suffix("")
    if path.suffix in (".bin", ".idx"):
        path = path.with_suffix("")
    if not path.with_name(path.name + ".idx").is_file():
        raise InputError(f"data.paths={path}: neither a folder of `prepare` nor the prefix of .bin and .idx files")
    return path


def find_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer.json beside the token files; None if no corpus has one; InputError if two corpora disagree."""
    found: dict[str, Path] = {}
    for path in config.paths:
        file = find_corpus(path).parent / "tokenizer.json"
        if file.is_file():
            found[hashlib.sha256(file.read_bytes()).hexdigest()] = file
    if len(found) > 1:
        raise InputError(
            f"data.paths: {' and '.join(map(str, found.values()))} differ; prepare both with one tokenizer"
        )
    return Tokenizer.load(next(iter(found.values()))) if found else None


_BLOCKS, _BLOCK = 64, 2**16


def _sample(prefix: Path) -> str:
    """SHA-256 of PREFIX.bin's first and last 64 KiB and 62 blocks evenly between: of all of it up to 4 MiB.

    Whether other tokens are there, of another tokenizer or another text, without reading hundreds of gigabytes. A
    few tokens changed in a large file fall between the blocks, and are not seen.
    """
    digest = hashlib.sha256()
    with open(f"{prefix}.bin", "rb") as file:
        last = max(0, os.fstat(file.fileno()).st_size - _BLOCK)
        for start in sorted({i * last // (_BLOCKS - 1) for i in range(_BLOCKS)}):
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()


class Corpus:
    """One pair of token files, cut into what is trained on and, at the end, what is held out.

    The cut is at the end of a document, unless none ends near it (one long document).
    """

    def __init__(self, path: str | Path, heldout: float, length: int, vocab: int):
        """`length`: tokens predicted in a sample; `vocab`: ids must be below it."""
        self.prefix = find_corpus(path)
        file = TokenFile(self.prefix)
        self.tokens, self._length, self._vocab = file.tokens, length, vocab
        starts = file.document_starts
        self._cut = cut = self._boundary(starts, heldout)
        if cut < length + 1:
            raise InputError(
                f"data.paths={path}: {cut} tokens to train on, but a sample takes {length + 1}; give more text or "
                "lower train.sequence_length"
            )
        self._starts = starts[: np.searchsorted(starts, cut)]
        self._ends = np.append(self._starts[1:], cut)
        self.heldout_tokens = len(self.tokens) - cut
        with open(f"{self.prefix}.idx", "rb") as index:
            digest = hashlib.file_digest(index, "sha256").hexdigest()
        # Runs have begun with the part before "sample" alone.
        self.fingerprint = f"{len(self.tokens)} tokens, index sha256 {digest}, sample sha256 {_sample(self.prefix)}"

    def _boundary(self, starts: np.ndarray, heldout: float) -> int:
        total = int(starts[-1])
        if not heldout:
            return total
        wanted = total - max(2, round(total * heldout))
        nearest = int(starts[np.abs(starts - wanted).argmin()])
        is_near = 2 * abs(nearest - wanted) <= total - wanted
        return nearest if is_near and 0 < nearest < total - 1 else max(wanted, 0)

    def read(self, start: int, stop: int) -> np.ndarray:
        """int32[stop - start] tokens in file order; InputError if one is no id of the tokenizer."""
        tokens = np.asarray(self.tokens[start:stop], dtype=np.int32)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self._vocab:
            bad = start + int(np.argmax((tokens < 0) | (tokens >= self._vocab)))
            raise InputError(
                f"{self.prefix}.bin: token {bad} is {self.tokens[bad]}, but the tokenizer's ids end at "
                f"{self._vocab - 1}; prepare the text with this model's tokenizer"
            )
        return tokens

    def samples(self, seed: int) -> Samples:
        return Samples(self, self._starts, self._ends, self._length, seed)

    def heldout(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(tokens int32[length + 1], weights float32[length]) in file order; each held-out token but the first is
        predicted once, and the last row is filled up with weight 0."""
        for start in range(self._cut, len(self.tokens) - 1, self._length):
            tokens = self.read(start, min(start + self._length + 1, len(self.tokens)))
            weights = np.zeros(self._length, np.float32)
            weights[: len(tokens) - 1] = 1
            yield np.pad(tokens, (0, self._length + 1 - len(tokens))), weights


class Samples(grain.sources.RandomAccessDataSource):
    """The training samples of a corpus in the order of its shuffled documents; [i] is int32[length + 1]."""

    def __init__(self, corpus: Corpus, starts: np.ndarray, ends: np.ndarray, length: int, seed: int):
        self._corpus, self._length = corpus, length
        order = np.random.default_rng(seed).permutation(len(starts))
        self._starts = starts[order]
        self._stream_ends = np.cumsum(ends[order] - self._starts)

    def __len__(self) -> int:
        return (int(self._stream_ends[-1]) - 1) // self._length

    def __getitem__(self, index: int) -> np.ndarray:
        start, stop = index * self._length, (index + 1) * self._length + 1
        pieces = []
        document = int(np.searchsorted(self._stream_ends, start, side="right"))
        while start < stop:
            end = int(self._stream_ends[document])
            before = int(self._stream_ends[document - 1]) if document else 0
            at, take = int(self._starts[document]) + start - before, min(end, stop) - start
            pieces.append(self._corpus.read(at, at + take))
            start, document = start + take, document + 1
        return np.concatenate(pieces)


class Batches:
    """Training batches by number, and the held-out rows.

    batches(step) -> int32[batch_size, sequence_length + 1]
    batches.rows(step, start, stop) -> those rows of it alone, which is all that one host reads
    """

    def __init__(self, config: Config):
        data, train = config.data, config.train
        if not data.paths:
            raise InputError("data.paths=(): nothing to train on; give --data DIR, a folder written by `prepare`")
        vocab = config.model.vocab if data.valid_ids is None else data.valid_ids
        self.corpora = [Corpus(path, data.heldout, train.sequence_length, vocab) for path in data.paths]
        self._size = train.batch_size
        samples = [corpus.samples(_seed(train.seed, i)) for i, corpus in enumerate(self.corpora)]
        self.samples_per_pass = sum(map(len, samples))
        endless = [
            grain.MapDataset.source(source).shuffle(seed=_seed(train.seed, i, 1)).repeat()
            for i, source in enumerate(samples)
        ]
        weights = np.array(data.weights or [len(source) for source in samples], float)
        self._samples = grain.MapDataset.mix(endless, list(weights / weights.sum()))

    def __call__(self, step: int) -> np.ndarray:
        return self.rows(step, 0, self._size)

    def rows(self, step: int, start: int, stop: int) -> np.ndarray:
        """int32[stop - start, sequence_length + 1]: rows of the batch of optimizer step `step`, from 0."""
        first = step * self._size
        return np.stack([self._samples[i] for i in range(first + start, first + stop)])

    def heldout(self, sequences: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The first `sequences` held-out rows (0: all), in equal numbers from each corpus; see `Corpus.heldout`."""
        each = -(-sequences // len(self.corpora)) if sequences else None
        for corpus in self.corpora:
            for i, row in enumerate(corpus.heldout()):
                if i == each:
                    break
                yield row


def _seed(*parts: int) -> int:
    """One 31-bit seed from several numbers, without the collisions of adding them."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "little") >> 1
