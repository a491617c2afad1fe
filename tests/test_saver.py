"""Checkpoints written while training goes on: what they hold, what stays, what happens when one cannot be written."""

import dataclasses
import gc
import os
import random
import shutil
import signal
import threading
import time
from functools import partial

import jax
import pytest
from disks import remount, small_disk, used
from kills import killed_at, start, train_quickly
from runs import bits, make_config, random_corpus, untimed_log

from polyglot_jax import checkpoint, report
from polyglot_jax.checkpoint import Checkpoint, newest
from polyglot_jax.config import InputError
from polyglot_jax.files import locked
from polyglot_jax.log import read_log
from polyglot_jax.program import Program
from polyglot_jax.sharding import make_mesh
from polyglot_jax.train import train

pytestmark = pytest.mark.usefixtures("compiled_once", "unmeasured_device")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return random_corpus(tmp_path_factory.mktemp("data") / "corpus", tokens=3200)


WHOLE = {"train__steps": 12, "train__checkpoint_every": 3, "train__eval_every": 3}


@pytest.fixture(scope="module")
def whole(compiled_once, unmeasured_device, corpus, tmp_path_factory):
    """A run that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(make_config(corpus, **WHOLE), run)
    return run


def equal_runs(one, two):
    assert untimed_log(one) == untimed_log(two)
    assert newest(one).name == newest(two).name and state_of(newest(one)) == state_of(newest(two))


def state_of(path):
    found = Checkpoint(path)
    return bits(Program.make(found.config, make_mesh(found.config.mesh)).restore(found))


def steps_kept(run):
    return sorted(int(folder.name) for folder in (run / "checkpoints").glob("*") if folder.name.isdigit())


@pytest.mark.parametrize(
    "before, after",
    [
        ((1, 8, 1), (1, 1, 1)),
        ((1, 1, 1), (1, 8, 1)),
        ((1, 2, 4), (1, 4, 2)),
        pytest.param((2, 2, 2), (8, 1, 1), marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_is_restored_onto_another_mesh(whole, tmp_path, before, after):
    """Every bit of parameters and moments, laid out as the new mesh asks."""
    found, on_disk = Checkpoint(newest(whole)), state_of(newest(whole))
    for mesh in (before, after):
        sizes = dataclasses.replace(found.config.mesh, **dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
        program = Program.make(found.config, make_mesh(sizes))
        state = program.restore(found)
        assert bits(state) == on_disk
        for leaf, asked in zip(jax.tree.leaves(state), jax.tree.leaves(program.abstract), strict=True):
            assert leaf.sharding == asked.sharding
        path = tmp_path / "-".join(map(str, mesh))
        checkpoint.save(path, found.config, state.params, optimizer=state.optimizer, step=found.step)
        found = Checkpoint(path)
    whole_shards = [leaf.addressable_shards[0].data.shape == leaf.shape for leaf in jax.tree.leaves(state)]
    assert all(whole_shards) == (after[1] * after[2] == 1)


@pytest.mark.parametrize("data, fsdp", [(1, 1), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_training_goes_on_while_a_checkpoint_is_written(corpus, tmp_path, monkeypatch, data, fsdp):
    """Steps are taken, and donate their arrays, before it may end; the checkpoint holds what they were."""
    settings = {"mesh__data": data, "mesh__fsdp": fsdp, "train__steps": 4}
    train(make_config(corpus, **settings, optimizer__decay_steps=40), tmp_path / "short")
    may_write, write_rest = threading.Event(), checkpoint._write_rest

    def later(*args, **kwargs):
        assert may_write.wait(60)
        write_rest(*args, **kwargs)

    report_step = report.Reporter.step

    def step(self, now, metrics, state):
        report_step(self, now, metrics, state)
        jax.block_until_ready(state)
        if now == 6:
            assert steps_kept(tmp_path / "run") == []
            may_write.set()

    monkeypatch.setattr(checkpoint, "_write_rest", later)
    monkeypatch.setattr(report.Reporter, "step", step)
    run = tmp_path / "run"
    train(make_config(corpus, **settings | {"train__steps": 8, "train__checkpoint_every": 4}), run)
    assert steps_kept(run) == [4, 8]
    assert state_of(run / "checkpoints" / "4") == state_of(newest(tmp_path / "short"))
    rows = {row["step"]: row for row in read_log(run) if "loss" in row}
    metrics = Checkpoint(run / "checkpoints" / "4").metrics
    assert metrics == {name: rows[4][name] for name in ("loss", "gradient_norm", "parameter_norm", "skipped")}


def test_the_newest_and_every_so_many_are_kept(corpus, tmp_path):
    run = tmp_path / "run"
    train(make_config(corpus, train__steps=9, train__checkpoint_every=1, train__keep=2, train__keep_every=3), run)
    assert steps_kept(run) == [3, 6, 8, 9]


def damage(checkpoint, how):
    """Flip a bit of its largest file, or cut the file short, or lose the manifest."""
    file = max((checkpoint / "params").rglob("*"), key=lambda file: file.is_file() * file.stat().st_size)
    content = bytearray(file.read_bytes())
    if how == "bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "cut":
        file.write_bytes(content[:-1])
    else:
        (checkpoint / "manifest.json").unlink()


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_taken(corpus, whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for step, how in ((12, "bit"), (9, "cut"), (6, "manifest")):
        damage(run / "checkpoints" / str(step), how)
    # In another rhythm, so that steps come by which an older checkpoint is the newest.
    train(make_config(corpus, **WHOLE | {"train__checkpoint_every": 5, "train__keep": 1}), run)
    said = capsys.readouterr().err
    for step, what in (
        (12, "its bytes are not those that were written"),
        (9, "bytes instead of"),
        (6, "a half-written checkpoint: it has no manifest"),
    ):
        assert any(line.startswith(f"warning: {run}/checkpoints/{step}") and what in line for line in said.splitlines())
        assert f"set aside as {step}.damaged; going on from {run}/checkpoints/3" in said
    assert steps_kept(run) == [12]
    assert sorted(path.name for path in (run / "checkpoints").iterdir() if path.suffix) == [
        "12.damaged",
        "6.damaged",
        "9.damaged",
    ]
    equal_runs(run, whole)


def test_a_run_without_a_whole_checkpoint_is_refused(corpus, whole, tmp_path):
    """Rather than begun anew in silence; as often as it is tried."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for step in steps_kept(run):
        damage(run / "checkpoints" / str(step), "cut")
    for _ in range(2):
        with pytest.raises(InputError, match=rf"^{run}: none of its 4 checkpoints is whole; begin anew in another"):
            train(make_config(corpus, **WHOLE), run)
    assert steps_kept(run) == [3, 6, 9, 12]


