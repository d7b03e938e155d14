"""Local attention by tokamax's flash attention: for GPU, by name, if it is installed.

tokamax (github.com/openxla/tokamax) is optional, and imported when it is first used: it
pins a version of typeguard that other packages do not take. Its mask has a first key and
an end for every query, which are those of `blocked.py`: documents, the cache, the window
and padding are ranges of keys in time order. It knows the soft cap and grouped heads.
"""

import importlib
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from recurrentgemma.kernels.dispatch import differentiable
from recurrentgemma.kernels.gpu import LEAST_CAPABILITY, capability
from recurrentgemma.kernels.local_attention import blocked
from recurrentgemma.kernels.local_attention.chunk import Chunk, Settings, keys_in_time
from recurrentgemma.kernels.precision import kernel_precision_of

PACKAGE = "tokamax"
ATTENTION = f"{PACKAGE}._src.ops.attention"
"""The public function takes neither a range of keys for each query nor gives the sum of
weights; the objects behind it do. They are as they were in tokamax 0.0.12."""
KERNELS, EMULATION = ("mosaic_gpu", "triton"), "xla"
"""Names of tokamax's implementations: on a GPU, the first that takes the arguments; and
where that is interpreted."""
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def supports(chunk: Chunk, *, settings: Settings) -> str | None:
    """Why tokamax cannot take these arguments, or None."""
    del settings
    q, k, v, *_ = chunk
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return (
            "it takes float32, bfloat16 or float16, the same for q, k and v, not "
            f"{q.dtype}, {k.dtype} and {v.dtype}"
        )
    if importlib.util.find_spec(PACKAGE) is None:
        return f"the package {PACKAGE} is not installed"
    if (capability() or (0, 0)) < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        return f"it asks for a GPU of compute capability {least}, and none is here"
    return None


def attend(
    chunk: Chunk, *, settings: Settings, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """See `reference.attend`."""
    return _attend(chunk.q, *keys_in_time(chunk), chunk, settings, interpret)


def gradients(
    arguments: tuple[Chunk],
    results: tuple[jax.Array, jax.Array],
    upstream: tuple[jax.Array, jax.Array],
    *,
    settings: Settings,
    interpret: bool = False,
) -> tuple[Chunk]:
    """See `blocked.gradients`. tokamax computes the output again."""
    del results
    (chunk,) = arguments

    def out(chunk):
        return attend(chunk, settings=settings, interpret=interpret)[0]

    _, pull_back = jax.vjp(out, chunk)
    with jax.numpy_rank_promotion("allow"):
        return differentiable(pull_back(upstream[0]))


def _attend(q, k, v, chunk, settings, interpret) -> tuple[jax.Array, jax.Array]:
    base = importlib.import_module(f"{ATTENTION}.base")
    held = chunk.cache.positions
    cached = jnp.sum(held >= 0, axis=1, dtype=jnp.int32)
    first, last = blocked.visible_range(
        chunk.positions, cached, held.shape[1], settings.window
    )
    mask = base.Mask(k_start=first[:, None], k_end=last[:, None] + 1)
    out, (largest, total) = _call(
        (EMULATION,) if interpret else KERNELS,
        *(q, k, v),
        mask=mask,
        logits_scale=settings.scale,
        logits_soft_cap=settings.soft_cap,
        precision=kernel_precision_of(q),
        return_residuals=True,
    )
    log_total = jax.lax.stop_gradient(largest + jnp.log(total))
    return out, jnp.swapaxes(log_total, 1, 2)


def _call(names: tuple[str, ...], *arrays: jax.Array, **options: Any) -> Any:
    """The first of tokamax's implementations that takes the arguments."""
    table = importlib.import_module(f"{ATTENTION}.api").IMPLEMENTATIONS
    # Its settings are absl's flags, which it would read from sys.argv itself: that fails
    # in notebooks and in programs with arguments of another kind.
    flags = importlib.import_module("absl.flags").FLAGS
    if not flags.is_parsed():
        flags.mark_as_parsed()
    reasons = []
    for name in names:
        try:
            with jax.numpy_rank_promotion("allow"):
                return table[name](*arrays, **options)
        except (KeyError, NotImplementedError) as error:
            reasons.append(f"{name}: {error}")
    raise NotImplementedError(f"local_attention: {'; '.join(reasons)}")
