"""The compile check: what is read from a compiled program's text, and what it is taken to cost."""

import dataclasses
import importlib.util
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from polyglot_jax.__main__ import VERBS
from polyglot_jax.attention import kernel_flops
from polyglot_jax.cli import run
from polyglot_jax.compile import command, decode, hlo
from polyglot_jax.compile.cost import Cost, Estimator, replica_groups
from polyglot_jax.compile.output import new_file
from polyglot_jax.compile.topology import describe
from polyglot_jax.config import Config, InputError
from polyglot_jax.hardware import CARDS, CHIPS
from polyglot_jax.preflight import Memory

CHIP = CHIPS["v5e"]


def text_of(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def cost(text, places=((0, 0),), efficiency=0.5):
    return Estimator(hlo.parse(text), CHIP, 197e12, places, kernel_flops, efficiency).cost()


# --- Loops ---


def scan(length):
    return lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c) @ c, None), x, length=length)[0]


def nested(x):
    return jax.lax.fori_loop(0, 7, lambda _, c: scan(5)(c) + 1, x)


def by_threes(x):
    return jax.lax.while_loop(lambda s: s[0] < 20, lambda s: (s[0] + 3, jnp.sin(s[1]) @ s[1]), (2, x))[1]


def until_equal(x):
    return jax.lax.while_loop(lambda s: s[0] <= 20, lambda s: (s[0] + 1, jnp.sin(s[1]) @ s[1]), (2, x))[1]


@pytest.mark.parametrize(
    "function, trips",
    [
        (scan(13), [13]),
        (lambda x: jax.lax.fori_loop(3, 17, lambda _, c: jnp.sin(c) @ c, x), [14]),
        (nested, [5, 7]),
        (by_threes, [6]),
        (until_equal, [19]),
        (jax.grad(lambda x: scan(9)(x).sum()), [9, 9]),
    ],
)
def test_trip_counts_of_real_loops(function, trips):
    assert sorted(cost(text_of(function, jnp.ones((8, 8)))).loops.values()) == trips


@pytest.mark.parametrize("direction, trips", [("GT", 6), ("GE", 7)])
def test_a_limit_may_stand_before_the_counter(direction, trips):
    """XLA turns such round, where it optimises."""
    turned = LOOP.replace("compare(%j, %limit), direction=LT", f"compare(%limit, %j), direction={direction}")
    assert cost(turned).loops == {"loop": trips}


def test_a_loop_that_depends_on_data_is_refused():
    def function(x):
        return jax.lax.while_loop(lambda c: c.sum() < 100, lambda c: c * 2, x)

    with pytest.raises(InputError, match="how often it runs cannot be told"):
        cost(text_of(function, jnp.ones(8)))


@pytest.mark.parametrize(
    "old, new, reason",
    [
        ("direction=LT", "direction=NE", "not of the form counter < limit"),
        ("constant(6)", "constant(1.5)", "its limit is a constant, no integer"),
        ("add(%i, %one)", "multiply(%i, %one)", "its counter does not grow by a constant"),
        ("compare(%j, %limit)", "compare(%j, %other)", "its limit changes while it runs"),
    ],
)
def test_a_loop_of_another_form_is_refused(old, new, reason):
    assert cost(LOOP).loops == {"loop": 6}
    assert old in LOOP
    with pytest.raises(InputError, match=reason):
        cost(LOOP.replace(old, new))


# --- Costs ---

