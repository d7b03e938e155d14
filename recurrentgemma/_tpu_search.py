"""No search for a TPU on a machine that has none.

With libtpu installed (extra `tpu-plan`), JAX asks it for chips when it starts: it looks
for a cloud's metadata server and prints eight lines. The variables here answer what it
would ask. They are set before JAX is imported, where no chip is present and the user has
set none of them.
"""

import importlib.util
import os
from pathlib import Path

NO_CHIP = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Without a chip no value but the first means anything."""
COMPILER_ONLY = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}
"""For a process that uses libtpu as a compiler alone."""
CHIPS = ("accel*", "vfio/[0-9]*")
"""Files in /dev of the drivers of TPU chips."""


def skip() -> None:
    """Sets the variables, where that is right."""
    has_chip = any(next(Path("/dev").glob(pattern), None) for pattern in CHIPS)
    if has_chip or not importlib.util.find_spec("libtpu"):
        return
    if not any(name in os.environ for name in NO_CHIP):
        os.environ.update(NO_CHIP)


def compile_only() -> None:
    """For a process that compiles for TPUs and runs nothing: CPU is its only platform."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for name, value in {**NO_CHIP, **COMPILER_ONLY}.items():
        os.environ.setdefault(name, value)
