"""Tests on a real GPU or TPU; without one all are skipped.

    JAX_PLATFORMS=cuda,cpu pytest tests/device        # a GPU
    JAX_PLATFORMS=tpu,cpu pytest tests/device         # a TPU

The CPU computes the truth. What is checked, and the tolerances, are those of
`recurrentgemma bench device`: `recurrentgemma/benchmarks/device_suite/`.
"""

import jax
import pytest


@pytest.fixture(autouse=True, scope="session")
def a_device():
    """Skips every test where jax has a CPU alone."""
    if jax.default_backend() == "cpu":
        pytest.skip("needs a GPU or a TPU: JAX_PLATFORMS=cuda,cpu, or tpu,cpu")
