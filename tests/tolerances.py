"""Every tolerance of the tests, by quantity and dtype, each with its reason.

Those of a GPU or TPU are in `recurrentgemma/benchmarks/device_suite/`, for its command too.

`assert_close` compares |actual - expected| with `absolute + relative * |expected|` for
every entry; where `of_largest` or `of_channel` is given, with that share of the largest entry of
the expected array, or of its channel (the last axis). Its message reports the largest and the relative RMS error.
"""

from typing import NamedTuple

import numpy as np


class Tolerance(NamedTuple):
    absolute: float = 0.0
    relative: float = 0.0
    of_largest: float = 0.0
    of_channel: float = 0.0


TOLERANCES: dict[tuple[str, str], Tolerance] = {
    # Two evaluations of the same float32 model in another order differ by up to 6e-6
    # in logits of up to 24; a wrong norm epsilon changes them by 1e-4 at least.
    ("logits", "float32"): Tolerance(absolute=1e-4),
    # bfloat16 has 8 bits: the original's own bfloat16 logits are 0.11 to 0.29 away
    # from its float32 ones.
    ("logits", "bfloat16"): Tolerance(absolute=0.5),
    # Activations of order one after a few float32 layers.
    ("cache", "float32"): Tolerance(absolute=2e-5, relative=2e-5),
    ("layer", "float32"): Tolerance(absolute=2e-5, relative=2e-5),
    # Mean over some hundred float32 cross-entropies, stored to 4e-6 of float64.
    ("loss", "float32"): Tolerance(absolute=1e-5),
    # The sum of some ten cross-entropies from bfloat16 hidden states and embedding.
    ("loss", "bfloat16"): Tolerance(relative=1e-2),
    # Sums over all positions: rounding scales with the largest entry, not with each.
    ("gradient", "float32"): Tolerance(of_largest=1e-4),
    # The same sums in another order; every chunk's part is added to those behind it.
    ("long_gradient", "float32"): Tolerance(of_largest=1e-5),
    # The last factor is rounded to 8 bits, and so are states inside a gradient.
    ("gradient", "bfloat16"): Tolerance(of_largest=1e-2),
    ("gradient", "float16"): Tolerance(of_largest=2e-3),
    # A slow channel's gradient is a thousandth of the others'.
    ("channel_gradient", "float32"): Tolerance(of_channel=1e-4),
    ("channel_gradient", "bfloat16"): Tolerance(of_channel=1e-2),
    # 1 - a^2 of the RG-LRU, from gates that are 5e-7 off.
    ("decay", "float32"): Tolerance(relative=1e-4),
    # One rounding of a number below 1.
    ("decay_near_one", "float32"): Tolerance(absolute=0.6 * 2.0**-24),
    # Rounding grows with the number of steps that a state remembers: about ten here.
    ("scan", "float32"): Tolerance(absolute=1e-5, relative=1e-5),
    # One rounding to 8 bits of the result; the carry is float32.
    ("scan", "bfloat16"): Tolerance(absolute=1e-2, relative=8e-3),
    # One rounding to 11 bits, likewise.
    ("scan", "float16"): Tolerance(absolute=2e-3, relative=1e-3),
    # 1e5 products with one decay, which without fused multiply-add round alike: at
    # worst 1e5 half units in the last place, 6e-3; measured 1.7e-4.
    ("long_scan", "float32"): Tolerance(of_largest=5e-4),
    # Where 1 - a^2 is near 0 its rounding decides: a square root magnifies it by 1000.
    ("rg_lru_gradient_clip", "float32"): Tolerance(absolute=3e-3),
    # Softmax of scores of order one, weighted sums of values of order one.
    ("attention", "float32"): Tolerance(absolute=1e-5, relative=1e-5),
    # Weights and result are rounded to 8 bits.
    ("attention", "bfloat16"): Tolerance(absolute=2e-2, relative=1e-2),
}


def _largest_of_channels(array: np.ndarray) -> np.ndarray:
    return array.max(axis=tuple(range(array.ndim - 1)))


def assert_close(actual, expected, quantity: str, dtype: str = "float32") -> None:
    """Raises AssertionError unless `actual` is within the table's tolerance.

    Args:
      actual, expected: arrays of one shape, any dtype that casts to float64.
      quantity: the row of `TOLERANCES`, such as "logits".
      dtype: the precision that `actual` was computed in.
    """
    actual = np.asarray(actual).astype(np.float64)
    expected = np.asarray(expected).astype(np.float64)
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    tolerance = TOLERANCES[quantity, dtype]
    if actual.size == 0:
        return
    error = np.abs(actual - expected)
    allowed = (
        tolerance.absolute
        + tolerance.relative * np.abs(expected)
        + tolerance.of_largest * np.abs(expected).max()
        + tolerance.of_channel * _largest_of_channels(np.abs(expected))
    )
    rms = np.sqrt(np.mean(error**2)) / max(np.sqrt(np.mean(expected**2)), 1e-30)
    # `not (<=)` also catches NaN.
    wrong = ~(error <= allowed)
    assert not wrong.any(), (
        f"{quantity} ({dtype}): {wrong.sum()} of {wrong.size} entries off by up to "
        f"{np.nanmax(error):.3g} ({tolerance}); relative RMS error {rms:.3g}; "
        f"{np.sum(~np.isfinite(actual))} entries are not finite"
    )
