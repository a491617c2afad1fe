"""The tokenizer: a Hugging Face `tokenizer.json`, loaded, asked, and trained anew in the shape of the released one.

Ids at or above `valid_ids` are padding of the model's vocabulary: no text encodes to them and `decode` refuses them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from polyglot_jax.config import InputError, padded

END = "<|endoftext|>"
MASKS = ("<|acc|>", "<|tel|>", "<|rrn|>")
"""What stands for an account number, a telephone number and a resident registration number."""
FIRST = ("<pad>", "<eos>", END, "<|sep|>")
"""The special tokens before the bytes, at ids 0 to 3; the masks come after the last merge."""


def read_text(file: Path) -> str | None:
    """The exact text of a tokenizer.json, None if it is not there; InputError if it is no text."""
    if not os.path.lexists(file):  # a link that leads nowhere is there, and cannot be read
        return None
    try:
        # Bytes, because text mode would change line ends, and `to_json` promises the exact text.
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not a tokenizer.json, not even UTF-8; fetch it again") from error


class Tokenizer:
    """A byte-level BPE tokenizer; the text it was read from is kept, so that copies of it are exact.

    Nothing is added around a text, unless asked. A special token typed out in a text, `<|endoftext|>` say, becomes its
    one id: that is how the library behaves and what the masks rely on; where a text must not do that, clean it before.
    """

    def __init__(self, json: str, origin: str = "tokenizer") -> None:
        """`json`: the text of a tokenizer.json. Raises InputError, naming `origin`, when it is not one."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json)
        except Exception as error:  # the library raises bare Exceptions
            raise InputError(f"{origin}: not a tokenizer.json of Hugging Face tokenizers ({error})") from error
        # Some fine-tuned models save these with the tokenizer, and every long text would lose its end.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._json = json

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read `path`, a tokenizer.json or a folder that holds one. Raises InputError when there is none."""
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        try:
            json = read_text(file)
        except OSError as error:
            raise InputError(f"tokenizer={path}: cannot read {file} ({error.strerror})") from error
        if json is None:
            raise InputError(f"tokenizer={path}: cannot read {file} (No such file or directory)")
        return cls(json, origin=str(file))

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """The inverse of `to_json`. Raises InputError when `text` is no tokenizer."""
        return cls(text)

    def to_json(self) -> str:
        """The exact text this tokenizer was made from."""
        return self._json

    @property
    def sha256(self) -> str:
        """SHA-256, in hex, of the file this tokenizer was read from."""
        return hashlib.sha256(self._json.encode()).hexdigest()

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of `text`; if asked, with what the tokenizer puts around it: XGLM's a </s>, Polyglot-Ko's nothing."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        """As `encode`, of each of `texts`, made on all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; a character whose bytes are not all there becomes U+FFFD. InputError for an unknown id."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.valid_ids:
                raise InputError(f"id={i}: the tokenizer has the ids 0 to {self.valid_ids - 1}")
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    @cached_property
    def valid_ids(self) -> int:
        """One more than the highest id: 30,003 for Polyglot-Ko."""
        return max(self.vocabulary.values(), default=-1) + 1

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every entry, special tokens too, and its id."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def padded(self, multiple: int = 128) -> int:
        """`valid_ids` rounded up to a multiple, the rows of the model's embedding: 30,080 for Polyglot-Ko."""
        return padded(self.valid_ids, multiple)

    @cached_property
    def special(self) -> dict[str, int]:
        """Ids, by name, of those special tokens of Polyglot-Ko that this tokenizer has."""
        ids = {name: self._tokenizer.token_to_id(name) for name in (END, "<|sep|>", *MASKS)}
        return {name: i for name, i in ids.items() if i is not None}

    @property
    def eos_id(self) -> int:
        """Id of `<|endoftext|>`. Raises InputError when the tokenizer has none."""
        if END not in self.special:
            raise InputError(f"tokenizer: has no {END}, which ends every document")
        return self.special[END]

    def byte_lengths(self) -> np.ndarray:
        """int32[valid_ids]: how many bytes of UTF-8 each id stands for; 0 for special tokens.

        Summed over the ids of a text this is its length in bytes, which is what losses per byte divide by. (A boundary
        character that the tokenizer deletes is in the text and in none of its ids.) Raises InputError unless the
        tokenizer is byte-level, since only there each character of a vocabulary entry is one byte.
        """
        if not isinstance(self._tokenizer.decoder, decoders.ByteLevel):
            raise InputError("tokenizer: not byte-level, so the bytes of its ids are unknown")
        lengths = np.zeros(self.valid_ids, np.int32)
        for token, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            lengths[i] = len(token)
        for i, token in self._tokenizer.get_added_tokens_decoder().items():
            lengths[i] = 0 if token.special else len(token.content.encode())
        return lengths


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 30_000, boundary: str | None = None, show_progress: bool = True
) -> Tokenizer:
    """Train a byte-level BPE of the released tokenizer's shape: `vocab_size` ids, and the three masks after them.

    Ids 0-3 are `<pad>`, `<eos>`, `<|endoftext|>`, `<|sep|>`, 4-259 the bytes, then merges of pairs seen at least twice,
    then `<|acc|>`, `<|tel|>`, `<|rrn|>`. `texts` is read once and only word counts are kept. `boundary` is a string
    (the released tokenizer has "ೱ") that marks morphemes in `texts`, so that no merge crosses one; the tokenizer then
    deletes it from every text it is ever given. Without it there is no such step, the only difference in shape.
    Raises InputError when the texts have too few pairs for `vocab_size`.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(FIRST) + len(alphabet)
    if vocab_size < least:
        raise InputError(f"vocab_size={vocab_size}: the special tokens and the bytes alone are {least}")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    split = [pre_tokenizers.Split(boundary, behavior="removed")] if boundary else []
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(name, normalized=False, special=True) for name in FIRST],
        initial_alphabet=alphabet,
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size()
    if reached < vocab_size:
        raise InputError(
            f"vocab_size={vocab_size}: the texts give only {reached} ids; add text, or pass --vocab-size {reached}"
        )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in MASKS])
    return Tokenizer.from_json(tokenizer.to_str(pretty=True))