def test_a_failed_save_stops_the_run_at_the_next_step(corpus, tmp_path, monkeypatch):
    reported, report_step = [], report.Reporter.step

    def fail(*_, **__):
        raise ValueError("the disk is on fire")

    def step(self, now, metrics, state):
        reported.append(now)
        report_step(self, now, metrics, state)
        for thread in threading.enumerate():
            if thread.name.startswith("save"):
                thread.join()

    monkeypatch.setattr(checkpoint, "_write_rest", fail)
    monkeypatch.setattr(report.Reporter, "step", step)
    run = tmp_path / "run"
    config = make_config(corpus, train__steps=9, train__checkpoint_every=3)
    message = r"^checkpoint of step 3 was not written: the disk is on fire \(newest checkpoint: none\)$"
    with pytest.raises(InputError, match=message):
        train(config, run)
    assert reported == [1, 2, 3, 4]
    assert steps_kept(run) == []


@pytest.mark.filterwarnings("ignore:coroutine 'async_serialize")  # as orbax_noise does; pytest has filters of its own
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_disk_that_fills(corpus, tmp_path, policy, capfd, caplog):
    """The last good checkpoint stays; the run stops, or goes on to its next checkpoint; one line says so."""
    settings = {"train__steps": 8, "train__checkpoint_every": 2, "train__keep": 1, "train__if_save_fails": policy}
    config = make_config(corpus, **settings)
    with small_disk(tmp_path / "disk", 64 * 2**20) as disk:
        run = disk / "run"
        train(make_config(corpus, **settings | {"train__steps": 2}, optimizer__decay_steps=40), run)
        remount(disk, f"size={used(disk) + 300_000}")
        good, report_step = state_of(run / "checkpoints" / "2"), report.Reporter.step

        def step(self, now, metrics, state):
            report_step(self, now, metrics, state)
            if now == 5:
                assert steps_kept(run) == [2] and state_of(run / "checkpoints" / "2") == good
                remount(disk, f"size={64 * 2**20}")

        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(report.Reporter, "step", step)
            if policy == "stop":
                with pytest.raises(InputError, match=r"^checkpoint of step 4 was not written: .*the disk is full"):
                    train(config, run)
                assert steps_kept(run) == [2] and state_of(run / "checkpoints" / "2") == good
            else:
                train(config, run)
                assert steps_kept(run) == [8]
    gc.collect()  # asyncio tells of what nobody asked for when it is collected
    said = [line for line in capfd.readouterr().err.splitlines() if line.strip() and "training: " not in line]
    lines = [f"warning: checkpoint of step 4 was not written: {run}/checkpoints/4: the disk is full, nothing was "]
    assert len(said) == (policy == "continue") and all(map(str.startswith, said, lines)), said
    assert not caplog.records


