"""Real shapes of the recurrence, by name: for benchmarks, and for tests of coverage."""

from typing import NamedTuple


class Workload(NamedTuple):
    batch: int
    length: int
    width: int


WORKLOADS = {
    "prefill_67m": Workload(1, 1024, 768),
    "prefill_67m_long": Workload(1, 8192, 768),
    "train_small": Workload(8, 512, 256),
    "train_small_long": Workload(8, 2048, 256),
    "decode_2b": Workload(8, 1, 2560),
    "prefill_2b": Workload(2, 1024, 2560),
    "train_2b": Workload(8, 2048, 2560),
    "train_2b_long": Workload(8, 8192, 2560),
    "train_9b": Workload(4, 8192, 4096),
    "document_2b": Workload(1, 131072, 2560),
}
