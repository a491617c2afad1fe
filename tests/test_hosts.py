"""Several real processes that train as one: the same losses, and nobody waits for ever for one that is gone."""

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from clusters import Member, cluster, free_port, wait
from runs import make_config, random_corpus

from polyglot_jax import checkpoint, hosts
from polyglot_jax.checkpoint import Checkpoint, newest
from polyglot_jax.config import DistributedConfig, InputError
from polyglot_jax.log import read_log
from polyglot_jax.train import train
from polyglot_jax.two_phases import TwoPhases

EIGHT_DEVICES = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return random_corpus(tmp_path_factory.mktemp("data") / "corpus", tokens=3200)


def write_config(folder: Path, corpus: Path, **changes: object) -> Path:
    """A config.json for --config: eight devices, and weights, batch and heads split over them."""
    file = folder / "config.json"
    file.write_text(make_config(corpus, **EIGHT_DEVICES | changes).to_json(), encoding="utf-8")
    return file


def train_on_two(folder: Path, compiled: Path, file: Path, run: Path, **changes: object) -> list[Member]:
    """Train to the end, in two processes of four devices each."""
    with cluster(folder, compiled, "--config", file, "--out", run, **changes) as members:
        assert wait(members) == [0, 0], [member.said[-3000:] for member in members]
    return members


def losses(run: Path) -> np.ndarray:
    return np.array([row["loss"] for row in read_log(run) if "loss" in row])


def heldout_losses(run: Path) -> np.ndarray:
    return np.array([row["heldout_loss"] for row in read_log(run) if "heldout_loss" in row])


def values_of(path: Path) -> dict[str, np.ndarray]:
    found = Checkpoint(path)
    return {name: found.read(name) for name in found.params}


def steps_kept(run: Path) -> list[int]:
    return sorted(int(folder.name) for folder in (run / "checkpoints").glob("*") if folder.name.isdigit())


