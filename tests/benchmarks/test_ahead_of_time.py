"""What the TPU compiler writes of a kernel, and what is read from it."""

import importlib.util

import pytest

from recurrentgemma.benchmarks import ahead_of_time, scan_estimates
from recurrentgemma.kernels.linear_scan.workloads import WORKLOADS

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
    assert ahead_of_time.turns_of_bundles(BUNDLES) == [1, outer, *[inner] * 6, outer]


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


def test_what_is_read_of_a_kernel(tmp_path):
    (tmp_path / "12-scan.1-01-packed-bundles-post-ra.txt").write_text(BUNDLES)
    name = "12-scan.1-02-pre-delay_hlo-static-per-bundle-utilization.txt"
    (tmp_path / name).write_text(UTILIZATION)
    profile = ahead_of_time.read_profile(tmp_path)
    inner, outer = 16 * 130, 130
    assert profile.cycles == {"12-scan.1": 1 + 2 * outer + 6 * inner}
    assert profile.spills == {"12-scan.1": 1}  # not the capacity


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu: pip install 'recurrentgemma[tpu-plan]'",
)
def test_the_real_compiler_writes_what_is_read():
    program = "rg_lru: pallas_tpu"
    code = scan_estimates.program_code("v5e", program, "prefill_67m", "float32")
    profile = ahead_of_time.profile(code)
    [kernel] = [name for name in profile.cycles if "rg_lru" in name]
    assert profile.spills[kernel] == 0
    batch, length, width = WORKLOADS["prefill_67m"]
    per_register = profile.cycles[kernel] / (batch * length * width / 1024)
    assert 5 < per_register < 100  # cycles for 8 rows of 128 lanes
