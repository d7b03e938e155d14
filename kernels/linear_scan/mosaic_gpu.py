"""The linear scan as Pallas kernels for GPU by Mosaic: those of `pallas_gpu.py`."""

from functools import partial

from recurrentgemma.kernels.linear_scan import pallas_gpu
from recurrentgemma.kernels.linear_scan.gpu_programs import MOSAIC

scan = partial(pallas_gpu.scan, backend=MOSAIC)
gradients = partial(pallas_gpu.gradients, backend=MOSAIC)