# As the TPU compiler writes: a product of 300 cycles in a loop that runs 6 times, one of 1,000 outside it, a kernel.
LOOP = """HloModule example, is_scheduled=true

%body (state: (s32[], bf16[8,128], s32[])) -> (s32[], bf16[8,128], s32[]) {
  %state = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}, /*index=2*/s32[]) parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%state), index=1
  %n = s32[] get-tuple-element(%state), index=2
  %m = s32[] add(%n, %one)
  %next = s32[]{:T(128)} add(%i, %one)
  %y = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%x), calls=%inside, backend_config={"x":{"estimated_cycles":"300"}}
  ROOT %out = (s32[], bf16[8,128], s32[]) tuple(%next, %y, %m)
}

%inside (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  ROOT %b = bf16[8,128]{1,0} multiply(%a, %a), backend_config={"window_config":{"estimated_cycles":"77"}}
}

%condition (before: (s32[], bf16[8,128], s32[])) -> pred[] {
  %before = (s32[], bf16[8,128], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%before), index=0
  %other = s32[] get-tuple-element(%before), index=2
  %limit = s32[]{:T(128)} constant(6)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %copied = s32[] copy(%zero), backend_config={"window_config":{"estimated_cycles":"10"}}
  %start = (s32[], bf16[8,128], s32[]) tuple(%copied, %p, %zero)
  %loop = (s32[], bf16[8,128], s32[]) while(%start), condition=%condition, body=%body, metadata={op_name="layers"}
  %z = bf16[8,128]{1,0} get-tuple-element(%loop), index=1
  ROOT %last = bf16[8,128]{1,0} convolution(%z, %p), backend_config={"window_config":{"estimated_cycles":"1000"}}
}
"""


def in_body(line):
    return LOOP.replace("  ROOT %out", f"  {line}\n  ROOT %out")


def test_cycles_are_multiplied_through_loops_and_a_fusion_counts_once():
    assert cost(LOOP).compute == pytest.approx((10 + 6 * 300 + 1000) / 1.5e9)


def test_what_has_no_estimate_is_costed_by_its_bytes():
    assert cost(in_body("%s = f32[1000,2] sort(%x), dimensions={0}")).moved - cost(LOOP).moved == pytest.approx(
        6 * (8000 + 8 * 128 * 2) / 819e9
    )


def test_kernels_are_costed_by_their_products():
    call = '%splash_mha_fwd_residuals.1 = bf16[4,2,512,128] custom-call(%x, %q), custom_call_target="tpu_custom_call"'
    found = cost(in_body(f"%q = bf16[4,2,512,128] bitcast(%x)\n  {call}"))
    flops = 2 * 2 * 4 * 2 * 512 * 512 * 128
    assert [(kernel.times, kernel.flops) for kernel in found.kernels] == [(6, flops)]
    assert found.kernel_seconds == pytest.approx(6 * flops / 98.5e12)
    assert found.step == pytest.approx(found.compute + found.moved + found.kernel_seconds)


def test_a_kernel_of_one_row_has_no_batch_axis():
    call = '%splash_mha_dq.1 = bf16[2,512,128] custom-call(%t, %q), custom_call_target="tpu_custom_call"'
    found = cost(in_body(f"%t = s8[1,4,4] bitcast(%x)\n  %q = bf16[2,512,128] bitcast(%x)\n  {call}"))
    assert [kernel.flops for kernel in found.kernels] == [3 * 2 * 2 * 512 * 512 * 128]


@pytest.mark.parametrize("name, target", [("mystery.1", "tpu_custom_call"), ("splash_mha_fwd.1", "x"), ("c.1", "TopK")])
def test_a_kernel_whose_products_are_not_known_is_refused(name, target):
    with pytest.raises(InputError, match=f"{name}: custom call to {target} .*cannot be estimated"):
        cost(
            in_body(f'%{name} = bf16[8,128] custom-call(%x), custom_call_target="{target}", metadata={{op_name="a/b"}}')
        )


WRAPPED = """
%hidden (c: bf16[4,2,512,128]) -> bf16[4,2,512,128] {
  %c = bf16[4,2,512,128] parameter(0)
  %s = bf16[4,2,512,128] custom-call(%c), custom_call_target="Sharding"
  ROOT %splash_mha_dq.1 = bf16[4,2,512,128] custom-call(%s), custom_call_target="tpu_custom_call"
}

%around (d: bf16[4,2,512,128]) -> bf16[4,2,512,128] {
  %d = bf16[4,2,512,128] parameter(0)
  ROOT %f = bf16[4,2,512,128] fusion(%d), kind=kCustom, calls=%hidden
}

ENTRY"""


