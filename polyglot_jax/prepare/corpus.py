"""Files as documents: NFC, counted, with every row that is left out on record."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from polyglot_jax.config import InputError
from polyglot_jax.prepare.readers import ARCHIVES, LONGEST, ReaderConfig, Row, Source, find_files, kind_of, read_rows
from polyglot_jax.tokenizer import Tokenizer

BATCH_CHARACTERS = 1 << 20
"""Text that is tokenised at a time; the library needs some hundred bytes for each of its tokens."""
PRINTED = 5
"""Bad rows shown on stderr; all of them are in bad_rows.jsonl."""
REMEDIES = {
    "encoding": "pass --encoding cp949, or whichever it is in, or convert it with iconv -f cp949 -t utf-8",
    "json": "a .jsonl has one JSON object on each line",
    "column": "name the key that holds the text with --column",
    "fields": "pass --quoting none if quotes are plain characters in it, and see that the extension fits the delimiter",
    "page": "see bad_rows.jsonl for all of them",
    "length": "cut such documents into shorter ones; a .txt is one only with --txt-documents file",
}


@dataclass
class FileCount:
    """What one input file came to; characters and bytes (of UTF-8) are those of its documents after NFC."""

    path: str
    sha256: str = ""
    documents: int = 0
    empty_rows: int = 0
    bad_rows: int = 0
    characters: int = 0
    utf8_bytes: int = 0


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
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


def token_ids(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The ids of each text, ended by <|endoftext|>."""
    for batch in batches(texts):
        for ids in tokenizer.encode_batch(batch):
            yield [*ids, tokenizer.eos_id]


class TextCorpus:
    """The documents of the files that a ReaderConfig names. Raises InputError when these cannot be found.

    pages    whether documents may be whole pages of the web, which somebody will clean
    counts   one FileCount per file read so far
    skipped  files in the given folders that are hidden, or of another extension than those read
    """

    def __init__(self, config: ReaderConfig, *, pages: bool = False) -> None:
        self.config = config
        self.files, self.skipped = find_files(config.text)
        for file in self.files:
            if kind_of(file) in ARCHIVES and not pages:
                raise InputError(f"text={file}: holds pages, not text; only `prepare --clean` reads it")
        self.counts: list[FileCount] = []
        self._printed = 0
        if self.skipped:
            print(f"skipped {len(self.skipped)} hidden or other files, such as {self.skipped[0]}", file=sys.stderr)

    def bar(self) -> tqdm:
        """A progress bar over the files' bytes as they are stored."""
        return tqdm(total=sum(file.stat().st_size for file in self.files), unit="B", unit_scale=True, unit_divisor=1024)

    def documents(self, bad_rows: Path, progress: Callable[[int], object]) -> Iterator[str]:
        """Each document, NFC. Rows that cannot be used are counted, and written to `bad_rows` with the reason.

        `progress` is called with numbers of stored bytes as they are read. Raises InputError when a file is damaged,
        when more than half of its rows are bad, or when not one document is left.
        """
        # Paths and keys may hold bytes of other encodings; the record must not fail over them.
        with open(bad_rows, "w", encoding="utf-8", errors="backslashreplace") as record:
            for path in self.files:
                yield from self.documents_of(path, record, progress)
        if not self.total("bad_rows"):
            bad_rows.unlink()
        if not self.total("documents"):
            raise InputError(
                f"text={', '.join(self.config.text)}: no document in {len(self.files)} files "
                f"({self.total('empty_rows')} empty rows, {self.total('bad_rows')} bad ones)"
            )

    def documents_of(self, path: Path, record: IO[str], progress: Callable[[int], object]) -> Iterator[str]:
        """Those of one file, bad rows to `record`. Raises InputError when it is damaged or mostly bad."""
        count = FileCount(str(path))
        self.counts.append(count)
        problems: Counter[str] = Counter()
        examples: dict[str, Row] = {}
        with closing(Source(path, progress)) as source:
            for row in map(self._checked, read_rows(path, source, self.config)):
                if row.problem:
                    count.bad_rows += 1
                    problems[row.problem] += 1
                    examples.setdefault(row.problem, row)
                    self._print(path, row)
                    entry = {"file": str(path), "line": row.line, "reason": row.reason}
                    record.write(json.dumps(entry, ensure_ascii=False) + "\n")
                elif not row.text.strip():
                    count.empty_rows += 1
                else:
                    count.documents += 1
                    count.characters += len(row.text)
                    count.utf8_bytes += len(row.text.encode())
                    yield row.text
            count.sha256 = source.sha256
        rows = count.documents + count.empty_rows + count.bad_rows
        if 2 * count.bad_rows > rows:
            [(problem, _)] = problems.most_common(1)
            line, _, _, reason = examples[problem]
            raise InputError(
                f"{path}: {count.bad_rows} of {rows} rows are bad, such as line {line} ({reason}); {REMEDIES[problem]}"
            )

    def total(self, name: str) -> int:
        """Sum over the files of one field of FileCount."""
        return sum(getattr(count, name) for count in self.counts)

    def _checked(self, row: Row) -> Row:
        """The row with its text in NFC, or with the problem that it is too long or cannot be written as UTF-8."""
        if len(row.text) > LONGEST:
            return Row(row.line, problem="length", reason=f"longer than {LONGEST:,} characters")
        try:
            row.text.encode()
        except UnicodeEncodeError as error:
            code = ord(row.text[error.start])
            if 0xDC80 <= code <= 0xDCFF:
                reason = f"byte 0x{code - 0xDC00:02x} is not {self.config.encoding}"
            else:
                reason = "half of a surrogate pair, which is no character"
            return Row(row.line, problem="encoding", reason=reason)
        return row._replace(text=unicodedata.normalize("NFC", row.text))

    def _print(self, path: Path, row: Row) -> None:
        self._printed += 1
        if self._printed <= PRINTED:
            tqdm.write(f"bad row: {path}: line {row.line}: {row.reason}", file=sys.stderr)
        elif self._printed == PRINTED + 1:
            tqdm.write("more bad rows; bad_rows.jsonl will list them all", file=sys.stderr)
