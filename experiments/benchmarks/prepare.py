"""How fast `prepare --clean` is, on one core, beside the `tokenizers` library alone; and how well it finds duplicates.

    RAYON_NUM_THREADS=1 python -m experiments.benchmarks.prepare --tokenizer ../shared/tokenizer/tokenizer.json

Documents are put together from the sentences of experiments/sample, in an order of their own each. One run's rates are
compared with each other only; each is the median of three. Takes ten minutes of one core, nearly all for the 400 MB.
"""

from __future__ import annotations

import json
import multiprocessing
import operator
import os
import random
import re
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib import pyplot

from convert.meter import Meter
from experiments import record
from polyglot_jax.prepare.cleaning import STEPS, CleanConfig, Cleaner
from polyglot_jax.prepare.command import PrepareConfig, prepare
from polyglot_jax.prepare.corpus import batches, token_ids
from polyglot_jax.prepare.duplicates import Duplicates
from polyglot_jax.prepare.personal_data import mask, replacements
from polyglot_jax.token_files import TokenFileWriter
from polyglot_jax.tokenizer import Tokenizer

CLEANING = CleanConfig(min_word_length=1)
"""The sample's prose has words of 2.9 characters; with the default its documents would be dropped, and seem quick."""
FILE_MEGABYTES = 10
PAGE = (
    "<!doctype html><html><head><title>글</title></head><body><nav><ul><li><a href='/'>처음</a></li></ul></nav>"
    "<main><p>{}</p></main><footer><a href='/terms'>약관</a></footer></body></html>"
)
SAMPLE = Path(__file__).parent.parent / "sample"


@dataclass(frozen=True)
class PrepareBenchmark:
    """Rates of the steps and of the whole, time against size, recall and precision on planted duplicates."""

    tokenizer: str
    """A tokenizer.json."""
    megabytes: int = 8
    """Text for the rates."""
    sizes: tuple[int, ...] = (10, 100, 400)
    """Megabytes for time and memory against size, in files of ten."""
    pairs: int = 500
    """Duplicates that are planted, and as many documents that share half of their sentences with another."""
    repeats: int = 3
    """Runs of which the median is taken."""


def documents(megabytes: float, seed: int) -> Iterator[str]:
    """Documents of 20 to 60 sentences, until there are so many bytes."""
    texts = (path.read_text(encoding="utf-8") for path in sorted(SAMPLE.glob("*.txt")))
    sentences = [part.strip() for text in texts for part in re.split(r"(?<=[.?!])\s", text) if len(part) > 10]
    numbers = random.Random(seed)
    left = megabytes * 1e6
    while left > 0:
        text = " ".join(numbers.choices(sentences, k=numbers.randint(20, 60)))
        left -= len(text.encode())
        yield text