@pytest.mark.parametrize(
    "call, cycles",
    [
        ('bf16[4,2,512,128] fusion(%q), calls=%hidden, backend_config={"estimated_cycles":"5"}', 5),
        ("((bf16[4,2,512,128]), bf16[4,2,512,128], s32[]) async-start(%q), calls=%hidden", 0),
        ("((bf16[4,2,512,128]), bf16[4,2,512,128], s32[]) async-start(%q), calls=%around", 0),
    ],
)
def test_kernels_inside_fusions_and_what_starts_others_are_costed_or_refused(call, cycles):
    text = in_body(f"%q = bf16[4,2,512,128] bitcast(%x)\n  %u = {call}").replace("\nENTRY", WRAPPED)
    found, flops = cost(text), 3 * 2 * 4 * 2 * 512 * 512 * 128
    assert [(kernel.times, kernel.flops) for kernel in found.kernels] == [(6, flops)]
    assert found.compute - cost(LOOP).compute == pytest.approx(6 * cycles / 1.5e9)
    with pytest.raises(InputError, match=r"mystery.1: custom call to tpu_custom_call .*cannot be estimated"):
        cost(text.replace("splash_mha_dq.1", "mystery.1"))


def test_a_loop_inside_a_wrapper_is_refused():
    loop = "%again = (s32[], bf16[8,128], s32[]) while(%a), condition=%condition, body=%body\n  ROOT %b"
    with pytest.raises(InputError, match="%y: holds a while, %again, that cannot be estimated there"):
        cost(LOOP.replace("ROOT %b", loop))


TORUS = [(x, y) for x in range(16) for y in range(16)]


def collective(line, places=TORUS):
    (found,) = cost(in_body(line), places).collectives
    return found


@pytest.mark.parametrize(
    "line, size, link_bytes",
    [
        # 16 x 16 chips, both axes closed to rings: four links.
        ("%g = bf16[256,4096] all-gather(%x), replica_groups=[1,256]<=[256], dimensions={0}", 2 << 20, 255 / 256 / 4),
        ("%g = bf16[4,4] reduce-scatter(%x), replica_groups=[1,256]<=[256], dimensions={0}", 2048, 255 / 256 / 4),
        ("%g = bf16[8,128] all-reduce(%x), replica_groups=[1,256]<=[256]", 2048, 2 * 255 / 256 / 4),
        # One axis: two links.
        ("%g = bf16[8,128] all-reduce(%x), replica_groups=[16,16]<=[256]", 2048, 2 * 15 / 16 / 2),
        ("%g = bf16[8,128] all-reduce(%x), replica_groups=[16,16]<=[16,16]T(1,0)", 2048, 2 * 15 / 16 / 2),
        ("%g = bf16[8,128] all-reduce(%x), replica_groups=mesh['a'=16,'b'=16] {'b'}, to_apply=%inside", 2048, 15 / 16),
        ("%g = bf16[8,128] all-to-all(%x), replica_groups=[16,16]<=[256]", 2048, 4 / 2),
        # Each byte goes along both axes, so that their links do not share the work.
        ("%g = bf16[8,128] all-to-all(%x), replica_groups=[1,256]<=[256]", 2048, 4 / 2),
        # Half of an axis is no ring: one link. With a whole one beside it, three.
        ("%g = bf16[8,128] all-reduce(%x), replica_groups=[32,8]<=[256]", 2048, 2 * 7 / 8),
        ("%g = bf16[8,128] all-to-all(%x), replica_groups=[32,8]<=[256]", 2048, 2),
        ("%g = bf16[8,128] all-reduce(%x), replica_groups=[2,128]<=[16,2,8]T(1,0,2)", 2048, 2 * 127 / 128 / 3),
        # Eight pairs, or two rings of eight, over the same links of an axis; pairs that are not closed to a ring.
        ("%g = bf16[8,128] all-reduce(%x), replica_groups=[128,2]<=[16,2,8]T(0,2,1)", 2048, 8 * 2 / 2 / 2),
        ("%g = bf16[8,128] all-reduce(%x), replica_groups=[32,8]<=[16,8,2]T(0,2,1)", 2048, 2 * 2 * 7 / 8 / 2),
        ("%g = bf16[8,128] all-reduce(%x), replica_groups=[128,2]<=[16,4,2,2]T(0,1,3,2)", 2048, 2 * 2 / 2),
        ("%g = bf16[8,128] all-reduce(%x), replica_groups=[64,4]<=[16,2,4,2]T(0,2,1,3)", 2048, 4 * 2 * 3 / 4 / 2),
        ("%g = bf16[8,128] collective-permute(%x), source_target_pairs={{0,1},{1,0}}", 2048, 1),
        ("%g = bf16[8,128] all-reduce(%x), replica_groups={{0},{1}}", 2048, 0),
    ],
)
def test_collectives_cost_the_bytes_on_their_busiest_link(line, size, link_bytes):
    found = collective(line)
    assert (found.times, found.bytes, found.overlaps) == (6, size, False)
    assert found.link_bytes == pytest.approx(size * link_bytes)


