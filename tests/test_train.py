"""Training is a pure function of (config, files, seed, step): the same on any mesh, however often it is stopped."""

import contextlib
import gzip
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from disks import small_disk
from runs import EOS, MODEL, bits, make_config, random_corpus, text_corpus, untimed_log, write_corpus
from tensorboardX.proto.event_pb2 import Event

from polyglot_jax import report, steps
from polyglot_jax.checkpoint import Checkpoint, newest
from polyglot_jax.config import InputError, TrainConfig
from polyglot_jax.data import Batches
from polyglot_jax.log import Log, read_log
from polyglot_jax.model import Transformer, abstract_params
from polyglot_jax.optimizer import schedule
from polyglot_jax.program import Program
from polyglot_jax.sharding import make_mesh
from polyglot_jax.steps import Batch
from polyglot_jax.train import train

ROOT = Path(__file__).resolve().parent.parent


pytestmark = pytest.mark.usefixtures("compiled_once", "unmeasured_device")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return random_corpus(tmp_path_factory.mktemp("data") / "corpus", tokens=3200)


def losses(run):
    return np.array([row["loss"] for row in read_log(run) if "loss" in row])


def heldout_losses(run):
    return [row["heldout_loss"] for row in read_log(run) if "heldout_loss" in row]


def contents(checkpoint):
    """Every parameter and every leaf of the optimizer's state of a checkpoint, bit for bit."""
    found = Checkpoint(checkpoint)
    state = Program.make(found.config, make_mesh(found.config.mesh)).restore(found)
    return found.step, bits(state)


def equal_runs(one, two):
    assert untimed_log(one) == untimed_log(two)
    assert contents(newest(one)) == contents(newest(two))


class Stopped(Exception):
    pass


def train_until(monkeypatch, step, *args):
    """Train, and stop as abruptly as an exception can once `step` is reported."""
    report_step = report.Reporter.step

    def stopping(self, now, metrics, state):
        report_step(self, now, metrics, state)
        if now == step:
            raise Stopped

    with monkeypatch.context() as patches, pytest.raises(Stopped):
        patches.setattr(report.Reporter, "step", stopping)
        train(*args)


# --- The same on any mesh and in any number of parts ---


@pytest.fixture(scope="module")
def on_one_device(compiled_once, unmeasured_device, corpus, tmp_path_factory):
    run = tmp_path_factory.mktemp("one") / "run"
    train(make_config(corpus, train__steps=20), run)
    assert len(losses(run)) == 20 and len(set(losses(run))) == 20
    return run


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"sequence": 2, "tensor": 2, "slices": 2},
        *(
            pytest.param(sizes, marks=pytest.mark.slow)
            for sizes in (
                {"data": 8},
                {"fsdp": 8},
                {"tensor": 8},
                {"sequence": 8},
                {"data": 2, "sequence": 2, "fsdp": 2},
                {"slices": 2, "fsdp": 4},
                {"slices": 2, "data": 2, "tensor": 2},
            )
        ),
    ],
    ids=lambda sizes: "-".join(f"{name}{size}" for name, size in sizes.items()),
)
def test_losses_are_the_same_on_any_mesh(corpus, on_one_device, tmp_path, sizes):
    sizes = {f"mesh__{name}": size for name, size in sizes.items()}
    train(make_config(corpus, train__steps=20, **sizes), tmp_path / "run")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(on_one_device), rtol=0, atol=1e-5)
    np.testing.assert_allclose(heldout_losses(tmp_path / "run"), heldout_losses(on_one_device), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parts, data, sequence", [(4, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 4)])
def test_accumulated_losses_are_those_of_the_whole_batch(corpus, on_one_device, tmp_path, parts, data, sequence):
    sizes = {"mesh__data": data, "mesh__sequence": sequence}
    train(make_config(corpus, train__steps=20, train__accumulate=parts, **sizes), tmp_path / "run")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(on_one_device), rtol=0, atol=1e-5)


