"""What the device suite checks of each op: its inputs, by case.

Inputs are made on the host and are the same for every implementation: sequences of ragged
sizes, positions 0 and -1, decays up to 1 - 1e-6, a state before the first step.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from recurrentgemma.benchmarks.device_suite.sizes import Size
from recurrentgemma.kernels import (
    Gate,
    KVCache,
    StepParameters,
    linear_scan,
    local_attention,
    recurrent_step,
    rg_lru,
)
from recurrentgemma.kernels.dispatch import Table
from recurrentgemma.kernels.linear_scan import IMPLEMENTATIONS as LINEAR_SCANS
from recurrentgemma.kernels.local_attention import IMPLEMENTATIONS as ATTENTIONS
from recurrentgemma.kernels.recurrent_step import IMPLEMENTATIONS as STEPS
from recurrentgemma.kernels.rg_lru import IMPLEMENTATIONS as RG_LRUS

DTYPES = ("float32", "bfloat16", "float16")
SLOWEST, FASTEST = -6.0, -0.5
"""Decimal logarithms of 1 - a: decays from 1 - 1e-6 to 0.68."""
START_SHARE, HELD_SHARE = 0.1, 0.2
"""Shares of steps at which a document starts, and up to which a state is held."""
TAPS = 4
GATE_BLOCKS = 2
FAR = 100_000_000
"""A position that float32 cannot hold."""

Arguments = dict[str, Any]


class Maker:
    """Random arrays on the host: floating-point ones of this dtype, and others.

    Args:
      seed: seed of all that is made.
      size: sizes of the run.
      dtype: name of the dtype of activations and matrices.
    """

    def __init__(self, seed: int, size: Size, dtype: str):
        self.random, self.size = np.random.default_rng(seed), size
        self.dtype = jnp.dtype(dtype)

    def normal(self, *shape: int, dtype: Any = None, scale: float = 1.0) -> Any:
        """Normal values, in the dtype of activations unless another is given."""
        values = scale * self.random.standard_normal(shape, np.float32)
        return values.astype(self.dtype if dtype is None else dtype)

    def distances(self, *shape: int) -> np.ndarray:
        """1 - a, from 1e-6 to 0.3, the smallest in the first channel."""
        logarithms = self.random.uniform(SLOWEST, FASTEST, shape)
        logarithms[..., 0] = SLOWEST
        return 10.0**logarithms

    def a_param(self, width: int) -> Any:
        """Decays of such distances where the recurrence gate is half open, float32."""
        return np.log(np.expm1(self.distances(width) / 4)).astype(np.float32)

    def positions(self, rows: int, length: int) -> np.ndarray:
        """Starts of documents and held steps anywhere, for recurrences."""
        kind = self.random.random((rows, length))
        held = np.where(kind < HELD_SHARE, -1, 5)
        return np.where(kind < START_SHARE, 0, held).astype(np.int32)

    def gate(self) -> Gate:
        """A gate of `GATE_BLOCKS` diagonal blocks."""
        block = self.size.gate_block
        kernel = self.normal(GATE_BLOCKS, block, block, scale=block**-0.5)
        return Gate(kernel, self.normal(GATE_BLOCKS, block, dtype=np.float32))


def _scan(make: Maker, rows: int, length: int, *, wide: bool = True) -> Arguments:
    width = make.size.width if wide else make.size.narrow_width
    # A row and channel has one decay, so that a slow one is slow all the way; some are
    # negative or 0.
    a = np.repeat(1 - make.distances(rows, 1, width), length, axis=1)
    kind = make.random.random(a.shape)
    a = np.where(kind < 0.02, 0, np.where(kind < 0.04, -a, a))
    return {
        "x": make.normal(rows, length, width),
        "a": a.astype(np.float32),
        "h0": make.normal(rows, width, dtype=np.float32),
    }


def _rg_lru(
    make: Maker, rows: int, length: int, *, gates: bool, wide: bool = True
) -> Arguments:
    size = make.size
    width = GATE_BLOCKS * size.gate_block if gates else size.width
    width = width if wide else size.narrow_width
    shape = rows, length, width
    pair = ("recurrence_gate", "input_gate")
    return {
        "x": make.normal(*shape),
        **{name: make.gate() if gates else make.normal(*shape) for name in pair},
        "a_param": make.a_param(width),
        "positions": make.positions(rows, length),
        "h0": make.normal(rows, width, dtype=np.float32),
    }


def _step(make: Maker) -> Arguments:
    rows, width = make.size.rows + 2, GATE_BLOCKS * make.size.gate_block
    parameters = StepParameters(
        conv_kernel=make.normal(TAPS, width),
        conv_bias=make.normal(width, dtype=np.float32),
        recurrence_gate=make.gate(),
        input_gate=make.gate(),
        a_param=make.a_param(width),
    )
    return {
        "x": make.normal(rows, width),
        "parameters": parameters,
        "positions": np.resize(np.array([7, 0, -1, 1, 2], np.int32), rows),
        "h": make.normal(rows, width, dtype=np.float32),
        "conv_state": make.normal(rows, TAPS - 1, width),
    }


def _attention(
    make: Maker, length: int, heads: tuple[int, int], slots: int, newest: int
) -> Arguments:
    """A chunk after a ring of `slots`, none if that is 0.

    Rows by turns continue after position `newest`, start a document within the chunk
    after few tokens, and come after an empty ring with padding at their end.
    """
    rows, head_dim = make.size.rows, make.size.head_dim
    starts = np.resize([newest, min(slots, 3), 0], rows)
    positions = starts[:, None] + np.arange(length)
    for row, of_row in enumerate(positions):
        if row % 3 == 1:
            cut = int(make.random.integers(0, length))
            of_row[cut:] = np.arange(length - cut)
        if row % 3 == 2:
            of_row[length // 2 :] = -1
    query_heads, key_heads = heads
    keys = (rows, length, key_heads, head_dim)
    cache: Any = None
    if slots:
        age = (starts[:, None] - 1 - np.arange(slots)) % slots
        held: Any = np.maximum(starts[:, None] - 1 - age, -1).astype(np.int32)
        ring = (rows, slots, key_heads, head_dim)
        cache = KVCache(make.normal(*ring), make.normal(*ring), held)
    return {
        "q": make.normal(rows, length, query_heads, head_dim),
        "k": make.normal(*keys),
        "v": make.normal(*keys),
        "positions": positions.astype(np.int32),
        "cache": cache,
    }


def _call_scan(implementation, **arguments):
    y, h_last = linear_scan(**arguments, implementation=implementation)
    return {"y": y, "h_last": h_last}


def _call_reverse_scan(implementation, **arguments):
    y, h_last = linear_scan(**arguments, reverse=True, implementation=implementation)
    return {"y": y, "h_last": h_last}


def _call_rg_lru(implementation, **arguments):
    y, h_last = rg_lru(**arguments, implementation=implementation)
    return {"y": y, "h_last": h_last}


def _call_step(implementation, **arguments):
    y, h, conv_state = recurrent_step(**arguments, implementation=implementation)
    return {"y": y, "h": h, "conv_state": conv_state}


def _call_attention(implementation, *, q, positions, window, soft_cap, **arguments):
    out, cache = local_attention(
        q,
        positions=positions,
        window=window,
        scale=1 / math.sqrt(q.shape[-1]),
        soft_cap=soft_cap,
        implementation=implementation,
        **arguments,
    )
    # What comes out at padding is not specified.
    seen = (positions >= 0)[:, :, None, None]
    return {"out": jnp.where(seen, out, 0), **cache._asdict()}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """Inputs of an op, and how it is called with them."""

    op: str
    name: str
    table: Table
    """Implementations of the op."""
    call: Callable[..., dict[str, Any]]
    """(implementation, **arguments, **options) -> results by name."""
    make: Callable[[Maker], Arguments]
    options: Callable[[Size], dict[str, Any]] = lambda size: {}
    """Further keyword arguments of `call`, which are no arrays."""
    dtypes: tuple[str, ...] = DTYPES
    many_steps: bool = False
    """Whether rounding adds up over `Size.many_steps`."""

    @property
    def program(self) -> str:
        """Name of the op and of the case."""
        return f"{self.op}: {self.name}"

    def arguments(self, size: Size, dtype: str) -> Arguments:
        """The inputs: host arrays, the same at every call."""
        seed = zlib.crc32(self.program.encode())
        return self.make(Maker(seed, size, dtype))


def _window(soft_cap: float | None) -> Callable[[Size], dict[str, Any]]:
    return lambda size: {"window": size.window, "soft_cap": soft_cap}


FLOAT32 = ("float32",)
CASES = (
    Case(
        "linear_scan",
        "sequence",
        LINEAR_SCANS,
        _call_scan,
        lambda make: _scan(make, make.size.rows, make.size.length),
    ),
    Case(
        "linear_scan",
        "one step",
        LINEAR_SCANS,
        _call_scan,
        lambda make: _scan(make, make.size.rows, 1),
        dtypes=FLOAT32,
    ),
    Case(
        "linear_scan",
        "reverse",
        LINEAR_SCANS,
        _call_reverse_scan,
        lambda make: _scan(make, make.size.rows, make.size.length),
        dtypes=FLOAT32,
    ),
    Case(
        "rg_lru",
        "gates",
        RG_LRUS,
        _call_rg_lru,
        lambda make: _rg_lru(make, make.size.rows, make.size.length, gates=True),
    ),
    Case(
        "rg_lru",
        "logits",
        RG_LRUS,
        _call_rg_lru,
        lambda make: _rg_lru(make, make.size.rows, make.size.length, gates=False),
    ),
    Case(
        "rg_lru",
        "one step",
        RG_LRUS,
        _call_rg_lru,
        lambda make: _rg_lru(make, make.size.rows, 1, gates=True),
        dtypes=FLOAT32,
    ),
    Case("recurrent_step", "one token", STEPS, _call_step, _step),
    Case(
        "local_attention",
        "documents",
        ATTENTIONS,
        _call_attention,
        lambda make: _attention(make, make.size.length, (4, 1), 0, FAR),
        _window(None),
    ),
    Case(
        "local_attention",
        "after a cache",
        ATTENTIONS,
        _call_attention,
        lambda make: _attention(make, make.size.length, (4, 2), make.size.slots, FAR),
        _window(30.0),
        dtypes=FLOAT32,
    ),
    Case(
        "local_attention",
        "one token",
        ATTENTIONS,
        _call_attention,
        lambda make: _attention(make, 1, (4, 1), make.size.slots, FAR),
        _window(None),
    ),
    Case(
        "local_attention",
        "global",
        ATTENTIONS,
        _call_attention,
        lambda make: _attention(
            make,
            make.size.window,
            (4, 1),
            make.size.long_ring,
            make.size.long_ring - make.size.window,
        ),
        lambda size: {"window": None, "soft_cap": None},
        dtypes=FLOAT32,
    ),
    Case(
        "linear_scan",
        "many steps",
        LINEAR_SCANS,
        _call_scan,
        lambda make: _scan(make, 1, make.size.many_steps, wide=False),
        dtypes=FLOAT32,
        many_steps=True,
    ),
    Case(
        "rg_lru",
        "many steps",
        RG_LRUS,
        _call_rg_lru,
        lambda make: _rg_lru(make, 1, make.size.many_steps, gates=False, wide=False),
        dtypes=FLOAT32,
        many_steps=True,
    ),
)
"""Every case, in the order in which they are checked."""
