"""Operations, bytes and exchanges, read from the text of compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from recurrentgemma.planning.hlo import Costs, Exchange, costs_of
from recurrentgemma.training.mesh import MeshConfig

TEXT = """HloModule jit_step, is_scheduled=true

%body (arg: (s32[], f32[8,64], f32[32,64])) -> (s32[], f32[8,64], f32[32,64]) {
  %arg = (s32[], f32[8,64]{1,0}, f32[32,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[8,64]{1,0:T(8,128)} get-tuple-element(%arg), index=1
  %shard = f32[32,64]{1,0} get-tuple-element(%arg), index=2
  %g = f32[64,64]{1,0} all-gather(%shard), channel_id=1, dimensions={0}
  %y = f32[8,64]{1,0:T(8,128)} fusion(%x, %g), kind=kOutput, calls=%product
  %two = s32[] constant(2)
  %j = s32[] add(%i, %two)
  ROOT %t = (s32[], f32[8,64]{1,0}, f32[32,64]{1,0}) tuple(%j, %y, %shard)
}

%below (arg: (s32[], f32[8,64], f32[32,64])) -> pred[] {
  %arg = (s32[], f32[8,64]{1,0}, f32[32,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %limit = s32[] constant(9)
  ROOT %t = pred[] compare(%i, %limit), direction=LT
}

%product (p0: f32[8,64], p1: f32[64,64]) -> f32[8,64] {
  %p0 = f32[8,64]{1,0} parameter(0)
  %p1 = f32[64,64]{1,0} parameter(1)
  ROOT %c = f32[8,64]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%cut (p0: f32[4,8,64], p1: s32[]) -> f32[8,64] {
  %p0 = f32[4,8,64]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %s = f32[1,8,64]{2,1,0} dynamic-slice(%p0, %p1, %p1, %p1), dynamic_slice_sizes={1,8,64}
  ROOT %b = f32[8,64]{1,0} bitcast(%s)
}

%write (p0: f32[4,8,64], p1: s32[], p2: f32[1,8,64]) -> f32[4,8,64] {
  %p0 = f32[4,8,64]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[1,8,64]{2,1,0} parameter(2)
  ROOT %s = f32[4,8,64]{2,1,0} scatter(%p0, %p1, %p2), to_apply=%last
}

ENTRY %main (a: f32[4,8,64], k: s32[]) -> f32[8,64] {
  %a = f32[4,8,64]{2,1,0} parameter(0)
  %k = s32[] parameter(1)
  %first = f32[8,64]{1,0} fusion(%a, %k), kind=kLoop, calls=%cut
  %far = ((f32[4,8,64]{2,1,0}), f32[2,8,64]{2,1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:2], [0:8], [0:64]}
  %half = f32[2,8,64]{2,1,0:T(8,128)S(1)} slice-done(%far)
  %row = f32[1,8,64]{2,1,0:T(8,128)S(1)} bitcast(%first)
  %written = f32[4,8,64]{2,1,0} fusion(%a, %k, %row), kind=kLoop, calls=%write
  %near = f32[8,64]{1,0:T(8,128)S(1)} copy(%first)
  %w = f32[32,64]{1,0} custom-call(%near), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"7","bytes_accessed":"9"}}
  %init = (s32[], f32[8,64]{1,0}, f32[32,64]{1,0}) tuple(%k, %first, %w)
  %loop = (s32[], f32[8,64]{1,0}, f32[32,64]{1,0}) while(%init), condition=%below, body=%body{NOTED}
  %sum = f32[8,64]{1,0} all-reduce(%first), to_apply=%add
  ROOT %out = f32[8,64]{1,0} get-tuple-element(%loop), index=1
}
"""
NOTED = ', backend_config={"known_trip_count":{"n":"5"}}'


@pytest.mark.parametrize("noted", ["", NOTED])
def test_loops_count_as_often_as_they_turn(noted):
    rows, matrix = 8 * 64 * 4, 64 * 64 * 4
    product = 2 * 8 * 64 * 64
    # A slice is read, not what it is cut from; what lies on the chip is not counted.
    once = (rows + 4 + rows) + 2 * rows + (4 + rows) + rows + 9 + 2 * rows
    turn = 12 + matrix + matrix // 2 + (rows + matrix + rows)
    exchanges = {"all-gather": Exchange(5, 5 * matrix), "all-reduce": Exchange(1, rows)}
    text = TEXT.replace("{NOTED}", noted)
    flops, moved, launches = 7 + 5 * product, once + 5 * turn, 6 + 5 * 3
    assert costs_of(text) == Costs(flops, moved, exchanges, 0, launches, turns=5)


HEADS = (
    "window={size=4 stride=3 pad=3_3 lhs_dilate=4 rhs_reversal=1}, "
    "dim_labels=0bf_0io->0bf"
)
"""A product for each of 4 heads, as the compiler writes it."""
TWO_AXES = "window={size=5}, dim_labels=0fb_0io->0bf"
"""A sum over two axes, likewise."""


@pytest.mark.parametrize(
    ("attributes", "left", "right", "out", "products"),
    [
        ("dim_labels=bf_io->bf", (8, 64), (64, 32), (8, 32), 8 * 64 * 32),
        (HEADS, (4, 8, 16), (4, 16, 32), (4, 8, 32), 4 * 8 * 16 * 32),
        (TWO_AXES, (5, 16, 8), (5, 16, 32), (1, 8, 32), 5 * 16 * 8 * 32),
    ],
)
def test_products_of_a_convolution(attributes, left, right, out, products):
    left, right, out = (
        "f32[" + ",".join(map(str, s)) + "]" for s in (left, right, out)
    )
    text = f"""ENTRY %main () -> {out} {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %c = {out} convolution(%a, %b), {attributes}
}}"""
    assert costs_of(text).flops == 2 * products


def test_a_program_of_this_machine():
    """A scan of products with a matrix that is gathered in each turn."""
    mesh = MeshConfig("fsdp=8").make()
    x = jax.ShapeDtypeStruct(
        (8, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp"))
    )
    w = jax.ShapeDtypeStruct(
        (5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp"))
    )

    def run(x, w):
        def turn(x, w):
            w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
            return jnp.tanh(x @ w), None

        return jax.lax.scan(turn, x, w)[0]

    costs = costs_of(jax.jit(run).lower(x, w).compile().as_text())
    assert costs.flops == 5 * 2 * 64 * 64
    assert costs.exchanges["all-gather"].bytes == 5 * 64 * 64 * 4
    assert costs.unknown_loops == 0
