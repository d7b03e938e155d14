"""Loading and saving never hold the model twice: measured in a process of its own.

A host target may grow the peak by 1.2 times the model at its target dtype; a device or
sharded target by twice the largest tensor, besides what is on the devices (which share
the host's memory here).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints.checkpoints import FORMAT_NAMES

PROBE = Path(__file__).with_name("memory_probe.py")
ROOT = Path(__file__).parents[2]
HOST_SHARE = 1.2
LARGEST_TENSORS = 2.0


def run_probe(*arguments) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(PROBE), *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def check(layout, layers, dtype, target, folder):
    run_probe("make", layout, folder, layers)
    result = json.loads(run_probe("measure", layout, folder, dtype, target))
    print(layout, dtype, target, result)
    beside = LARGEST_TENSORS * result["largest"]
    if target == "host":
        assert result["load_growth"] <= HOST_SHARE * result["model"]
        assert result["save_growth"] <= result["model"] + beside
    else:
        assert result["load_growth"] <= result["on_devices"] + beside
        assert result["save_growth"] <= result["on_devices"] + beside
    assert result["load_growth"] > 0.9 * result["on_devices"], "nothing was measured"


@pytest.mark.parametrize(
    ("layout", "target"), [("native", "columns"), ("hugging_face", "host")]
)
def test_a_small_checkpoint_is_never_in_memory_twice(layout, target, tmp_path):
    check(layout, 2, "bfloat16", target, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["host", "rows", "columns", "replicated"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", FORMAT_NAMES)
def test_a_checkpoint_of_one_gigabyte_is_never_in_memory_twice(
    layout, dtype, target, tmp_path
):
    check(layout, 18, dtype, target, tmp_path)