def test_parts_with_few_tokens_weigh_less():
    """Gradients of a batch whose rows count differently, one of them not at all."""
    config = make_config().model
    model = Transformer(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), abstract_params(config, jnp.float32)
    )
    weights = rng.random((8, 16), np.float32) * (rng.random((8, 16)) < 0.7)
    weights[3], weights[5, 1:] = 0, 0
    batch = Batch(rng.integers(0, config.vocab, (8, 17), np.int32), weights.astype(np.float32))
    compute = jax.jit(steps.gradients, static_argnums=(0, 3))
    each = jax.jit(steps.token_losses, static_argnums=0)
    (whole, gradient), (sum_, parts) = compute(model, params, batch, 1), compute(model, params, batch, 4)
    expected = np.asarray(each(model, params, batch.tokens), np.float64)
    np.testing.assert_allclose(whole, (expected * weights).sum() / weights.sum(), rtol=1e-6)
    np.testing.assert_allclose(sum_, whole, rtol=1e-6)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    assert largest > 1e-2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * largest), parts, gradient)


# --- Stopped and resumed ---


@pytest.fixture(scope="module")
def settings(corpus):
    return {"train__steps": 10, "train__log_every": 3, "train__eval_every": 4, "train__checkpoint_every": 4}


@pytest.fixture(scope="module")
def uninterrupted(compiled_once, unmeasured_device, corpus, settings, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    train(make_config(corpus, **settings), run)
    assert [row["step"] for row in read_log(run)] == [0, 3, 4, 6, 8, 9, 10, 10]
    return run


@pytest.mark.parametrize("stop", [2, 5, *(pytest.param(step, marks=pytest.mark.slow) for step in (3, 7, 9))])
def test_a_run_stopped_and_resumed_is_the_same_bit_for_bit(
    corpus, settings, uninterrupted, tmp_path, monkeypatch, stop
):
    """Stopped before the first checkpoint, at a row of the log and between two; then by the same call to the end."""
    config, run = make_config(corpus, **settings), tmp_path / "run"
    train_until(monkeypatch, stop, config, run)
    assert read_log(run)[-1]["step"] in (0, 3, 4, 6, 8, 9)
    kept = newest(run)
    assert (kept and int(kept.name)) == {2: None, 3: None, 5: 4, 7: 4, 9: 8}[stop]
    assert train(config, run) == run / "checkpoints" / "10"
    equal_runs(run, uninterrupted)
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_rows_after_the_restored_step_are_dropped_and_a_torn_one_too(
    corpus, settings, uninterrupted, tmp_path, monkeypatch
):
    config, run = make_config(corpus, **settings), tmp_path / "run"
    train_until(monkeypatch, 7, config, run)
    assert [row["step"] for row in read_log(run)] == [0, 3, 4, 6]
    with (run / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 7, "loss": 99.0}\n{"step": 9, "lo')
    assert [row["step"] for row in read_log(run)] == [0, 3, 4, 6, 7]
    train(config, run)
    equal_runs(run, uninterrupted)


def events(run):
    """(step, tag, value) of every scalar in the run's TensorBoard files; records are length, crc, bytes, crc."""
    found = []
    for file in sorted((run / "tensorboard").iterdir()):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += 16 + length
    return found


def test_tensorboard_holds_what_the_log_holds(uninterrupted):
    rows = read_log(uninterrupted)
    expected = [(row["step"], tag, value) for row in rows for tag, value in row.items() if tag != "step"]
    found = events(uninterrupted)
    assert [event[:2] for event in found] == [row[:2] for row in expected]
    np.testing.assert_allclose([event[2] for event in found], [row[2] for row in expected], rtol=1e-6)
    assert {"loss", "heldout_loss", "learning_rate", "gradient_norm", "mfu"} <= {tag for _, tag, _ in found}


def test_rows_say_where_the_time_went(uninterrupted):
    """A row of training has the time of a step and the share waited for data; what else was done, beside them."""
    rows = {row["step"]: row for row in read_log(uninterrupted) if "loss" in row}
    for row in rows.values():
        speed = 8 * 16 / row["step_seconds"]
        assert row["tokens_per_second"] == pytest.approx(speed) and 0 <= row["data_wait"] < 1
    # The first held-out loss; then one and a checkpoint after steps 4 and 8.
    found = {step: {key for key in ("heldout_seconds", "save_seconds") if row.get(key, 0) > 0}
             for step, row in rows.items()}  # fmt: skip
    both = {"heldout_seconds", "save_seconds"}
    assert found == {3: {"heldout_seconds"}, 6: both, 9: both, 10: set()}


def test_waiting_for_data_is_seen(corpus, tmp_path, monkeypatch):
    rows = Batches.rows

    def slow(*args):
        time.sleep(0.2)
        return rows(*args)

    monkeypatch.setattr(Batches, "rows", slow)
    train(make_config(corpus, train__steps=20, train__log_every=10), tmp_path / "run")
    waits = [row["data_wait"] for row in read_log(tmp_path / "run") if "loss" in row]
    assert waits[-1] > 0.5


def test_the_profiler_traces_the_steps_asked_for(corpus, tmp_path, capfd):
    run = tmp_path / "run"
    train(make_config(corpus, train__steps=6, train__log_every=5, train__profile=(3, 4)), run)
    [trace] = run.glob("profile/**/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert any("train_step" in name for name in names), sorted(set(names))
    assert f"trace to {run / 'profile'}" in capfd.readouterr().out


@pytest.mark.parametrize("profile", [(3,), (0, 2), (4, 3), (3, 102_001)])
def test_steps_that_cannot_be_traced(profile):
    message = r"^train\.profile=.*: must be none, or the first and the last step, up to train\.steps=102000$"
    with pytest.raises(InputError, match=message):
        TrainConfig(profile=profile)


def test_a_step_that_takes_far_too_long_has_every_stack_printed(corpus, tmp_path, monkeypatch, capfd):
    rows = Batches.rows

    def stuck(self, step, *args):
        time.sleep(2.5 if step == 2 else 0)
        return rows(self, step, *args)

    monkeypatch.setattr(Batches, "rows", stuck)
    train(make_config(corpus, train__steps=4, train__log_every=1, train__watchdog=1), tmp_path / "run")
    said = capfd.readouterr().err
    assert "Timeout (0:00:01)!" in said and "in stuck" in said and "in watched" in said
    time.sleep(1.5)
    assert "Timeout" not in capfd.readouterr().err  # the run is over


def test_a_row_waits_for_room_where_the_run_may_go_on(tmp_path, capfd):
    with small_disk(tmp_path / "disk", 2**20) as disk:
        log = Log(disk, 0, may_fail=True)
        log.write(1, loss=1.0)
        with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(b"x" * 4096):
                pass
        for step in range(2, 200):
            log.write(step, loss=float(step))
        assert f"warning: {disk / 'log.jsonl'}: No space left on device; training goes on" in capfd.readouterr().err
        (disk / "filler").unlink()
        log.write(200, loss=200.0)
        log.close()
        assert [row["step"] for row in read_log(disk)] == list(range(1, 201))


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_in_the_same_bits(tmp_path):
    """Real processes and SIGKILL: while it trains, while it writes a checkpoint, and at random."""
    corpus, tokenizer = text_corpus(tmp_path / "corpus")
    arguments = [sys.executable, "-m", "polyglot_jax", "train", "--data", corpus, "--mesh.data", "1"]
    flags = {"vocab": 384, "layers": 2, "embed": 32, "heads": 8, "mlp": 64, "context": 32}
    arguments += [part for name, value in flags.items() for part in (f"--model.{name}", str(value))]
    flags = {"steps": 60, "sequence-length": 16, "batch-size": 8, "log-every": 1, "checkpoint-every": 3}
    arguments += [part for name, value in flags.items() for part in (f"--train.{name}", str(value))]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*arguments, "--out", whole], cwd=ROOT, env=environment, check=True, capture_output=True)

    rng = random.Random(0)

    def is_writing():
        """Whether the process that was started last is, not one that was killed before."""
        with contextlib.suppress(FileNotFoundError):  # renamed just now
            found = (killed / "checkpoints").glob("*.incomplete")
            return any(folder.stat().st_ctime_ns > started for folder in found)
        return False

    def has_grown(rows):
        return len(read_log(killed)) >= rows

    moments = [
        lambda before: has_grown(before + 1),
        lambda before: is_writing(),
        lambda before: has_grown(before + rng.randrange(2, 6)),
        lambda before: is_writing() and has_grown(before + 4),
        lambda before: has_grown(before + rng.randrange(2, 9)),
    ]
    torn, started = 0, 0
    for reached in moments:
        before = len(read_log(killed))
        quiet, started = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}, time.time_ns()
        process = subprocess.Popen([*arguments, "--out", killed], cwd=ROOT, env=environment, **quiet)
        while process.poll() is None and not reached(before):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
        torn += is_writing()
    assert torn, "no kill fell into the writing of a checkpoint"
    last = subprocess.run([*arguments, "--out", killed], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    equal_runs(killed, whole)
    assert not is_writing()
    assert (killed / "tokenizer.json").read_text(encoding="utf-8") == tokenizer.to_json()


def test_a_run_that_is_finished_returns_and_touches_nothing(corpus, settings, uninterrupted, capsys):
    before = {file: file.stat().st_mtime_ns for file in uninterrupted.rglob("*")}
    assert train(make_config(corpus, **settings), uninterrupted) == uninterrupted / "checkpoints" / "10"
    assert "is at step 10 already; raise --train.steps above 10 to go on" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in uninterrupted.rglob("*")} == before


