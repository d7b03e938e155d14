"""The sizes of everything that the device suite checks and times: one parameter."""

import dataclasses
from collections.abc import Mapping

from recurrentgemma.kernels.linear_scan.workloads import Workload


@dataclasses.dataclass(frozen=True, eq=False)
class Size:
    """Sizes of a run.

    Shapes of checks are ragged: no multiple of a block, where an op allows it.
    """

    rows: int
    length: int
    """Steps of a checked sequence."""
    width: int
    """Channels, where no gate has blocks."""
    narrow_width: int
    """Channels of sequences of many steps."""
    gate_block: int
    """Channels of a diagonal block of the gates; there are two blocks."""
    head_dim: int
    window: int
    slots: int
    """Slots of the ring that a chunk continues."""
    long_ring: int
    """Slots of the ring of global attention."""
    many_steps: int
    large_bytes: int
    """Bytes that one array exceeds."""
    workloads: Mapping[str, Workload]
    """Shapes at which the recurrence is timed, by name."""
    attention: tuple[int, int, int, int]
    """Tokens, query heads, channels of a head, and window, at which attention is timed."""
    model: str
    """Preset whose prefill, decode and train step are timed."""
    small_model: str
    """Preset whose train step is timed too, for a device that cannot train the other."""
    prefill_lengths: tuple[int, ...]
    decode_batches: tuple[int, ...]
    train_length: int
    repeats: int
    """Number of samples of a model's figure."""
    most_calls: int
    """Largest number of calls in a sample of an op."""


SIZES = {
    "full": Size(
        rows=3,
        length=300,
        width=200,
        narrow_width=50,
        gate_block=256,
        head_dim=256,
        window=100,
        slots=130,
        long_ring=1100,
        many_steps=100_000,
        large_bytes=1 << 32,
        workloads={
            "training": Workload(8, 2048, 2560),
            "prefill": Workload(1, 8192, 2560),
            "decode": Workload(16, 1, 2560),
        },
        attention=(8192, 10, 256, 2048),
        model="recurrentgemma-2b",
        small_model="recurrentgemma-100m",
        prefill_lengths=(2048, 8192),
        decode_batches=(1, 16, 64),
        train_length=2048,
        repeats=3,
        most_calls=100,
    ),
    "small": Size(
        rows=3,
        length=11,
        width=6,
        narrow_width=6,
        gate_block=128,
        head_dim=128,
        window=4,
        slots=5,
        long_ring=1024,
        many_steps=300,
        large_bytes=1 << 16,
        workloads={
            "training": Workload(2, 24, 256),
            "decode": Workload(2, 1, 256),
        },
        attention=(40, 2, 128, 16),
        model="griffin-175k",
        small_model="griffin-175k",
        prefill_lengths=(24,),
        decode_batches=(1, 2),
        train_length=24,
        repeats=1,
        most_calls=1,
    ),
}
"""Sizes by name. "full" takes 10 minutes on one device; "small" rehearses it on a CPU."""
