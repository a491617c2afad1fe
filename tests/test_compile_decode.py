"""The compile check of decoding: memory as a queue beside computing, and generate's own loop compiled for TPUs."""

import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from models import model_config, random_params

import polyglot_jax
from polyglot_jax import checkpoint, sharding
from polyglot_jax.__main__ import VERBS
from polyglot_jax.attention import kernel_flops
from polyglot_jax.checkpoint import flatten
from polyglot_jax.cli import run
from polyglot_jax.compile import hlo
from polyglot_jax.compile.cost import Estimator
from polyglot_jax.compile.decode import abstract_weights, main_loop
from polyglot_jax.compile.timeline import LAUNCH, Timeline
from polyglot_jax.config import Config, InputError, MeshConfig, SampleConfig, TrainConfig
from polyglot_jax.generate import Generator
from polyglot_jax.hardware import CHIPS
from polyglot_jax.model import Transformer, _scattered, _stored, split_layers
from polyglot_jax.sampling import Form, Sampling

CHIP = CHIPS["v5e"]


@pytest.mark.parametrize(
    "text, held, space",
    [
        ("bf16[8,6,2048,128]{3,2,1,0:T(8,128)(2,1)}", 8 * 6 * 2048 * 128 * 2, 0),
        ("bf16[8,6,2048,128]{3,1,2,0:T(8,128)(2,1)S(1)}", 8 * 8 * 2048 * 128 * 2, 1),  # 6 heads take 8 lines of a tile
        ("f32[3,100]{1,0:T(4,128)}", 4 * 128 * 4, 0),
        ("s32[5]{0:T(128)S(6)}", 128 * 4, 6),
        ("pred[]{:T(512)}", 1, 0),
        ("f32[3,100]{1,0}", 1200, 0),
        ("f32[3,100]", 1200, 0),
    ],
)
def test_shapes_know_what_their_tiles_hold_and_where_they_lie(text, held, space):
    line = f"ENTRY %main (p: f32[]) -> f32[] {{\n  ROOT %p = {text} parameter(0)\n}}"
    (shape,) = hlo.parse(line).computations["main"].instructions["p"].shapes
    assert (shape.held, shape.space) == (held, space)


# --- The clocks. 15,000 cycles are 10 us; 8.19 MB pass in 10 us. ---

ENTRY = """
%cut (c: f32[2047500], i: s32[]) -> f32[1000] {
  %c = f32[2047500]{0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %part = f32[1000]{0} dynamic-slice(%c, %i), dynamic_slice_sizes={1000}
}

%written (d: f32[2047500], u: f32[1000], j: s32[]) -> f32[2047500] {
  %d = f32[2047500]{0} parameter(0)
  %u = f32[1000]{0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %new = f32[2047500]{0} dynamic-update-slice(%d, %u, %j)
}

%passed (e: f32[2047500]) -> f32[2047500] {
  ROOT %e = f32[2047500]{0} parameter(0)
}

%all (f: f32[2047500]) -> f32[] {
  %f = f32[2047500]{0} parameter(0)
  %g = f32[2047500]{0} fusion(%f), kind=kLoop, calls=%passed
  ROOT %sum = f32[]{:S(6)} reduce(%g, %g), to_apply=%add
}

%quick (q: f32[8]) -> f32[8] {
  ROOT %q = f32[8]{0:S(1)} parameter(0)
}

%slow (s: f32[8]) -> f32[8] {
  %s = f32[8]{0:S(1)} parameter(0)
  ROOT %t = f32[8]{0:S(1)} multiply(%s, %s), backend_config={"estimated_cycles":"15000"}
}

ENTRY %main (p: f32[2047500]) -> f32[8] {
  %p = f32[2047500]{0:T(1024)} parameter(0)
  %w = f32[2047500]{0} bitcast(%p)
  %n = s32[]{:S(6)} constant(0)
  %x = f32[8]{0:S(1)} constant({...})
LINES
}
"""
COPY = (
    "%start = (f32[2047500]{0:S(1)}, f32[2047500]{0}, u32[]{:S(2)}) copy-start(%w)",
    "%done = f32[2047500]{0:S(1)} copy-done(%start)",
)


def work(cycles, name="y"):
    return f'%{name} = f32[8]{{0:S(1)}} multiply(%x, %x), backend_config={{"estimated_cycles":"{cycles}"}}'


def times(*lines, branch=max):
    program = hlo.parse(ENTRY.replace("LINES", "\n".join(f"  {line}" for line in lines)))
    places = [(x, y) for x in range(2) for y in range(4)]
    estimator = Estimator(program, CHIP, 197e12, places, kernel_flops, 1.0)
    return Timeline(program, estimator, CHIP.bandwidth, branch).run("main")


