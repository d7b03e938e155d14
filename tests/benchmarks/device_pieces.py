"""Pieces of the device suite that go well, and some that are wrong."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from recurrentgemma.benchmarks.device_suite import checks, timings
from recurrentgemma.benchmarks.device_suite.cases import CASES
from recurrentgemma.benchmarks.device_suite.pieces import DEFAULT, Piece
from recurrentgemma.benchmarks.device_suite.sizes import SIZES
from tests.benchmarks.ending_pieces import FACTS

SMALL = SIZES["small"]
WENT_WELL = {
    ("check", "linear_scan: sequence", DEFAULT, "float32"),
    ("check", "linear_scan: sequence", "chunked", "float32"),
    ("check", "linear_scan: sequence", "pallas_gpu", "float32"),
    ("check", "linear_scan: sequence", "one_step", "float32"),
    ("check", "linear_scan: larger than 4 GiB", DEFAULT, "float32"),
    ("time", "copy", DEFAULT, "float32"),
    ("time", "linear_scan: training 2x24x256", DEFAULT, "float32"),
    ("time", "linear_scan: training 2x24x256", "chunked", "float32"),
}
count = itertools.count()


def make():
    """Facts and pieces, as `device_suite.everything` gives them."""
    made = [*checks.pieces(SMALL, "cpu"), *timings.pieces(SMALL, "cpu")]
    made = [piece for piece in made if tuple(piece.key.values()) in WENT_WELL]
    return FACTS, [*made, *wrong()]


def wrong():
    """Results that are wrong, each in its way, and a kernel that does not compile."""
    yield _check("off by a thousandth", _off)
    yield _check("not finite", lambda y: y.at[0, 0, 0].set(jnp.nan))
    yield _check("two runs differ", _changing)
    yield _check("a kernel that does not compile", _copied_by_a_kernel)


def _check(name, change):
    """A check of the linear scan whose result is changed."""

    def call(implementation, **arguments):
        found = CASES[0].call(implementation, **arguments)
        return (
            found
            if implementation == "reference"
            else found | {"y": change(found["y"])}
        )

    case = dataclasses.replace(CASES[0], call=call)
    work = partial(checks.check, case, DEFAULT, "float32", SMALL)
    return Piece("check", name, DEFAULT, "float32", work)


def _off(y):
    return y * 1.001


def _changing(y):
    def tiny():
        return np.float32(1e-7 * next(count))

    shape = jax.ShapeDtypeStruct((), jnp.float32)
    return y * (1 + jax.pure_callback(tiny, shape))


def _copied_by_a_kernel(y):
    def kernel(source, target):
        target[...] = source[...]

    shape = jax.ShapeDtypeStruct(y.shape, y.dtype)
    return y + pl.pallas_call(kernel, out_shape=shape)(jax.lax.stop_gradient(y))