@pytest.mark.parametrize(
    "kind, groups, hops",
    [
        ("all-reduce", "replica_groups=[1,256]<=[256]", 2 * (8 + 8)),  # half of each ring, there and back
        ("all-gather", "replica_groups=[1,256]<=[256]", 8 + 8),
        ("all-reduce", "replica_groups=[16,16]<=[256]", 2 * 8),
        ("all-reduce", "replica_groups=[128,2]<=[256]", 2),
        ("all-gather", "replica_groups=[32,8]<=[256]", 7),  # half a ring: a line
        ("all-gather", "replica_groups=[32,8]<=[16,8,2]T(0,2,1)", 8),  # every second chip of a ring
        ("collective-permute", "source_target_pairs={{0,1},{1,0}}", 1),
    ],
)
def test_a_collective_takes_its_bytes_or_its_hops(kind, groups, hops):
    small, large = (
        collective(f"%b = bf16[{size}] bitcast(%x)\n  %g = bf16[{size}] {kind}(%b), {groups}") for size in (8, 1 << 26)
    )
    assert small.seconds == pytest.approx(hops * 1e-6)
    assert large.seconds == pytest.approx(large.link_bytes / 45e9)


def test_an_axis_that_is_no_ring_has_one_link():
    line = "%g = bf16[8,128] all-reduce(%x), replica_groups=[1,8]<=[8]"
    assert collective(line, [(0, y) for y in range(8)]).link_bytes == pytest.approx(2048 * 2 * 7 / 8)


# The last bytes of a body's result go to the other slices while it computes.
BETWEEN = """
  %t = token[] after-all()
  %send = (f32[500,250], u32[], token[]) send(%x, %t), frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.6_0"}
  %recv = (f32[500,250], u32[], token[]) recv(%t), frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.6_0",_xla_megascale_transfer_type="ALL_REDUCE"}
  %w = bf16[8,128]{1,0} multiply(%x, %x), backend_config={"estimated_cycles":"150000"}
  %sent = token[] send-done(%send)
  %got = (f32[500,250], token[]) recv-done(%recv)
"""  # noqa: E501


def between(text, slices):
    found = Estimator(hlo.parse(in_body(text.strip())), CHIP, 197e12, TORUS, kernel_flops, 0.5, slices).cost()
    (one,) = found.collectives
    return one, found.waiting


@pytest.mark.parametrize("slices, passed", [(2, 500_000), (4, 750_000)])
def test_what_goes_between_slices_takes_the_network_and_waits_for_what_computing_does_not_cover(slices, passed):
    found, waiting = between(BETWEEN, slices)
    assert (found.kind, found.times, found.bytes, found.devices) == ("all-reduce between slices", 6, 500_000, slices)
    # Of each chip, twice (n - 1)/n of its bytes at 3.125 GB/s; it computes for 0.1 ms meanwhile.
    assert found.seconds == pytest.approx(passed / 3.125e9)
    assert found.covered == pytest.approx(min(found.seconds, 1e-4))
    assert waiting == pytest.approx(6 * (passed / 3.125e9 - 1e-4))