@pytest.mark.parametrize(
    "name, value, line",
    [
        ("model__layers", 3, "model.layers is 2 there, 3 here"),
        ("model__norm_eps", 1e-6, "model.norm_eps is 1e-05 there, 1e-06 here"),
        ("optimizer__learning_rate", 2e-3, "optimizer.learning_rate is 0.001 there, 0.002 here"),
        ("data__heldout", 0.2, "data.heldout is 0.1 there, 0.2 here"),
        ("train__seed", 1, "train.seed is 0 there, 1 here"),
        ("train__batch_size", 4, "train.batch_size is 8 there, 4 here"),
        ("train__sequence_length", 8, "train.sequence_length is 16 there, 8 here"),
        ("train__dtype", "bfloat16", 'train.dtype is "float32" there, "bfloat16" here'),
    ],
)
def test_another_setting_is_refused_on_resuming_by_its_name(corpus, settings, uninterrupted, name, value, line):
    with pytest.raises(InputError, match="a run with other settings is there: ") as caught:
        train(make_config(corpus, **(settings | {name: value, "train__steps": 12})), uninterrupted)
    assert str(caught.value).startswith(f"--out {uninterrupted}: ")
    assert f": {line}; give the same settings" in str(caught.value)


def test_another_corpus_is_refused_on_resuming(corpus, settings, uninterrupted, tmp_path):
    other = random_corpus(tmp_path / "other", seed=1, tokens=3200)  # an equal index, other tokens
    with pytest.raises(InputError, match=rf'data\.paths is \["{corpus}"\] there, \["{other}"\] here'):
        train(make_config(other, **settings), uninterrupted)


