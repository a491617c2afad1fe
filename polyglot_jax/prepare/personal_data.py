"""Personal data in Korean text: found, told apart and masked. Telephone, resident registration and account numbers
become the vocabulary's own tokens; e-mail addresses and card numbers have none and become Korean words in brackets.

A pattern only proposes. Whether a number is what it looks like is decided by its digits (does a resident number begin
with a date, is a card's checksum right), by its neighbours (it must not be a part of a longer code, a URL, a price) and
by the nearest word before it that names a number: "입금 계좌", "주문번호", "전화". A shape that is as good as never
anything else, such as 010-1234-5678, needs no such word; a bare run of digits does.
"""

from __future__ import annotations

import calendar
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from polyglot_jax.prepare.number_words import CALLS, LABEL, PAYS, UNIT

KINDS = {"tel": "[전화번호]", "rrn": "[주민등록번호]", "acc": "[계좌번호]", "email": "[이메일]", "card": "[카드번호]"}
"""Each kind, and the words that replace it where the vocabulary has no `<|kind|>`."""
LAST_BIRTH = 2030
"""A birth after this year makes a resident number invalid (991231-3 would be 2099); fixed, so that results are."""


class Found(NamedTuple):
    """One piece of personal data: text[start:end] is of this kind (a key of KINDS)."""

    kind: str
    start: int
    end: int


def replacements(vocabulary: Mapping[str, int]) -> dict[str, str]:
    """What each kind is replaced by: `<|tel|>`, `<|rrn|>`, `<|acc|>` where these are tokens, else its words."""
    return {kind: f"<|{kind}|>" if f"<|{kind}|>" in vocabulary else words for kind, words in KINDS.items()}


def mask(text: str, masks: Mapping[str, str], counts: Counter[str]) -> str:
    """`text` with all that `find` finds replaced by `masks[kind]`; `counts[kind]` is raised for each."""
    pieces, at = [], 0
    for kind, start, end in find(text):
        pieces += [text[at:start], masks[kind]]
        counts[kind] += 1
        at = end
    return "".join((*pieces, text[at:])) if pieces else text


def find(text: str) -> list[Found]:
    """All personal data in `text`, in order, without overlaps."""
    if not _MAYBE.search(text):
        return []
    # Signs that nobody sees (soft hyphens, spaces of no width) may stand between digits.
    shown = (
        [i for i, character in enumerate(text) if character not in _UNSEEN] if _UNSEEN & set(text) else range(len(text))
    )
    flat = "".join(map(text.__getitem__, shown)).translate(_FLAT) if len(shown) < len(text) else text.translate(_FLAT)
    found: list[Found] = []
    taken = bytearray(len(flat))
    for kind, pattern, is_one in _RULES:
        for match in pattern.finditer(flat):
            start, end = match.span()
            number = _Number(flat, start, end)
            if not any(taken[start:end]) and not number.joined(kind) and is_one(number):
                found.append(Found(kind, shown[start], shown[end - 1] + 1))
                taken[start:end] = b"1" * (end - start)
    return sorted(found, key=lambda one: one.start)


_MAYBE = re.compile(r"\d(?:\D{0,4}\d){6}|[@\uff20]|[공영]\s?일\s?[공영일육칠팔구]")
# Digits of other scripts, full-width signs, dashes and blanks as ASCII, one character for one, so that positions stay.
_FLAT = {
    code: str(unicodedata.decimal(chr(code)))
    for code in range(128, sys.maxunicode)
    if unicodedata.category(chr(code)) == "Nd"
}
_FLAT |= {0xFF00 + code - 0x20: chr(code) for code in b"+().@/~:_-"}
_FLAT |= dict.fromkeys((*range(0x2010, 0x2016), 0x2212, 0x2500, 0x2501, 0x30FC, 0x3161, 0xFE63), "-") | {
    0x223C: "~",
    0x301C: "~",
}
_UNSEEN = frozenset("\xad\u200b\u200c\u200d\u2060\ufeff")
_FLAT |= dict.fromkeys((0x2022, 0x2027, 0x30FB, 0x318D), "·")
_FLAT |= dict.fromkeys((9, 0xA0, *range(0x2002, 0x200B), 0x202F, 0x3000), " ")