def test_another_transfer_to_the_host_is_refused():
    with pytest.raises(InputError, match="a transfer of kind ALL_TO_ALL, which is not known"):
        between(BETWEEN.replace("ALL_REDUCE", "ALL_TO_ALL"), 2)


def test_groups_are_read_in_every_form():
    def groups(text):
        return replica_groups(hlo.Instruction("g", "all-reduce", (), (), text), 8).tolist()

    assert groups("replica_groups=[2,4]<=[8]") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups("replica_groups=[4,2]<=[2,4]T(1,0)") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert groups("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}") == [[0, 1, 4, 5], [2, 3, 6, 7]]
    moved = "replica_groups=mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}"
    assert groups(moved) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert groups("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}") == [[3, 2], [1, 0]]
    assert groups("replica_groups={{0,2},{1,3}}") == [[0, 2], [1, 3]]
    assert groups("replica_groups={}") == [list(range(8))]
    with pytest.raises(InputError, match="cannot be read"):
        groups("replica_groups=something")
    with pytest.raises(InputError, match="cannot be read"):
        groups("replica_groups=mesh['a'=8] {'a':(2)4}")


CHAIN = """
%started (c: bf16[8,128]) -> bf16[8,128] {
  %c = bf16[8,128] parameter(0)
  %g.1 = bf16[256,8,128] all-gather(%c), replica_groups=[1,256]<=[256], frontend_attributes={chain_id="5"}
  ROOT %s = bf16[8,128] custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%woven (d: bf16[8,128]) -> bf16[8,128] {
  %d = bf16[8,128] parameter(0)
  %g.2 = bf16[256,8,128] all-gather(%d), replica_groups=[1,256]<=[256], frontend_attributes={chain_id="5"}
  ROOT %e = bf16[8,128] multiply(%d, %d)
}

ENTRY"""


def test_a_collective_woven_into_fusions_counts_once_and_overlaps():
    start = "%u = bf16[8,128] fusion(%x), kind=kCustom, calls=%started"
    more = '%v = bf16[8,128] fusion(%u), calls=%woven, backend_config={"estimated_cycles":"50"}'
    found = cost(in_body(f"{start}\n  {more}").replace("\nENTRY", CHAIN), TORUS)
    assert [(c.times, c.bytes, c.overlaps) for c in found.collectives] == [(6, 256 * 2048, True)]
    assert found.waiting == 0 and found.links > found.busy  # so the links are what takes the time
    assert found.step == found.links
    assert found.compute - cost(LOOP).compute == pytest.approx(6 * 50 / 1.5e9)
    with pytest.raises(InputError, match="was not started"):
        cost(in_body(more.replace("%u", "%x")).replace("\nENTRY", CHAIN), TORUS)


def test_collectives_of_a_real_program():
    """A product summed over 8 devices in a loop of 3: one all-reduce of float32[16, 4] each time."""
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, "a"), ()))

    def function(x, w):
        def step(c, _):
            y = jax.lax.with_sharding_constraint(c @ w.T, whole)
            return jax.lax.with_sharding_constraint(jnp.sin(y) @ w, split), None

        return jax.lax.scan(step, x, length=3)[0]

    x, w = jnp.ones((16, 64)), jnp.ones((4, 64))
    text = jax.jit(function, in_shardings=(split, split)).lower(x, w).compile().as_text()
    (found,) = cost(text, [(0, y) for y in range(8)]).collectives
    assert (found.kind, found.times, found.bytes, found.devices) == ("all-reduce", 3, 16 * 4 * 4, 8)


# --- The command ---


