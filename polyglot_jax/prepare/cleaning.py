"""The steps that clean one document: each takes its text and gives it back, changed or not, or None to drop it.

A step is made by a function of the settings, in STEPS; `CleanConfig.steps` names those that are taken, in their order.
The thresholds are those of EleutherAI/dps, the preparation of Polyglot-Ko, at its commit af3c664b.
"""

from __future__ import annotations

import hashlib
import html
import math
import re
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from polyglot_jax.config import InputError
from polyglot_jax.prepare.web import is_page, main_text

Step = Callable[[str], str | None]


@dataclass(frozen=True)
class CleanConfig:
    """What is cleaned and in which order, what is dropped, and what counts as the same document."""

    steps: tuple[str, ...] = (
        "html", "length", "unicode", "emoticons", "whitespace", "repeats", "spam", "bad_words", "word_length",
        "symbols", "lines", "korean", "final_length",
    )  # fmt: skip
    """Steps, in order; personal data is masked after them, and then duplicates are found."""
    min_length: int = 50
    """Characters; shorter documents are dropped."""
    max_length: int = 100_000
    """Characters; longer documents are dropped."""
    min_word_length: float = 3.0
    """Least mean length of the words, in characters."""
    max_word_length: float = 10.0
    """Greatest mean length of the words."""
    max_symbol_words: float = 0.1
    """Greatest share of words that hold an ellipsis or a #."""
    min_symbol_words: int = 2
    """Fewer such words are how people write: they are not judged by their share."""
    min_lines: int = 3
    """Fewer lines are no list, and one that ends with an ellipsis is how people write: they are not judged by lines."""
    max_bullet_lines: float = 0.9
    """Greatest share of lines that begin with a bullet."""
    max_ellipsis_lines: float = 0.3
    """Greatest share of lines that end with an ellipsis."""
    min_korean: float = 0.25
    """Least share of Korean letters among the characters that are not blank."""
    bad_words: str | None = None
    """A file with one word a line; a document that holds any of them is dropped."""
    spam_markers: str | None = None
    """A file with one text a line; a document is cut where the first of them begins. None: some common sign-offs."""
    deduplicate: bool = True
    """Whether of documents that are the same, or nearly, only one is kept."""
    shingle_words: int = 13
    """Words in a row that are compared; a shorter document is one shingle."""
    buckets: int = 14
    """Two documents are the same when all hashes of one bucket are: at a Jaccard index of 0.8 with 92 % probability."""
    bucket_hashes: int = 8
    """Hashes in a bucket."""
    samples: int = 5
    """Documents of each file among which the report chooses its samples: of each step's, those kept and duplicates."""

    def __post_init__(self) -> None:
        for name in self.steps:
            if name not in STEPS:
                raise InputError(f"cleaning.steps={name}: unknown; known are {' '.join(STEPS)}")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"cleaning.{name}={value}: must be a finite number")
        for name in ("min_length", "shingle_words", "buckets", "bucket_hashes"):
            if getattr(self, name) < 1:
                raise InputError(f"cleaning.{name}={getattr(self, name)}: must be above 0")
        for low, high in (("min_length", "max_length"), ("min_word_length", "max_word_length")):
            if getattr(self, low) > getattr(self, high):
                raise InputError(f"cleaning.{low}={getattr(self, low)}: above {high}={getattr(self, high)}")


@dataclass
class StepCount:
    """What one step did: documents seen, changed and dropped, bytes of UTF-8 after it, and seconds of CPU in it."""

    seen: int = 0
    changed: int = 0
    dropped: int = 0
    bytes: int = 0
    seconds: float = field(default=0.0, compare=False)


class Cleaner:
    """The steps of a config in their order, with a StepCount each."""

    def __init__(self, config: CleanConfig) -> None:
        self.steps = {name: STEPS[name](config) for name in config.steps}
        self.counts = {name: StepCount() for name in self.steps}

    def __call__(self, text: str) -> tuple[str, str]:
        """The cleaned text and ""; or the text as it came to the step that dropped it, and that step's name."""
        for name, step in self.steps.items():
            count = self.counts[name]
            start = time.thread_time()
            result = step(text)
            count.seconds += time.thread_time() - start
            count.seen += 1
            if not result:  # nothing left is dropped too, and by the step that left nothing
                count.dropped += 1
                return text, name
            count.changed += result != text
            count.bytes += len(result.encode())
            text = result
        return text, ""


