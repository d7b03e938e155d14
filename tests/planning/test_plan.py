"""Plans: the search, the errors, and programs that the real compiler takes."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import AxisType

from recurrentgemma import cli
from recurrentgemma.config import PRESETS
from recurrentgemma.planning import plan, programs, topologies
from recurrentgemma.planning.hlo import Costs, Exchange

ROOT = Path(__file__).parents[2]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu: pip install 'recurrentgemma[tpu-plan]'",
)


@pytest.mark.parametrize(
    ("needs", "limit"),
    [
        (lambda n: 100 + 10 * n, 90),
        (lambda n: 100 + 300 * n, 3),
        (lambda n: 100 + 10 * n + (n > 40) * 150, 75),  # Another algorithm from 41 on.
        (lambda n: 990 + 9 * n, 1),
        (lambda n: 1001 + n, 0),
    ],
)
@pytest.mark.parametrize("start", [1, 8, 500])
def test_a_search_ends_at_the_limit_after_few_programs(needs, limit, start):
    needed, count = {}, start
    while count is not None:
        needed[count] = needs(count)
        count = plan.next_count(needed, 1000)
    assert max((n for n, size in needed.items() if size <= 1000), default=0) == limit
    assert len(needed) <= plan.MAX_COMPILATIONS + 1


def test_bounds():
    chip = topologies.Chip(100.0, 10.0, 5.0, 4, "here")
    costs = Costs(
        200, 30, {"all-gather": Exchange(2, 5), "all-reduce": Exchange(1, 5)}, 0, 0, 0
    )
    found = plan.bounds(costs, chip)
    assert found == {"products": 2.0, "memory": 3.0, "links": 3.0}


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        ("Used 25.50G of 15.75G hbm. Exceeded", (25.5, 15.75)),
        ("temporaries (512.00G) exceeds available HBM (31.25G).", (512, 31.25)),
    ],
)
def test_what_a_refusal_says(message, sizes):
    refused = topologies.Refusal.of(RuntimeError(message))
    assert refused == tuple(int(size * 2**30) for size in sizes)
    assert topologies.Refusal.of(RuntimeError("another error")) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v5e"], "topology: expected a generation and the shape"),
        (["--topology=h100:8"], "topology: expected a generation and the shape"),
        (["--topology=v5e:3x5"], "topology: expected one that the TPU compiler knows"),
        (["--mesh=data=3,fsdp=2"], "mesh: expected axes that multiply to 16 devices"),
        (["--mesh=rows=16"], "mesh: expected different axes of data, fsdp, tensor"),
        (["--program=sleep"], "train|prefill|decode"),
    ],
)
@needs_libtpu
def test_errors_are_one_line(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "nano", *flags]) in (cli.EXIT_FAILED, cli.EXIT_USAGE)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not [*tmp_path.iterdir()]


def test_without_libtpu(capsys, monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["plan", "nano"]) == cli.EXIT_FAILED
    error = capsys.readouterr().err
    assert "pip install 'recurrentgemma[tpu-plan]'" in error
    assert error.count("\n") == 1


def test_a_decode_step_writes_its_cache_in_place():
    """Every array of the new cache lies in the memory of the old one."""
    pattern = ("recurrent", "local_attention")
    config = dataclasses.replace(
        PRESETS["nano"], num_layers=2, block_pattern=pattern, vocab_size=64
    )
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    lowered = programs.lower(config, programs.Workload("decode", 4, 8), mesh)
    compiled = lowered.compile()
    (_, cache, _), _ = lowered.args_info
    (_, shardings, _), _ = compiled.input_shardings
    of_leaves = list(zip(*map(jax.tree.leaves, (cache, shardings)), strict=True))
    assert jax.tree.leaves(compiled.output_shardings[1]) == [s for _, s in of_leaves]
    cache_bytes = sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in of_leaves
    )
    assert compiled.memory_analysis().alias_size_in_bytes == cache_bytes


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "mesh", "topology"),
    [
        ("train", "fsdp=2,tensor=2", "v5e:2x2"),
        ("prefill", "data=2,sequence=2", "v6e:2x2"),
        ("decode", "tensor=2,data=2", "v5p:2x2x1"),
    ],
)
def test_a_plan(program, mesh, topology, tmp_path):
    flags = [f"--program={program}", f"--mesh={mesh}", f"--topology={topology}"]
    flags += ["--length=512", "--batch-size=4"]
    result = subprocess.run(
        [sys.executable, "-m", "recurrentgemma", "plan", "nano", *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr == ""
    assert "no call takes less than (a bound, no prediction)" in result.stdout
    [file] = (tmp_path / "plan").iterdir()
    document = json.loads(file.read_text())
    [found] = document["plans"]
    assert found["fits"]
    assert found["needed_bytes"] == sum(found["bytes_by_kind"].values())
    assert found["costs"]["unknown_loops"] == 0
    assert found["costs"]["exchanges"]
    assert found["costs"]["flops"] > 0
