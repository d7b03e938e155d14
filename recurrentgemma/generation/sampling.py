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
import numbers

import jax
import jax.numpy as jnp

_FLOAT32_BITS = 32
_SIGN_BIT = 1 << 31
_MAX_SEED = 2**32 - 1


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
        if not _is_number(self.temperature) or not 0 <= self.temperature < float("inf"):
            raise ValueError(
                "temperature: expected a finite number of at least 0 "
                f"(0 is greedy), got {self.temperature!r}"
            )
        if self.top_k is not None and (
            not isinstance(self.top_k, numbers.Integral)
            or isinstance(self.top_k, bool)
            or not 1 <= self.top_k < 2**31
        ):
            raise ValueError(
                f"top_k: expected an integer of at least 1 or None, got {self.top_k!r}"
            )
        if self.top_p is not None and (
            not _is_number(self.top_p) or not 0 < self.top_p <= 1
        ):
            raise ValueError(
                f"top_p: expected a number in (0, 1] or None, got {self.top_p!r}"
            )
        if self.min_p is not None and (
            not _is_number(self.min_p) or not 0 <= self.min_p <= 1
        ):
            raise ValueError(
                f"min_p: expected a number in [0, 1] or None, got {self.min_p!r}"
            )
        penalty = self.repetition_penalty
        if penalty is not None and (
            not _is_number(penalty) or not 0 < penalty < float("inf")
        ):
            raise ValueError(
                "repetition_penalty: expected a finite number above 0 or None, got "
                f"{penalty!r}"
            )
        # One Python type each: 1 and 1.0 would be two programs under jax.jit.
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                kind = int if field.name == "top_k" else float
                object.__setattr__(self, field.name, kind(value))


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _flatten(sampling):
    fields = dataclasses.fields(Sampling)
    return tuple(getattr(sampling, field.name) for field in fields), None


def _unflatten(_, children):
    # Past __post_init__: the leaves may be tracers, which cannot be compared.
    sampling = object.__new__(Sampling)
    for field, value in zip(dataclasses.fields(Sampling), children, strict=True):
        object.__setattr__(sampling, field.name, value)
    return sampling


jax.tree_util.register_pytree_node(Sampling, _flatten, _unflatten)


def check_seed(seed) -> int:
    """Returns `seed` as an int; ValueError unless it is an integer in [0, 2**32)."""
    is_integer = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
    if not is_integer or not 0 <= int(seed) <= _MAX_SEED:
        raise ValueError(f"seed: expected an integer in [0, 2**32), got {seed!r}")
    return int(seed)


def row_keys(seeds: jax.Array, steps: jax.Array) -> jax.Array:
    """Keys for one step: `fold_in(key(seed), step)` for each row.

    Args:
      seeds: uint32 [B].
      steps: int32 [B], how many tokens each row has drawn so far.

    Returns:
      A typed key array [B].
    """
    return jax.vmap(lambda s, i: jax.random.fold_in(jax.random.key(s), i))(seeds, steps)


def sample(
    logits: jax.Array,
    keys: jax.Array,
    sampling: Sampling,
    seen: jax.Array | None = None,
) -> jax.Array:
    """Chooses a token for every row.

    Args:
      logits: [B, V] float32.
      keys: typed key array [B], one for each row (see `row_keys`).
      sampling: how to choose.
      seen: bool [B, V], the tokens of each row so far; needed for a repetition penalty
        alone.

    Returns:
      int32 [B].
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
    """Makes tokens that were seen less likely (or, below 1, more likely).

    Args:
      logits: [B, V] float32.
      seen: bool [B, V].
      penalty: greater than 0.

    Returns:
      [B, V] float32: where seen, a positive logit divided, a negative one multiplied.
    """
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, penalized, logits)


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Cuts each row to its top-k, then to its top-p, then to its min-p.

    Args:
      logits: [B, V] float32, already divided by the temperature.
      sampling: its `top_k`, `top_p` and `min_p` are used.

    Returns:
      [B, V] float32: -inf where a token is cut, else unchanged.
    """
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

    Where all the weights do not reach the target (k above V, or p = 1 after rounding)
    everything is kept.
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
    return jnp.where(order >= threshold, logits, -jnp.inf)


def log_prob(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-probability of each row's token under the model: no temperature, no filter.

    Args:
      logits: [B, V] float32.
      tokens: int32 [B].

    Returns:
      float32 [B], natural logarithm.
    """
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
