"""One input file as rows: .txt, .jsonl, .csv, .tsv, .warc, plain or packed with .gz or .zst, streamed in flat memory.

A row that cannot be used is yielded with its problem, for the caller to count. What makes the rest of a file doubtful
too (a damaged archive, a quote that is never closed, no such column) is an InputError.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, NamedTuple

import zstandard

from polyglot_jax.config import InputError

KINDS = (".txt", ".jsonl", ".csv", ".tsv", ".warc", ".wet", ".parquet")
PACKINGS = ("", ".gz", ".zst")
ARCHIVES = (".warc", ".wet")
"""Kinds that hold pages of the web."""
LONGEST = 1 << 24
"""Characters of a document, or bytes of a page, above which a row is bad: the tokenizer takes 200 bytes for each."""
LONGEST_LINE = 6 * LONGEST + (1 << 20)
"""Characters of a line of a .jsonl above which it is not read: LONGEST as escapes like \\ud55c, and other keys."""
DEFAULT_COLUMNS = ("text", "document")

Problem = Literal["encoding", "json", "column", "fields", "page", "length"]


class MissingLibrary(InputError):
    """What reads a kind of file is not installed: no fault of the file's."""


class Row(NamedTuple):
    """One row of a file: its text or, where that cannot be had, the kind of problem and the reason in words."""

    line: int
    text: str = ""
    problem: Problem | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """Which files, and where in them the text is."""

    text: tuple[str, ...]
    """Files or folders (walked in sorted order): .txt, .jsonl, .csv, .tsv, each also as .gz or .zst; .parquet; with
    --clean also .warc and .wet."""
    column: str | None = None
    """Column of a .csv, .tsv or .parquet, or key of a .jsonl, that holds the text; none: "text", else "document"."""
    txt_documents: Literal["line", "paragraph", "file"] = "line"
    """What is one document in a .txt: a line, a paragraph (up to a blank line), or the whole file."""
    encoding: str = "utf-8"
    """Encoding of the text, in Python's names: cp949 for old Korean files. A byte order mark is skipped. Pages
    of a .warc say which they are in."""
    quoting: Literal["standard", "none"] = "standard"
    """Whether quotes in a .csv or .tsv enclose fields, or are plain characters and each line is a row."""

    def __post_init__(self) -> None:
        if not self.text:
            raise InputError("text: name at least one file or folder")
        try:
            "".encode(self.encoding)
        except (LookupError, ValueError) as error:  # ValueError: "undefined", and a name with a zero byte
            raise InputError(f"encoding={self.encoding}: Python knows no such text encoding") from error


def kind_of(path: Path) -> str | None:
    """The extension without its packing, ".jsonl" for "a.jsonl.gz"; None when it is not one that is read."""
    name = path.name.lower()
    if name.endswith(".parquet"):  # packed inside
        return ".parquet"
    return next((kind for kind in KINDS[:-1] for packing in PACKINGS if name.endswith(kind + packing)), None)


def find_files(paths: Iterable[str]) -> tuple[list[Path], list[Path]]:
    """The files to read, in order, and those in the given folders that are not: of another extension, or hidden.

    Raises InputError for a path that is missing, unreadable, of an unknown extension, without files, or given twice.
    """
    known = f"{' '.join(KINDS)} (each but .parquet also with .gz or .zst)"
    files: list[Path] = []
    skipped: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside: list[Path] = []
            walked: set[tuple[bool, Path]] = set()
            for folder, folders, names in os.walk(path, onerror=_unreadable, followlinks=True):
                # Links to each other's folders would be followed for ever; a hidden one must not hide where it leads.
                here = (_hidden(Path(folder).relative_to(path)), Path(folder).resolve())
                if here in walked:
                    folders.clear()
                    continue
                walked.add(here)
                folders.sort()
                inside += (Path(folder, name) for name in names)
            inside.sort()
            found = [file for file in inside if kind_of(file) and not _hidden(file.relative_to(path))]
            if not found:
                raise InputError(f"text={path}: no file in this folder is one of {known}")
            files += found
            skipped += sorted(set(inside) - set(found))
        elif not path.is_file():
            raise InputError(f"text={path}: no such file or folder")
        elif not kind_of(path):
            raise InputError(f"text={path}: unknown extension; known are {known}")
        else:
            files.append(path)
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise InputError(f"text={file}: given twice; to weight a corpus, prepare it alone and use data.weights")
        if not os.access(file, os.R_OK):
            raise InputError(f"text={file}: cannot be read; see its permissions, or where it links to")
        seen.add(file.resolve())
    return files, skipped


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _unreadable(error: OSError) -> None:
    raise InputError(f"text={error.filename}: cannot be read ({error.strerror})") from error


