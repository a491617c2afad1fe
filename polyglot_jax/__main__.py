"""python -m polyglot_jax VERB: finds the verb's module when it is asked for. --help never imports JAX."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from polyglot_jax.config import PRESETS, Config, InputError, SampleConfig

_PresetName = Literal["tiny", "polyglot-ko-1.3b", "polyglot-ko-3.8b", "polyglot-ko-5.8b", "polyglot-ko-12.8b"]


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Train a model, or go on with the run at --out.

    --preset or --config sets every default below (`train --preset NAME --help` shows them); flags change single values.
    """

    out: str
    """Run folder; one that is there is resumed from its newest checkpoint."""
    preset: _PresetName = "tiny"
    """The recipe to start from."""
    config_file: Annotated[str | None, tyro.conf.arg(name="config")] = None
    """A config.json (a run's, or a checkpoint's) to start from instead of a preset."""
    init: str | None = None
    """Where a new run's weights come from: a checkpoint, a run, a Hugging Face folder or a hub name; none: random."""
    config: Annotated[Config, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class GenerateCommand:
    """Continue prompts with a trained model; each prompt is printed with its continuation, as it is made."""

    checkpoint: str
    """A checkpoint, a run (its newest checkpoint), a Hugging Face folder or a hub name."""
    prompt: tuple[str, ...]
    """One or several texts."""
    stop: tuple[str, ...] | None = None
    """Strings to end before, instead of at <|endoftext|>; given without any: always make max-new-tokens."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of weights and products; none: float32 on a CPU, bfloat16 elsewhere."""
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)


def _train(arguments: Sequence[str]) -> None:
    command = tyro.cli(TrainCommand, args=arguments, prog="python -m polyglot_jax train", default=_base(arguments))
    from polyglot_jax.train import train

    path = train(command.config, command.out, command.init)
    print(f'next: python -m polyglot_jax generate --checkpoint {command.out} --prompt "..."\n({path})')


def _base(arguments: Sequence[str]) -> Any:
    """The defaults of `train`: those of the preset or file named among the arguments."""
    given = {"--preset": "tiny", "--config": None}
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in given:
            given[flag] = value if equals else next(iter(arguments[i + 1 : i + 2]), None)
    if given["--config"] is not None:
        file = Path(given["--config"])
        if not file.is_file():
            raise InputError(f"--config {file}: no such file")
        config = Config.from_json(file.read_text(encoding="utf-8"))
    else:
        config = PRESETS.get(given["--preset"], PRESETS["tiny"])  # tyro itself refuses an unknown name
    return TrainCommand(out=tyro.MISSING, config=config)


def _generate(arguments: Sequence[str]) -> None:
    command = tyro.cli(GenerateCommand, args=arguments, prog="python -m polyglot_jax generate")
    from polyglot_jax.language_model import load

    model = load(command.checkpoint, dtype=command.dtype)
    for prompt in command.prompt:
        print(prompt, end="", flush=True)
        for piece in model.stream(prompt, stop=command.stop, **dataclasses.asdict(command.sample)):
            print(piece, end="", flush=True)
        print(flush=True)


def _prepare(arguments: Sequence[str]) -> None:
    from polyglot_jax.prepare.command import PrepareConfig, prepare

    prepare(tyro.cli(PrepareConfig, args=arguments, prog="python -m polyglot_jax prepare"))


def _tokenizer(arguments: Sequence[str]) -> None:
    from polyglot_jax.prepare.train_tokenizer import TokenizerConfig, make_tokenizer

    make_tokenizer(tyro.cli(TokenizerConfig, args=arguments, prog="python -m polyglot_jax tokenizer"))


VERBS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "tokenizer": (_tokenizer, "train a tokenizer on text"),
    "prepare": (_prepare, "turn text into token files"),
    "train": (_train, "train a model on token files, or go on training"),
    "generate": (_generate, "continue prompts"),
}


def run(verbs: dict[str, tuple[Callable[[Sequence[str]], None], str]], program: str, arguments: Sequence[str]) -> int:
    """Run a verb; returns the exit status. What the user can mend is said in one line, without a traceback."""
    if not arguments or arguments[0] not in verbs:
        lines = [f"usage: {program} VERB [options]", ""]
        lines += [f"  {name:<14}{text}" for name, (_, text) in verbs.items()]
        lines += ["", f"{program} VERB --help tells more."]
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        verbs[arguments[0]][0](arguments[1:])
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run(VERBS, "python -m polyglot_jax", sys.argv[1:]))