def test_other_token_files_in_the_same_place_are_refused_on_resuming(tmp_path):
    corpus = random_corpus(tmp_path / "corpus", tokens=3200)
    run = train(make_config(corpus, train__steps=2), tmp_path / "run").parent.parent
    shutil.rmtree(corpus)
    random_corpus(tmp_path / "corpus", tokens=3300)
    with pytest.raises(InputError, match="are not those it began with"):
        train(make_config(corpus, train__steps=4), run)


def test_other_tokens_in_documents_of_the_same_lengths_are_refused_on_resuming(corpus, tmp_path):
    moved = shutil.copytree(corpus, tmp_path / "moved")
    run = train(make_config(corpus, train__steps=2), tmp_path / "run").parent.parent
    # The same bytes in another place are the same data.
    assert train(make_config(moved, train__steps=3), run).name == "3"
    file = moved / "text_document.bin"
    file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(InputError, match=rf"there: the token files in {moved} are not those it began with; give"):
        train(make_config(moved, train__steps=4), run)


def as_older_runs_wrote_it(run):
    """inputs.json with less of a fingerprint, and no word about the tokenizer."""
    file = run / "inputs.json"
    inputs = json.loads(file.read_text(encoding="utf-8"))
    del inputs["tokenizer"]
    inputs["corpora"] = [fingerprint.partition(", sample")[0] for fingerprint in inputs["corpora"]]
    file.write_text(json.dumps(inputs), encoding="utf-8")