_FILES = ("png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "html", "php", "pdf", "mp4", "zip", "txt", "json")


@dataclass(frozen=True)
class _Number:
    """text[start:end] that looks like personal data, and what surrounds it."""

    text: str
    start: int
    end: int

    @cached_property
    def found(self) -> str:
        return self.text[self.start : self.end]

    @cached_property
    def digits(self) -> str:
        return re.sub("[^0-9]", "", self.found)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the groups of digits: (3, 4, 4) for 010-1234-5678."""
        return tuple(map(len, re.findall("[0-9]+", self.found)))

    @cached_property
    def label(self) -> str | None:
        """What the nearest word before, on this line and after any other number, says that this is; None: no word."""
        before = re.split(r"[0-9\n]", self.text[max(0, self.start - 30) : self.start])[-1]
        *_, last = (None, *LABEL.finditer(before))
        return last and last.lastgroup

    def joined(self, kind: str) -> bool:
        """Whether it is only a part of something: of a longer number, a code with letters, a URL."""
        if kind == "email":
            return False
        before, after = self.text[max(0, self.start - 200) : self.start], self.text[self.end : self.end + 2]
        if re.search(r"[0-9][-.:_]?\Z", before) or re.match(r"[0-9]|-[0-9A-Za-z]|[._][0-9]", after):
            return True
        if re.search(r"[A-Za-z][-_]?\Z", before) and self.label != kind:
            return True
        if re.match("[A-Za-z]", after) and not (kind == "tel" and len(self.shape) > 1):
            return True
        return bool(re.search(r"(?:://|www\.|\.(?:com|net|org|me|kr)/)\S*\Z", before))

    def has_unit(self) -> bool:
        return bool(UNIT.match(self.text, self.end))

    def followed_by(self, pattern: re.Pattern[str]) -> bool:
        return bool(pattern.match(self.text, self.end))


def _is_email(number: _Number) -> bool:
    if number.text[number.end : number.end + 1] == "(":  # a call, in code
        return False
    local, _, domain = number.found.lower().replace(" ", "").partition("@")
    return domain.rpartition(".")[2] not in _FILES and not (local == "git" and number.text[number.end :][:1] == ":")


def _is_card(number: _Number) -> bool:
    if number.label == "other":
        return False
    digits = number.digits
    if len(digits) == 14 and len(number.shape) == 1 and number.label != "card":
        return False
    issued = digits[0] in "34569" or 2221 <= int(digits[:4]) <= 2720
    if number.label == "card" or (len(number.shape) > 1 and " " not in number.found.replace(" - ", "-")):
        return len(digits) == 16 or issued
    if number.label == "acc" and len(number.shape) == 1:
        return False
    return issued and _luhn(digits)


def _luhn(digits: str) -> bool:
    """The check digit of card numbers (ISO/IEC 7812)."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0


def _is_rrn(number: _Number) -> bool:
    """Resident and foreigner numbers alike: a date, and a digit for sex and century that fits it.

    The checksum says nothing: numbers given out since October 2020 have none.
    """
    if number.label == "other" or (number.label == "acc" and len(number.shape) == 1):
        return False
    digits = number.digits
    if len(set(digits)) < 3:  # 1010101010101
        return False
    century = 1900 if digits[6] in "1256" else 2000
    year, month, day = century + int(digits[:2]), int(digits[2:4]), int(digits[4:6])
    return year <= LAST_BIRTH and 1 <= month <= 12 and 1 <= day <= calendar.monthrange(year, month)[1]


def _is_mobile(number: _Number) -> bool:
    if len(number.shape) > 1:
        return True
    # 010 has eight digits after it; the older 011, 016 to 019 have seven or eight.
    return number.label != "other" and not (number.digits.startswith("010") and len(number.digits) < 11)


def _is_landline(number: _Number) -> bool:
    return number.label != "other" and not number.has_unit()


def _is_foreign(number: _Number) -> bool:
    return number.label != "other" and 10 <= len(number.digits) <= 15


def _is_service(number: _Number) -> bool:
    """A 15xx, 16xx or 18xx number; without a word for it, it must be hyphenated and no pair of years."""
    if number.label == "other" or number.has_unit():
        return False
    if number.label == "tel" or number.followed_by(CALLS):
        return True
    first, second = int(number.digits[:4]), int(number.digits[4:])
    return second < 1000 if " " in number.found else "-" in number.found and not first < second <= 2100


def _is_local(number: _Number) -> bool:
    return number.label == "tel" and not number.has_unit()


def _is_shaped_account(number: _Number) -> bool:
    """An account in a shape of its bank; one that begins with a year must also be called an account."""
    if number.label == "other" or not 10 <= len(number.digits) <= 16:
        return False
    if number.label == "acc" or number.followed_by(PAYS):
        return True
    return number.shape in _ACCOUNTS and not (number.shape[0] != 3 and re.match("(?:19|20)[0-9]{2}", number.digits))


def _is_named_account(number: _Number) -> bool:
    """Any number of an account's length beside a word for it, if it is no amount of money and no point in time."""
    digits = number.digits
    if not 10 <= len(digits) <= 16 or number.has_unit() or number.label not in ("acc", None):
        return False
    if re.match(r"(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])(?:[01][0-9]|2[0-3])[0-5]", digits):
        return False
    return number.label == "acc" or number.followed_by(PAYS)


_ACCOUNTS = {
    (3, 3, 6),  # Shinhan, K bank, Gwangju, Shinhyup
    (3, 2, 6),  # SC, Shinhan of old, NH of old
    (4, 3, 6),  # Woori
    (6, 2, 6),  # KB, Korea Post, NH
    (3, 4, 4, 2),  # NH, BNK
    (3, 6, 2, 3),  # IBK
    (3, 6, 5),  # Hana
    (3, 6, 3),  # KEB, Citi
    (4, 2, 7),  # Kakao Bank
    (3, 2, 7),  # Jeonbuk
    (3, 2, 6, 1),  # DGB, BNK, Suhyup
    (4, 4, 4, 1),  # MG
    (3, 2, 4, 3),  # KB of old
    (3, 4, 4, 3),  # KDB
}
# What may stand between groups, and the beginnings that are given out: areas (and 030 to 080), mobile, 15xx to 18xx.
_SEP = r"(?:\ ?[-.~/_)·,*=]\s?|\ {1,2})?"
_AREA = "(?:2|3[1-3]|4[1-4]|5[1-5]|6[1-4]|[678]0|30[23]?|50[2-8]?)"
_MOBILE = "1[016-9]"
_SERVICE = (
    "(?:15(?:22|33|44|51|55|66|77|88|99)|16(?:00|01|11|22|33|44|55|60|61|66|68|70|77|88|99)"
    "|18(?:00|11|22|33|44|55|66|77|88|99))"
)
_COUNTRIES = "(?:1|7|20|3[0-9]|4[0-9]|5[1-8]|6[0-6]|8[1-6]|852|853|855|856|880|886|9[0-58]|9[67][0-9])"
_SPELT = "[공영일이삼사오육칠팔구]"


def _numbers(*alternatives: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![0-9])(?:{'|'.join(alternatives)})(?![0-9])")


# The lengths are RFC 5321's; without them a long run of letters would be read once from each of its letters.
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9])[A-Za-z0-9][A-Za-z0-9._%+'-]{0,63}\ ?@\ ?"
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+(?:xn--[a-z0-9-]{2,59}|[A-Za-z]{2,24})(?![A-Za-z0-9])"
)
_CARD = _numbers(
    r"[0-9]{4}(\ ?[-._/]\s?|\ ?)[0-9]{4}\1[0-9]{4}\1[0-9]{4}",
    r"3[47][0-9]{2}([- ]?)[0-9]{6}\2[0-9]{5}",  # American Express
    r"3[068][0-9]{2}([- ]?)[0-9]{6}\3[0-9]{4}",  # Diners Club
)
_RULES: list[tuple[str, re.Pattern[str], Callable[[_Number], bool]]] = [
    ("email", _EMAIL, _is_email),
    ("card", _CARD, _is_card),
    ("rrn", _numbers(r"[0-9]{6}\ {0,2}[-./~_]?\s{0,2}[1-8][0-9]{6}"), _is_rrn),
    (
        "tel",
        _numbers(
            rf"(?:\((?:\+|00)82\)|(?:\+|00[0-9]?-?)82|82(?=[- ])){_SEP}(?:\(0\){_SEP}|0)?(?:{_MOBILE}|{_AREA})"
            rf"{_SEP}[0-9]{{3,4}}{_SEP}[0-9]{{4}}"
        ),
        _is_landline,
    ),
    (
        "tel",
        _numbers(
            rf"(?:\(0{_MOBILE}\)|0{_MOBILE}){_SEP}[0-9]{{3,4}}{_SEP}[0-9]{{4}}",
            r"0\ ?1\ ?[016-9](?:[- ]{1,3}[0-9]){7,8}",
        ),
        _is_mobile,
    ),
    (
        "tel",
        _numbers(
            rf"(?:\(0{_AREA}\)|\[0{_AREA}\]|0{_AREA}){_SEP}[0-9]{{3,4}}{_SEP}[0-9]{{4}}",
            "0[0-9]{1,2}-[0-9]{3,4}-[0-9]{4}",
        ),
        _is_landline,
    ),
    ("tel", _numbers(rf"\+{_COUNTRIES}(?:[- .]?\(?[0-9]{{1,4}}\)?){{2,5}}"), _is_foreign),
    ("tel", _numbers(rf"{_SERVICE}(?:\ ?[-.~]\ ?|\ )?[0-9]{{4}}"), _is_service),
    ("tel", _numbers("[0-9]{3,4}-[0-9]{4}"), _is_local),
    ("tel", re.compile(rf"[공영]\s?일\s?[공영일육칠팔구](?:[\s-]{{0,2}}{_SPELT}){{7,8}}(?!{_SPELT})"), _is_landline),
    ("acc", _numbers(r"[0-9]{2,6}(\ ?[-._]\s?)[0-9]{1,7}(?:\1[0-9]{1,7}){1,3}"), _is_shaped_account),
    (
        "acc",
        _numbers("[0-9]{10,16}", "[0-9]{2,8}(?:-[0-9]{1,8}){1,4}", r"[0-9]{2,7}(?:\ [0-9]{1,8}){1,4}"),
        _is_named_account,
    ),
]