def test_text_that_is_no_hlo_is_refused():
    with pytest.raises(InputError, match="not HLO"):
        hlo.parse("error: nothing here")


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:2x", "gpu:8"])
def test_an_unknown_topology_is_refused_with_the_names_there_are(name):
    with pytest.raises(InputError, match=re.escape(f"--topology {name}: expected CHIP:SIZE, CHIP one of v5e, v5p")):
        describe(name)


@pytest.mark.parametrize(
    "name", ["v5e:2x2x2", "v5e:4x4x4", "v5e:256", "v5e:32x32", "v5e:16x32", "v5e:8x32", "v5p:16x16", "v5p:4x8x32"]
)
def test_a_slice_that_nobody_built_is_refused_with_those_there_are(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: pytest.fail("asked the compiler"))
    largest = {"v5e": "16x16", "v5p": "16x16x24"}[name[:3]]
    with pytest.raises(InputError, match=f"--topology {name}: no slice is larger than {largest} .* {name[:3]}:2x2"):
        describe(name)


@pytest.mark.parametrize("name", ["v5e:1x1", "v5e:4x8", "v5e:16x16", "v5p:2x2x1", "v5p:4x8x8", "v5p:24x16x16"])
def test_slices_as_large_as_are_built_come_to_the_compiler(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the TPU compiler"):
        describe(name)


@pytest.mark.parametrize("name", ["h100:0", "h100:0x8", "h100:2x2x2", "h100:73", "a100:1025x8"])
def test_gpus_that_nobody_built_are_refused(name):
    with pytest.raises(InputError, match=f"--topology {name}: expected GPUS or NODESxGPUS, .* such as 8 or 4x8"):
        describe(name)


@pytest.mark.parametrize("name, kind", [("v5e:2x2", "tpu"), ("h200:4x8", "gpu")])
def test_without_the_compiler_the_command_says_what_to_install(name, kind, monkeypatch):
    find = importlib.util.find_spec
    without = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in without else find(name))
    with pytest.raises(InputError, match=rf"--topology {name}: .* pip install -r requirements-{kind}\.txt"):
        describe(name)


def described_gpus(monkeypatch, name):
    """What `describe` tells the CUDA compiler, as fields, and what it makes of it."""
    told = {}

    def topology(_, platform, target_config, topology):
        told.update(re.findall(r"(\w+): \"?([^\s\"]+)", target_config))
        told.update(text=target_config, platform=platform, topology=topology)
        return SimpleNamespace(devices=("a device",))

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "jax_cuda12_plugin")
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", topology)
    return describe(name), told


@pytest.mark.parametrize("name, shape", [("h100:8", "1x1x8"), ("h100:4x8", "1x4x8")])
def test_gpus_are_described_to_their_compiler(name, shape, monkeypatch):
    for variable in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(variable, "")
    (card, devices), told = described_gpus(monkeypatch, name)
    assert told["platform"] == "cuda" and told["topology"] == shape and devices == ["a device"]
    assert "cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }" in told["text"]
    assert told["core_count"] == "132"
    assert told["device_memory_size"] == str(CARDS["h100"].memory) and card.memory == CARDS["h100"].memory * 3 // 4
    for variable in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(variable, "0.9")
        assert described_gpus(monkeypatch, name)[0][0].memory == int(CARDS["h100"].memory * 0.9)
        for wrong in ("much", "0", "-1", "1.1", "inf", "nan"):
            monkeypatch.setenv(variable, wrong)
            with pytest.raises(InputError, match=f"^{variable}={wrong}: must be above 0 and at most 1"):
                described_gpus(monkeypatch, name)


def test_a_token_is_not_timed_on_gpus(monkeypatch, capsys):
    monkeypatch.setattr(decode, "describe", lambda *_: (CARDS["h100"], []))
    assert run(VERBS, "polyglot_jax", ["compile", "--mode", "decode", "--topology", "h100:8"]) == 1
    assert "--topology h100:8: --mode decode is for TPUs" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["train", "decode"])