@pytest.mark.parametrize("is_older", [False, True])
def test_another_tokenizer_is_refused_on_resuming(tmp_path, is_older):
    corpus, tokenizer = text_corpus(tmp_path / "corpus")
    run = train(make_config(corpus, train__steps=2), tmp_path / "run").parent.parent
    if is_older:
        as_older_runs_wrote_it(run)
        assert train(make_config(corpus, train__steps=3), run).name == "3"
    other = json.loads(tokenizer.to_json())
    vocabulary = other["model"]["vocab"]
    one, two = sorted(vocabulary, key=vocabulary.get)[10:12]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (corpus / "tokenizer.json").write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(
        InputError, match=rf"the tokenizer\.json in {corpus} is not the one it began with \(SHA-256 is "
    ):
        train(make_config(corpus, train__steps=4), run)
    assert (run / "tokenizer.json").read_text(encoding="utf-8") == tokenizer.to_json()


def test_an_older_runs_data_stay_where_they_are(corpus, tmp_path):
    """Its fingerprints do not tell other tokens from these."""
    run = train(make_config(corpus, train__steps=2), tmp_path / "run").parent.parent
    as_older_runs_wrote_it(run)
    assert train(make_config(corpus, train__steps=3), run).name == "3"
    moved = shutil.copytree(corpus, tmp_path / "moved")
    with pytest.raises(InputError, match=rf'data\.paths is \["{corpus}"\] there, \["{moved}"\] here'):
        train(make_config(moved, train__steps=4), run)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("inputs.json", b'{"corpora": ["12', "damaged (JSONDecodeError: "),
        (
            "inputs.json",
            b"{}",
            "damaged (KeyError: 'corpora'); put a copy of it back, or begin anew in another folder, ",
        ),
        ("inputs.json", b'{"corpora": 1, "init": null}', "damaged (TypeError: "),
        ("log.jsonl", b"\xff\xfe", "not a log, not even UTF-8 ("),
        (
            "log.jsonl",
            b'{"step": 0, "loss": 1.0}\n[1]\n',
            "line 2 is no row of a log, it has no step: [1]; mend it, or ",
        ),
        ("log.jsonl", b'{"loss": 1.0}\n', 'line 1 is no row of a log, it has no step: {"loss": 1.0}; mend it, or move'),
    ],
)
def test_a_damaged_file_of_a_run_is_named(corpus, on_one_device, tmp_path, name, content, message):
    run = shutil.copytree(on_one_device, tmp_path / "run")
    (run / name).write_bytes(content)
    with pytest.raises(InputError, match=f"^{re.escape(f'{run / name}: {message}')}"):
        train(make_config(corpus, train__steps=21), run)


def test_a_start_that_was_killed_early_does_not_block_the_folder(corpus, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "inputs.json").write_text("{}", encoding="utf-8")
    (tmp_path / "run" / "config.json.tmp").write_text("{", encoding="utf-8")
    assert train(make_config(corpus, train__steps=2), tmp_path / "run").is_dir()


@pytest.mark.parametrize("last", ["inputs.json", "config.json", "tokenizer.json"])
def test_a_start_killed_after_any_of_its_files_goes_on(tmp_path, monkeypatch, last):
    class Killed(BaseException):
        pass

    replace = Path.replace

    def replace_then_die(self, target):
        replace(self, target)
        if Path(target).name == last:
            raise Killed

    corpus, _ = text_corpus(tmp_path / "text")  # with a tokenizer.json
    config = make_config(corpus, train__steps=2)
    with monkeypatch.context() as patches, pytest.raises(Killed):
        patches.setattr(Path, "replace", replace_then_die)
        train(config, tmp_path / "run")
    assert train(config, tmp_path / "run").is_dir()