def _unicode(config: CleanConfig) -> Step:
    try:
        import ftfy
    except ImportError as error:
        raise InputError("cleaning.steps=unicode: needs ftfy; pip install -r requirements-corpus.txt") from error
    # Quotes, ligatures and full-width letters are how people write; entities are the html step's.
    settings = ftfy.TextFixerConfig(
        unescape_html=False, uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False, explain=False
    )

    def step(text: str) -> str:
        # ftfy reads 1 MB/s. Bytes of UTF-8 read as another encoding always give one of these; so do control characters.
        if _ODD.search(text):
            text = ftfy.fix_text(text, settings)
        # What follows NFC and is still a conjoining jamo belongs to no syllable.
        return _LONE_JAMO.sub("", unicodedata.normalize("NFC", text))

    return step


def _html(config: CleanConfig) -> Step:
    extract = main_text()

    def step(text: str) -> str:
        if "<" in text:
            if is_page(text):
                return extract(text)
            text = _TAG.sub("", _BREAK.sub("\n", _without_hidden(text)))
        return html.unescape(text) if "&" in text else text

    return step


def _without_hidden(text: str) -> str:
    """Without comments, scripts and styles; one that is never closed stays, and its end is looked for only once."""
    left, end, never = [], 0, set()
    for begin in _HIDDEN.finditer(text):
        name = (begin[1] or "").lower()
        if begin.start() < end or name in never:
            continue
        if close := _ENDS[name].search(text, begin.end()):
            left.append(text[end : begin.start()])
            end = close.end()
        else:
            never.add(name)
    return "".join(left) + text[end:]


def _emoticons(config: CleanConfig) -> Step:
    return lambda text: _RUN.sub(r"\1\1\2\2\3\3\3", text)


def _whitespace(config: CleanConfig) -> Step:
    def step(text: str) -> str:
        if text != " ".join(text.split()):
            text = _NEWLINES.sub("\n\n", _LINE_ENDS.sub("\n", _BLANKS.sub(" ", text)))
        return text.strip()

    return step


def _repeats(config: CleanConfig) -> Step:
    def step(text: str) -> str:
        words = text.split()
        if len(set(words)) == len(words):
            return text
        pieces = re.findall(r"\S+\s*", text)
        hashes = np.fromiter(map(hash, words), np.int64, len(words))
        for size in (*range(13, 2, -1), 1):
            keep = 3 if size == 1 else 1
            alike = hashes[size:] == hashes[:-size]
            if b"\1" * size * keep not in alike.tobytes():
                continue
            kept: list[int] = []
            for i in range(len(words)):
                kept.append(i)
                tail = [words[j] for j in kept[-size * (keep + 1) :]]
                if len(tail) == size * (keep + 1) and tail == tail[:size] * (keep + 1):
                    del kept[-size:]
            pieces, words, hashes = [pieces[i] for i in kept], [words[i] for i in kept], hashes[kept]
        return "".join(pieces).rstrip()

    return step


def _spam(config: CleanConfig) -> Step:
    markers = _lines(config.spam_markers, "spam_markers") if config.spam_markers else SPAM_MARKERS
    pattern = re.compile("|".join(map(re.escape, markers)))

    def step(text: str) -> str:
        found = pattern.search(text)
        return text[: found.start()].rstrip() if found else text

    return step


def _bad_words(config: CleanConfig) -> Step:
    if config.bad_words is None:
        return lambda text: text
    pattern = re.compile("|".join(map(re.escape, _lines(config.bad_words, "bad_words"))))
    return lambda text: None if pattern.search(text) else text


def _length(config: CleanConfig) -> Step:
    return lambda text: text if config.min_length <= len(text) <= config.max_length else None


def _word_length(config: CleanConfig) -> Step:
    def step(text: str) -> str | None:
        words = text.split()
        mean = sum(map(len, words)) / max(len(words), 1)
        return text if config.min_word_length <= mean <= config.max_word_length else None

    return step


def _symbols(config: CleanConfig) -> Step:
    def step(text: str) -> str | None:
        if "…" not in text and "..." not in text and "#" not in text:
            return text
        words = text.split()
        marked = sum("…" in word or "..." in word or "#" in word for word in words)
        few = marked < config.min_symbol_words or marked <= config.max_symbol_words * len(words)
        return text if few else None

    return step


