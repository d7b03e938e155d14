"""How many processes a test run starts."""

from types import SimpleNamespace

import pytest


@pytest.mark.parametrize(
    ("arguments", "alone"),
    [
        (["tests/test_cost.py"], True),
        (["tests/test_cost.py::one", "tests/test_cost.py::two[a.py]"], True),
        (["tests/test_cost.py", "tests/test_cache.py"], False),
        (["tests"], False),
        (["tests/kernels"], False),
    ],
)
def test_a_single_file_needs_no_workers(arguments, alone, pytestconfig):
    config = SimpleNamespace(
        args=arguments, option=SimpleNamespace(numprocesses="auto")
    )
    count = pytestconfig.hook.pytest_xdist_auto_num_workers(config=config)
    assert (count == 0) == alone