def test_a_copy_in_the_background_hides_behind_computing_until_it_is_needed():
    before = times(COPY[0], work(15_000), COPY[1])
    assert before.end == pytest.approx(10e-6) and before.waiting == pytest.approx(0, abs=1e-12)
    late = times(COPY[0], work(6_000), COPY[1], work(15_000, "z"))
    assert late.end == pytest.approx(20e-6) and late.waiting == pytest.approx(6e-6)
    assert late.traffic == 8_190_000


def test_copies_share_one_queue():
    again = [line.replace("%start", "%start.2").replace("%done", "%done.2") for line in COPY]
    assert times(COPY[0], again[0], COPY[1], again[1]).end == pytest.approx(20e-6)


def test_what_reads_memory_itself_takes_its_cycles_or_its_bytes():
    def reads(cycles):
        return times(f'%r = f32[]{{:S(6)}} fusion(%w), calls=%all, backend_config={{"estimated_cycles":"{cycles}"}}')

    assert reads(3_000).end == pytest.approx(10e-6) and reads(3_000).computing == pytest.approx(2e-6)
    assert reads(30_000).end == pytest.approx(20e-6) and reads(30_000).waiting == 0


@pytest.mark.parametrize(
    "line, size",
    [
        ("f32[1000]{0} fusion(%w, %n), calls=%cut", 8_000),  # 1,000 read, 1,000 written
        ("f32[2047500]{0} fusion(%w, %u, %n), calls=%written", 4_000),
        ("f32[2047500]{0} dynamic-update-slice(%w, %u, %n)", 4_000),
    ],
)
def test_of_an_array_that_is_cut_or_changed_in_place_only_that_part_passes(line, size):
    assert times("%u = f32[1000]{0:S(1)} bitcast(%x)", f"%r = {line}").traffic == size


def test_what_has_no_estimate_takes_a_launch_unless_it_is_small():
    big = "%r = f32[2000]{0:S(1)} add(%v, %v)"
    assert times("%v = f32[2000]{0:S(1)} bitcast(%x)", big).end == pytest.approx(LAUNCH)
    assert times("%r = f32[8]{0:S(1)} add(%x, %x)").end == 0


def test_of_a_conditional_the_branch_asked_for_is_taken():
    line = "%r = f32[8]{0:S(1)} conditional(%n, %x, %x), branch_computations={%quick, %slow}"
    assert times(line, branch=min).end == 0
    assert times(line, branch=max).end == pytest.approx(10e-6)


def test_while_a_collective_is_waited_for_copies_go_on():
    """2 x 4 chips, no rings: 1 and 3 links far, there and back."""
    line = "%r = f32[8]{0:S(1)} all-reduce(%x), replica_groups=[1,8]<=[8]"
    alone, beside = times(line), times(COPY[0], line, COPY[1])
    assert alone.end == alone.exchanging == pytest.approx(8e-6)
    assert beside.end == pytest.approx(10e-6)


def test_a_program_without_a_loop_is_refused():
    with pytest.raises(InputError, match="no loop"):
        main_loop(hlo.parse(ENTRY.replace("LINES", "  ROOT %y = f32[8] add(%x, %x)")))


# --- The program ---


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, tensor=4)])
def test_tokens_are_stored_row_by_row_as_a_scatter_would(mesh):
    slots = jax.random.normal(jax.random.key(0), (4, 8, 16, 8))
    new, positions = jax.random.normal(jax.random.key(1), (4, 8, 1, 8)), jnp.array([[0], [15], [7], [3]])
    expected, store = _scattered(slots, new, positions), jax.jit(_stored)
    assert not np.array_equal(expected, slots)
    new = new.swapaxes(1, 2)
    if mesh is None:
        found, text = store(slots, new, positions), store.lower(slots, new, positions).as_text()
    else:
        on = sharding.make_mesh(mesh)
        slots_at, new_at = (NamedSharding(on, PartitionSpec("data", *axes)) for axes in (("tensor",), (None, "tensor")))
        slots, new = jax.device_put(slots, slots_at), jax.device_put(new, new_at)
        with jax.set_mesh(on):
            found, text = store(slots, new, positions), store.lower(slots, new, positions).compile().as_text()
        assert found.sharding.is_equivalent_to(slots_at, 4)
        assert "collective" not in text and "all-" not in text
    np.testing.assert_array_equal(found, expected)
    assert not re.search(r"stablehlo\.scatter| scatter\(", text)


