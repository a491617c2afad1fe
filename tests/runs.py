"""Small token files, configs and runs for the tests; everything comes from seeds."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from polyglot_jax.config import Config
from polyglot_jax.log import read_log
from polyglot_jax.token_files import TokenFileWriter
from polyglot_jax.tokenizer import Tokenizer, train_tokenizer

EOS = 2
IDS = 300
MODEL = {"vocab": 384, "layers": 2, "embed": 32, "heads": 8, "mlp": 64, "context": 32, "rotary_pct": 1.0}
TRAIN = {
    "steps": 6,
    "batch_size": 8,
    "sequence_length": 16,
    "dtype": "float32",
    "remat": "none",
    "log_every": 1,
    "eval_every": 0,
    "eval_sequences": 8,
    "checkpoint_every": 0,
    "keep": 0,
}
TIMINGS = {"tokens_per_second", "mfu", "mfu_with_attention", "step_seconds", "data_wait", "heldout_seconds",
           "save_seconds", "profile_seconds"}  # fmt: skip

SENTENCES = [
    f"{who} {where} {what}{end}"
    for who in ("고양이가", "아이들이", "선생님이", "할머니가")
    for where in ("강가에서", "시장에서", "마당에서")
    for what in ("노래를 불렀다", "밥을 먹었다", "이야기를 들었다")
    for end in (".", "!")
]


def make_config(*corpora: str | Path, **changes: object) -> Config:
    """A tiny model on `corpora`; changes are `section__field=value`."""
    plain = {
        "mesh": {"data": 1},
        "model": dict(MODEL),
        "optimizer": {"learning_rate": 1e-3, "decay_steps": 40},
        "data": {"paths": [str(path) for path in corpora], "heldout": 0.1, "eos_id": EOS},
        "train": dict(TRAIN),
    }
    for name, value in changes.items():
        section, field = name.split("__")
        plain.setdefault(section, {})[field] = value
    return Config.from_json(json.dumps(plain))


def random_documents(seed: int, sizes: Sequence[int], ids: int = IDS) -> list[list[int]]:
    """Documents of these numbers of random ids; each ends with EOS."""
    rng = np.random.default_rng(seed)
    return [[*rng.integers(3, ids, size - 1).tolist(), EOS] for size in sizes]


def write_corpus(folder: Path, documents: Sequence[Sequence[int]], tokenizer: Tokenizer | None = None) -> Path:
    """Token files of `documents`, with a tokenizer.json beside them if one is given; returns the folder."""
    folder.mkdir(parents=True)
    with TokenFileWriter(folder / "text_document", vocab=65_000) as writer:
        for document in documents:
            writer.add_document(document)
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    return folder


def random_corpus(folder: Path, seed: int = 0, tokens: int = 1600) -> Path:
    """Token files of random ids, in documents of 40."""
    return write_corpus(folder, random_documents(seed, [40] * (tokens // 40)))


def text_corpus(folder: Path, seed: int = 0, sentences: int = 400) -> tuple[Path, Tokenizer]:
    """Token files of Korean sentences drawn at random, and the tokenizer they were made with."""
    tokenizer = train_tokenizer(SENTENCES, vocab_size=IDS - 3, show_progress=False)
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(SENTENCES, 3)) for _ in range(sentences // 3)]
    return write_corpus(folder, [[*tokenizer.encode(text), EOS] for text in texts], tokenizer), tokenizer


def untimed_log(run: Path) -> list[dict]:
    """Rows of the run's log without what the clock says."""
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in read_log(run)]


def bits(tree: object) -> list[tuple[tuple[int, ...], str, bytes]]:
    """Shape, dtype and bytes of every leaf: equal only when the trees are equal bit for bit."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return [(leaf.shape, str(leaf.dtype), leaf.tobytes()) for leaf in leaves]