def write(path: Path, texts: Iterator[str] | list[str]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def rates(command: PrepareBenchmark, folder: Path) -> dict[str, float]:
    """MB/s of one core: the library's own batches, ours to files, each step, and all of these."""
    tokenizer = Tokenizer.load(command.tokenizer)
    masks = replacements(tokenizer.vocabulary)
    texts = list(documents(command.megabytes, 0))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6

    pages = [PAGE.format("</p><p>".join(text.split(". "))) for text in texts]
    main_text = STEPS["html"](CLEANING)

    def library() -> None:
        for batch in batches(texts):
            tokenizer.encode_batch(batch)

    def to_files(source: list[str] | Iterator[str]) -> None:
        with TokenFileWriter(folder / "tokens", tokenizer.valid_ids) as writer:
            for ids in token_ids(source, tokenizer):
                writer.add_document(ids)

    def cleaned() -> Iterator[str]:
        cleaner = Cleaner(CLEANING)
        for text in texts:
            left, dropped = cleaner(text)
            if not dropped:
                yield mask(left, masks, Counter())
        steps.append(cleaner.counts)

    steps: list = []
    functions: dict[str, Callable[[], object]] = {
        "tokenizers alone": library,
        "tokenised to files": lambda: to_files(texts),
        "personal data": lambda: [mask(text, masks, Counter()) for text in texts],
        "main text of pages": lambda: list(map(main_text, pages)),
        "signatures": lambda: Duplicates(CLEANING, folder / "signed").sign(0, texts),
        "whole, without duplicates": lambda: to_files(cleaned()),
    }
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(command.repeats):  # in turn, so that what slows the machine slows all
        for name, function in functions.items():
            start = time.process_time()  # of all threads: others on the machine do not count
            function()
            times[name].append(time.process_time() - start)
    result = {name: megabytes / statistics.median(seconds) for name, seconds in times.items()}
    for name in steps[0]:
        result[f"step {name}"] = megabytes / statistics.median(counts[name].seconds for counts in steps)
    return {name: round(rate, 2) for name, rate in result.items()}


def whole(tokenizer: str, folder: Path) -> tuple[float, float]:
    """Seconds of CPU, and the most MiB of memory that is no file's, of a run over FOLDER/text."""
    text, out = str(folder / "text"), str(folder / "out")
    config = PrepareConfig(text=(text,), tokenizer=tokenizer, out=out, clean=True, cleaning=CLEANING)
    start = time.process_time()
    with Meter() as meter:
        prepare(config)
    return time.process_time() - start, (meter.peak or 0) / 2**20


def against_size(command: PrepareBenchmark, folder: Path) -> dict[str, list[float]]:
    """Time and memory of the whole pipeline, duplicates too, for each of the sizes; a process for each."""
    result: dict[str, list[float]] = {"megabytes": [], "seconds": [], "mebibytes_of_memory": []}
    for size in command.sizes:
        text = folder / str(size) / "text"
        text.mkdir(parents=True)
        for part in range(-(-size // FILE_MEGABYTES)):
            write(text / f"{part:04d}.jsonl", documents(min(size, FILE_MEGABYTES), size * 1000 + part))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, memory = pool.apply(whole, (command.tokenizer, text.parent))
        shutil.rmtree(text.parent)
        for name, value in zip(result, (size, seconds, memory), strict=True):
            result[name].append(round(value, 1))
    return result


def plot(measured: dict[str, list[float]], path: Path) -> float:
    """Draw time and memory against size; returns how far, as a share, any time is from their line."""
    sizes, seconds, memory = measured.values()
    rate = sum(map(operator.mul, sizes, seconds)) / sum(size * size for size in sizes)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.plot([0, *sizes], [0, *(rate * size for size in sizes)], color="0.7", label=f"{1 / rate:.2f} MB/s")
    left.plot(sizes, seconds, "o")
    left.set(xlabel="MB of text", ylabel="seconds of one core", xlim=0, ylim=0)
    left.legend()
    right.plot(sizes, memory, "o-")
    right.set(xlabel="MB of text", ylabel="most MiB of memory", xlim=0, ylim=0)
    figure.savefig(path, dpi=100)
    return max(abs(time / (rate * size) - 1) for size, time in zip(sizes, seconds, strict=True))


def planted(command: PrepareBenchmark, folder: Path) -> dict[str, float]:
    """Recall and precision: of each pair one must go; of two documents that share half their sentences none."""
    numbers = random.Random(1)
    singles = list(documents(6 * command.pairs / 500, 7))[: 2 * command.pairs]
    pairs = len(singles) // 2
    near = []
    for text in singles[:pairs]:
        words = text.split()
        for _ in range(max(1, len(words) // 250)):
            words[numbers.randrange(len(words))] = "바꾼말"
        near.append(" ".join(words))
    halves = []
    for k, text in enumerate(singles[pairs : 2 * pairs]):
        words, others = text.split(), singles[k - 1].split()
        halves.append(" ".join([*words[: len(words) // 2], *others[len(others) // 2 :]]))
    found = Duplicates(CleanConfig(), folder / "duplicates")
    for rank, texts in enumerate((singles, near, halves)):
        found.sign(rank, texts)
    for bucket in range(found.config.num_buckets):
        found.match(bucket)
    found.cluster(0)
    removed = [found.removed(rank) for rank in range(3)]
    right = sum((k in removed[0]) != (k in removed[1]) for k in range(pairs))
    wrong = len(removed[2]) + sum(k >= pairs for k in removed[0])
    return {"pairs": pairs, "recall": round(right / pairs, 4), "precision": round(right / max(right + wrong, 1), 4)}


def main(command: PrepareBenchmark) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        numbers = {
            "threads": os.environ.get("RAYON_NUM_THREADS", "all"),
            "megabytes_per_second": (rate := rates(command, folder)),
            "tokenised_against_library": round(rate["tokenised to files"] / rate["tokenizers alone"], 3),
            "whole_against_library": round(rate["whole, without duplicates"] / rate["tokenizers alone"], 3),
            "planted_duplicates": planted(command, folder),
            "by_size": (measured := against_size(command, folder)),
            "furthest_from_a_line": round(plot(measured, record.FOLDER / "benchmark_prepare.png"), 3),
        }
    flags = f"--megabytes {command.megabytes} --sizes {' '.join(map(str, command.sizes))}"
    path = record.write(
        "benchmark_prepare", "prepare --clean: rates of one core, planted duplicates, time and memory against size",
        f"RAYON_NUM_THREADS=1 python -m experiments.benchmarks.prepare --tokenizer {command.tokenizer} {flags}",
        ("tokenizers", "datatrove", "ftfy"), numbers,
    )  # fmt: skip
    print(json.dumps(numbers, indent=1), path)


if __name__ == "__main__":
    main(tyro.cli(PrepareBenchmark, prog="python -m experiments.benchmarks.prepare"))
