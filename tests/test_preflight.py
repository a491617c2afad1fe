"""What a step needs of a device's memory is said, and refused with what helps, before anything is allocated."""

import dataclasses
import re

import jax
import pytest
from runs import make_config, random_corpus

from polyglot_jax import preflight
from polyglot_jax.__main__ import VERBS
from polyglot_jax.cli import run
from polyglot_jax.config import InputError, MeshConfig
from polyglot_jax.preflight import Memory, check_step, compile_step, gib, on_device
from polyglot_jax.program import Program
from polyglot_jax.sharding import make_mesh
from polyglot_jax.train import train

GIB = 2**30


def program(devices=8, **changes):
    config = make_config(model__embed=64, model__mlp=256, **changes)
    return Program.make(config, make_mesh(config.mesh, jax.devices()[:devices]))


def state_of(program):
    return 2 * on_device(program.abstract.params) + on_device(program.abstract.optimizer)


@pytest.fixture
def compiling_is_an_error(monkeypatch):
    def compile(self):
        raise AssertionError("compiled")

    monkeypatch.setattr(Program, "compile", compile)


def test_bytes_of_a_device_are_those_it_gets():
    found = program(mesh__data=2, mesh__fsdp=4)
    with jax.set_mesh(found.mesh):
        params = found.random_params()
        state = found.first_state(params)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert held == on_device(found.abstract)


@pytest.mark.usefixtures("compiling_is_an_error")
def test_a_state_that_is_too_large_is_refused_with_the_least_fsdp_that_would_do():
    """And what it is said to take then is what it takes."""
    whole = program(mesh__data=8)
    state = state_of(whole)
    with pytest.raises(InputError) as error:
        compile_step(whole, state // 3)
    assert f"needs {gib(state)} for the state alone" in str(error.value)
    assert "--mesh.fsdp 4 --mesh.data 2" in str(error.value)
    split = program(mesh__data=2, mesh__fsdp=4)
    assert state_of(split) <= state // 3 < state_of(program(mesh__data=4, mesh__fsdp=2))
    assert state_of(split) == pytest.approx(state / 4, rel=0.01)
    with pytest.raises(AssertionError, match="compiled"):
        compile_step(split, state // 3)


@pytest.mark.usefixtures("compiling_is_an_error")
@pytest.mark.parametrize(
    "divide, helps",
    [
        (30, "; 32 devices with as much memory each, with --mesh.fsdp 32 "),
        (300, "; take a smaller --preset, or devices with more memory"),
    ],
)
def test_what_no_mesh_of_these_devices_holds_is_told_how_many_would(divide, helps):
    whole = program(mesh__data=8, train__batch_size=32)
    with pytest.raises(InputError, match=helps):
        compile_step(whole, state_of(whole) // divide)


@pytest.fixture(scope="module")
def found():
    """A program with its compiled step's memory."""
    found = program(mesh__data=8, train__batch_size=32, train__remat="value")
    with jax.set_mesh(found.mesh):
        return found, Memory.of(found.compile())


def test_a_step_that_fits_is_said_in_a_line(found):
    program, memory = found
    line = check_step(program, memory, memory.total)
    assert line.startswith(f"memory of a device: {gib(memory.total)} of {gib(memory.total)} (parameters ")
    assert gib(memory.total) in check_step(program, memory, None)
    assert memory.total > state_of(program)


def test_what_helps_is_ranked_by_what_takes_the_most(found):
    program, memory = found
    state = state_of(program)

    def helps(memory):
        with pytest.raises(InputError) as error:
            check_step(program, memory, memory.total - 1)
        message = str(error.value)
        assert message.startswith(f"does not fit: a device needs {gib(memory.total)} of ")
        return re.findall(r"--[\w.-]+ \w+", message)

    activations = ["--train.accumulate 2", "--train.remat full", "--train.batch-size 8"]
    split = ["--mesh.fsdp 2", "--mesh.data 4"]
    assert helps(dataclasses.replace(memory, temporaries=8 * state)) == activations + split
    assert helps(dataclasses.replace(memory, temporaries=state // 2)) == split + activations


def test_of_one_sequence_a_part_is_the_next_thing():
    one = program(mesh__data=8, train__remat="full")
    with pytest.raises(InputError, match=r"helps: --mesh.sequence 2 .*; --mesh.fsdp 2"):
        check_step(one, Memory(0, 0, 0, 8 * GIB, 0), GIB)


def test_a_compiler_that_finds_no_room_is_answered_alike(monkeypatch):
    def full(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 20G of 16G")

    monkeypatch.setattr(Program, "compile", full)
    with pytest.raises(InputError, match=r"no room. What helps: .*--mesh.fsdp 2 .*It says: RESOURCE_EXHAUSTED: 20G"):
        compile_step(program(mesh__data=8), None)


def test_simulated_devices_share_what_the_machine_has_free():
    one, eight = (make_mesh(MeshConfig(), jax.devices()[:count]) for count in (1, 8))
    total = preflight.available(one)
    assert 2**28 < total < 2**50
    assert preflight.available(eight) == pytest.approx(total / 8, rel=0.2)  # others run meanwhile


@pytest.mark.usefixtures("unmeasured_device", "compiled_once")
def test_training_allocates_nothing_that_does_not_fit(tmp_path, monkeypatch, capsys):
    corpus = random_corpus(tmp_path / "corpus")
    config = make_config(corpus, train__steps=2)
    monkeypatch.setattr(Program, "random_params", lambda self: pytest.fail("allocated"))
    monkeypatch.setattr(preflight, "available", lambda mesh: 200_000)
    with pytest.raises(InputError, match="for the state alone"):
        train(config, tmp_path / "run")
    monkeypatch.setattr(preflight, "available", lambda mesh: 700_000)  # room for the state, not for the step
    with pytest.raises(InputError, match=r"activations and the rest .*What helps"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    train(config, tmp_path / "run")
    assert "memory of a device: " in capsys.readouterr().out


def test_a_preset_that_cannot_fit_here_is_refused_at_once(tmp_path, capsys):
    """The state of 12.8B is 192 GiB on each of the 8 copies; nothing of it is made."""
    corpus, out = random_corpus(tmp_path / "corpus", tokens=8000), tmp_path / "run"
    command = f"train --preset polyglot-ko-12.8b --data {corpus} --out {out} --data.heldout 0"
    assert run(VERBS, "polyglot_jax", command.split()) == 1
    error = capsys.readouterr().err
    assert "needs 192.13 GiB for the state alone (parameters 48.03 GiB, optimizer 96.06 GiB, gradients 48.03" in error
    assert "smaller --preset" in error and not out.exists()
