"""Counts of what a GPU would run: the table, and the real compiler where it is installed."""

import importlib.util
import json

import pytest

from recurrentgemma import cli
from recurrentgemma.benchmarks import gpu_counts, gpu_programs

TEXT = """HloModule jit_scan

%body (arg: (s32[], f32[1,4096,2560])) -> (s32[], f32[1,4096,2560]) {
  %arg = (s32[], f32[1,4096,2560]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[1,4096,2560]{2,1,0} get-tuple-element(%arg), index=1
  %y = f32[1,4096,2560]{2,1,0} add(%x, %x)
  ROOT %t = (s32[], f32[1,4096,2560]{2,1,0}) tuple(%i, %y)
}

%below (arg: (s32[], f32[1,4096,2560])) -> pred[] {
  %arg = (s32[], f32[1,4096,2560]{2,1,0}) parameter(0)
  ROOT %t = pred[] constant(false)
}

ENTRY %main (a: (s32[], f32[1,4096,2560])) -> f32[1,4096,2560] {
  %a = (s32[], f32[1,4096,2560]{2,1,0}) parameter(0)
  %loop = (s32[], f32[1,4096,2560]{2,1,0}) while(%a), condition=%below, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %out = f32[1,4096,2560]{2,1,0} get-tuple-element(%loop), index=1
  ROOT %copy = f32[1,4096,2560]{2,1,0} copy(%out)
}
"""


def test_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_counts, "COMPILER", ())
    before = tmp_path / "older"

    def compile_programs(card, folder, checkout):
        assert (card, checkout) in (("T4", str(before)), ("T4", None))
        (folder / "float32 linear_scan.txt").write_text(TEXT)
        (folder / "float16 rg_lru gradient.txt").write_text(TEXT)

    monkeypatch.setattr(gpu_counts, "compile_programs", compile_programs)
    arguments = [f"--out={tmp_path}", f"--before={before}", "--cards=T4"]
    assert cli.main(["bench", "gpu_counts", *arguments]) == 0
    document = json.loads((tmp_path / "gpu_counts.json").read_text())
    rows = {
        tuple(row[name] for name in gpu_counts.KEY): row for row in document["rows"]
    }
    assert len(rows) == 4
    for checkout, commit in (("before", "unknown"), ("this", document["commit"])):
        row = rows["T4", "float32", "linear_scan", checkout]
        assert row["commit"] == commit
        assert (row["turns"], row["launches"]) == (5, 6)
        # A turn and the copy move 3 and 2 halves of a float32 sequence.
        assert row["sequences"] == (5 * 3 + 2) / 2
        assert rows["T4", "float16", "rg_lru gradient", checkout]["sequences"] == 17


def test_it_needs_the_compiler(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_counts, "COMPILER", ("no_such_compiler",))
    assert cli.main(["bench", "gpu_counts", f"--out={tmp_path}"]) == 1
    assert "no_such_compiler: expected it to be installed" in capsys.readouterr().err


def installed(name):
    return importlib.util.find_spec(name) is not None


@pytest.mark.skipif(
    not (installed("jax_cuda12_plugin") and installed("nvidia.cuda_nvcc")),
    reason="needs jax-cuda12-plugin and nvidia-cuda-nvcc-cu12 (no GPU)",
)
def test_what_a_gpu_would_run(tmp_path, monkeypatch):
    """The recurrence in a few launches; attention in 16 turns in each direction."""
    monkeypatch.setattr(gpu_counts, "DTYPES", {"T4": ("float32",)})
    gpu_counts.compile_programs("T4", tmp_path, None)
    found = {
        file.stem.partition(" ")[2]: gpu_counts.counts(file.read_text(), "float32")
        for file in tmp_path.glob("*.txt")
    }
    blocks = gpu_programs.LENGTH // 512
    for name, turns, launches, sequences in [
        ("linear_scan", 0, 12, 8),
        ("linear_scan gradient", 0, 16, 10),
        ("rg_lru", 0, 16, 14),
        ("rg_lru gradient", 0, 24, 21),
        ("attention", blocks, 20 * blocks, 65),
        ("attention and gradient", 2 * blocks, 20 * 2 * blocks, 190),
    ]:
        row = found.pop(name)
        assert row["unknown_loops"] == 0, name
        assert row["turns"] == turns, name
        assert row["launches"] <= launches, name
        assert row["sequences"] <= sequences, name
    assert not found
