"""The sweep of block choices, interpreted on this CPU."""

import json

import jax.numpy as jnp
import pytest

from recurrentgemma import cli
from recurrentgemma.benchmarks import device, gpu_blocks
from recurrentgemma.kernels.linear_scan import gpu_blocks as table
from recurrentgemma.kernels.linear_scan.workloads import Workload

UNROLLS = (2, 3)
PRESENT = 1


@pytest.fixture
def tiny(monkeypatch):
    """Two candidates beside the present choice, for float32 alone."""
    monkeypatch.setitem(gpu_blocks.WORKLOADS, "decode_2b", Workload(1, 7, 5))
    monkeypatch.setattr(gpu_blocks, "DTYPES", {4: "float32"})
    monkeypatch.setattr(gpu_blocks, "FIELDS", {"unroll": {4: UNROLLS}})
    monkeypatch.setattr(device, "SAMPLE_S", 1e-4)
    blocks = table.GpuBlocks((8,), 1, 4, PRESENT)
    rows = table._rows() | {(name, None, 4): blocks for name in table.KERNELS}
    monkeypatch.setattr(table, "_rows", lambda: rows)


def swept(tmp_path, *arguments):
    """The samples' rows, and the table's."""
    command = ["bench", "gpu_blocks", "--workloads=decode_2b", "--out", str(tmp_path)]
    assert cli.main([*command, *arguments]) == 0
    samples = json.loads((tmp_path / "gpu_blocks_samples.json").read_text())["rows"]
    written = json.loads((tmp_path / "gpu_blocks.json").read_text())
    return samples, dict(map(table.from_row, written))


@pytest.mark.parametrize("kernel", table.KERNELS)
def test_the_fastest_choice_is_written(kernel, tmp_path, tiny, monkeypatch):
    """The kernel runs with every candidate; the clock is ours."""
    seconds = {2: 1.0, 3: 3.0, PRESENT: 2.0}

    def measure(kernel, workload, dtype, blocks, present):
        clock = [seconds[blocks.unroll]]
        monkeypatch.setattr(device, "seconds_per_call", lambda *_: clock)
        return plain(kernel, workload, dtype, blocks, present)

    plain = gpu_blocks.measure
    monkeypatch.setattr(gpu_blocks, "measure", measure)
    samples, rows = swept(tmp_path, f"--kernels={kernel}")
    assert len(samples) == 1 + len(UNROLLS)
    assert all(row.get("remark") is None for row in samples), samples
    before = table._rows()
    assert {key: rows[key] for key in before} == before
    new = {key: blocks.unroll for key, blocks in rows.items() if key not in before}
    assert new == {(kernel, (0, 0), 4): 2}


@pytest.mark.parametrize(
    ("failure", "remark"),
    [
        (MemoryError("no room"), "MemoryError: no room"),
        (None, "WRONG by 1, not timed"),
    ],
)
def test_what_goes_wrong_is_not_chosen(failure, remark, tmp_path, tiny, monkeypatch):
    """Of a candidate that fails or differs the row says so, and the others go on."""

    def program(kernel, workload, dtype):
        def run(x, blocks, interpret):
            assert interpret
            if blocks.unroll == UNROLLS[0]:
                if failure:
                    raise failure
                return 2 * x
            return x

        return run, (jnp.ones(3),)

    monkeypatch.setattr(gpu_blocks, "program", program)
    samples, rows = swept(tmp_path, "--kernels=rg_lru")
    remarks = [row.get("remark") for row in samples]
    assert remarks == [None, remark, None]
    assert rows["rg_lru", (0, 0), 4].unroll != UNROLLS[0]


def test_the_table_is_complete():
    """A row of every kernel and width for cards that have none."""
    for kernel in table.KERNELS:
        for dtype in ("float32", "bfloat16", "float16"):
            blocks = table.find(kernel, [jnp.ones((1, 1, 1), dtype)], False)
            assert blocks.channels[0] * jnp.dtype(dtype).itemsize == 128
    assert dict(map(table.from_row, json.loads(table.to_text({})))) == table._rows()


def test_the_seconds_are_kept_to(tmp_path, tiny):
    samples, rows = swept(tmp_path, "--kernels=linear_scan", "--seconds=0")
    assert [row["remark"] for row in samples] == ["left out: the seconds are over"]
    assert rows["linear_scan", (0, 0), 4] == rows["linear_scan", None, 4]
