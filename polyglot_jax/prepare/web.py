"""Pages of the web: out of WARC and WET files with warcio, and to their main text with Resiliparse."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import IO

from polyglot_jax.config import InputError
from polyglot_jax.prepare.readers import LONGEST, MissingLibrary, Row

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
_NESTING = re.compile(r"<(/?)(?:div|section|article|table|ul|ol|li|blockquote|dl)\b", re.IGNORECASE)
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
    try:
        for number, record in enumerate(ArchiveIterator(stream), 1):
            if record.format != "warc":  # it takes any line of five words for the older format's head
                raise ArchiveLoadFailed(f"record {number} is none of a WARC")
            if record.rec_type == "conversion":
                declared = "charset=utf-8"
            elif record.rec_type == "response" and record.http_headers:
                declared = record.http_headers.get_header("Content-Type") or ""
                if record.http_headers.get_statuscode() != "200" or "html" not in declared.lower():
                    continue
            else:
                continue
            address = record.rec_headers.get_header("WARC-Target-URI")
            try:
                page = record.content_stream().read(LONGEST + 1)
            except EOFError:
                raise
            except Exception as error:  # whatever a decompressor raises
                packing = record.http_headers and record.http_headers.get_header("Content-Encoding")
                yield Row(number, problem="page", reason=f"{address}: cannot be unpacked from {packing!r} ({error})")
                continue
            if len(page) > LONGEST:
                yield Row(number, problem="length", reason=f"{address}: longer than {LONGEST:,} bytes")
                continue
            while record.raw_stream.read(1 << 16):  # what stands after the end of a packed body
                pass
            if record.raw_stream.limit > 0:
                raise EOFError("the last record is cut off")
            text = decoded(page, declared)
            if text is None:
                yield Row(number, problem="page", reason=f"{address}: in no encoding that it names, UTF-8 or CP949")
            else:
                yield Row(number, text)
        stream.read(1)  # warcio takes the end of a packed file that is cut short for that of the archive; this raises
    except ArchiveLoadFailed as error:
        raise InputError(f"{path}: damaged or no web archive ({error}); copy or download it again") from error


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
        marked = _SYLLABLE.sub(rf"\1{_MARK}\2", page)
        nesting = accumulate((-1 if end else 1 for end in _NESTING.findall(page)), initial=0)
        text = extract_plain_text(marked, main_content=max(nesting) <= DEEPEST, list_bullets=False, alt_texts=False)
        return text.replace(_MARK, "")

    return function