def test_files_are_found_wrong_before_anything_is_compiled(mode, tmp_path, monkeypatch, capsys):
    for module in (command, decode):
        monkeypatch.setattr(module, "describe", lambda *_: pytest.fail("began to compile"))
    there, new, nowhere = tmp_path / "there", tmp_path / "new", tmp_path / "none" / "file"
    there.write_text("precious")
    for first, second, message in (
        (there, new, f"{there}: exists; name another file, or delete it"),
        (new, there, f"{there}: exists; name another file, or delete it"),
        (tmp_path, new, f"{tmp_path}: exists"),
        (new, nowhere, f"{nowhere}: cannot be written"),
        (new, new, f"{new}: cannot be written"),
    ):
        flags = f"compile --mode {mode} --topology v5e:2x2 --json {first} --dump-hlo {second}"
        assert run(VERBS, "polyglot_jax", flags.split()) == 1
        assert message in capsys.readouterr().err
        assert [file.name for file in tmp_path.iterdir()] == ["there"] and there.read_text() == "precious"


def test_a_file_appears_whole_and_what_goes_wrong_later_leaves_it(tmp_path):
    file = tmp_path / "new"
    with pytest.raises(InputError, match="later"), new_file(str(file)) as write:
        write("all")
        raise InputError("later")
    assert file.read_text() == "all"
    file.unlink()
    with pytest.raises(InputError, match=f"{file}: exists"), new_file(str(file)) as write:
        file.write_text("somebody's")
        write("ours")
    assert [file.name for file in tmp_path.iterdir()] == ["new"] and file.read_text() == "somebody's"


def test_a_collective_without_a_source_has_no_empty_brackets():
    found = collective("%g = bf16[8,128] all-reduce(%x), replica_groups=[1,256]<=[256]")
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    program = SimpleNamespace(config=Config(), mesh=mesh, model=SimpleNamespace(attention="splash"))
    for source, end in (("", "waited for"), ("a/b", "waited for (a/b)")):
        costs = Cost(compute=1.0, collectives=[dataclasses.replace(found, source=source)])
        printed = str(command.Estimate(program, "v5e:1x1", CHIP, Memory(1, 1, 1, 1, 1), costs.collectives, 1.0, costs))
        assert [line.endswith(end) for line in printed.splitlines() if "all-reduce" in line] == [True]


