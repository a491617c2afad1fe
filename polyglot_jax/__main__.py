"""python -m polyglot_jax VERB: finds the verb's module when it is asked for. --help never imports JAX."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from polyglot_jax.cli import Verbs, run
from polyglot_jax.config import PRESETS, Config, DistributedConfig, InputError, SampleConfig
from polyglot_jax.files import read_config

_PresetName = Literal[
    "tiny", "polyglot-ko-1.3b", "polyglot-ko-3.8b", "polyglot-ko-5.8b", "polyglot-ko-12.8b", "ko-gpt-trinity-1.2b",
    "kogpt-6b", "xglm-7.5b",
]  # fmt: skip


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
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
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
    keep_end: bool = False
    """Keep the end of a prompt that the context has no room for, instead of refusing it."""
    samples: int = 1
    """Continuations of each prompt; with beams, the best of them."""
    log_probabilities: bool = False
    """Also print every token made and its log-probability."""
    # --help shows the general defaults; a checkpoint's own come before them.
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)


@dataclass(frozen=True, kw_only=True)
class CompileCommand:
    """Compile a training or decode step for TPUs that are not here; print an estimate of memory, time and utilisation.

    For GPUs that are not here: a training step's memory and collectives, not its time. Needs requirements-tpu.txt or
    requirements-gpu.txt. Exit status 1 when the step does not fit.
    """

    topology: str
    """Chip and size: v5e:16x16, v5p:4x8x8; or GPU and nodes x GPUs: h100:8, h100:4x8."""
    mode: Literal["train", "decode"] = "train"
    """decode: a step of generate's loop, in bfloat16; with mesh.data -1 all chips share heads and hidden layer."""
    batch_size: int = 1
    """For decode: rows, prompts times samples."""
    slots: int | None = None
    """For decode: positions the cache has room for, all read at every step; none: model.context."""
    quantize: Literal["int8"] | None = None
    """For decode: weights in a byte each."""
    preset: _PresetName = "tiny"
    """The recipe to start from."""
    config_file: Annotated[str | None, tyro.conf.arg(name="config")] = None
    """A config.json (a run's, or a checkpoint's) to start from instead of a preset."""
    dump_hlo: str | None = None
    """File for the text of the compiled program."""
    json: str | None = None
    """File for everything that is printed, and more."""
    config: Annotated[Config, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class ExplainCommand:
    """Print where each tensor of a training step lies (shape, split, bytes a device) and the step's collectives."""

    topology: str | None = None
    """Chip and size of TPUs or GPUs that are not here, as for `compile`; none: simulated CPU devices."""
    preset: _PresetName = "tiny"
    """The recipe to start from."""
    config_file: Annotated[str | None, tyro.conf.arg(name="config")] = None
    """A config.json (a run's, or a checkpoint's) to start from instead of a preset."""
    config: Annotated[Config, tyro.conf.arg(name="")]


def _train(arguments: Sequence[str]) -> None:
    default = TrainCommand(out=tyro.MISSING, config=_base(arguments))
    command = tyro.cli(TrainCommand, args=arguments, prog="python -m polyglot_jax train", default=default)
    from polyglot_jax import hosts
    from polyglot_jax.train import train

    with hosts.cluster(command.distributed):
        path = train(command.config, command.out, command.init)
        print(f'next: python -m polyglot_jax generate --checkpoint {command.out} --prompt "..."\n({path})')


def _compile(arguments: Sequence[str]) -> None:
    default = CompileCommand(topology=tyro.MISSING, config=_base(arguments))
    command = tyro.cli(CompileCommand, args=arguments, prog="python -m polyglot_jax compile", default=default)
    if command.mode == "decode":
        from polyglot_jax.compile.decode import Decode, compile_decode

        slots = command.config.model.context if command.slots is None else command.slots
        decode = Decode(command.batch_size, slots, command.quantize)
        compile_decode(command.config, command.topology, decode, command.dump_hlo, command.json)
        return
    if (command.batch_size, command.slots, command.quantize) != (1, None, None):
        raise InputError(
            "--batch-size, --slots and --quantize belong to --mode decode; a training step's are --train.batch-size "
            "and --train.sequence-length"
        )
    from polyglot_jax.compile.command import compile_step

    compile_step(command.config, command.topology, command.dump_hlo, command.json)


def _explain(arguments: Sequence[str]) -> None:
    default = ExplainCommand(config=_base(arguments))
    command = tyro.cli(ExplainCommand, args=arguments, prog="python -m polyglot_jax explain", default=default)
    from polyglot_jax.compile.explain import explain

    print(explain(command.config, command.topology))


def _base(arguments: Sequence[str]) -> Config:
    """The preset or file named among the arguments, which gives the defaults of all settings."""
    given: dict[str, str | None] = {"--preset": None, "--config": None}
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in given:
            given[flag] = value if equals else next(iter(arguments[i + 1 : i + 2]), None)
    if given["--preset"] and given["--config"]:
        raise InputError("--preset and --config: give one of the two; each sets all defaults")
    if given["--config"] is not None:
        return read_config(given["--config"])
    return PRESETS.get(given["--preset"] or "tiny", PRESETS["tiny"])  # tyro itself refuses an unknown name


def _generate(arguments: Sequence[str]) -> None:
    program = "python -m polyglot_jax generate"
    command = tyro.cli(GenerateCommand, args=arguments, prog=program)
    if not command.prompt:
        raise InputError("--prompt: names no text; give one or several, in quotes")
    from polyglot_jax.language_model import load

    model = load(command.checkpoint, dtype=command.dtype)
    # Once more, over the checkpoint's own settings.
    command = tyro.cli(
        GenerateCommand, args=arguments, prog=program, default=dataclasses.replace(command, sample=model.config.sample)
    )
    settings = dataclasses.asdict(command.sample)
    if command.samples == 1 and command.sample.beams == 1 and not command.log_probabilities:
        for number, prompt in enumerate(command.prompt):
            pieces = model.stream(prompt, stop=command.stop, first=number, keep_end=command.keep_end, **settings)
            first = next(pieces, "")  # what is wrong with the prompt is said before it is printed
            for piece in itertools.chain((prompt, first), pieces):
                print(piece, end="", flush=True)
            print(flush=True)
        return
    made = model.complete(command.prompt, command.samples, command.stop, keep_end=command.keep_end, **settings)
    for prompt, completions in zip(command.prompt, made, strict=True):
        for number, completion in enumerate(completions):
            total = sum(completion.log_probabilities)
            print(f"# sample {number}, seed {command.sample.seed}, ended by {completion.finish}, "
                  f"log-probability {total:.3f} of {len(completion.ids)} tokens")  # fmt: skip
            print(prompt + completion.text)
            if command.log_probabilities:
                for token, log in zip(completion.ids, completion.log_probabilities, strict=True):
                    text = model.tokenizer.decode([token], skip_special_tokens=False)
                    print(f"{log:9.3f}  {token:>6}  {text!r}")


def _prepare(arguments: Sequence[str]) -> None:
    from polyglot_jax.prepare.command import PrepareConfig, prepare

    prepare(tyro.cli(PrepareConfig, args=arguments, prog="python -m polyglot_jax prepare"))


def _evaluate(arguments: Sequence[str]) -> None:
    from polyglot_jax.evaluate.settings import EvaluateConfig

    config = tyro.cli(EvaluateConfig, args=arguments, prog="python -m polyglot_jax evaluate")
    from polyglot_jax.evaluate.command import evaluate

    evaluate(config)


def _tokenizer(arguments: Sequence[str]) -> None:
    from polyglot_jax.prepare.train_tokenizer import TokenizerConfig, make_tokenizer

    make_tokenizer(tyro.cli(TokenizerConfig, args=arguments, prog="python -m polyglot_jax tokenizer"))


def _audit(arguments: Sequence[str]) -> None:
    from polyglot_jax.prepare.audit import AuditConfig, audit

    audit(tyro.cli(AuditConfig, args=arguments, prog="python -m polyglot_jax audit"))


VERBS: Verbs = {
    "tokenizer": (_tokenizer, "train a tokenizer on text"),
    "prepare": (_prepare, "turn text into token files"),
    "audit": (_audit, "look for personal data in token files"),
    "train": (_train, "train a model on token files, or go on training"),
    "generate": (_generate, "continue prompts"),
    "evaluate": (_evaluate, "score a model on KoBEST, and texts by bits per byte"),
    "explain": (_explain, "where each tensor lies on a mesh, and what the devices exchange"),
    "compile": (_compile, "estimate memory and speed of a training or decode step on devices that are not here"),
}


if __name__ == "__main__":
    sys.exit(run(VERBS, "python -m polyglot_jax", sys.argv[1:]))