def test_two_runs_in_one_folder_are_refused(corpus, tmp_path):
    run = tmp_path / "run"
    message = rf"^{tmp_path}/\.run\.lock: process {os.getpid()} on .* is writing there; wait"
    with locked(tmp_path / ".run.lock"), pytest.raises(InputError, match=message):
        train(make_config(corpus), run)
    assert not run.exists()
    train(make_config(corpus), run)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_sigterm_saves_and_ends_well(tmp_path, compiled):
    """As clusters take machines back: a real process, a real signal; then the same command goes on to the same bits."""
    corpus = random_corpus(tmp_path / "corpus")
    config = make_config(corpus, train__steps=200, train__checkpoint_every=190)
    whole, run = tmp_path / "whole", tmp_path / "run"
    process, _ = start(partial(train_quickly, config, run, compiled, tmp_path / "said"))
    while process.is_alive() and not any("loss" in row for row in read_log(run)):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGTERM)
    process.join(300)
    assert process.exitcode == 0
    stopped = Checkpoint(newest(run)).step
    assert 0 < stopped < 190
    said = f"{run}: stopped by SIGTERM after step {stopped}, which is saved; the same command goes on"
    assert said in (tmp_path / "said").read_text(encoding="utf-8").splitlines()
    train(config, run)
    train(config, whole)
    equal_runs(run, whole)


def test_a_last_checkpoint_that_fails_is_an_error_whatever_the_policy(corpus, tmp_path, monkeypatch):
    """Also where SIGTERM makes it the last: nothing may then say that it was saved."""

    def fail(*_, **__):
        raise ValueError("the disk is on fire")

    report_step = report.Reporter.step

    def step(self, now, metrics, state):
        report_step(self, now, metrics, state)
        if now == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(checkpoint, "_write_rest", fail)
    for steps in (2, 6):
        with pytest.raises(InputError, match=r"^checkpoint of step 2 was not written: the disk is on fire"):
            train(make_config(corpus, train__steps=steps, train__if_save_fails="continue"), tmp_path / str(steps))
        monkeypatch.setattr(report.Reporter, "step", step)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# --- Killed ---


def test_killed_inside_a_save(corpus, whole, tmp_path, compiled):
    """By injection: before Orbax writes, when it has written, before the rename, and before what it replaces goes."""
    config, run = make_config(corpus, **WHOLE | {"train__keep": 1}), tmp_path / "run"
    for moment, left in (
        (("os.mkdir", "/3.incomplete/optimizer"), ["3.incomplete"]),
        (("open", "/3.incomplete/manifest.json"), ["3.incomplete"]),
        (("os.rename", "/3.incomplete"), ["3.incomplete"]),
        (("os.remove", "/3/manifest.json"), ["3", "6"]),
    ):
        assert killed_at(moment, partial(train_quickly, config, run, compiled))
        assert sorted(path.name for path in (run / "checkpoints").glob("[0-9]*")) == left
    train(config, run)
    assert [path.name for path in (run / "checkpoints").glob("[0-9]*")] == ["12"]
    equal_runs(run, whole)


@pytest.mark.slow
def test_killed_at_many_moments(corpus, tmp_path, compiled):
    """At any change to the disk: while it begins, trains, evaluates, saves, and deletes."""
    settings = {"train__steps": 60, "train__checkpoint_every": 2, "train__eval_every": 3, "train__keep": 2}
    config, rng = make_config(corpus, **settings), random.Random(0)
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(config, whole)
    for _ in range(15):
        # A save is about 35 changes, and the deletion that follows as many.
        assert killed_at(rng.randrange(150), partial(train_quickly, config, run, compiled))
    train(config, run)
    assert steps_kept(run) == [58, 60] and not list((run / "checkpoints").glob("[0-9]*.*"))
    equal_runs(run, whole)