def test_a_checkpoint_is_no_run_to_go_on_with(on_one_device, corpus):
    with pytest.raises(InputError, match="exists and is not a training run"):
        train(make_config(corpus, train__steps=2), newest(on_one_device))


def test_a_finished_run_without_its_picture_gets_it(corpus, tmp_path):
    config = make_config(corpus, train__steps=2)
    train(config, tmp_path / "run")
    (tmp_path / "run" / "curves.png").unlink()
    train(config, tmp_path / "run")
    assert (tmp_path / "run" / "curves.png").is_file()


def test_a_jump_of_the_learning_rate_on_resuming_is_said(corpus, tmp_path, capsys):
    config = make_config(corpus, train__steps=4, optimizer__decay_steps=None)
    train(config, tmp_path / "run")
    longer = make_config(corpus, train__steps=8, optimizer__decay_steps=None)
    capsys.readouterr()
    train(longer, tmp_path / "run")
    assert "the learning rate at step 4 is " in capsys.readouterr().out


def test_more_steps_another_mesh_and_another_rhythm_are_allowed_on_resuming(corpus, on_one_device, tmp_path):
    run = tmp_path / "run"
    train(make_config(corpus, train__steps=10), run)
    changed = {
        "mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "train__log_every": 5, "train__eval_every": 7,
        "train__eval_sequences": 3, "train__checkpoint_every": 6, "train__keep": 2, "sample__temperature": 0.5,
    }  # fmt: skip
    train(make_config(corpus, train__steps=20, **changed), run)
    assert [row["step"] for row in read_log(run) if "loss" in row] == [*range(1, 11), 15, 20]
    np.testing.assert_allclose(losses(run)[:10], losses(on_one_device)[:10], rtol=0, atol=0)
    np.testing.assert_allclose(losses(run)[10:], losses(on_one_device)[[14, 19]], rtol=0, atol=1e-5)
    assert sorted(int(item.name) for item in (run / "checkpoints").iterdir()) == [18, 20]
    assert Checkpoint(newest(run)).config.sample.temperature == 0.5


def test_a_folder_that_is_no_run_is_refused(corpus, tmp_path):
    (tmp_path / "letter.txt").touch()
    with pytest.raises(InputError, match=rf"^--out {tmp_path}: exists and is not a training run; choose another"):
        train(make_config(corpus), tmp_path)
    with pytest.raises(InputError, match=r"letter\.txt: exists and is not a training run"):
        train(make_config(corpus), tmp_path / "letter.txt")
    assert [item.name for item in tmp_path.iterdir()] == ["letter.txt"]


# --- What is compiled, what stops a run ---


def test_a_run_traces_its_step_and_its_held_out_loss_once(corpus, settings, tmp_path, monkeypatch):
    chex.clear_trace_counter()
    monkeypatch.setattr(steps, "train_step", chex.assert_max_traces(steps.train_step, n=1))
    # One for all held-out losses: rows that do not fill a batch are no new shape.
    monkeypatch.setattr(steps, "token_losses", chex.assert_max_traces(steps.token_losses, n=1))
    train(make_config(corpus, **settings | {"train__eval_sequences": 13}), tmp_path / "run")
    assert len(heldout_losses(tmp_path / "run")) == 4
    with pytest.raises(AssertionError, match="is traced > 1 times"):
        jax.jit(steps.token_losses, static_argnums=0)(None, {}, jnp.zeros((1, 1), jnp.int32))


def poison(monkeypatch, config, *numbers, row=3):
    """Make the loss of one row NaN in the batches of these steps (from 1), wherever it is computed."""
    token_losses, loss_sum, batches = steps.token_losses, steps.loss_sum, Batches(config)
    bad = np.stack([batches(number - 1)[row] for number in numbers])

    def poison_of(tokens):
        return jnp.where((tokens[:, None] == bad).all(2).any(1), jnp.nan, 1.0)

    def poisoned_losses(model, params, tokens):
        return poison_of(tokens)[:, None] * token_losses(model, params, tokens)

    def poisoned_sum(model, params, batch):
        return poison_of(batch.tokens).sum() / len(batch.tokens) * loss_sum(model, params, batch)

    monkeypatch.setattr(steps, "token_losses", poisoned_losses)
    monkeypatch.setattr(steps, "loss_sum", poisoned_sum)


