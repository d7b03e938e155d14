"""What the TPU compiler writes, and what is made of it."""

import importlib.util
import json

import pytest

from recurrentgemma.benchmarks import (
    ahead_of_time,
    bundles,
    estimated_time,
    hlo_text,
    scan,
)

CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
KERNEL_CONFIG = (
    'backend_config={"scoped_memory_configs":[{"size":"9"}],'
    '"custom_call_config":{"body":"AA=="},"aliasing_operands":{}}'
)
MODULE = f"""HloModule jit_f, is_scheduled=true

%product (p: f32[8,8]) -> f32[8,8] {{
  %p = f32[8,8]{{1,0}} parameter(0)
  ROOT %convolution.1 = f32[8,8]{{1,0}} convolution(%p, %p), dim_labels=bf_io->bf
}}

%around (p.1: f32[8,8]) -> f32[8,8] {{
  %p.1 = f32[8,8]{{1,0}} parameter(0)
  ROOT %fusion.9 = f32[8,8]{{1,0}} fusion(%p.1), kind=kOutput, calls=%product
}}

%condition (c: (s32[], f32[8,8])) -> pred[] {{
  %constant.1 = s32[]{{:T(128)}} constant(5)
  %c = (s32[], f32[8,8]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %constant.1), direction=LT
}}

%body (b: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {{
  %b = (s32[], f32[8,8]{{1,0}}) parameter(0)
  %x = f32[8,8]{{1,0}} get-tuple-element(%b), index=1
  %fusion.1 = f32[8,8]{{1,0}} fusion(%x), calls=%around, {CYCLES % 3000}
  %kernel.1 = (bf16[2,16]{{1,0}}, f32[4]{{0}}) custom-call(%fusion.1), custom_call_target="tpu_custom_call", operand_layout_constraints={{f32[8,8]{{1,0}}}}, frontend_attributes={{kernel_metadata={{
"xprof_metadata":"x"
}}}}, {KERNEL_CONFIG}
  ROOT %tuple = (s32[], f32[8,8]{{1,0}}) tuple(%i.1, %x)
}}

ENTRY %main (a: f32[8,8]) -> f32[8,8] {{
  %a = f32[8,8]{{1,0:T(8,128)}} parameter(0), metadata={{op_name="a"}}
  %copy-start = (f32[8,8], f32[8,8]{{1,0:T(8,128)S(1)}}, u32[]) copy-start(%a)
  %copy-done = f32[8,8]{{1,0:T(8,128)S(1)}} copy-done(%copy-start)
  %slice = f32[4,8]{{1,0:T(8,128)S(1)}} slice(%copy-done), slice={{[0:4], [0:8]}}
  %pad = f32[1024,1024]{{1,0:T(8,128)}} pad(%slice)
  %copy.1 = f32[8,8]{{0,1}} copy(%a), {CYCLES % 1500}
  %while = (s32[], f32[8,8]{{1,0}}) while(%t), condition=%condition, body=%body
  ROOT %result = f32[8,8]{{1,0}} get-tuple-element(%while), index=1
}}
"""


def test_a_program_is_summed_with_its_loops():
    kernels = []

    def kernel_seconds(kernel):
        kernels.append(kernel)
        return 1e-3

    parts = estimated_time.estimate(MODULE, "v5e", kernel_seconds)
    assert parts.products == pytest.approx(5 * 3000 / 1.5e9)
    assert parts.kernels == pytest.approx(5 * 1e-3)
    assert parts.other == pytest.approx(1500 / 1.5e9)
    assert parts.guessed == pytest.approx(2 * 4 * 2**20 / 819e9)
    [kernel] = set(kernels)
    assert kernel.arguments == (("f32", (8, 8)),)
    assert kernel.results == (("bf16", (2, 16)), ("f32", (4,)))
    assert json.loads(kernel.config) == {
        "custom_call_config": {"body": "AA=="},
        "scoped_memory_configs": [{"size": "9"}],
    }


def test_a_loop_that_is_not_understood_is_refused():
    for text in [
        MODULE.replace("direction=LT", "direction=NE"),
        MODULE.replace("constant(5)", "parameter(1)"),
    ]:
        with pytest.raises(ValueError, match="no loop from 0 to a constant"):
            estimated_time.estimate(text, "v5e", lambda kernel: 0.0)


