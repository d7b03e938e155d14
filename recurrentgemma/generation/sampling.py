"""From logits to a token: penalty, temperature, top-k, top-p and min-p; or greedy.

The logits of tokens that a row holds already are penalised; the row is scaled by
1 / temperature, cut to its top-k tokens, cut again to the smallest set of tokens whose
probability reaches top-p, cut to those at least min-p times as probable as the first,
and sampled by the Gumbel trick with a key of its own, `fold_in(key(seed), step)`: what a
row gets never depends on the rows beside it.

Top-k and top-p keep the tokens above a threshold, which a binary search over the 32 bits of
a float32 finds: 32 passes over the logits instead of a sort of the vocabulary, and k
and p may be traced, so that a new setting compiles nothing. Tokens that tie with the
last one kept are kept too. All in float32.

Sources: top-p is arXiv 1904.09751, min-p arXiv 2407.01082, the penalty arXiv 1909.05858,
section 4.1.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from recurrentgemma import _validation as check

_FLOAT32_BITS = 32
_SIGN_BIT = 1 << 31
_MAX_SEED = 2**32 - 1
_MAX_TOP_K = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Example: `Sampling(temperature=0.7, top_p=0.95)`; `Sampling(temperature=0)` is
    greedy. A pytree: under `jax.jit` the numbers are traced, and only which of them are
    None is static.

    Attributes:
      temperature: at least 0; the logits are divided by it. 0 takes the most probable
        token, whatever `top_k`, `top_p` and `min_p` say.
      top_k: how many of the most probable tokens may be chosen, at least 1, or None.
      top_p: in (0, 1]: only the most probable tokens that together reach this
        probability (after temperature and top-k) may be chosen, or None.
      min_p: in [0, 1]: only tokens at least this times as probable as the most probable
        one (after temperature) may be chosen, or None.
      repetition_penalty: greater than 0: the logits of the tokens that the prompt or
        the text so far holds are divided by it where positive and multiplied by it
        where negative (above 1 discourages them), or None.

    Raises:
      ValueError: a number out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self):
        # Each number is checked as the device sees it: rounded to float32, where the
        # smallest numbers are zero. One Python type each, as 1 and 1.0 would be two
        # programs under jax.jit.
        limits = {
            "temperature": {"least": 0},
            "top_p": {"above": 0, "most": 1},
            "min_p": {"least": 0, "most": 1},
            "repetition_penalty": {"above": 0},
        }
        for name, limit in limits.items():
            value = getattr(self, name)
            if value is None and name != "temperature":
                continue
            value = check.number(name, value, **limit)
            if check.number(name, _on_device(value), **limit) == 0:
                value = 0.0
            object.__setattr__(self, name, value)
        if self.top_k is not None:
            top_k = check.integer("top_k", self.top_k, least=1, most=_MAX_TOP_K)
            object.__setattr__(self, "top_k", top_k)


def _on_device(value: float) -> float:
    """The number in float32, without the denormal numbers that devices treat as 0."""
    with np.errstate(over="ignore"):
        rounded = np.float32(value)
    return 0.0 if abs(rounded) < np.finfo(np.float32).tiny else float(rounded)


def _unflatten(names, values):
    # Past __post_init__: the leaves may be tracers, which cannot be compared.
    sampling = object.__new__(Sampling)
    vars(sampling).update(zip(names, values, strict=True))
    return sampling


jax.tree_util.register_pytree_node(
    Sampling, lambda one: (tuple(vars(one).values()), tuple(vars(one))), _unflatten
)


def check_seed(seed) -> int:
    """Returns `seed` as an int; ValueError unless it is an integer in [0, 2**32)."""
    return check.integer("seed", seed, least=0, most=_MAX_SEED)


def row_keys(seeds: jax.Array, steps: jax.Array) -> jax.Array:
    """Keys for one step of each row, `fold_in(key(seed), step)`: seeds, uint32 [B], and
    numbers of tokens drawn so far, int32 [B], to a typed key array [B]."""
    return jax.vmap(lambda s, i: jax.random.fold_in(jax.random.key(s), i))(seeds, steps)


def sample(
    logits: jax.Array,
    keys: jax.Array,
    sampling: Sampling,
    seen: jax.Array | None = None,
) -> jax.Array:
    """Chooses a token for every row, int32 [B].

    Args:
      logits: [B, V] float32.
      keys: [B], see `row_keys`.
      sampling: how to choose.
      seen: bool [B, V], the tokens so far; needed for a repetition penalty alone.
    """
    if sampling.repetition_penalty is not None:
        assert seen is not None, "a repetition penalty needs the tokens so far"
        logits = penalize(logits, seen, sampling.repetition_penalty)

    def greedy():
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw():
        # From the maximum down, so that no temperature overflows.
        scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
        scaled = filter_logits(scaled / sampling.temperature, sampling)
        return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)

    return jax.lax.cond(sampling.temperature > 0, draw, greedy)


def penalize(
    logits: jax.Array, seen: jax.Array, penalty: float | jax.Array
) -> jax.Array:
    """The logits [B, V], less of the tokens that were seen (or, below 1, more); finite.

    Where `seen`, bool [B, V], a positive one is divided and a negative one multiplied.
    """
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    largest = jnp.finfo(logits.dtype).max
    return jnp.where(seen, jnp.clip(penalized, -largest, largest), logits)


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """The logits [B, V], after the temperature, cut to top-k, then top-p, then min-p:
    -inf where a token is cut."""
    if sampling.top_k is not None:
        logits = _keep_top(logits, jnp.ones_like(logits), sampling.top_k)
    if sampling.top_p is not None:
        logits = _keep_top(logits, jax.nn.softmax(logits, axis=-1), sampling.top_p)
    if sampling.min_p is not None:
        lowest = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits >= lowest, logits, -jnp.inf)
    return logits


def _keep_top(logits, weights, target):
    """-inf below the largest threshold that leaves at least `target` of `weights`.

    Everything is kept where all weights together do not reach the target (k above V, or
    p = 1 after rounding), and the largest logit is always kept.
    """
    sign = jnp.uint32(_SIGN_BIT)
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    # Unsigned integers in the order of the floats.
    order = jnp.where(bits >= sign, ~bits, bits | sign)

    def try_bit(i, threshold):
        candidate = threshold | (sign >> i.astype(jnp.uint32))
        kept = jnp.sum(jnp.where(order >= candidate, weights, 0), -1, keepdims=True)
        return jnp.where(kept >= target, candidate, threshold)

    threshold = jnp.zeros((*logits.shape[:-1], 1), jnp.uint32)
    threshold = jax.lax.fori_loop(0, _FLOAT32_BITS, try_bit, threshold)
    threshold = jnp.minimum(threshold, jnp.max(order, axis=-1, keepdims=True))
    return jnp.where(order >= threshold, logits, -jnp.inf)


def log_prob(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-probability, in nats, of each row's token under the model, without temperature
    and filters: logits [B, V] and int32 [B] to float32 [B]."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
