"""Training: a pure function of (config, files, seed, step), and a loop that reads from top to bottom.

RUN/
  config.json tokenizer.json     what is trained
  inputs.json                    fingerprints of the token files and their tokenizer, and --init
  checkpoints/STEP/              see checkpoint.py; the newest resumes the run, bit for bit on the same mesh
  log.jsonl tensorboard/         rows while it runs
  profile/                       train.profile's trace, for Perfetto and XProf
  curves.png                     drawn at the end
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from polyglot_jax import checkpoint, hosts, preflight, sharding
from polyglot_jax.checkpoint import Checkpoint
from polyglot_jax.config import Config, InputError
from polyglot_jax.data import Batches, find_tokenizer
from polyglot_jax.files import locked, read_config, sync
from polyglot_jax.hardware import free_memory
from polyglot_jax.log import plot_run
from polyglot_jax.optimizer import schedule
from polyglot_jax.preemption import Preemption
from polyglot_jax.preflight import Memory
from polyglot_jax.program import Program
from polyglot_jax.report import Reporter, is_due
from polyglot_jax.saver import Saver
from polyglot_jax.source import Source
from polyglot_jax.steps import TrainState
from polyglot_jax.tokenizer import Tokenizer
from polyglot_jax.weights import load_params, open_source, read_tokenizer

# What may differ when a run goes on; anything else would make it another run.
_MAY_CHANGE = {
    "mesh",
    "sample",
    "optimizer.decay_steps",
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.eval_sequences",
    "train.checkpoint_every",
    "train.keep",
    "train.keep_every",
    "train.if_save_fails",
    "train.skip_limit",
    "train.watchdog",
    # Rounding may differ with these, as with the mesh; a run can go on where there is less memory.
    "train.accumulate",
    "train.remat",
    "train.attention",
    "train.profile",
}

_INPUTS = "inputs.json"


def train(config: Config, out: str | Path, init: str | Path | None = None) -> Path:
    """Train into the run folder `out`, or go on with the run that is there; returns its newest checkpoint.

    init: where a new run's parameters come from (anything `weights.open_source` takes); None: random, from train.seed.
    InputError for whatever does not fit together, before anything is written. With several processes (hosts.cluster)
    each calls this with the same arguments, and `out` is a folder that all of them see.
    """
    out, total = Path(out).absolute(), config.train.steps
    with hosts.together():
        tokenizer = find_tokenizer(config.data)
        if tokenizer is not None:
            config = config.with_tokenizer(tokenizer.valid_ids, tokenizer.eos_id)
        mesh = sharding.make_mesh(config.mesh)
        _check_processes(mesh)
        sharding.check(config, mesh)
        batches = Batches(config)
        inputs = {
            "corpora": [corpus.fingerprint for corpus in batches.corpora],
            "tokenizer": tokenizer.sha256 if tokenizer else None,
            "init": _named(init),
        }
        _check_run(config, out, inputs)
        source = _initial_source(config, init, tokenizer) if init and checkpoint.newest(out) is None else None
        program = Program.make(config, mesh)
    _check_same(config, out, inputs)

    with contextlib.ExitStack() as stack:
        with hosts.together():
            if hosts.is_first():  # one lock for all: they are one writer
                out.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(out.with_name(f".{out.name}.lock")))
        start = checkpoint.newest_whole(out)
        first = start.step if start else 0
        if start and first >= total:
            print(f"{out}: is at step {first} already; raise --train.steps above {total} to go on")
            if hosts.is_first() and not (out / "curves.png").is_file():  # the run was killed after its last checkpoint
                print(f"wrote {plot_run(out)}")
            return start.path
        print(_describe(config, mesh, batches, start))
        stack.enter_context(jax.set_mesh(mesh))
        with hosts.together():  # hosts may differ in what is free
            room = free_memory(mesh.local_devices)
            step_function = preflight.compile_step(program, room)
            print(preflight.check_step(program, Memory.of(step_function), room))
        state = _first_state(program, mesh, start, source)
        with hosts.together():
            if hosts.is_first():
                _write_run(out, config, tokenizer, inputs)
        report = stack.enter_context(Reporter(program, batches, tokenizer, out, start))
        preemption = stack.enter_context(Preemption())
        saver = stack.enter_context(Saver(out, config, tokenizer.to_json() if tokenizer else None))
        if first == 0:
            report.heldout(0, state)
        for step, batch in enumerate(report.watched(program.batches(batches, first)), first + 1):
            state, metrics = step_function(state, batch)
            report.step(step, metrics, state)
            if jax.process_count() == 1 or is_due(config.train.log_every, step, total):
                saver.poll()  # to ask the others is to wait for the step, as a row of the log has just done
            if is_due(config.train.eval_every, step, total):
                report.heldout(step, state)
            is_last = step == total or preemption.reached(step)
            if is_last or is_due(config.train.checkpoint_every, step, total):
                values = report.settle(step, state)
                with report.aside("save"):
                    saver.save(step, state, values | {"skipped": report.skipped}, is_last=is_last)
            if is_last:
                break
    if step < total:
        print(f"{out}: stopped by SIGTERM after step {step}, which is saved; the same command goes on")
    if hosts.is_first():
        print(f"wrote {plot_run(out)}")
    return out / "checkpoints" / str(step)


def _initial_source(config: Config, init: str | Path, tokenizer: Tokenizer | None) -> Source:
    """Where --init leads; InputError if its weights are no start for this run."""
    source = open_source(init)
    theirs = read_tokenizer(source)[1]
    if theirs and tokenizer and theirs.vocabulary != tokenizer.vocabulary:
        raise InputError(f"--init {init}: made with another tokenizer than the token files; prepare them with its own")
    if source.config.model != config.model:
        first = next(line for name, line in _differences(source.config, config) if name.startswith("model."))
        raise InputError(f"--init {init}: another model: {first}")
    return source


def _first_state(program: Program, mesh: Mesh, start: Checkpoint | None, source: Source | None) -> TrainState:
    params = None
    with hosts.together():  # each process reads what lies on its devices
        if start:
            return program.restore(start)
        if source:
            params = load_params(source, mesh, "float32", split=False)
    return program.first_state(program.random_params() if params is None else params)


def _check_processes(mesh: Mesh) -> None:
    if jax.process_count() > 1 and mesh.size < jax.device_count():
        raise InputError(
            f"{sharding.product(dict(mesh.shape))}: uses {mesh.size} of the "
            f"{jax.device_count()} devices of {jax.process_count()} processes; several processes have to use them all"
        )


def _named(init: str | Path | None) -> str | None:
    """--init as it is compared when the run goes on: a folder by its place, however it was written; else a hub name."""
    if init is None:
        return None
    return str(Path(init).resolve() if Path(init).exists() else init)


def _check_same(config: Config, out: Path, inputs: dict[str, Any]) -> None:
    """InputError if a process trains something else than the first. Of all processes."""
    first = json.loads(hosts.gather(json.dumps([config.to_json(), inputs, str(out)]))[0])
    with hosts.together():
        differences = [line for _, line in _differences(Config.from_json(first[0]), config)]
        if first[1] != inputs:
            differences.append(f"token files or --init are {first[1]} there, {inputs} here")
        if first[2] != str(out):
            differences.append(f"--out is {first[2]} there, {out} here")
        if differences:
            raise InputError(f"other settings than those of process 0: {'; '.join(differences)}")


def _check_run(config: Config, out: Path, inputs: dict[str, Any]) -> None:
    """InputError if something is at `out` and it is not this run."""
    # A process killed while it began the run may have left what is written before config.json.
    if not out.exists() or (out.is_dir() and all(f.suffix == ".tmp" or f.name == _INPUTS for f in out.iterdir())):
        return
    file = out / "config.json"
    if not (file.is_file() and (out / _INPUTS).is_file()):
        raise InputError(f"--out {out}: exists and is not a training run; choose another folder")
    before = _read_inputs(out)
    # The same bytes may lie elsewhere; an older run's fingerprints, which are shorter, do not tell enough for that.
    may_change = _MAY_CHANGE | ({"data.paths"} if before["corpora"] == inputs["corpora"] else set())
    differences = [
        line for name, line in _differences(read_config(file), config) if not {name, name.split(".")[0]} & may_change
    ]
    olds, news = before["corpora"], inputs["corpora"]
    if len(olds) != len(news) or not all(new.startswith(old) for old, new in zip(olds, news, strict=True)):
        differences.append(f"the token files in {', '.join(config.data.paths)} are not those it began with")
    if before.get("tokenizer", inputs["tokenizer"]) != inputs["tokenizer"]:
        differences.append(
            f"the tokenizer.json in {', '.join(config.data.paths)} is not the one it began with (SHA-256 is "
            f"{before['tokenizer']} there, {inputs['tokenizer']} here)"
        )
    if inputs["init"] not in (None, before["init"]):
        differences.append(f"--init is {before['init']} there, {inputs['init']} here")
    if differences:
        raise InputError(
            f"--out {out}: a run with other settings is there: {'; '.join(differences)}; give the same settings to go "
            "on with it, or choose another folder"
        )
    if checkpoint.newest(out) is None and before["init"] != inputs["init"]:
        raise InputError(f"--out {out}: began with --init {before['init']} and has no checkpoint yet; give it again")


def _read_inputs(out: Path) -> dict[str, Any]:
    """What a run's inputs.json says; InputError if it is damaged. An older run's tokenizer is that in its folder."""
    file = out / _INPUTS
    try:
        before = json.loads(file.read_bytes())
        corpora, init = before["corpora"], _named(before["init"])
        if not all(isinstance(fingerprint, str) and fingerprint for fingerprint in corpora):
            raise ValueError(f"corpora={corpora}")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        newest = checkpoint.newest(out)
        raise InputError(
            f"{file}: damaged ({type(error).__name__}: {error}); put a copy of it back, or begin anew in another folder"
            + (f", from the weights there by --init {newest}" if newest else "")
        ) from error
    if "tokenizer" not in before and (out / "tokenizer.json").is_file():
        before["tokenizer"] = Tokenizer.load(out).sha256
    return before | {"init": init}


def _differences(old: Config, new: Config) -> list[tuple[str, str]]:
    """(dotted name, "name is OLD there, NEW here") of each field that differs."""
    lines = []
    for section in dataclasses.fields(Config):
        before, after = getattr(old, section.name), getattr(new, section.name)
        for field in dataclasses.fields(before):
            name, was, now = f"{section.name}.{field.name}", getattr(before, field.name), getattr(after, field.name)
            if name == "data.paths":  # the same folders may be named from another place
                was, now = ([str(Path(path).resolve()) for path in paths] for paths in (was, now))
            if was != now:
                lines.append((name, f"{name} is {json.dumps(was)} there, {json.dumps(now)} here"))
    return lines


def _write_run(out: Path, config: Config, tokenizer: Tokenizer | None, inputs: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    texts = {}
    if not (out / "config.json").is_file():  # going on does not change where the run came from
        texts[_INPUTS] = json.dumps(inputs, indent=1) + "\n"
    texts["config.json"] = config.to_json()  # with it the folder is a run, so what it needs to be one comes before
    if tokenizer is not None and not (out / "tokenizer.json").is_file():
        texts["tokenizer.json"] = tokenizer.to_json()
    for name, text in texts.items():
        temporary = out / f"{name}.tmp"
        temporary.write_bytes(text.encode())
        sync(temporary)
        temporary.replace(out / name)


def _describe(config: Config, mesh: Mesh, batches: Batches, start: Checkpoint | None) -> str:
    train, model = config.train, config.model
    first = start.step if start else 0
    jump = ""
    if start:
        taken = first - int(start.metrics.get("skipped", 0))
        old, new = (float(schedule(c.optimizer, c.train.steps)(taken)) for c in (start.config, config))
        end = start.config.optimizer.decay_steps or start.config.train.steps
        if old != new:
            jump = (
                f"\nnote: with {train.steps} steps the learning rate at step {first} is {new:.3g}, where it was "
                f"{old:.3g}; --optimizer.decay-steps {end} keeps it"
            )
    tokens = train.batch_size * train.sequence_length
    valid = f"{config.data.valid_ids:,} ids" if config.data.valid_ids else "no tokenizer"
    return (
        f"model: {model.parameters():,} parameters ({valid}, {model.vocab:,} rows), float32 weights, "
        f"{train.dtype} products\n"
        f"mesh: {' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}, {mesh.devices.flat[0].platform}\n"
        f"data: {batches.samples_per_pass:,} samples of {train.sequence_length + 1} tokens a pass, "
        f"{sum(corpus.heldout_tokens for corpus in batches.corpora):,} tokens held out\n"
        f"steps {first + 1} to {train.steps} of {train.batch_size} sequences, {tokens:,} tokens: "
        f"{train.steps * train.batch_size / batches.samples_per_pass:.2f} passes{jump}"
    )
