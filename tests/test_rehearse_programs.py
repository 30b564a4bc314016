"""What a compiled program says of itself: collectives, loops, bytes, implementations."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from hydrajax.rehearse.hlo import Program, size_of
from hydrajax.rehearse.step import implementations
from hydrajax.rehearse.traffic import collectives, group_size, hbm_bytes


def program(fn, *args) -> Program:
    return Program(jax.jit(fn).lower(*args).compile().as_text())


def mapped(fn, mesh=(8,)):
    """fn on each of eight devices, arrays split along their first axis."""
    axes = ("x", "y")[: len(mesh)]
    mesh = jax.make_mesh(mesh, axes, (AxisType.Auto,) * len(mesh))
    return jax.shard_map(fn, mesh=mesh, in_specs=P(axes), out_specs=P("x"), check_vma=False)


X = jax.ShapeDtypeStruct((64, 1024), jnp.float32)
PART = 64 * 1024 * 4 // 8  # bytes of X on a device

COLLECTIVES = {
    "all-reduce": (lambda x: jax.lax.psum(x, "x"), 2 * PART * 7 // 8),
    "all-gather": (lambda x: jax.lax.all_gather(x, "x", tiled=True), PART * 7),
    "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "x", tiled=True), PART * 7 // 8),
    "all-to-all": (lambda x: jax.lax.all_to_all(x, "x", 0, 1, tiled=True), PART * 7 // 8),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]),
        PART,
    ),
}


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_collectives_of_a_compiled_program_are_counted(kind):
    fn, want = COLLECTIVES[kind]
    found = collectives(program(mapped(fn), X), 8)
    assert found.sent == {kind: want} and found.count == {kind: 1}


def test_a_group_is_smaller_than_the_mesh():
    found = collectives(program(mapped(lambda x: jax.lax.psum(x, "y"), mesh=(2, 4)), X), 8)
    assert found.sent == {"all-reduce": 2 * PART * 3 // 4}


def test_collectives_in_a_loop_count_as_often_as_it_turns():
    def fn(x):
        inner = lambda x, _: (jnp.sin(jax.lax.psum(x, "x")), None)  # noqa: E731
        outer = lambda x, _: (jax.lax.scan(inner, x, None, length=3)[0], None)  # noqa: E731
        return jax.lax.scan(outer, x, None, length=5)[0]

    found = program(mapped(fn), X)
    assert found.unknown_loops == 0
    assert collectives(found, 8).count == {"all-reduce": 15}
    assert collectives(found, 8).sent == {"all-reduce": 15 * 2 * PART * 7 // 8}


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    def fn(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e3, lambda x: jax.lax.psum(x + 1, "x"), x)

    found = program(mapped(fn), X)
    assert found.unknown_loops == 1
    assert collectives(found, 8).count == {"all-reduce": 1}


@pytest.mark.parametrize(
    "attributes, want",
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add", 4),
        ("replica_groups=[2,4]<=[8], to_apply=%add", 4),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}", 2),
        ("replica_groups=mesh['axis_0'=16,'axis_1'=4] {'axis_1'}, channel_id=3", 4),
        ("replica_groups=mesh['axis_0'=16,'axis_1'=4] {'axis_0','axis_1'}", 64),
        ("replica_groups=mesh['axis_0'=16] {'axis_0':(2)8}", 8),
        ("channel_id=1", 8),
    ],
)
def test_group_sizes_of_all_notations(attributes, want):
    assert group_size(attributes, 8) == want


@pytest.mark.parametrize(
    "shape, want, in_hbm",
    [
        ("bf16[2,3,4]{2,1,0:T(8,128)(2,1)}", 48, 48),
        ("(f32[8]{0}, s8[3]{0:T(256)S(1)}, pred[])", 36, 32),
        ("u4[5]{0}", 3, 3),
        ("f8e4m3fn[16]{0}", 16, 16),
        ("token[]", 0, 0),
    ],
)
def test_bytes_of_shapes(shape, want, in_hbm):
    assert size_of(shape) == want and size_of(shape, hbm_only=True) == in_hbm


# As the TPU compiler writes it: a loop of 50 turns that slices its weights out of a stack, with a
# reduce-scatter disguised as a fused all-reduce, activations in on-chip memory, and a prefetch.
TPU_TEXT = """HloModule jit_g

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%slice (p.1: f32[50,8,16], p.2: s32[]) -> f32[8,16] {
  %p.1 = f32[50,8,16]{2,1,0:T(8,128)} parameter(0)
  %p.2 = s32[]{:T(128)} parameter(1)
  ROOT %cut = f32[1,8,16]{2,1,0:T(8,128)S(1)} dynamic-slice(%p.1, %p.2), dynamic_slice_sizes={1,8,16}
}