@pytest.mark.parametrize("way", ["default", "cuda"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(corpus, tmp_path, monkeypatch, capsys, way):
    """As though the optimizer had not been there: the same parameters, moments and schedule before and after."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda state, **ways: ways[way](state))
    settings = {"train__steps": 6, "train__checkpoint_every": 1, "train__log_every": 2}
    config = make_config(corpus, **settings)
    poison(monkeypatch, config, 3)
    run = tmp_path / "run"
    train(config, run)
    two, three, four = (contents(run / "checkpoints" / step)[1] for step in "234")
    assert two == three != four
    assert "step 3: loss=nan; skipped (1 so far)" in capsys.readouterr().out
    rows = {row["step"]: row for row in read_log(run) if "loss" in row}
    assert [rows[step]["skipped"] for step in (2, 4, 6)] == [0, 1, 1]
    rate = schedule(config.optimizer, 6)
    np.testing.assert_allclose(rows[6]["learning_rate"], rate(4), rtol=1e-6)
    assert Checkpoint(run / "checkpoints" / "6").metrics["skipped"] == 1

    config = make_config(corpus, **settings | {"train__steps": 7})
    train(config, run)  # resumed, it counts on
    assert [row["skipped"] for row in read_log(run) if row["step"] == 7 and "loss" in row] == [1]


def test_too_many_steps_that_are_not_finite_stop_the_run(corpus, tmp_path, monkeypatch):
    config = make_config(corpus, train__steps=12, train__log_every=4, train__checkpoint_every=3, train__skip_limit=2)
    poison(monkeypatch, config, 5, 6, 7)
    run = tmp_path / "run"
    with pytest.raises(InputError, match=r"^step 7: loss=nan; train\.skip_limit=2 allows no more") as caught:
        train(config, run)
    message = str(caught.value)
    assert "In the batch of step 7, the losses of rows 3 and the gradients of " in message
    assert message.endswith(f"(newest checkpoint: {run}/checkpoints/6)")
    assert len(contents(run / "checkpoints" / "6")[1]) == len(contents(run / "checkpoints" / "3")[1])


def test_a_learning_rate_far_too_high_stops_the_run(corpus, tmp_path):
    """Adam's update is the learning rate, so the first overflows; no checkpoint gets it."""
    config = make_config(corpus, optimizer__learning_rate=1e38, optimizer__warmup=0.0, train__steps=8)
    with pytest.raises(InputError, match=r"^step 1: parameter_norm=inf: .* nothing after it was saved; lower optim"):
        train(config, tmp_path / "run")
    assert newest(tmp_path / "run") is None


# --- What is learnt ---


def test_the_loss_falls_on_text_that_can_be_learnt(tmp_path):
    pattern = [[3 + (start + i) % 7 for i in range(33)] for start in range(60)]
    config = make_config(
        write_corpus(tmp_path / "corpus", pattern), train__steps=40, optimizer__learning_rate=2e-2, train__log_every=10
    )
    train(config, tmp_path / "run")
    before, after = heldout_losses(tmp_path / "run")
    assert abs(before - np.log(MODEL["vocab"])) < 0.1
    # Seven ids in a fixed order; chance among seven would be 1.95.
    assert after < 1 and losses(tmp_path / "run")[-1] < 1


def test_held_out_bits_per_byte_are_those_of_the_text(tmp_path):
    folder, tokenizer = text_corpus(tmp_path / "corpus")
    run = tmp_path / "run"
    train(make_config(folder, train__eval_sequences=0), run)
    row = next(row for row in reversed(read_log(run)) if "heldout_loss" in row)

    found = Checkpoint(newest(run))
    ids = np.fromfile(folder / "text_document.bin", "<u2").astype(np.int32)
    ends = np.flatnonzero(ids == EOS) + 1
    heldout = ids[min(ends, key=lambda end: abs(end - round(0.9 * len(ids)))) :]
    model, total = Transformer(found.config.model), 0.0
    params = found.restore_params(Program.make(found.config, make_mesh(found.config.mesh)).abstract.params)
    each = jax.jit(steps.token_losses, static_argnums=0)
    for start in range(0, len(heldout) - 1, 16):
        piece = heldout[start : start + 17]
        padded = np.zeros((1, 17), np.int32)
        padded[0, : len(piece)] = piece
        total += float(each(model, params, padded)[0, : len(piece) - 1].sum())
    # The first token is not predicted; a byte-level vocabulary spells it with one character for each byte.
    text, spelling = tokenizer.decode(heldout), json.loads(tokenizer.to_json())["model"]["vocab"]
    first = next(token for token, i in spelling.items() if i == heldout[0])
    assert row["heldout_loss"] == pytest.approx(total / (len(heldout) - 1), rel=1e-6)
    size = len(text.encode()) - len(first)
    assert row["heldout_bits_per_byte"] == pytest.approx(total / np.log(2) / size, rel=1e-6)


# --- Where a run starts ---


def test_a_run_starts_from_the_weights_of_a_checkpoint(corpus, on_one_device, tmp_path):
    source = newest(on_one_device)
    for name, init in (("checkpoint", source), ("run", on_one_device)):
        train(make_config(corpus, train__steps=1), tmp_path / name, init)
        assert heldout_losses(tmp_path / name)[0] == heldout_losses(on_one_device)[-1]
    # Going on needs no --init and minds another one, then too.
    train(make_config(corpus, train__steps=2), tmp_path / "checkpoint")
    # The same folder, written otherwise.
    train(make_config(corpus, train__steps=3), tmp_path / "checkpoint", os.path.relpath(source))
    with pytest.raises(InputError, match="--init is "):
        train(make_config(corpus, train__steps=4), tmp_path / "checkpoint", on_one_device)
    # The optimizer starts anew: its count is that of one step.
    state = contents(newest(tmp_path / "run"))[1]
    counts = [leaf for leaf in state if leaf[1] == "int32"]
    assert counts and all(np.frombuffer(leaf[2], np.int32) == 1 for leaf in counts)


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"model__mlp": 128, "model__tied": True}, "model.mlp is 64 there, 128 here"),
        ({"model__residual": "sequential"}, 'model.residual is "parallel" there, "sequential" here'),
    ],
)
def test_weights_of_another_model_are_refused_by_the_first_field(corpus, on_one_device, tmp_path, changes, line):
    with pytest.raises(InputError, match=rf"^--init {on_one_device}: another model: {line}$"):
        train(make_config(corpus, **changes), tmp_path / "run", on_one_device)
    assert not (tmp_path / "run").exists()


def test_the_seed_gives_the_weights(corpus):
    def weights(seed):
        config = make_config(corpus, train__seed=seed)
        return bits(Program.make(config, make_mesh(config.mesh)).random_params())

    assert weights(0) == weights(0) != weights(1)


# --- Precision and memory ---


def test_bfloat16_trains_close_to_float32(corpus, on_one_device, tmp_path):
    train(make_config(corpus, train__steps=20, train__dtype="bfloat16"), tmp_path / "run")
    # bfloat16 keeps 8 bits: of a loss near 6, differences are below 6 / 2^8.
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(on_one_device), rtol=0, atol=6 / 2**8)
    assert {str(leaf.dtype) for leaf in Checkpoint(newest(tmp_path / "run")).params.values()} == {"float32"}


@pytest.mark.parametrize("remat", ["full", pytest.param("dots", marks=pytest.mark.slow)])
def test_recomputing_changes_no_loss(corpus, on_one_device, tmp_path, remat):
    train(make_config(corpus, train__steps=20, train__remat=remat), tmp_path / "run")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(on_one_device), rtol=0, atol=1e-5)
