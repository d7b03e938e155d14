"""Ops on sequences that are cut into shards along time, one for each device of an axis.

Recurrences are affine in their first state: y_t = y0_t + decay_t * h0. Every shard runs
the op twice, for y0 (from a zero state) and for the decays (from a state of ones without
input). What is left is a scan over one state for each shard, which every device does
for itself, and a product. Attention gets the keys before a shard, as many as the window
holds, from the devices that have them, as its cache.

Each function takes whole arrays, as under `jax.jit`, opens a `jax.shard_map` around the
public op, and is differentiable like it, in both directions of the ring of devices.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from recurrentgemma.kernels import linear_scan as scan_op
from recurrentgemma.kernels import local_attention as attention_op
from recurrentgemma.kernels import rg_lru as rg_lru_op
from recurrentgemma.kernels.checks import check_arrays, check_kind, check_sequence
from recurrentgemma.kernels.local_attention import KVCache, ring


@dataclasses.dataclass(frozen=True)
class SequenceSharding:
    """How arrays [B, T, ...] lie on devices.

    Attributes:
      mesh: the devices.
      sequence: the mesh axis that T is cut along.
      batch: the mesh axis that B is cut along; None is not at all.
    """

    mesh: Mesh
    sequence: str
    batch: str | None = None

    def __post_init__(self):
        check_kind("mesh", self.mesh, Mesh)
        axes = [*self.mesh.axis_names]
        for name, axis in {"sequence": self.sequence, "batch": self.batch}.items():
            given = isinstance(axis, str) and axis in axes
            if not given and not (name == "batch" and axis is None):
                raise ValueError(
                    f"{name}: expected a mesh axis of {axes}, got {axis!r}; name one."
                )

    @property
    def shards(self) -> int:
        """Into how many parts T is cut."""
        return self.mesh.shape[self.sequence]


def linear_scan(
    x: jax.Array,
    a: jax.Array,
    h0: jax.Array | None = None,
    *,
    sharding: SequenceSharding,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`recurrentgemma.kernels.linear_scan` of a sequence cut along time.

    Raises:
      As there, and a ValueError if T is no multiple of the number of shards.
    """
    _check(sharding, scan_op, x, a, h0, reverse=reverse, implementation=implementation)

    op = partial(scan_op, reverse=reverse, implementation=implementation)
    return _recurrence(op, x, (a,), h0, sharding, reverse)


