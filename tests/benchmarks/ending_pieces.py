"""Pieces of the device suite that end their process; quickly imported."""

import os
import time

import jax.numpy as jnp

from recurrentgemma.benchmarks.device_suite.pieces import DEFAULT, Piece

FACTS = {
    "device": "A chip",
    "platform": "cpu",
    "versions": {"jax": "1.0"},
    "commit": "abc",
}
LAST_WORDS = "illegal memory access in kernel"


def make():
    """Facts and pieces, as `device_suite.everything` gives them."""
    works = {
        "out of memory": _allocate,
        "after out of memory": _process,
        "a crash": _crash,
        "after a crash": _process,
        "no end": _sleep,
    }
    return FACTS, [
        Piece(
            "check", name, DEFAULT, "float32", work, limit_s=20 - 19 * (work is _sleep)
        )
        for name, work in works.items()
    ]


def no_device():
    """A start that fails."""
    raise RuntimeError("no driver was found")


def _process():
    return {"process": os.getpid()}


def _allocate():
    return {"bytes": jnp.zeros(1 << 46, jnp.int8).block_until_ready().nbytes}


def _crash():
    os.write(2, LAST_WORDS.encode())
    os.abort()


def _sleep():
    time.sleep(600)
