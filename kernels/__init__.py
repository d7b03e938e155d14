"""Recurrence and attention ops: pure functions of arrays that depend on jax alone.

Each op is a folder: the public function and its table of implementations in
`__init__.py`, the definition in `reference.py`, one file per further implementation.
`dispatch.py` decides which implementation runs, `meshes.py` on which part of the arrays.
"""

from recurrentgemma.kernels.linear_scan import linear_scan
from recurrentgemma.kernels.local_attention import KVCache, local_attention
from recurrentgemma.kernels.recurrent_step import StepParameters, recurrent_step
from recurrentgemma.kernels.rg_lru import rg_lru
from recurrentgemma.kernels.rg_lru.gates import Gate

__all__ = [
    "Gate",
    "KVCache",
    "StepParameters",
    "linear_scan",
    "local_attention",
    "recurrent_step",
    "rg_lru",
]
