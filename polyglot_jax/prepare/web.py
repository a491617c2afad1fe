"""Pages of the web: out of WARC and WET files with warcio, and to their main text with Resiliparse."""

from __future__ import annotations

import codecs
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING

import zstandard

from polyglot_jax.config import InputError
from polyglot_jax.prepare.readers import DAMAGES, LONGEST, MissingLibrary, Row, damaged

if TYPE_CHECKING:
    from warcio.recordloader import ArcWarcRecord

DEEPEST = 1000
"""Elements of a kind inside each other, above which Resiliparse's time, which grows with their square, is seconds."""
_DECLARED = re.compile(rb"<meta[^<>]*?charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
_CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
# Browsers take the first for the second, of which it is a part, and so do the authors of pages.
_WIDER = {"euc_kr": "cp949", "iso8859-1": "cp1252", "ascii": "cp1252", "gb2312": "gb18030", "shift_jis": "cp932"}
_PAGE = re.compile(
    r"[\s\ufeff]*(?:<\?xml[^<>]*>\s*)?(?:(?><!--.*?-->)\s*)*<(?:!doctype\s+html|html|head|body)\b",
    re.DOTALL | re.IGNORECASE,
)
_NESTING = re.compile(r"<(/?)(?:div|section|article|table|ul|ol|blockquote|dl)\b", re.IGNORECASE)
_LENGTH = re.compile(r"[0-9]{1,18}")
_SYLLABLE = re.compile(r"(>\s*[^\W\x00-\x7f])(\s*<)")
_MARK = "\u2060"


def page_rows(path: Path, stream: IO[bytes]) -> Iterator[Row]:
    """The pages in the unpacked bytes of a WARC or WET file, each with the number of its record, from 1.

    A page is the body of an answer with status 200 that says it is HTML, or a text that a crawler has made of one
    (`conversion`). All other records are left out. Raises InputError when warcio is missing or the file is damaged.
    """
    try:
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed
    except ImportError as error:
        raise MissingLibrary(f"{path}: web archives need warcio; pip install -r requirements-corpus.txt") from error
    # Left to itself, warcio takes an answer that ends before its head for the end of the archive.
    archive = ArchiveIterator(_Unpacked(path, stream), no_record_parse=True)
    try:
        for number, record in enumerate(archive, 1):
            length = record.rec_headers.get_header("Content-Length")
            if record.format != "warc":  # it takes any line of five words for the older format's head
                raise ArchiveLoadFailed(f"record {number} is none of a WARC")
            if not (record.rec_type and length and _LENGTH.fullmatch(length)):
                raise ArchiveLoadFailed(f"the head of record {number} has no WARC-Type or no possible Content-Length")
            if archive.err_count:
                raise ArchiveLoadFailed(f"record {number - 1} does not end where its head says")
            row = _page(number, record)
            while record.raw_stream.read(1 << 16):  # what was left out, or stands after the end of a packed body
                pass
            if record.raw_stream.limit > 0:
                raise damaged(path, "the last record is cut off")
            if row:
                yield row
        if archive.err_count:
            raise ArchiveLoadFailed("the last record does not end where its head says")
    except ArchiveLoadFailed as error:
        raise InputError(f"{path}: damaged or no web archive ({error}); copy or download it again") from error


class _Unpacked:
    """The bytes of `stream`. warcio would take the EOFError of a packed file that is cut for the archive's end."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self._path, self._stream = path, stream

    def read(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except DAMAGES as error:
            raise damaged(self._path, error) from error


class _Lines:
    """The lines of `stream`, and the last one read: the head of an answer ends with a blank one, or is cut off."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.last = stream, b""

    def readline(self) -> bytes:
        self.last = self._stream.readline()
        return self.last


def _page(number: int, record: ArcWarcRecord) -> Row | None:
    """The page in a record, what is wrong with it, or None if it holds none."""
    from warcio.exceptions import ArchiveLoadFailed
    from warcio.statusandheaders import StatusAndHeadersParser

    if record.rec_type not in ("conversion", "response"):
        return None
    address = record.rec_headers.get_header("WARC-Target-URI")
    if not address:
        raise ArchiveLoadFailed(f"the head of record {number} has no WARC-Target-URI")
    declared, packing = "charset=utf-8", ""
    if record.rec_type == "response":
        if not address.lower().startswith(("http:", "https:")):
            return None
        try:
            record.http_headers = StatusAndHeadersParser([], verify=False).parse(head := _Lines(record.raw_stream))
        except EOFError:
            return Row(number, problem="page", reason=f"{address}: the answer is empty")
        if not record.http_headers.protocol.startswith("HTTP/"):
            return Row(number, problem="page", reason=f"{address}: the answer does not begin as one of HTTP does")
        if not head.last:
            return Row(number, problem="page", reason=f"{address}: the answer is cut off within its head")
        declared = record.http_headers.get_header("Content-Type") or ""
        if record.http_headers.get_statuscode() != "200" or "html" not in declared.lower():
            return None
        packing = (record.http_headers.get_header("Content-Encoding") or "").strip().lower()
    try:
        page = _unpacked(record, packing)
    except InputError:  # of the file, not of this body
        raise
    except Exception as error:  # whatever a decompressor raises
        return Row(number, problem="page", reason=f"{address}: cannot be unpacked from {packing!r} ({error})")
    if len(page) > LONGEST:
        return Row(number, problem="length", reason=f"{address}: longer than {LONGEST:,} bytes")
    text = decoded(page, declared)
    if text is None:
        packed = f", which is packed as {packing!r}" if packing else ""
        return Row(number, problem="page", reason=f"{address}: in no encoding that it names, UTF-8 or CP949{packed}")
    return Row(number, text)


def _unpacked(record: ArcWarcRecord, packing: str) -> bytes:
    """The first LONGEST bytes of a body and, if there are more, one of those."""
    if packing not in ("gzip", "x-gzip", "br", "zstd"):
        return record.content_stream().read(LONGEST + 1)
    # warcio 1.8 passes over damage in gzip, knows no zstd and calls a method that brotli no longer has.
    record.http_headers.remove_header("Content-Encoding")
    packed = record.content_stream().read(LONGEST + 1)
    if packing == "zstd":
        with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(packed) as reader:
            return reader.read(LONGEST + 1)
    if packing == "br":
        try:
            import brotli
        except ImportError as error:
            raise ImportError("needs brotli; pip install -r requirements-corpus.txt") from error
        unpacker = brotli.Decompressor()
        page, ended = unpacker.process(packed, output_buffer_limit=LONGEST + 1), unpacker.is_finished()
    elif packed.startswith(b"\x1f\x8b"):
        unpacker = zlib.decompressobj(zlib.MAX_WBITS + 16)
        page, ended = unpacker.decompress(packed, LONGEST + 1), unpacker.eof
    else:  # some crawlers unpack pages and leave the head as it was
        return packed
    if len(page) <= LONGEST and not ended:
        raise EOFError("cut off")
    return page


def decoded(page: bytes, declared: str) -> str | None:
    """The page as text, in the first encoding that fits: UTF-8, the one in `declared` (the server's Content-Type), the
    one in its <meta>, CP949; None when none does.

    One fits if at most a twentieth of all but ASCII had to be replaced, as where a crawler has cut the page short.
    """
    names = [*_CHARSET.findall(declared), *(name.decode() for name in _DECLARED.findall(page[:4096]))]
    for name in ("utf-8", *names, "cp949"):
        try:
            codec = codecs.lookup(name).name
            text = page.decode(_WIDER.get(codec, codec), "replace")
        except (LookupError, UnicodeError):  # no encoding, or one that does not replace
            continue
        if 20 * text.count("\ufffd") <= len(text) - len(text.encode("ascii", "ignore")):
            return text
    return None


def is_page(text: str) -> bool:
    """Whether `text` is a whole page, as opposed to text with some tags in it."""
    return _PAGE.match(text) is not None


def main_text() -> Callable[[str], str]:
    """A function from a whole page to its main text, without menus, lists of links and footers."""
    try:
        from resiliparse.extract.html2text import extract_plain_text
    except ImportError as error:
        raise InputError("cleaning.steps=html: needs resiliparse; pip install -r requirements-corpus.txt") from error

    def function(page: str) -> str:
        # An element of one syllable would be taken for a bullet, being one character of no ASCII, and lost.
        marked = _SYLLABLE.sub(rf"\1{_MARK}\2", page.encode(errors="replace").decode())  # no half of a surrogate pair
        steps = (-1 if end else 1 for end in _NESTING.findall(page))
        nesting = accumulate(steps, lambda depth, step: max(depth + step, 0), initial=0)
        text = extract_plain_text(marked, main_content=max(nesting) <= DEEPEST, list_bullets=False, alt_texts=False)
        return text.replace(_MARK, "")

    return function
