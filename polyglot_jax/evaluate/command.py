"""The command `evaluate`: KoBEST and bits per byte, from one checkpoint to JSON and tables."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from polyglot_jax import weights
from polyglot_jax.config import InputError
from polyglot_jax.evaluate import data, metrics, perplexity, published, report
from polyglot_jax.evaluate.journal import Journal
from polyglot_jax.evaluate.protocol import Prompt, encode, make_prompts
from polyglot_jax.evaluate.settings import EvaluateConfig
from polyglot_jax.evaluate.tasks import TASKS
from polyglot_jax.files import locked
from polyglot_jax.language_model import LanguageModel, load
from polyglot_jax.scoring import Pair
from polyglot_jax.sharding import make_mesh

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "tokenizers")
_TEXT_TOKENS = 1 << 20
"""Tokens of a text that are held at a time."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate, print the tables, write `config.out`, and return what is written there.

    Raises InputError for bad input; what concerns `config.out`, the data and the stride is found before the model is
    loaded.
    """
    with contextlib.ExitStack() as stack:
        if config.out:
            _hold(Path(config.out), config.overwrite, stack)
        return _evaluate(config)


def _hold(out: Path, overwrite: bool, stack: contextlib.ExitStack) -> None:
    """Be the one writer of `out` and its journal until the end; InputError if nothing can be written there."""
    if out.is_dir():
        raise InputError(f"{out}: is a folder; name the file to write")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(out.with_name(f".{out.name}.lock")))
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); choose another place") from error
    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists; choose another place, or replace it with --overwrite")


def _evaluate(config: EvaluateConfig) -> dict[str, Any]:
    prompts = _prompts(config)
    for path in config.text:
        perplexity.text_files(path)
    source = weights.open_source(config.checkpoint)
    known, tokenizer = weights.read_tokenizer(source)
    if tokenizer is None:
        raise InputError(f"{config.checkpoint}: came without a tokenizer.json; put the model's own beside its weights")
    if config.stride and config.stride > known.model.context:
        raise InputError(f"stride={config.stride}: is above model.context={known.model.context}")
    for path in config.text:
        perplexity.check(path, tokenizer)
    lm = load(config.checkpoint, make_mesh(config.mesh), config.dtype)
    described = _describe(config, lm, weights.fingerprint(source))
    journal = Journal(config.out, {name: described[name] for name in ("weights_sha256", "dtype", "versions")})
    start = time.monotonic()
    cells = {
        cell: _score_cell(lm, config, journal, cell, found[: config.limit], len(found))
        for cell, found in prompts.items()
    }
    texts = {path: _score_text(lm, config, journal, path) for path in config.text}
    record: dict[str, Any] = described | {"seconds": round(time.monotonic() - start, 2), "results": {}, "documents": {}}
    for (task, shots), (result, documents) in cells.items():
        record["results"].setdefault(task, {})[str(shots)] = result
        record["documents"].setdefault(task, {})[str(shots)] = documents
    record["text"] = texts
    _print(record, lm)
    if config.out:
        out = Path(config.out)
        temporary = out.with_name(out.name + ".incomplete")
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(out)
        journal.finish()
        print(f"\nwrote {out}")
    return record


def _prompts(config: EvaluateConfig) -> dict[tuple[str, int], list[Prompt]]:
    prompts = {}
    shot_numbers = config.shot_numbers()
    for name in config.task_names():
        tests = data.read(config.data, name, "test")
        train = data.read(config.data, name, "train") if any(shot_numbers) else []
        for shots in shot_numbers:
            prompts[name, shots] = make_prompts(TASKS[name], tests, train, shots, config.protocol)
    return prompts


def _describe(config: EvaluateConfig, lm: LanguageModel, fingerprint: str) -> dict[str, Any]:
    settings = dataclasses.asdict(config)
    del settings["overwrite"], settings["out"]
    return {
        "settings": settings,
        "weights_sha256": fingerprint,
        "tokenizer_sha256": lm.tokenizer.sha256,
        "model": dataclasses.asdict(lm.config.model),
        "published_name": published.name_of(lm.config.model),
        "dtype": str(lm.model.dtype),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {package: version(package) for package in _PACKAGES},
    }


def _score_cell(
    lm: LanguageModel,
    config: EvaluateConfig,
    journal: Journal,
    cell: tuple[str, int],
    prompts: Sequence[Prompt],
    of: int,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The metrics of a task at a number of shots, and its documents, in the order of the file, which has `of`."""
    task, shots = cell
    encoded = encode(prompts, lm.tokenizer, config.protocol)
    pairs = [pair for found in encoded for pair in found]
    flat = iter(_scores(lm, config, journal, f"{task}, {shots} shots", pairs))
    is_cut = [not all(pair.fits(lm.config.model.context) for pair in found) for found in encoded]
    documents, near = [], []
    for number, prompt in enumerate(prompts):
        scores = [next(flat) for _ in prompt.continuations]
        lengths = [len(text) - 1 for text in prompt.continuations]  # without the space
        documents.append(
            {
                "scores": scores,
                "prediction": metrics.choose(scores),
                "prediction_norm": metrics.choose(scores, lengths),
                "gold": prompt.gold,
            }
        )
        if metrics.is_near_tie(scores) or metrics.is_near_tie(scores, lengths):
            near.append(number)
    result: dict[str, Any] = {}
    gold, choices = [prompt.gold for prompt in prompts], len(prompts[0].continuations)
    for kind in ("", "_norm"):
        predicted = [document[f"prediction{kind}"] for document in documents]
        for name, values in metrics.summary(gold, predicted, choices, config.resamples).items():
            result |= {f"{name}{kind}{part}": value for part, value in values.items()}
    result |= {"documents": len(documents), "of": of, "truncated": sum(is_cut), "near_ties": len(near)}
    result |= {"near_tie_documents": near}
    return result, documents


