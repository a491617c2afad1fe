"""Token files of GPT-NeoX, `PREFIX.bin` and `PREFIX.idx` in its "mmap" format, byte for byte.

The .bin is token ids back to back, without a header. The .idx is little endian:

    bytes 0-8    magic "MMIDIDX\\0\\0"
    9-16         u64 version, 1
    17           u8 type of the ids in the .bin (1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 8 u16; 6 and 7 are floats)
    18-25        u64 number of sequences S
    26-33        u64 length of the document index, documents + 1
    34-          i32[S] tokens of each sequence, i64[S] where it starts in the .bin, in bytes,
                 i64[documents + 1] the first sequence of each document, then S

Source: megatron/data/indexed_dataset.py of EleutherAI/gpt-neox.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from polyglot_jax.config import InputError

MAGIC = b"MMIDIDX\x00\x00"
OLD_MAGIC = b"TNTIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CHUNK = 1 << 20  # entries of the index handled at a time, so that memory does not grow with it


def _files(prefix: str | Path) -> tuple[Path, Path]:
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


class TokenFile:
    """Reads a pair of token files through memory maps. Raises InputError when either is missing, damaged or foreign.

    tokens     integer[tokens], all documents back to back
    sizes      int32[S], tokens of each sequence
    documents  int64[documents + 1], the first sequence of each document, then S
    """

    def __init__(self, prefix: str | Path) -> None:
        """`prefix`: the common path of the two files, without .bin and .idx."""
        self._bin, self._idx = _files(prefix)
        for file in (self._bin, self._idx):
            if not file.is_file():
                raise InputError(f"{file}: no such file; a prefix names both PREFIX.bin and PREFIX.idx")
        dtype, sequences, bounds = self._read_header()
        at = HEADER.size
        self.sizes = np.memmap(self._idx, "<i4", "r", at, (sequences,))
        pointers = np.memmap(self._idx, "<i8", "r", at + 4 * sequences, (sequences,))
        self.documents = np.memmap(self._idx, "<i8", "r", at + 12 * sequences, (bounds,))
        tokens = self._check_index(pointers, dtype.itemsize)
        length = self._bin.stat().st_size
        if length != tokens * dtype.itemsize:
            state = "truncated" if length < tokens * dtype.itemsize else "too long"
            raise InputError(
                f"{self._bin}: {state}, {length} bytes where {self._idx.name} counts {tokens} tokens of "
                f"{dtype.itemsize} bytes; copy or make both again"
            )
        self.tokens = np.memmap(self._bin, dtype, "r", shape=(tokens,))

    @property
    def document_starts(self) -> np.ndarray:
        """int64[documents + 1]: the position in `tokens` where each document starts, then the number of tokens."""
        starts = np.zeros(len(self.sizes) + 1, np.int64)
        np.cumsum(self.sizes, out=starts[1:])
        return starts[self.documents]

    def _read_header(self) -> tuple[np.dtype, int, int]:
        with open(self._idx, "rb") as file:
            head = file.read(HEADER.size)
        if head.startswith(OLD_MAGIC):
            raise InputError(
                f"{self._idx}: GPT-NeoX's old format (TNTIDX: cached or lazy); make it again with "
                "preprocess_data.py --dataset-impl mmap, or from the text with `prepare`"
            )
        if not head.startswith(MAGIC):
            raise InputError(f"{self._idx}: not a token index of GPT-NeoX, it starts with {head[:9]!r}, not {MAGIC!r}")
        if len(head) < HEADER.size:
            raise InputError(f"{self._idx}: truncated, {len(head)} bytes; copy or make it again")
        _, version, code, sequences, bounds = HEADER.unpack(head)
        if version != 1:
            raise InputError(f"{self._idx}: version={version}: only version 1 is known")
        if code not in DTYPES:
            raise InputError(f"{self._idx}: dtype code={code}: not one of the integers {sorted(DTYPES)}")
        length, expected = self._idx.stat().st_size, HEADER.size + 12 * sequences + 8 * bounds
        if length != expected:
            state = "truncated" if length < expected else "too long"
            raise InputError(
                f"{self._idx}: {state}, {length} bytes where its header asks for {expected}; copy or make it again"
            )
        if sequences == 0 or bounds < 2:
            raise InputError(f"{self._idx}: holds no documents; make it again from the text with `prepare`")
        return np.dtype(DTYPES[code]), sequences, bounds

    def _check_index(self, pointers: np.ndarray, itemsize: int) -> int:
        """Check that sizes, pointers and documents tell one story; returns the number of tokens."""
        tokens = 0
        for start in range(0, len(self.sizes), _CHUNK):
            sizes = self.sizes[start : start + _CHUNK].astype(np.int64)
            ends = tokens + np.cumsum(sizes)
            if sizes.min() < 0 or np.any(pointers[start : start + _CHUNK] != (ends - sizes) * itemsize):
                raise InputError(
                    f"{self._idx}: damaged, its pointers are not the running sum of its sizes; make it again"
                )
            tokens = int(ends[-1])
        bounds = self.documents
        if bounds[0] != 0 or bounds[-1] != len(self.sizes) or np.any(bounds[1:] < bounds[:-1]):
            raise InputError(
                f"{self._idx}: damaged, its document index does not rise from 0 to the {len(self.sizes)} sequences; "
                "make it again"
            )
        if tokens == 0:
            raise InputError(f"{self._idx}: holds no tokens; make it again from the text with `prepare`")
        return tokens


class TokenFileWriter:
    """Writes a pair of token files, one sequence per document, as `preprocess_data.py` of GPT-NeoX does.

    A context manager: the two files appear under their names when it is left without an exception, and not at all
    otherwise. Memory grows by four bytes per document.

        with TokenFileWriter("corpus/text_document", vocab=30_003) as writer:
            writer.add_document([5, 6, 2])
    """

    def __init__(self, prefix: str | Path, vocab: int) -> None:
        """`prefix`: path of the two files without .bin and .idx. `vocab`: one more than the highest id."""
        self._vocab = vocab
        self._code = 8 if vocab < 65_500 else 4
        self._dtype = np.dtype(DTYPES[self._code])
        self._targets = _files(prefix)
        self._temporary = tuple(target.with_name(target.name + ".tmp") for target in self._targets)
        self._sizes = array("i")
        self.tokens = 0

    @property
    def documents(self) -> int:
        """Documents added so far."""
        return len(self._sizes)

    def add_document(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append a document of ids [tokens]. Raises InputError when it is empty or has an id outside [0, vocab)."""
        document = np.asarray(ids)
        if document.size == 0:
            raise InputError(f"document {self.documents}: holds no tokens")
        if document.min() < 0 or document.max() >= self._vocab:
            raise InputError(
                f"document {self.documents}: has ids from {document.min()} to {document.max()}, but vocab={self._vocab}"
            )
        self._file.write(document.astype(self._dtype).tobytes())
        self._sizes.append(document.size)
        self.tokens += document.size

    def __enter__(self) -> TokenFileWriter:
        self._file = open(self._temporary[0], "wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._file.close()
            if kind is None:
                self._write_index()
                for temporary, target in zip(self._temporary, self._targets, strict=True):
                    temporary.replace(target)
        finally:
            for temporary in self._temporary:
                temporary.unlink(missing_ok=True)

    def _write_index(self) -> None:
        count = self.documents
        if count == 0:
            raise InputError(f"{self._targets[0]}: no documents to write")
        sizes = np.frombuffer(self._sizes, np.int32)
        with open(self._temporary[1], "wb") as file:
            file.write(HEADER.pack(MAGIC, 1, self._code, count, count + 1))
            file.write(sizes.astype("<i4", copy=False).data)
            start = 0
            for at in range(0, count, _CHUNK):
                ends = start + np.cumsum(sizes[at : at + _CHUNK], dtype=np.int64)
                file.write(((ends - sizes[at : at + _CHUNK]) * self._dtype.itemsize).astype("<i8").data)
                start = int(ends[-1])
            for at in range(0, count + 1, _CHUNK):
                file.write(np.arange(at, min(at + _CHUNK, count + 1), dtype="<i8").data)
