"""The whole pipeline over real Korean text: film reviews, comments, news titles and chat pairs.

    python -m experiments.corpus --data ../shared/data --tokenizer ../shared/tokenizer/tokenizer.json

takes five minutes of one core. What is dropped and kept can be read in the report of each run (--samples 30); the
record and the reports beside it hold only numbers, since the text is other people's. KoBEST stays out: what is
evaluated on is not trained on.
"""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments import record
from polyglot_jax.prepare.cleaning import CleanConfig
from polyglot_jax.prepare.command import PrepareConfig, prepare


@dataclass(frozen=True)
class CorpusRecord:
    """Clean real text with the defaults, and with shorter documents let in; write records/corpus.json."""

    data: str
    """Folder with nsmc, korean_hate_speech and chatbot_data."""
    tokenizer: str
    """A tokenizer.json."""
    out: str = "runs/corpus"
    """Folder for the text and the results."""
    samples: int = 0
    """Documents that the reports show for each file and step."""


def texts(data: Path) -> Iterator[tuple[str, Iterator[str]]]:
    """Each source's name and its documents."""
    with gzip.open(data / "nsmc" / "nsmc_raw_reviews.tsv.gz", "rt", encoding="utf-8", newline="\n") as lines:
        next(lines)
        yield "reviews", (line.rstrip("\n").split("\t")[-1] for line in lines)
    hate = data / "korean_hate_speech"
    for name, files in (("comments", "unlabeled/*.txt"), ("titles", "news_title/*.txt"), ("labeled", "labeled/*.tsv")):
        lines = (line for path in sorted(hate.glob(files)) for line in path.read_text(encoding="utf-8").splitlines())
        # Only the comments that have no labels are not quoted.
        if name == "comments":  # the only ones without quotes
            yield name, lines
        else:
            yield name, (row[0] for row in csv.reader(lines, delimiter="\t") if row and row[0] != "comments")
    with open(data / "chatbot_data" / "ChatbotData.csv", encoding="utf-8", newline="") as file:
        yield "chat", (f"{row['Q']}\n{row['A']}" for row in csv.DictReader(file))


def main(command: CorpusRecord) -> None:
    out = Path(command.out)
    source = out / "text"
    source.mkdir(parents=True, exist_ok=True)
    for name, documents in texts(Path(command.data)):
        with open(source / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    numbers = {}
    for name, shortest in (("defaults", 50), ("short", 10)):
        start = time.process_time()
        manifest = prepare(
            PrepareConfig(
                text=(str(source),), tokenizer=command.tokenizer, out=str(out / name), clean=True, overwrite=True,
                cleaning=CleanConfig(min_length=shortest, samples=command.samples),
            )
        )  # fmt: skip
        seconds = time.process_time() - start
        megabytes = sum(count["utf8_bytes"] for count in manifest["inputs"]) / 1e6
        keys = ("documents", "tokens", "utf8_bytes", "bad_rows", "empty_rows", "personal_data", "cleaning")
        numbers[name] = {
            "min_length": shortest,
            "cpu_seconds": round(seconds, 1),
            "megabytes_read": round(megabytes, 2),
            "megabytes_per_cpu_second": round(megabytes / seconds, 2),
            **{key: manifest[key] for key in keys},
        }
        if not command.samples:
            shutil.copy(out / name / "report.html", record.FOLDER / f"corpus_{name}.html")
    flags = f"--data {command.data} --tokenizer {command.tokenizer}"
    path = record.write(
        "corpus", "reviews, comments, titles and chat pairs through `prepare --clean`",
        f"python -m experiments.corpus {flags}", ("tokenizers", "datatrove", "ftfy"), numbers,
    )  # fmt: skip
    print(path)


if __name__ == "__main__":
    main(tyro.cli(CorpusRecord, prog="python -m experiments.corpus"))