def until(is_so, members: list[Member], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end and all(member.process.is_alive() for member in members), [
            member.said[-3000:] for member in members
        ]
        time.sleep(0.01)


# --- The same run ---

WHOLE = {"train__steps": 12, "train__checkpoint_every": 4, "train__eval_every": 4}


@pytest.fixture(scope="module")
def on_one_process(corpus, compiled_once, unmeasured_device, tmp_path_factory):
    run = tmp_path_factory.mktemp("one") / "run"
    train(make_config(corpus, **EIGHT_DEVICES | WHOLE), run)
    return run


def watch_rows(folder: Path, number: int) -> None:
    """Writes down which rows of batches the process reads."""
    from polyglot_jax.data import Batches

    read = Batches.rows

    def rows(self, step, start, stop):
        with open(folder / f"rows{number}.txt", "a") as file:
            file.write(f"{step} {start} {stop}\n")
        return read(self, step, start, stop)

    Batches.rows = rows


@pytest.fixture(scope="module")
def on_two_processes(corpus, compiled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    file = write_config(folder, corpus, **WHOLE)
    members = train_on_two(folder, compiled, file, folder / "run", setup=partial(watch_rows, folder))
    return folder, members


def close(one: Path, two: Path) -> None:
    """Losses and what is left of the runs are the same but for rounding."""
    np.testing.assert_allclose(losses(one), losses(two), rtol=0, atol=1e-5)
    np.testing.assert_allclose(heldout_losses(one), heldout_losses(two), rtol=0, atol=1e-5)
    ours, theirs = values_of(newest(one)), values_of(newest(two))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-5)


def test_two_processes_train_as_one(on_one_process, on_two_processes):
    folder, members = on_two_processes
    run = folder / "run"
    assert len(losses(run)) == 12 and len(set(losses(run))) == 12
    close(run, on_one_process)
    assert steps_kept(run) == [4, 8, 12]
    assert not [path.name for path in (run / "checkpoints").iterdir() if not path.name.isdigit()]
    # Both wrote a share of the arrays, and only the first spoke.
    for part in ("params", "optimizer"):
        for number in (0, 1):
            assert list((newest(run) / part / f"ocdbt.process_{number}" / "d").iterdir())
    assert f"wrote {run}/curves.png" in members[0].said and "held-out loss" in members[0].said
    # Gloo's threads write in between one another.
    ours = [line for line in members[1].said.splitlines() if "[Gloo]" not in line and "peer ranks" not in line]
    assert len(ours) == 1 and ours[0].startswith("process 1 of 2: distributed.coordinator=127.0.0.1:"), ours


def test_a_process_reads_only_its_rows(on_two_processes):
    folder, _ = on_two_processes
    for number, mine in ((0, ("0 2", "2 4")), (1, ("4 6", "6 8"))):
        read = (folder / f"rows{number}.txt").read_text().splitlines()
        assert {line.split(" ", 1)[1] for line in read} == set(mine)
        assert {int(line.split()[0]) for line in read} == set(range(12))


# --- One of them is stopped, or gone ---


def slowly(number: int) -> None:
    """Leaves time to do something to the processes while they train."""
    from polyglot_jax.report import Reporter

    report_step = Reporter.step

    def step(self, *args):
        report_step(self, *args)
        time.sleep(0.05)

    Reporter.step = step


def has_begun(run: Path) -> bool:
    return any("loss" in row for row in read_log(run))


def test_sigterm_to_one_stops_all_and_the_run_goes_on_with_another_number(corpus, compiled, tmp_path):
    """Stopped on two processes, gone on with on one, then on two again: the losses of a run left in peace."""
    run, long = tmp_path / "run", {"train__steps": 2000}
    with cluster(
        tmp_path, compiled, "--config", write_config(tmp_path, corpus, **long), "--out", run, setup=slowly
    ) as members:
        until(lambda: has_begun(run), members)
        os.kill(members[1].process.pid, signal.SIGTERM)
        assert wait(members) == [0, 0], [member.said[-3000:] for member in members]
    stopped = Checkpoint(newest(run)).step
    assert 0 < stopped < 1000 and steps_kept(run) == [stopped]
    said = f"{run}: stopped by SIGTERM after step {stopped}, which is saved; the same command goes on"
    assert said in members[0].said.splitlines()
    train(make_config(corpus, **EIGHT_DEVICES | {"train__steps": stopped + 3}), run)
    train_on_two(tmp_path, compiled, write_config(tmp_path, corpus, train__steps=stopped + 6), run)
    whole = tmp_path / "whole"
    train(make_config(corpus, **EIGHT_DEVICES | {"train__steps": stopped + 6}), whole)
    assert len(losses(run)) == stopped + 6
    np.testing.assert_allclose(losses(run), losses(whole), rtol=0, atol=1e-5)
    assert heldout_losses(run)[-1] == pytest.approx(heldout_losses(whole)[-1], abs=1e-5)


def says_that_another_is_lost(member: Member, status: int | None) -> None:
    """By a connection that breaks, where the process sees it; else by the engine's heartbeat."""
    if status == 1:
        assert len(member.errors) == 1, member.said
        lost = f"error: process {member.number}: can no longer compute with the others: "
        assert member.errors[0].startswith(lost), member.said
        assert member.errors[0].endswith("the same command on all goes on from the newest checkpoint")
        assert "Traceback" not in member.said
    else:
        assert status == -signal.SIGABRT, member.said[-3000:]
        assert "This most likely indicates that another task died" in member.said


@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(corpus, compiled, on_one_process, tmp_path, killed):
    run, file = tmp_path / "run", write_config(tmp_path, corpus, **WHOLE)
    with cluster(tmp_path, compiled, "--config", file, "--out", run, setup=slowly, heartbeat=10) as members:
        until(lambda: 4 in steps_kept(run), members)
        os.kill(members[killed].process.pid, signal.SIGKILL)
        left, status = members[1 - killed], wait(members)[1 - killed]
    says_that_another_is_lost(left, status)
    train(make_config(corpus, **EIGHT_DEVICES | WHOLE), run)
    close(run, on_one_process)
    assert steps_kept(run) == [4, 8, 12]


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others_within_the_heartbeat(corpus, compiled, tmp_path):
    """Stopped, not killed: its connections stay open, so only the engine's heartbeat tells."""
    run, file = tmp_path / "run", write_config(tmp_path, corpus, train__steps=2000)
    with cluster(tmp_path, compiled, "--config", file, "--out", run, setup=slowly, heartbeat=10) as members:
        until(lambda: has_begun(run), members)
        os.kill(members[1].process.pid, signal.SIGSTOP)
        start = time.monotonic()
        members[0].process.join(90)
        assert members[0].process.exitcode == -signal.SIGABRT, members[0].said[-3000:]
        assert time.monotonic() - start < 60
    assert "stopped sending heartbeats" in members[0].said
    assert "most recent call first" in members[0].said  # where it waited


def fail_to_save(number: int) -> None:
    """The second process cannot write its part of a checkpoint, from step 8 on."""
    from polyglot_jax import checkpoint

    start_tree = checkpoint._start_tree

    def start(path, tree):
        wait = start_tree(path, tree)

        def fail():
            wait()
            if number == 1 and int(path.parent.name.split(".")[0]) >= 8:
                raise OSError(28, "No space left on device")

        return fail

    checkpoint._start_tree = start


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_save_that_fails_on_one_process_is_said_by_all(corpus, compiled, tmp_path, policy):
    run = tmp_path / "run"
    file = write_config(tmp_path, corpus, **WHOLE | {"train__if_save_fails": policy, "train__steps": 14})
    with cluster(tmp_path, compiled, "--config", file, "--out", run, setup=fail_to_save) as members:
        # On a busy machine the engine may end the one that is slower to part; both have said why by then.
        assert set(wait(members)) <= {1, -signal.SIGABRT}, [member.said[-3000:] for member in members]
    failed = 8 if policy == "stop" else 14  # the last one must succeed, whatever the policy
    for member in members:
        assert len(member.errors) == 1, member.said
        assert member.errors[0].startswith(f"error: checkpoint of step {failed} was not written: ")
        assert "No space left on device" in member.errors[0] or "the disk is full" in member.errors[0]
    warned = [line for line in members[0].said.splitlines() if "training goes on" in line]
    assert len(warned) == (0 if policy == "stop" else 2)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["4"]
    Checkpoint(newest(run)).check()
    train_on_two(tmp_path, compiled, file, run)
    assert steps_kept(run) == [4, 8, 12, 14]


def hang_in_a_save(number: int) -> None:
    """The second process waits for ever for its file system, as it writes the checkpoint of step 8."""
    from polyglot_jax import checkpoint

    start_tree = checkpoint._start_tree

    def start(path, tree):
        wait = start_tree(path, tree)
        is_hanging = number == 1 and path.parent.name.startswith("8.")
        return threading.Event().wait if is_hanging else wait

    checkpoint._start_tree = start


@pytest.mark.slow
def test_a_process_that_lives_but_does_not_come_is_not_waited_for_longer_than_asked(corpus, compiled, tmp_path):
    """Also where a save that fails is to be gone past: there is nobody to train with."""
    run, file = tmp_path / "run", write_config(tmp_path, corpus, **WHOLE | {"train__if_save_fails": "continue"})
    flags = ["--config", file, "--out", run, "--distributed.meeting-timeout", 20]
    with cluster(tmp_path, compiled, *flags, setup=hang_in_a_save) as members:
        members[0].process.join(240)
        assert members[0].process.exitcode == 1, members[0].said[-3000:]
        assert wait(members, 60)[1] == -signal.SIGABRT, members[1].said[-3000:]
    said = (
        "error: checkpoint of step 8 was not written: process 0: others did not come within "
        "distributed.meeting_timeout=20 seconds: "
    )
    assert len(members[0].errors) == 1 and members[0].errors[0].startswith(said), members[0].said
    train(make_config(corpus, **EIGHT_DEVICES | WHOLE), run)
    assert steps_kept(run) == [4, 8, 12]


@pytest.fixture
def nobody_comes(monkeypatch):
    """One of two processes, as it meets the others; counts how often it waited."""
    waited = []

    def wait(**_):
        waited.append(1)
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: process 1 is missing")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(ocp.multihost, "get_barrier_sync_fn", lambda: wait)
    return waited


def test_an_error_of_its_own_is_said_by_a_process_that_misses_another(nobody_comes):
    said = "^no space left; and then process 0: others did not come within"
    with pytest.raises(hosts.Missing, match=said), hosts.together():
        raise OSError("no space left")
    assert not hosts.meet("place") and len(nobody_comes) == 2


def test_a_save_waits_for_a_missing_process_once(nobody_comes):
    held = contextlib.ExitStack()
    left = held.enter_context(tempfile.TemporaryDirectory())
    save = TwoPhases(held, lambda: [1], lambda parts: pytest.fail("committed alone"))
    with pytest.raises(
        hosts.Missing, match=r"within distributed\.meeting_timeout=3600 seconds: .* process 1 is missing"
    ):
        save.result()
    assert len(nobody_comes) == 1 and not Path(left).exists()


def fail_to_read(number: int) -> None:
    from polyglot_jax.data import Batches

    read = Batches.rows

    def rows(self, step, start, stop):
        if number == 1 and step == 6:
            raise InputError("text_document.bin: token 7 is 400, but the tokenizer's ids end at 299")
        return read(self, step, start, stop)

    Batches.rows = rows


@pytest.mark.slow
def test_an_error_of_one_process_alone_ends_all(corpus, compiled, tmp_path):
    """In the middle of training, where the others wait for it in a step; a checkpoint was being written."""
    run, file = tmp_path / "run", write_config(tmp_path, corpus, **WHOLE)
    with cluster(tmp_path, compiled, "--config", file, "--out", run, setup=fail_to_read, heartbeat=10) as members:
        first, second = wait(members)
    assert second == 1
    assert members[1].errors == ["error: text_document.bin: token 7 is 400, but the tokenizer's ids end at 299"]
    says_that_another_is_lost(members[0], first)
    train_on_two(tmp_path, compiled, file, run)
    assert steps_kept(run) == [4, 8, 12] and not list(tmp_path.glob(".*"))


# --- Beginning ---


@pytest.mark.slow
def test_weights_to_begin_with_are_read_by_all(corpus, compiled, on_one_process, tmp_path):
    """From a run's checkpoint, and from the same weights as they are converted."""
    converted = tmp_path / "converted"
    checkpoint.copy(converted, Checkpoint(newest(on_one_process)))
    first = []
    for name, init in (("run", on_one_process), ("copy", converted)):
        file, run = write_config(tmp_path, corpus, train__steps=2), tmp_path / name
        with cluster(tmp_path, compiled, "--config", file, "--out", run, "--init", init) as members:
            assert wait(members) == [0, 0], [member.said[-3000:] for member in members]
        first.append(heldout_losses(run)[0])
    assert first == pytest.approx([heldout_losses(on_one_process)[-1]] * 2, abs=1e-5)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_found_whoever_checks_the_file(corpus, compiled, on_one_process, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(on_one_process, run)
    for step in (12, 8):  # the largest file, and the next: they fall to different processes
        files = sorted(
            (run / "checkpoints" / str(step)).rglob("*"), key=lambda file: file.is_file() * file.stat().st_size
        )
        file = files[-1 if step == 12 else -2]
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    file = write_config(tmp_path, corpus, **WHOLE)
    members = train_on_two(tmp_path, compiled, file, run)
    for step in (12, 8):
        assert f"set aside as {step}.damaged; going on from {run}/checkpoints/4" in members[0].said
    assert "warning" not in members[1].said
    close(run, on_one_process)


@pytest.mark.slow
def test_what_a_process_lacks_or_has_otherwise_is_said_by_all(corpus, compiled, tmp_path):
    run, file = tmp_path / "run", write_config(tmp_path, corpus, **WHOLE)
    (tmp_path / "1").mkdir()
    for change, message in (
        ("--train.seed=1", "other settings than those of process 0: train.seed is 0 there, 1 here"),
        (f"--data.paths={tmp_path / 'none'}", f"data.paths={tmp_path / 'none'}: "),
        ("--mesh.data=1", "mesh.fsdp=2 x mesh.tensor=2: uses 4 of the 8 devices of 2 processes"),
    ):
        common = ["--config", str(file), "--out", str(run)]
        with cluster(tmp_path, compiled, *common, others={1: [change]}) as members:
            # On a busy machine one may find the other gone before it has parted from it: the engine ends it then.
            assert set(wait(members)) <= {1, -signal.SIGABRT}, [member.said[-3000:] for member in members]
        assert members[1].errors[0].startswith(f"error: {message}"), members[1].said
        assert members[0].errors[0].startswith(f"error: process 1: {message}"), members[0].said
        assert not run.exists()


@pytest.mark.parametrize("present", [0, 1])
def test_processes_that_do_not_come_are_not_waited_for_longer_than_asked(compiled, tmp_path, present):
    arguments = ["--out", tmp_path / "run", "--distributed.start-timeout", 2]
    with cluster(tmp_path, compiled, *arguments, numbers=[present]) as members:
        assert wait(members) == [1]
    expected = f"error: process {present} of 2: distributed.coordinator=127.0.0.1:"
    assert len(members[0].errors) == 1 and members[0].errors[0].startswith(expected)
    assert "not all processes came together there within distributed.start_timeout=2 seconds" in members[0].said


@pytest.mark.slow
def test_a_port_that_is_taken_is_said(compiled, tmp_path):
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        place = f"127.0.0.1:{server.getsockname()[1]}"
        with cluster(tmp_path, compiled, "--out", tmp_path / "run", numbers=[0], place=place) as members:
            assert wait(members) == [1]
    assert members[0].errors == [
        f"error: process 0 of 2: distributed.coordinator={place}: the port is taken; name another"
    ]


@pytest.mark.slow
def test_another_number_of_processes_on_one_is_refused(corpus, compiled, tmp_path):
    """The engine would go on with the number that process 0 was given."""
    place = f"127.0.0.1:{free_port()}"
    arguments = ["--config", write_config(tmp_path, corpus), "--out", tmp_path / "run"]
    with (
        cluster(tmp_path / "right", compiled, *arguments, numbers=[0], place=place) as right,
        cluster(tmp_path / "wrong", compiled, *arguments, numbers=[1], processes=3, place=place) as wrong,
    ):
        assert wait(wrong) == [1]
        assert wait(right)[0] in (1, -signal.SIGABRT)
    said = f"error: process 1 of 3: distributed.coordinator={place}: 2 processes came; give all the same"
    assert len(wrong[0].errors) == 1 and wrong[0].errors[0].startswith(said), wrong[0].said
    assert not (tmp_path / "run").exists()


def test_auto_without_a_cluster_is_an_error(compiled, tmp_path):
    with cluster(tmp_path, compiled, "--out", tmp_path / "run", numbers=[0], place="auto") as members:
        assert wait(members) == [1]
    said = "error: distributed.coordinator=auto: coordinator_address should be defined; give HOST:PORT, and "
    assert len(members[0].errors) == 1 and members[0].errors[0].startswith(said), members[0].said


@pytest.mark.slow
def test_a_cluster_that_slurm_describes_is_found(corpus, compiled, tmp_path):
    """Two tasks of a job, as Slurm's environment tells them of each other; on this machine, and without Slurm."""
    run, file = tmp_path / "run", write_config(tmp_path, corpus, train__steps=2)
    with cluster(tmp_path, compiled, "--config", file, "--out", run, place="auto", setup=as_slurm) as members:
        assert wait(members) == [0, 0], [member.said[-3000:] for member in members]
    assert steps_kept(run) == [2]


def as_slurm(number: int) -> None:
    job = {"JOB_ID": "4711", "STEP_NODELIST": "localhost", "NTASKS": "2", "PROCID": str(number), "LOCALID": str(number)}
    os.environ.update({f"SLURM_{name}": value for name, value in job.items()})


@pytest.mark.parametrize(
    "given, message",
    [
        ({"coordinator": "host:1", "processes": 2}, "distributed.process=None: must be given with"),
        ({"coordinator": "host:1", "process": 0}, "distributed.processes=None: must be given with"),
        ({"processes": 2, "process": 0}, "distributed.processes=2: must not be given with"),
        ({"coordinator": "auto", "process": 1}, "distributed.process=1: must not be given with"),
        ({"coordinator": "host", "processes": 2, "process": 0}, "distributed.coordinator=host: must be HOST:PORT"),
        ({"coordinator": ":80", "processes": 2, "process": 0}, "distributed.coordinator=:80: must be HOST:PORT"),
        ({"coordinator": "host:70000", "processes": 2, "process": 0}, "distributed.coordinator=host:70000: must be"),
        ({"coordinator": "host:1", "processes": 2, "process": 2}, "distributed.process=2: must be from 0 to 1"),
        ({"coordinator": "host:1", "processes": 2, "process": -1}, "distributed.process=-1: must be from 0 to 1"),
        ({"coordinator": "host:1", "processes": 0, "process": 0}, "distributed.processes=0: must be above 0"),
        ({"start_timeout": 0}, "distributed.start_timeout=0: must be above 0"),
        ({"meeting_timeout": 0}, "distributed.meeting_timeout=0: must be above 0"),
        ({"heartbeat_timeout": -1}, "distributed.heartbeat_timeout=-1: must be above 0"),
    ],
)
def test_wrong_flags_are_named(given, message):
    with pytest.raises(InputError) as caught:
        DistributedConfig(**given)
    assert str(caught.value).startswith(message)


def test_one_process_has_nobody_to_ask():
    with hosts.cluster(DistributedConfig()), hosts.together():
        assert hosts.is_first() and hosts.gather("text") == ["text"] and hosts.meet("place")
    with pytest.raises(ValueError, match="its own"), hosts.together():
        raise ValueError("its own")