class Source(io.RawIOBase):
    """The bytes of a file as stored; hashes them, and reports how many were read, on their way."""

    def __init__(self, path: Path, progress: Callable[[int], object]) -> None:
        self._file = path.open("rb", buffering=0)
        self._hash = hashlib.sha256()
        self._progress = progress

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        count = self._file.readinto(buffer)
        self._hash.update(memoryview(buffer)[:count])
        self._progress(count)
        return count

    @property
    def sha256(self) -> str:
        """SHA-256, in hex, of the bytes read so far."""
        return self._hash.hexdigest()

    def close(self) -> None:
        self._file.close()
        super().close()


DAMAGES = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)
"""What reading a packed file raises when it is damaged."""


def damaged(path: Path, reason: object) -> InputError:
    """The error for a packed file or an archive that is damaged."""
    return InputError(f"{path}: damaged or truncated archive ({reason}); copy or download it again")


class _Zstd(io.RawIOBase):
    """Decompressed bytes of a .zst of one or more frames.

    zstandard's own stream reader ends in silence where a truncated frame ends; this one raises EOFError.
    """

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame = self._decompressor.decompressobj()
        self._inside = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._ready:
            packed = b""
            if self._frame.eof:
                packed = self._frame.unused_data
                self._frame = self._decompressor.decompressobj()
                self._inside = False
            packed = packed or self._source.read(1 << 17)
            if not packed:
                if self._inside:
                    raise EOFError("a zstandard frame is cut off")
                return 0
            self._inside = True
            self._ready = memoryview(self._frame.decompress(packed))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def read_rows(path: Path, source: Source, config: ReaderConfig) -> Iterator[Row]:
    """Rows of the file `path`, whose stored bytes are `source`, in order.

    Bytes that are not of the encoding arrive as lone surrogates ("surrogateescape"), so that one bad row costs no
    other. Raises InputError when the file is a damaged archive, its quotes are wrong or it has no column of text.
    """
    kind = kind_of(path)
    if kind == ".parquet":
        from polyglot_jax.prepare.parquet_rows import parquet_rows  # which needs the names above

        while source.read(1 << 20):  # for the hash: pyarrow reads the file out of order
            pass
        yield from parquet_rows(path, config)
        return
    # csv wants the line ends as they are; elsewhere only a .txt may have any of the three kinds.
    newline = {".txt": None, ".jsonl": "\n"}.get(kind, "" if config.quoting == "standard" else "\n")
    encoding = "utf-8-sig" if codecs.lookup(config.encoding).name == "utf-8" else config.encoding
    with ExitStack() as stack:
        stream: IO[bytes] = stack.enter_context(io.BufferedReader(source, 1 << 17))
        if path.name.lower().endswith(".gz"):
            stream = stack.enter_context(gzip.GzipFile(fileobj=stream))
        elif path.name.lower().endswith(".zst"):
            stream = stack.enter_context(io.BufferedReader(_Zstd(stream)))
        try:
            if kind in ARCHIVES:
                from polyglot_jax.prepare.web import page_rows

                yield from page_rows(path, stream)
                return
            lines = stack.enter_context(io.TextIOWrapper(stream, encoding, "surrogateescape", newline))
            if kind == ".txt":
                yield from _txt_rows(lines, config.txt_documents)
            elif kind == ".jsonl":
                yield from _jsonl_rows(lines, config)
            else:
                yield from _table_rows(path, lines, "," if kind == ".csv" else "\t", config)
        except DAMAGES as error:
            raise damaged(path, error) from error
        except UnicodeError as error:
            raise InputError(f"{path}: encoding={config.encoding}: {error}; pass the one it is in") from error


def _txt_rows(lines: IO[str], documents: str) -> Iterator[Row]:
    if documents == "file":
        yield Row(1, lines.read(LONGEST + 1))
        while lines.read(LONGEST):  # for the hash
            pass
    elif documents == "line":
        for number, line in enumerate(_bounded(lines), 1):
            yield Row(number, line.rstrip("\n"))
    else:
        paragraph: list[str] = []
        start, length = 1, 0
        for number, line in enumerate(_bounded(lines), 1):
            if line.strip():
                start, length = (start, length) if paragraph else (number, 0)
                if length <= LONGEST:
                    paragraph.append(line)
                    length += len(line)
            elif paragraph:
                yield Row(start, "".join(paragraph).rstrip("\n"))
                paragraph = []
        if paragraph:
            yield Row(start, "".join(paragraph).rstrip("\n"))


