"""Training: a pure function of (config, files, seed, step), and a loop that reads from top to bottom.

RUN/
  config.json tokenizer.json     what is trained
  checkpoints/STEP/              see checkpoint.py; the newest resumes the run, bit for bit on the same mesh
  log.jsonl tensorboard/         rows while it runs
  loss.png                       drawn at the end
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
from jax.sharding import Mesh

from polyglot_jax import checkpoint, sharding
from polyglot_jax.checkpoint import Checkpoint
from polyglot_jax.config import Config, InputError
from polyglot_jax.data import Batches, find_tokenizer
from polyglot_jax.log import plot_losses
from polyglot_jax.model import Params
from polyglot_jax.program import Program
from polyglot_jax.report import Reporter, is_due
from polyglot_jax.tokenizer import Tokenizer
from polyglot_jax.weights import load_params, open_source

# What may differ when a run goes on; anything else would make it another run.
_MAY_CHANGE = (
    "mesh.",
    "sample.",
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.eval_sequences",
    "train.checkpoint_every",
    "train.keep",
)


def train(config: Config, out: str | Path, init: str | Path | None = None) -> Path:
    """Train into the run folder `out`, or go on with the run that is there; returns its newest checkpoint.

    init: where a new run's parameters come from (anything `weights.open_source` takes); None: random, from train.seed.
    InputError for whatever does not fit together, before anything is written.
    """
    out, total = Path(out).absolute(), config.train.steps
    tokenizer = find_tokenizer(config.data)
    if tokenizer is not None:
        config = config.with_tokenizer(tokenizer.valid_ids, tokenizer.eos_id)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check(config, mesh)
    batches = Batches(config)
    start = _find_start(config, out)
    first = start.step if start else 0
    if start and first >= total:
        print(f"{out}: is at step {first} already; raise --train.steps above {total} to go on")
        return start.path
    params = _initial_params(config, mesh, init) if init and not start else None
    program = Program.make(config, mesh)
    print(_describe(config, mesh, batches, first))

    with jax.set_mesh(mesh):
        state = program.restore(start) if start else program.first_state(params or program.random_params())
        _write_run(out, config, tokenizer)
        step_function = program.compile()
        with Reporter(program, batches, tokenizer, out, first) as report:
            if first == 0:
                report.heldout(0, state)
            for step, batch in enumerate(program.batches(batches, first), first + 1):
                state, metrics = step_function(state, batch)
                report.step(step, metrics)
                if is_due(config.train.eval_every, step, total):
                    report.heldout(step, state)
                if is_due(config.train.checkpoint_every, step, total):
                    report.check_finite(step)
                    text = tokenizer.to_json() if tokenizer else None
                    path = out / "checkpoints" / str(step)
                    checkpoint.save(path, config, state.params, optimizer=state.optimizer, tokenizer=text, step=step)
                    checkpoint.prune(out, config.train.keep)
    print(f"wrote {plot_losses(out)}")
    return path


def _initial_params(config: Config, mesh: Mesh, init: str | Path) -> Params:
    source = open_source(init)
    if source.config.model != config.model:
        raise InputError(f"--init {init}: another model: {_differences(source.config, config, 'model.')[0]}")
    return load_params(source, mesh, config.train.param_dtype, split=False)


def _find_start(config: Config, out: Path) -> Checkpoint | None:
    """The newest checkpoint of the run at `out`; None for a new run. InputError if it is not this run."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    file = out / "config.json"
    if not file.is_file():
        raise InputError(f"--out {out}: exists and is not a training run; choose another folder")
    old = Config.from_json(file.read_text(encoding="utf-8"))
    differences = [line for line in _differences(old, config) if not line.startswith(_MAY_CHANGE)]
    if differences:
        raise InputError(
            f"--out {out}: a run with other settings is there: {'; '.join(differences)}; give the same settings to go "
            "on with it, or choose another folder"
        )
    newest = checkpoint.newest(out)
    return Checkpoint(newest) if newest else None


def _differences(old: Config, new: Config, only: str = "") -> list[str]:
    """Lines "section.field is OLD there, NEW here" for fields whose dotted name starts with `only`."""
    lines = []
    for section in dataclasses.fields(Config):
        before, after = getattr(old, section.name), getattr(new, section.name)
        for field in dataclasses.fields(before):
            name, was, now = f"{section.name}.{field.name}", getattr(before, field.name), getattr(after, field.name)
            if name == "data.paths":  # the same folders may be named from another place
                was, now = ([str(Path(path).resolve()) for path in paths] for paths in (was, now))
            if was != now and name.startswith(only):
                lines.append(f"{name} is {json.dumps(was)} there, {json.dumps(now)} here")
    return lines


def _write_run(out: Path, config: Config, tokenizer: Tokenizer | None) -> None:
    if jax.process_index():
        return
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("config.json", config.to_json()), ("tokenizer.json", tokenizer and tokenizer.to_json())):
        if text is not None:
            temporary = out / f"{name}.tmp"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(out / name)


def _describe(config: Config, mesh: Mesh, batches: Batches, first: int) -> str:
    train, model = config.train, config.model
    tokens = train.batch_size * train.sequence_length
    valid = f"{config.data.valid_ids:,} ids" if config.data.valid_ids else "no tokenizer"
    return (
        f"model: {model.parameters():,} parameters ({valid}, {model.vocab:,} rows), {train.param_dtype} weights, "
        f"{train.dtype} products\n"
        f"mesh: {' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}, {mesh.devices.flat[0].platform}\n"
        f"data: {batches.samples_per_pass:,} samples of {train.sequence_length + 1} tokens a pass, "
        f"{sum(corpus.heldout_tokens for corpus in batches.corpora):,} tokens held out\n"
        f"steps {first + 1} to {train.steps} of {train.batch_size} sequences, {tokens:,} tokens: "
        f"{train.steps * train.batch_size / batches.samples_per_pass:.2f} passes"
    )