def _lines_step(config: CleanConfig) -> Step:
    def step(text: str) -> str | None:
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        if len(lines) < config.min_lines:
            return text
        bullets = sum(line[0] in BULLETS for line in lines)
        ellipses = sum(line.endswith(("…", "...")) for line in lines)
        few = bullets <= config.max_bullet_lines * len(lines) and ellipses <= config.max_ellipsis_lines * len(lines)
        return text if few else None

    return step


def _korean(config: CleanConfig) -> Step:
    return lambda text: text if korean_share(text) >= config.min_korean else None


def korean_share(text: str) -> float:
    """Share of Korean letters, syllables or jamo, among the characters of `text` that are not blank."""
    codes = np.frombuffer(text.encode("utf-16-le"), "<u2")
    korean = ((codes >= 0xAC00) & (codes <= 0xD7A3)) | ((codes >= 0x3131) & (codes <= 0x3163))
    return float(korean.sum()) / max(len("".join(text.split())), 1)


def list_hashes(config: CleanConfig) -> dict[str, str]:
    """SHA-256 of the lines that the steps read from lists: a file may change under the same name."""
    paths = {"spam_markers": config.spam_markers, "bad_words": config.bad_words}
    read = {name: path for name, path in paths.items() if path and name.removesuffix("_markers") in config.steps}
    return {name: hashlib.sha256("\n".join(_lines(path, name)).encode()).hexdigest() for name, path in read.items()}


def _lines(path: str, name: str) -> list[str]:
    try:
        text = unicodedata.normalize("NFC", Path(path).read_text(encoding="utf-8-sig"))  # as documents are
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cleaning.{name}={path}: cannot be read as UTF-8 text ({error})") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"cleaning.{name}={path}: is empty; leave the flag out, or put one text on each line")
    return lines


STEPS: dict[str, Callable[[CleanConfig], Step]] = {
    "unicode": _unicode,
    "html": _html,
    "emoticons": _emoticons,
    "whitespace": _whitespace,
    "repeats": _repeats,
    "spam": _spam,
    "bad_words": _bad_words,
    "length": _length,
    "word_length": _word_length,
    "symbols": _symbols,
    "lines": _lines_step,
    "korean": _korean,
    "final_length": _length,
}
BULLETS = "*·•‧ㆍ"
SPAM_MARKERS = (
    "무단 전재 및 재배포 금지", "무단전재 및 재배포 금지", "무단전재-재배포 금지", "무단 복제 및 배포 금지",
    "저작권자 ©", "저작권자ⓒ", "Copyright ©", "공유하기 글 요소", "클린봇이 부적절한 표현을 감지한 댓글입니다",
)  # fmt: skip
_TAGS = (
    "a|abbr|article|aside|b|blockquote|body|button|caption|center|code|col|colgroup|dd|div|dl|dt|em|embed|fieldset"
    "|figcaption|figure|font|footer|form|frame|h[1-6]|head|header|html|i|iframe|img|input|label|legend|li|link|main|map"
    "|meta|nav|noscript|object|ol|option|p|param|pre|s|section|select|small|source|span|strike|strong|style|sub|sup"
    "|table|tbody|td|textarea|tfoot|th|thead|time|title|tr|u|ul|video"
)
_HIDDEN = re.compile(r"<(script|style)\b[^<>]*>|<!--", re.IGNORECASE)
_ENDS = {name: re.compile(rf"</{name}\s*>", re.IGNORECASE) for name in ("script", "style")} | {"": re.compile("-->")}
_BREAK = re.compile(r"</?(?:br|p|div|li|tr|h[1-6])\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(rf"</?(?:{_TAGS})(?:\s[^<>]*)?/?>", re.IGNORECASE)
_RUN = re.compile(r"([ㄱ-ㅎㅏ-ㅣ])\1{2,}|([ㄱ-ㅎㅏ-ㅣ]{2})\2{2,}|([!?.,;~^])\3{3,}")
_BLANKS = re.compile(r"[^\S\n\t]+")
_LINE_ENDS = re.compile(r"[ \t]*\n[ \t]*")
_NEWLINES = re.compile(r"\n{3,}")
_ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\xff\ufeff\ufff9-\ufffd\u2028\u2029]")
_LONE_JAMO = re.compile("[\u1100-\u11ff]")
