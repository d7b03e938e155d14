"""Every op and the bundled model on the device that is here, as the command checks them."""

import pytest

from recurrentgemma.benchmarks import device
from recurrentgemma.benchmarks.device_suite import checks, model_checks
from recurrentgemma.benchmarks.device_suite.pieces import (
    DEFAULT,
    NOT_HERE,
    OUT_OF_MEMORY,
    RIGHT,
)
from recurrentgemma.benchmarks.device_suite.sizes import SIZES

# A device's compiler may warn of what no test on a CPU sees.
pytestmark = pytest.mark.filterwarnings("default")
PLATFORM, SIZE = device.platform(), SIZES["full"]


def pieces():
    """All checks; a single one stands for them where there is no device."""
    found = [*checks.pieces(SIZE, PLATFORM), *model_checks.pieces(SIZE)]
    return found[:1] if PLATFORM == "cpu" else found


@pytest.mark.parametrize("piece", pieces(), ids=lambda p: "-".join(p.key.values()))
def test_check(piece):
    row, _ = piece.run()
    if row["status"] == OUT_OF_MEMORY and checks.LARGE in piece.program:
        pytest.skip(row["remark"])
    if row["status"] == NOT_HERE and piece.implementation != DEFAULT:
        pytest.skip(row["remark"])
    assert row["status"] == RIGHT, row["message"]
