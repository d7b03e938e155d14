"""Looking inside a model: the values that its layers compute, by name.

    values of a block      blocks.2.residual  blocks.2.mixer  blocks.2.mlp
    of a recurrent mixer   blocks.2.mixer.gate .conv .recurrence_gate .input_gate .decay
                           .state .recurrence
    of attention           blocks.2.mixer.queries .keys .values .heads
    of a minGRU            blocks.2.mixer.update_gate .decay .state
    before the first block embedding

The docstring of each module says what its values are. A module shows a value with
`chunk.observe(name, value)`, and the model's `observer` sees it there, in every call of
the model: prefill, chunks, decode, speculation, scoring and gradients. A model without
an observer computes nothing for it. What a fused op never forms is computed from the
op's inputs, only where it is observed, and then the decode step runs unfused.
"""

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Sequence

import jax

from recurrentgemma.cache import Cache, Observer
from recurrentgemma.griffin import Griffin, unstack_layers
from recurrentgemma.inputs import prepare

Captured = tuple[jax.Array, Cache, dict[str, jax.Array]]


def with_observer(model: Griffin, observer: Observer | None) -> Griffin:
    """The same model, sharing its parameters, with this observer.

    Args:
      model: not changed. Stacked layers are taken apart, so that each has a name.
      observer: who sees values from now on; it is part of what a compiled program is
        chosen by, so it must be hashable. None is nobody.
    """
    observed = unstack_layers(model)
    observed.observer = observer
    return observed


def capture(model: Griffin, patterns: str | Sequence[str]) -> Callable[..., Captured]:
    """The call of a model that also returns what its layers computed.

    Example:
      >>> look = capture(model, ["blocks.*.mixer.decay", "blocks.2.residual"])
      >>> hidden, cache, values = look(tokens)
      >>> values["blocks.0.mixer.decay"].shape  # [B, T, E]

    Args:
      model: what is observed; weights that are edited later are seen.
      patterns: names of values, or patterns such as "blocks.*.mixer.*" (`*` is any
        text, `?` any character, `[02]` one of these).

    Returns:
      A function (tokens, positions=None, cache=None) -> (hidden, cache, values). The
      first two are those of `model(tokens, positions, cache)`; values are arrays
      [B, T, ...] by name, in the order in which they were computed.

    Raises:
      ValueError: (by the function returned) a pattern matches no value; the names that
        there are are listed.
    """
    chosen = (patterns,) if isinstance(patterns, str) else tuple(patterns)

    def call(
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Captured:
        cache = prepare(model.config, tokens, positions, cache)
        return _captured(model, chosen, tokens, positions, cache)

    return call


@functools.partial(jax.jit, static_argnames="patterns")
def _captured(model, patterns, tokens, positions, cache) -> Captured:
    recorder = _Recorder(patterns, model.observer)
    observed = with_observer(model, recorder)
    # Values may not leave what is recomputed in the backward pass.
    observed.runtime = dataclasses.replace(model.runtime, remat=False)
    hidden, cache = observed(tokens, positions, cache)
    for pattern in patterns:
        if not fnmatch.filter(recorder.names, pattern):
            raise ValueError(
                f"patterns: expected names of values, got {pattern!r}, which matches "
                f"none; there are {', '.join(recorder.names)}"
            )
    return hidden, cache, recorder.values


class _Recorder:
    """Keeps the values of the names that match, as another observer leaves them."""

    def __init__(self, patterns: tuple[str, ...], inner: Observer | None):
        self.values: dict[str, jax.Array] = {}
        self.names: dict[str, None] = {}
        self._patterns = patterns
        self._inner = inner

    def sees(self, name: str) -> bool:
        """Whether a pattern matches, or the other observer wants it."""
        self.names[name] = None
        inner = self._inner is not None and self._inner.sees(name)
        return inner or self._matches(name)

    def replaces(self, name: str) -> bool:
        """Whether the other observer does."""
        return self._inner is not None and self._inner.replaces(name)

    def __call__(self, name: str, value: jax.Array) -> jax.Array:
        """Keeps the value if a pattern matches."""
        if self._inner is not None and self._inner.sees(name):
            value = self._inner(name, value)
        if self._matches(name):
            self.values[name] = value
        return value

    def _matches(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self._patterns)
