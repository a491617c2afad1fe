"""Documents that are the same or nearly the same, by MinHash: datatrove's steps, with words and shingles for Korean.

Equal documents have equal signatures, so one pass finds both kinds. Signatures go to disk, a sorted file for each task
and bucket, and are merged from there. Only the clusters are held in memory.
"""

from __future__ import annotations

import re
import resource
import shutil
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from polyglot_jax.config import InputError
from polyglot_jax.prepare.cleaning import CleanConfig

try:
    from datatrove.data import Document
    from datatrove.pipeline.dedup import minhash
    from datatrove.utils.logging import logger
    from datatrove.utils.word_tokenizers import WordTokenizer
except ImportError as error:
    raise InputError("cleaning.deduplicate: needs datatrove; pip install -r requirements-corpus.txt") from error

OTHER_FILES = 200
"""Files that a process has open besides: libraries, Ray's sockets."""


def _raised_limit() -> int:
    """How many files this process may open, raised as far as it may raise that itself."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most if most != resource.RLIM_INFINITY else sys.maxsize


class _Words(WordTokenizer):
    """Words without punctuation, in lower case; a text of punctuation only is one word."""

    def word_tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower()) or [text]

    def sent_tokenize(self, text: str) -> list[str]:
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]


class _Signatures(minhash.MinhashDedupSignature):
    """datatrove's, but a document with fewer words than a shingle is one shingle, where datatrove leaves it out."""

    def get_shingles(self, text: str) -> np.ndarray:
        words = self.word_tokenizer.word_tokenize(text)
        size = min(len(words), self.config.n_grams)
        shingles = (" ".join(words[i : i + size]).encode() for i in range(len(words) - size + 1))
        return np.fromiter(map(self._hash_func, shingles), np.uint64).reshape(-1, 1)


class Duplicates:
    """The files of one de-duplication, in the folder `work`; each method is one task, and may be called again."""

    def __init__(self, config: CleanConfig, work: Path) -> None:
        self.work = work
        self.config = minhash.MinhashConfig(config.shingle_words, config.buckets, config.bucket_hashes)
        logger.remove()  # datatrove would log every task to stderr

    def check(self, files: int) -> None:
        """Raises InputError when a process may not open the signatures of so many files at once."""
        if files + OTHER_FILES > (most := _raised_limit()):
            raise InputError(
                f"cleaning.deduplicate: opens a file for each of text's {files:,} at once, and {most:,} are allowed "
                "(ulimit -Hn): raise that, join the files to fewer, or pass --cleaning.no-deduplicate"
            )

    def sign(self, rank: int, texts: Iterable[str]) -> None:
        """Write the signatures of the documents of task `rank`."""
        step = _Signatures(str(self.work / "signatures"), self.config, language=_Words())
        documents = (Document(text, "") for text in texts)
        step.run(documents, rank)

    def match(self, bucket: int) -> None:
        """Find the pairs that agree in a bucket."""
        _raised_limit()
        files = sum(1 for _ in (self.work / "signatures" / f"bucket_{bucket:03d}").iterdir())
        minhash.MinhashDedupBuckets(
            str(self.work / "signatures"), str(self.work / "pairs"), config=self.config, only_dedup_in_index=False,
            lines_to_buffer=max(10, min(10_000, 1_000_000 // files)),  # of each file, all of which are open at once
        ).run(None, bucket, self.config.num_buckets)  # fmt: skip

    def cluster(self, _: int) -> None:
        """Join pairs to clusters and choose what is removed: all but one of each."""
        shutil.rmtree(self.work / "clusters", ignore_errors=True)
        minhash.MinhashDedupCluster(
            str(self.work / "pairs"), str(self.work / "clusters"), self.config, save_cluster_size=True,
            lines_to_buffer=10_000,
        ).run()  # fmt: skip

    def removed(self, rank: int) -> set[int]:
        """Which documents of task `rank`, by number, are duplicates of one that is kept."""
        path = self.work / "clusters" / f"{rank:06d}.remove"
        return set(np.fromfile(path, "<u4").tolist()) if path.exists() else set()

    def sizes(self, rank: int) -> dict[int, int]:
        """How many documents are like this one, itself counted, for those of task `rank` that have any."""
        path = self.work / "clusters" / f"{rank:06d}.sizes"
        return dict(struct.iter_unpack("<2I", path.read_bytes())) if path.exists() else {}
