"""Two processes on this machine train one model."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tolerances import assert_close

ROOT = Path(__file__).parents[2]
FLAGS = [
    "--model=nano",
    "--steps=3",
    "--batch-size=4",
    "--sequence-length=32",
    "--checkpoint-every=2",
    "--evaluate-every=2",
    "--evaluation-batches=1",
    "--held-out-share=0.5",
]


def start(folder, output, *flags):
    """A process that trains on the files of the folder."""
    given = [f"--data={folder / 'text'}", f"--output={folder / output}", *flags]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "recurrentgemma", "train", *FLAGS, *given],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes):
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def losses(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(8):
        lines = "".join(f"def f{i}_{j}(x): return x + {j}\n" for j in range(20))
        (tmp_path / "text" / f"{i}.py").write_text(lines)
    finish(start(tmp_path, "one"))
    port = free_port()
    pair = [
        start(tmp_path, "two", "--mesh=fsdp", f"--processes=localhost:{port},2,{index}")
        for index in range(2)
    ]
    finish(*pair)
    assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), "loss")
    files = {path.name for path in (tmp_path / "one" / "model").iterdir()}
    assert files == {path.name for path in (tmp_path / "two" / "model").iterdir()}