def _score_text(lm: LanguageModel, config: EvaluateConfig, journal: Journal, path: str) -> dict[str, Any]:
    context = lm.config.model.context
    stride = config.stride or max(1, context // 2)
    counts, waiting, part = perplexity.Counts(), [], 0

    def flush() -> None:
        nonlocal part
        counts.nats -= float(np.sum(_scores(lm, config, journal, f"{path}, part {part}", waiting)))
        waiting.clear()
        part += 1

    for document in perplexity.documents(path, lm.tokenizer):
        counts.add(document)
        waiting += perplexity.windows(document.ids, lm.config.data.eos_id, context, stride)
        if sum(len(pair.continuation) for pair in waiting) >= _TEXT_TOKENS:
            flush()
    flush()
    if not counts.tokens or not counts.bytes:
        raise InputError(f"text={path}: holds no text")
    return counts.summary()


def _scores(
    lm: LanguageModel, config: EvaluateConfig, journal: Journal, what: str, pairs: Sequence[Pair]
) -> list[float]:
    """The log-probability of each pair; those the journal has are not computed again."""
    key = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
    done = journal.scores(key)
    left = [number for number in range(len(pairs)) if number not in done]
    with tqdm(total=len(pairs), initial=len(pairs) - len(left), desc=what, leave=False) as progress:
        for batch in lm.scored([pairs[number] for number in left], config.batch_size):
            journal.add(key, [left[number] for number in batch.numbers], batch.log_probabilities)
            progress.update(len(batch.numbers))
    scores = journal.scores(key)
    if not np.isfinite(list(scores.values())).all():
        raise InputError(
            f"{config.checkpoint}: gives log-probabilities that are no numbers in {lm.model.dtype} ({what}); try "
            "another --dtype, or see whether the weights are whole"
        )
    return [scores[number] for number in range(len(pairs))]


def _print(record: Mapping[str, Any], lm: LanguageModel) -> None:
    settings = record["settings"]
    if record["results"]:
        name, size = record["published_name"], lm.config.model.parameters()
        print(f"\nprotocol {settings['protocol']}, {record['dtype']}, on {record['device']}\n")
        print(report.markdown(record["results"], settings["checkpoint"], size, name))
        notes = report.notes(record["results"])
        print("\n" + "\n".join(notes) if notes else "", end="\n" if notes else "")
    for path, values in record["text"].items():
        print(report.text_line(path, values))