def test_bytes_of_shapes():
    shapes = hlo_text.shapes("(bf16[2,3]{1,0:T(8,128)S(1)}, pred[], /*index=5*/s32[7])")
    assert shapes == [("bf16", (2, 3)), ("pred", ()), ("s32", (7,))]
    assert list(map(hlo_text.shape_bytes, shapes)) == [12, 1, 28]


BUNDLES = """LB: loop body
     0   :  { %1 = vld [vmem:[%2]] }
   0x1 LB: > { %3 = sadd.s32 1, %4 }
   0x2 LB: >> { %5 = vadd.f32 %6, %7
 ;;  %8 = scmp.ge.s32.totalorder %s9, 16 /* loop exit test */ }
   0x3   : >> { %10 = sbr.rel (!%p11) target bundleno = 2 (0x2), region = 3 }
   0x4   : >> { %12 = vst [vmem:[%13]] %v5 }
   0x5   : > { %14 = scmp.ge.s32.totalorder %s9, 130 /* loop exit test */ }
   0x6   : > { %15 = sbr.rel (!%p16) target bundleno = 1 (0x1), region = 2 }
   0x7   :  {}
   0x8   :  {}
"""


def test_bundles_count_as_often_as_their_loops_turn():
    # A jump is taken four bundles later: the loops end with bundles 7 and 8.
    inner, outer = 16 * 130, 130
    assert bundles.turns_of_bundles(BUNDLES) == [1, outer, *[inner] * 6, outer]


UTILIZATION = """== CAPACITY:
MATMUL, XLU, VALU, EUP, VLOAD, VSTORE, VSTORE:SPILL, SALU
    4     3     4     1     3     1     1     2
== UTILIZATION:
0 0 0 0 9 0 0 0
0 0 0 0 9 0 0 1
0 0 2 1 0 0 0 0
0 0 4 0 0 0 0 0
0 0 0 0 0 1 1 0
0 0 0 0 3 0 0 0
0 0 0 0 0 0 0 0
0 0 0 0 0 0 0 0
0 0 9 0 0 0 0 0
"""


def test_slot_use(tmp_path):
    (tmp_path / "12-scan.1-01-packed-bundles-post-ra.txt").write_text(BUNDLES)
    name = "12-scan.1-02-pre-delay_hlo-static-per-bundle-utilization.txt"
    (tmp_path / name).write_text(UTILIZATION)
    found = bundles.issued(tmp_path)
    assert found is not None
    inner, outer = 16 * 130, 130
    total = 1 + 2 * outer + 6 * inner
    assert (found["kernel"], found["bundles"]) == ("scan.1", total)
    using, filled = found["bundles_using"], found["slots_filled"]
    assert using["VALU"] == pytest.approx((2 * inner + outer) / total)
    assert filled["VALU"] == pytest.approx((6 * inner + 9 * outer) / (4 * total))
    assert using["VLOAD"] == pytest.approx((1 + outer + inner) / total)
    assert filled["EUP"] == pytest.approx(inner / total)
    assert filled["VSTORE"] == pytest.approx(inner / total)
    assert sum(bundles.spills(tmp_path).values()) == 1


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu: pip install 'recurrentgemma[tpu-plan]'",
)
def test_the_real_compiler_writes_what_is_read():
    program = "rg_lru: pallas_tpu"
    code = scan.program_code("v5e", program, "prefill_67m", "float32")
    profile = ahead_of_time.profile(code)
    assert profile.issued is not None
    assert profile.issued["kernel"].startswith("rg_lru")
    assert 0.1 < profile.issued["slots_filled"]["VALU"] <= 1
    assert 0 < profile.issued["slots_filled"]["EUP"] <= 1
    # Two ways to count; the profiler also knows what waits, and what is not executed.
    cycles = max(profile.cycles.values())
    assert profile.issued["bundles"] == pytest.approx(cycles, rel=0.3)

    found = []

    def kernel_seconds(kernel):
        found.append(kernel)
        return kernel.seconds("v5e")

    text = ahead_of_time.run(f"{code}print(compiled.as_text())").split("\n", 1)[1]
    parts = estimated_time.estimate(text, "v5e", kernel_seconds)
    [kernel] = found
    assert ("f32", (1, 1024, 768)) in kernel.arguments
    # Alone, the kernel costs what it costs in its program; the rest is small.
    least = 4 * 4 * 1024 * 768 / 819e9
    assert parts.kernels == pytest.approx(max(cycles / 1.5e9, least), rel=0.05)
    assert sum(parts) < 2 * parts.kernels