def small_config(model):
    return Config(model=model, train=TrainConfig(sequence_length=model.context))


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_the_weights_are_those_that_load_gives(quantize, tmp_path):
    """Names, shapes, dtypes and layout on 8 devices: a checkpoint, loaded, and what is compiled for."""
    model = model_config(heads=8, mlp=96)
    checkpoint.save(tmp_path / "model", small_config(model), random_params(model, 0))
    mesh = sharding.make_mesh(MeshConfig(data=2, tensor=4))
    loaded = flatten(polyglot_jax.load(tmp_path / "model", mesh, jnp.bfloat16, quantize).params)
    shapes = flatten(abstract_weights(Transformer(model, jnp.bfloat16, layout="decoding"), mesh, quantize))
    assert shapes.keys() == loaded.keys()
    for name, leaf in loaded.items():
        assert (shapes[name].shape, shapes[name].dtype) == (leaf.shape, leaf.dtype), name
        assert shapes[name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim), name


def test_the_loop_is_the_one_that_generate_runs():
    """Compiled from shapes, the generator's loop takes what its prefill makes, and gives its tokens."""
    model, sample = model_config(), SampleConfig(max_new_tokens=8, temperature=0.0)
    config, params = small_config(model), split_layers(jax.tree.map(jnp.asarray, random_params(model, 0)))
    generator = Generator(Transformer(model, layout="decoding"), config)
    (expected,) = generator.run(params, [[5]], sample, [])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    compiled, abstract = generator.compile(shapes, 1, model.context)
    is_done = jnp.zeros(1, bool)
    key, tokens = jax.random.key(0), jnp.array([[5]], jnp.int32)
    state = generator._start(model.context, 1, Form(False, 0), params, tokens, jnp.ones(1, jnp.int32), is_done, key,
                             jnp.int32(0))  # fmt: skip
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    state = compiled(params, state, is_done, jnp.int32(8), jnp.full(8, -1, jnp.int32), Sampling.of(sample))
    assert state.tokens[0, 1:9].tolist() == expected[0].ids


SIZES = "--model.layers 3 --model.embed 512 --model.heads 8 --model.mlp 1024 --model.context 512 --model.vocab 4096"
SIZES += " --train.sequence-length 512"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--slots 4096", "slots=4096: must be above 1, and at most model.context=512"),
        ("--batch-size 0", "batch_size=0: must be above 0"),
    ],
)
def test_wrong_sizes_are_refused_before_anything_is_compiled(flags, message, capsys):
    assert run(VERBS, "polyglot_jax", f"compile --mode decode --topology v5e:2x2 {SIZES} {flags}".split()) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("more, bytes_a_weight", [("", 2), ("--batch-size 8", 2), ("--quantize int8", 1)])
def test_a_small_decode_step_is_compiled_for_four_tpus(more, bytes_a_weight, tmp_path, capsys):
    """The estimate adds up, is no quicker than memory, and the cache stays as it is written down."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu: pip install -r requirements-tpu.txt")
    out, text = tmp_path / "estimate.json", tmp_path / "loop.txt"
    command = f"compile --mode decode --topology v5e:2x2 {SIZES} {more} --json {out} --dump-hlo {text}"
    assert run(VERBS, "polyglot_jax", command.split()) == 0
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    assert printed.startswith("ESTIMATE, not a measurement: one decode step") and "mesh tensor 4" in printed
    rows, seconds, size = found["rows"], found["seconds"], found["bytes"]
    assert size["cache"] == 2 * 3 * rows * 512 * 512 * 2 / 4
    weights = 3 * (4 * 512**2 + 2 * 512 * 1024) + 4096 * 512  # the embedding's rows are looked up; the rest is small
    assert size["weights"] == pytest.approx(bytes_a_weight * weights / 4, rel=0.03)
    assert seconds["step"] >= size["passed"] / 819e9
    assert seconds["step"] >= seconds["computing"] + seconds["collectives"] + seconds["waiting_for_memory"] - 1e-12
    assert found["bandwidth_utilisation"] == pytest.approx(
        sum((size["weights"], size["cache"])) / 819e9 / seconds["step"]
    )
    assert seconds["step_with_top_k_and_top_p"] > seconds["step"]
    assert (
        3 <= sum(c["times"] for c in found["collectives"] if c["bytes"] >= 512 * 2 * rows) <= 6
    )  # once or twice a layer
    carried = max((line.split(" while(")[0] for line in text.read_text().splitlines() if " while(" in line), key=len)
    assert set(re.findall(rf"bf16\[{rows},2,512,64\]\{{([0-9,]+)", carried)) == {"3,2,1,0"}

    command = command.split(" --json")[0].replace("--model.context 512", "--model.context 99999999")
    assert run(VERBS, "polyglot_jax", command.split()) == 1
    assert "does not fit" in capsys.readouterr().err
