"""What the TPU compiler writes of a kernel, and what is read from it."""

import importlib.util

import pytest

from recurrentgemma.benchmarks import ahead_of_time, bundles, scan_estimates

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
    code = scan_estimates.program_code("v5e", program, "prefill_67m", "float32")
    profile = ahead_of_time.profile(code)
    assert profile.issued is not None
    assert profile.issued["kernel"].startswith("rg_lru")
    assert 0.1 < profile.issued["slots_filled"]["VALU"] <= 1
    assert 0 < profile.issued["slots_filled"]["EUP"] <= 1
    # Two ways to count; the profiler also knows what waits, and what is not executed.
    cycles = max(profile.cycles.values())
    assert profile.issued["bundles"] == pytest.approx(cycles, rel=0.3)