%product (p.3: f32[4,8], p.4: f32[50,8,16], p.5: s32[]) -> f32[4,16] {
  %p.3 = f32[4,8]{1,0:T(8,128)S(1)} parameter(0)
  %p.4 = f32[50,8,16]{2,1,0:T(8,128)} parameter(1)
  %p.5 = s32[]{:T(128)} parameter(2)
  %inner = f32[8,16]{1,0:T(8,128)S(1)} fusion(%p.4, %p.5), kind=kLoop, calls=%slice
  ROOT %dot = f32[4,16]{1,0:T(8,128)S(1)} convolution(%p.3, %inner), dim_labels=bf_io->bf
}

%all-reduce-scatter.1 (in: f32[4,16]) -> f32[4,8] {
  %in = f32[4,16]{1,0:T(8,128)S(1)} parameter(0)
  %ar = f32[4,16]{1,0:T(8,128)} all-reduce(%in), replica_groups={{0,1},{2,3}}, to_apply=%add
  %zero = s32[]{:T(128)} constant(0)
  ROOT %half = f32[4,8]{1,0:T(8,128)S(1)} dynamic-slice(%ar, %zero, %zero), dynamic_slice_sizes={4,8}
}

%body (p: (s32[], f32[4,8], f32[50,8,16])) -> (s32[], f32[4,8], f32[50,8,16]) {
  %p = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)S(1)}, f32[50,8,16]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=1
  %w = f32[50,8,16]{2,1,0:T(8,128)} get-tuple-element(%p), index=2
  %one = s32[]{:T(128)S(6)} constant(1)
  %next = s32[]{:T(128)S(6)} add(%i, %one)
  %y = f32[4,16]{1,0:T(8,128)S(1)} fusion(%x, %w, %i), kind=kOutput, calls=%product
  %z = f32[4,8]{1,0:T(8,128)S(1)} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (s32[]{:T(128)}, f32[4,8]{1,0}, f32[50,8,16]{2,1,0}) tuple(%next, %z, %w)
}

%condition (p.6: (s32[], f32[4,8], f32[50,8,16])) -> pred[] {
  %p.6 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)S(1)}, f32[50,8,16]{2,1,0:T(8,128)}) parameter(0)
  %turns = s32[]{:T(128)} constant(50)
  %at = s32[]{:T(128)} get-tuple-element(%p.6), index=0
  ROOT %less = pred[]{:T(512)} compare(%at, %turns), direction=LT
}

ENTRY %main (x: f32[4,8], w: f32[50,8,16]) -> f32[4,8] {
  %x.1 = f32[4,8]{1,0:T(8,128)} parameter(0)
  %w.1 = f32[50,8,16]{2,1,0:T(8,128)} parameter(1)
  %start = (f32[4,8]{1,0:T(8,128)S(1)}, f32[4,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x.1)
  %done = f32[4,8]{1,0:T(8,128)S(1)} copy-done(%start)
  %nil = s32[]{:T(128)S(6)} constant(0)
  %all = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)S(1)}, f32[50,8,16]{2,1,0}) tuple(%nil, %done, %w.1)
  %loop = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)S(1)}, f32[50,8,16]{2,1,0}) while(%all), condition=%condition, body=%body, metadata={op_name="jit(g)/gated_delta_rule=xla/while"}
  %last = f32[4,8]{1,0:T(8,128)S(1)} get-tuple-element(%loop), index=1
  %back = (f32[4,8]{1,0:T(8,128)}, f32[4,8]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%last)
  ROOT %end = f32[4,8]{1,0:T(8,128)} copy-done(%back)
}
"""  # noqa: E501


def test_a_program_as_the_tpu_compiler_writes_it():
    found = Program(TPU_TEXT)
    weights, activations = 8 * 16 * 4, 4 * 8 * 4
    assert found.unknown_loops == 0
    assert collectives(found, 4).sent == {"reduce-scatter": 50 * 4 * 16 * 4 // 2}
    assert hbm_bytes(found) == 50 * weights + 2 * activations
    assert implementations(found) == {"gated_delta_rule": ["xla"]}


def test_hbm_traffic_of_a_loop_that_updates_in_place():
    """Each turn reads one row and writes one: the stack around them does not move."""

    def fn(x):
        return jax.lax.map(lambda row: jnp.tanh(row) + 1, x)

    x = jax.ShapeDtypeStruct((16, 4096), jnp.float32)
    moved = hbm_bytes(program(fn, x))
    assert 2 * x.size * 4 <= moved < 5 * x.size * 4  # with the stack it would be 34 times x