def _bounded(lines: IO[str], longest: int = LONGEST) -> Iterator[str]:
    """The lines; of one that is longer than `longest` only so much that this can be seen."""
    while line := lines.readline(longest + 1):
        rest = line
        while len(rest) > longest and not rest.endswith("\n"):
            rest = lines.readline(longest + 1)
        yield line


def _jsonl_rows(lines: IO[str], config: ReaderConfig) -> Iterator[Row]:
    wanted = (config.column,) if config.column else DEFAULT_COLUMNS
    for number, line in enumerate(_bounded(lines, LONGEST_LINE), 1):
        if not line.strip():
            yield Row(number)
            continue
        if len(line) > LONGEST_LINE:
            yield Row(number, problem="length", reason=f"a line longer than {LONGEST_LINE:,} characters")
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Row(number, problem="json", reason=f"not JSON: {error}")
            continue
        if not isinstance(value, dict):
            yield Row(number, problem="json", reason=f"not a JSON object but {type(value).__name__}")
            continue
        column = next((name for name in wanted if name in value), None)
        if column is None:
            reason = f"no {' or '.join(map(repr, wanted))} among {', '.join(value) or 'no keys'}"
            yield Row(number, problem="column", reason=reason)
        elif isinstance(value[column], str):
            yield Row(number, value[column])
        else:
            reason = f"{column!r} is not a string but {type(value[column]).__name__}"
            yield Row(number, problem="column", reason=reason)


def _table_rows(path: Path, lines: IO[str], delimiter: str, config: ReaderConfig) -> Iterator[Row]:
    records = _quoted(path, lines, delimiter) if config.quoting == "standard" else _unquoted(lines, delimiter)
    header_line, header = next(records, (1, []))
    if not header:
        raise InputError(f"{path}: line {header_line}: no header; the first line must name the columns")
    index = header.index(find_column(path, header, config))
    for line, fields in records:
        if not fields:
            yield Row(line)
        elif len(fields) == len(header):
            yield Row(line, fields[index])
        else:
            yield Row(line, problem="fields", reason=f"{len(fields)} fields where the header has {len(header)}")


def _unquoted(lines: IO[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r\n")
        yield number, line.split(delimiter) if line else []


def _quoted(path: Path, lines: IO[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Records with the line each begins at, quotes taken as RFC 4180 has them; any doubt about one is an InputError.

    A quote that is opened by mistake takes in the lines after it up to the next one, and nothing in the grammar says
    so. Here a field that goes on over lines which look like whole rows is taken for that mistake: the delimiters in a
    run of such lines must not reach 20. Five columns show it within 5 lines; two, of prose with a comma in it perhaps,
    within 20. With one column there is only the cap of 1,000 lines.
    """
    # The module's limit of 131,072 characters would refuse long documents, and end the file at one above LONGEST.
    csv.field_size_limit((1 << 31) - 1)
    begins, width = 1, 0

    def watched() -> Iterator[str]:
        alike = 0
        for number, line in enumerate(lines, 1):
            alike = alike + 1 if number > begins and line.count(delimiter) == width - 1 else 0
            if alike * (width - 1) >= 20:
                raise wrong("it takes in line after line that looks like a row of its own")
            if number - begins >= 1000:
                raise wrong("it is still open 1,000 lines later")
            yield line

    def wrong(reason: object) -> InputError:
        return InputError(
            f"{path}: line {begins}: a quoted field of this row is not closed as it should be: {reason}; if quotes "
            "are plain characters in this file, pass --quoting none; if not, mend the line, or use .jsonl"
        )

    reader = csv.reader(watched(), delimiter=delimiter, strict=True)
    try:
        for fields in reader:
            width = width or len(fields)
            yield begins, fields
            begins = reader.line_num + 1
    except csv.Error as error:
        raise wrong(error) from error


def find_column(path: Path, columns: Sequence[str], config: ReaderConfig) -> str:
    """The name among `columns` of that which holds the text. Raises InputError when there is none, or more than one."""
    wanted = (config.column,) if config.column else DEFAULT_COLUMNS
    for column in wanted:
        if (count := columns.count(column)) > 1:
            raise InputError(f"{path}: {count} columns are named {column}; rename those that do not hold the text")
        if count:
            return column
    raise InputError(
        f"{path}: no column {' or '.join(wanted)} among {', '.join(columns) or 'none'}; name the one that holds the "
        "text with --column (or pass --encoding, if these are garbled)"
    )
