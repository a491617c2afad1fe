"""Where a text ends: at special tokens, which are ids, or before strings, which may begin and end within a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polyglot_jax.config import InputError
from polyglot_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Stop:
    """ids: that end a row, on the device; strings: that end a text before them; a text shows no special token."""

    ids: tuple[int, ...]
    strings: tuple[str, ...] = ()

    @classmethod
    def of(cls, stop: str | Sequence[str] | None, tokenizer: Tokenizer | None, end: int) -> Stop:
        """stop: None for the id `end`, that of <|endoftext|>; strings instead of it, special tokens among them."""
        if stop is None:
            return cls((end,))
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) for text in stop):
            raise InputError(f"stop={stop!r}: must be a string, a list of strings, or None for the end of text")
        if "" in stop:
            raise InputError("stop: an empty string would stop at once; give [] to make max_new_tokens tokens")
        special = tokenizer.special if tokenizer else {}
        is_known = tokenizer is not None and end < tokenizer.valid_ids
        if is_known and not tokenizer.decode([end]):  # special, under whatever name the family has for it
            special = special | {tokenizer.decode([end], skip_special_tokens=False): end}
        return cls(
            tuple(special[text] for text in stop if text in special),
            tuple(text for text in stop if text not in special),
        )

    def first(self, text: str, start: int = 0) -> int | None:
        """Where the first of the strings begins, from `start` on; None if none does."""
        return min((at for at in (text.find(string, start) for string in self.strings) if at >= 0), default=None)

    def unsettled(self, text: str) -> int:
        """How many characters at the end of a text may still change: half a character, or the start of a string."""
        broken = len(text) - len(text.rstrip("\ufffd"))
        settled = text[: len(text) - broken]
        beginnings = (
            n for string in self.strings for n in range(len(string) - 1, 0, -1) if settled.endswith(string[:n])
        )
        return broken + max(beginnings, default=0)