@pytest.mark.slow
def test_a_small_step_is_compiled_for_eight_tpus(tmp_path, capsys):
    """The estimate adds up, loops run once a layer, and no product of the attention is computed again."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu: pip install -r requirements-tpu.txt")
    out, text = tmp_path / "estimate.json", tmp_path / "step.txt"
    sizes = "--model.layers 3 --model.embed 256 --model.heads 2 --model.mlp 512 --model.context 512"
    steps = "--train.sequence-length 512 --train.batch-size 16 --train.dtype bfloat16 --train.remat products"
    command = f"compile --topology v5e:2x4 {sizes} {steps} --mesh.fsdp 8 --json {out} --dump-hlo {text}"
    assert run(VERBS, "polyglot_jax", command.split()) == 0
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    assert printed.startswith("ESTIMATE, not a measurement") and "TPU v5 lite" in printed
    seconds = found["seconds"]
    largest = max(sum(seconds[name] for name in ("compute", "moved", "kernels")), seconds["busiest_link"],
                  seconds["background_copies"])  # fmt: skip
    assert seconds["step"] == pytest.approx(largest + seconds["not_overlapped_collectives"])
    assert sorted(found["loops"].values())[-2:] == [3, 3]  # forward and backward
    # Forward, dq and dk with dv, on 2 rows, once a layer: nothing is computed again.
    product = 2 * 2 * 2 * 512 * 512 * 128
    assert sorted((k["times"], k["flops"] // product) for k in found["kernels"]) == [(3, 2), (3, 3), (3, 4)]
    assert found["fits"] and found["attention"] == "splash"
    assert found["memory"]["total"] < found["memory"]["free_on_chip"] == int(15.75 * 2**30)
    assert hlo.parse(text.read_text()).entry

    # 8,192 rows a chip: of each layer's input alone 2 GiB.
    command = command.split(" --json")[0].replace("--train.batch-size 16", "--train.batch-size 65536")
    assert run(VERBS, "polyglot_jax", command.split()) == 1
    assert "does not fit" in capsys.readouterr().err


@pytest.mark.slow
def test_two_slices_reduce_gradients_within_and_then_between(tmp_path):
    """Each chip sends its share of the gradients, no more, through the network, while it computes."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu: pip install -r requirements-tpu.txt")
    out = tmp_path / "estimate.json"
    sizes = "--model.layers 3 --model.embed 256 --model.heads 2 --model.mlp 512 --model.context 512"
    steps = "--train.sequence-length 512 --train.batch-size 16 --train.dtype bfloat16 --train.remat products"
    command = f"compile --topology v5e:2x2 --mesh.slices 2 --mesh.fsdp 4 --model.no-tied {sizes} {steps} --json {out}"
    assert run(VERBS, "polyglot_jax", command.split()) == 0
    found = json.loads(out.read_text())
    assert found["chips"] == 8 and found["config"]["mesh"]["slices"] == 2
    between = [c for c in found["collectives"] if c["kind"] == "all-reduce between slices"]
    sent = sum(c["times"] * c["bytes"] for c in between)
    parameters = Config.from_json(json.dumps(found["config"])).model.parameters()
    assert 2 * parameters / 4 <= sent <= 1.05 * 4 * parameters / 4  # bfloat16 or float32, of a quarter
    assert all(c["covered"] <= c["seconds"] for c in between)
    with pytest.raises(InputError, match=r"--topology v5e:3x3: .* knows none of that name .*v5e:2x4, .*v5e:16x16"):
        describe("v5e:3x3")


@pytest.mark.slow
def test_a_small_step_is_compiled_for_eight_gpus(tmp_path, capsys):
    """With cuDNN's attention and without, in less memory than a copy of the state beside the state would take."""
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        pytest.skip("no CUDA compiler: pip install -r requirements-gpu.txt")
    out, text = tmp_path / "compiled.json", tmp_path / "step.txt"
    sizes = "--model.layers 3 --model.embed 1024 --model.heads 8 --model.mlp 4096 --model.context 512"
    steps = "--train.sequence-length 512 --train.dtype bfloat16 --train.remat full"
    command = f"compile --topology h100:8 {sizes} {steps} --mesh.fsdp 8 --train.batch-size 8"
    assert run(VERBS, "polyglot_jax", f"{command} --json {out} --dump-hlo {text}".split()) == 0
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    assert printed.startswith("COMPILED, not run: ") and "8 x NVIDIA H100" in printed
    assert "not known without these GPUs: the time of a step" in printed
    assert found["attention"] == "cudnn" and "__cudnn$fmha" in text.read_text()
    gathered = {c["times"] for c in found["collectives"] if c["kind"] == "all-gather" and c["bytes"] >= 2 * 1024 * 4096}
    assert 3 in gathered  # once a layer
    assert found["memory"]["total"] < found["memory"]["free_on_chip"] and "mfu_6n" not in found
    assert run(VERBS, "polyglot_jax", f"{command} --train.attention xla".split()) == 0
    assert "attention xla" in capsys.readouterr().out

    # On one GPU next to nothing but the state: parameters, moments and gradients, and no second copy of them.
    alone = f"compile --topology h100:1 {sizes} {steps} --train.batch-size 1 --json {tmp_path / 'alone.json'}"
    assert run(VERBS, "polyglot_jax", alone.split()) == 0
    assert "collectives: none" in capsys.readouterr().out
    found = json.loads((tmp_path / "alone.json").read_text())
    state = 12 * Config.from_json(json.dumps(found["config"])).model.parameters()
    assert found["memory"]["arguments"] == pytest.approx(state, rel=0.01)
    assert found["memory"]["temporaries"] < state