def rg_lru(
    x: jax.Array,
    recurrence_logits: jax.Array,
    input_logits: jax.Array,
    a_param: jax.Array,
    positions: jax.Array,
    h0: jax.Array | None = None,
    *,
    sharding: SequenceSharding,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`recurrentgemma.kernels.rg_lru` of a sequence cut along time.

    Raises:
      As there, and a ValueError if T is no multiple of the number of shards.
    """
    check_sequence(x, "B, T, E")
    logits = {"recurrence_logits": recurrence_logits, "input_logits": input_logits}
    check_arrays({name: (one, x.shape, jnp.floating) for name, one in logits.items()})
    arrays = x, recurrence_logits, input_logits, a_param, positions, h0
    _check(sharding, rg_lru_op, *arrays, implementation=implementation)

    op = partial(rg_lru_op, implementation=implementation)
    others = (recurrence_logits, input_logits, a_param, positions)
    return _recurrence(op, x, others, h0, sharding)


def local_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    positions: jax.Array,
    cache: KVCache | None,
    window: int | None,
    scale: float,
    soft_cap: float | None,
    sharding: SequenceSharding,
    implementation: str | None = None,
) -> tuple[jax.Array, KVCache]:
    """`recurrentgemma.kernels.local_attention` of a sequence cut along time.

    The window may be larger than a shard. The cache that comes back is on every device
    of the sequence axis.

    Raises:
      As there, and a ValueError if T is no multiple of the number of shards.
    """
    options = {"window": window, "scale": scale, "soft_cap": soft_cap}
    options |= {"positions": positions, "implementation": implementation}
    _check(sharding, attention_op, q, k, v, cache=cache, **options)
    _check_length(q, sharding)
    if cache is None:
        cache = ring.empty(k, v, k.shape[1] if window is None else window)

    def on_shard(q, k, v, positions, cache):
        before = _before_shard(cache, k, v, positions, sharding)
        out, after = attention_op(
            q,
            k,
            v,
            positions=positions,
            cache=before,
            window=window,
            scale=scale,
            soft_cap=soft_cap,
            implementation=implementation,
        )
        return out, _after_row(after, positions, sharding)

    long, state = _specs(sharding)
    return _map(on_shard, sharding, (long, long, long, long, state), (long, state))(
        q, k, v, positions, cache
    )


def _recurrence(
    op: Callable[..., tuple[jax.Array, jax.Array]],
    x: jax.Array,
    others: Sequence[jax.Array],
    h0: jax.Array | None,
    sharding: SequenceSharding,
    reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`op(x, *others, h0)`, which is linear in x and h0, through all shards in turn."""
    _check_length(x, sharding)
    if h0 is None:
        h0 = jnp.zeros((x.shape[0], x.shape[-1]), jnp.float32)

    def on_shard(x, h0, *others):
        y, end = op(x, *others, jnp.zeros_like(h0))
        decay, product = op(jnp.zeros_like(x), *others, jnp.ones_like(h0))
        ends, products = (
            jax.lax.all_gather(state, sharding.sequence, axis=1)
            for state in (end, product)
        )
        states, h_last = scan_op(ends, products, h0, reverse=reverse)
        if reverse:
            starts = jnp.concatenate([states[:, 1:], h0[:, None]], axis=1)
        else:
            starts = jnp.concatenate([h0[:, None], states[:, :-1]], axis=1)
        index = jax.lax.axis_index(sharding.sequence)
        start = jax.lax.dynamic_slice_in_dim(starts, index, 1, axis=1)
        total = y.astype(jnp.float32) + decay.astype(jnp.float32) * start
        return total.astype(y.dtype), h_last

    long, state = _specs(sharding)
    specs = (PartitionSpec() if array.ndim == 1 else long for array in others)
    run = _map(on_shard, sharding, (long, state, *specs), (long, state))
    return run(x, h0, *others)


def _before_shard(cache, k, v, positions, sharding) -> KVCache:
    """The ring after the tokens before a shard, of which it can hold the last ones."""
    length, slots = positions.shape[1], cache.positions.shape[1]
    reach = min(slots, (sharding.shards - 1) * length)
    for distance in range(-(-reach // length), 0, -1):
        tail = slice(-min(length, reach - (distance - 1) * length), None)
        route = [(i, i + distance) for i in range(sharding.shards - distance)]
        send = partial(jax.lax.ppermute, axis_name=sharding.sequence, perm=route)
        # Who gets nothing gets zeros, which must mean the position of padding.
        cache = ring.write(
            cache,
            send(k[:, tail]),
            send(v[:, tail]),
            send(positions[:, tail] + 1) - 1,
        )
    return cache


def _after_row(cache, positions, sharding) -> KVCache:
    """The ring after each row: that of the shard with the row's last token."""
    index = jax.lax.axis_index(sharding.sequence)
    filled = jnp.any(positions >= 0, axis=1)
    last = jax.lax.pmax(jnp.where(filled, index, 0), sharding.sequence)

    def choose(array):
        own = jnp.expand_dims(last == index, range(1, array.ndim))
        own_array = jnp.where(own, array, jnp.zeros_like(array))
        return jax.lax.psum(own_array, sharding.sequence)

    return KVCache(*(choose(array) for array in cache))


def _check(sharding, op, *arguments, **options):
    """Lets an op check its arguments while they still have their names and shapes."""
    check_kind("sharding", sharding, SequenceSharding)
    jax.eval_shape(lambda: op(*arguments, **options))


def _check_length(x, sharding):
    if x.ndim < 3 or x.shape[1] % sharding.shards:
        raise ValueError(
            f"Axis 1 of an array {x.shape} must be a multiple of the "
            f"{sharding.shards} devices of mesh axis {sharding.sequence!r}; pad it."
        )


def _specs(sharding):
    """Of arrays [B, T, ...] and of arrays [B, ...]."""
    return (
        PartitionSpec(sharding.batch, sharding.sequence),
        PartitionSpec(sharding.batch),
    )


def _map(function, sharding, in_specs, out_specs):
    # Kernels do not state over which axes their results vary, so that is not checked.
    return jax.shard_map(
        function,
        mesh=sharding.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
    )
