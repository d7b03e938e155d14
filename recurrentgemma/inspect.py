"""Looking inside a model: the values that its layers compute, seen or replaced by name.

    values of a block      blocks.2.residual  blocks.2.mixer  blocks.2.mlp
    of a recurrent mixer   blocks.2.mixer.gate .conv .recurrence_gate .input_gate .decay
                           .state .recurrence .effective_attention
    of attention           blocks.2.mixer.queries .keys .values .probabilities .heads
    of a minGRU            blocks.2.mixer.update_gate .decay .state
    before the first block embedding

The docstring of each module says what its values are; `names` lists those of a model.
`capture` returns values, `edit` replaces them. A module shows a value with
`chunk.observe(name, value)`, and the model's `observer` sees it there, in every call of
the model: prefill, chunks, decode, speculation, scoring and gradients. A model without
an observer computes nothing for it. What a fused op never forms is computed from the
op's inputs, only where it is observed, and then the decode step runs unfused.
"""

import collections
import dataclasses
import fnmatch
import functools
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from recurrentgemma import _validation as check
from recurrentgemma.cache import Cache
from recurrentgemma.chunk import Observer
from recurrentgemma.griffin import Griffin, unstack_layers
from recurrentgemma.inputs import prepare

Captured = tuple[jax.Array, Cache, dict[str, jax.Array]]
Function = Callable[..., jax.Array]
"""An edit: the value of some tokens, [B, T, ...], to one of the same shape."""
Edits = Mapping[str, Function]
"""Edits by name of the value, or by pattern."""


def with_observer(model: Griffin, observer: Observer | None) -> Griffin:
    """The same model, sharing its parameters, with this observer.

    Args:
      model: not changed. Stacked layers are taken apart, so that each has a name.
      observer: who sees values from now on; it is part of what a compiled program is
        chosen by, so it must be hashable. None is nobody: the model without edits.
    """
    observed = unstack_layers(model)
    observed.observer = observer
    return observed


def names(model: Griffin) -> tuple[str, ...]:
    """The names of all values of a model, in the order in which they are computed."""
    return tuple(_list_names(model).seen)


def capture(model: Griffin, patterns: str | Sequence[str]) -> Callable[..., Captured]:
    """The call of a model that also returns what its layers computed.

    Example:
      >>> look = capture(model, ["blocks.*.mixer.decay", "blocks.2.residual"])
      >>> hidden, cache, values = look(tokens)
      >>> values["blocks.0.mixer.decay"].shape  # [B, T, E]

    Args:
      model: what is observed; weights that are edited later are seen. Of an edited
        model, the values after its edits are captured.
      patterns: names of values, or patterns such as "blocks.*.mixer.*" (`*` is any
        text, `?` any character, `[02]` one of these). "*" includes what grows with the
        square of T: `probabilities` and `effective_attention`.

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
        room = prepare(model.config, tokens, positions, cache)
        hidden, new, values = _captured(model, chosen, tokens, positions, room)
        return hidden, new, dict(values)

    return call


def edit(
    model: Griffin,
    edits: Edits | None = None,
    *,
    prompt: Edits | None = None,
    generated: Edits | None = None,
) -> Griffin:
    """A model that goes on with other values in the place of its own.

    Example:
      >>> silent = edit(model, {"blocks.2.mixer": jnp.zeros_like})
      >>> clamped = edit(model, {"*.input_gate": lambda gate: jnp.minimum(gate, 0.5)})
      >>> focused = edit(model, {"*.probabilities": keep_heads(2)})
      >>> patched = edit(model, {"blocks.0.mixer.state": at(lambda p: p == 7, patch)})
      >>> blind = edit(model, generated={"*.heads": jnp.zeros_like})

    It runs like any model: called, in a `Sampler`, as the draft or the model of
    speculation, scored, differentiated, captured from, edited again. Where a state is
    replaced, the next token starts from the new one, and tokens are computed one after
    another. A prefix that it read is accepted by this very model alone and cannot be
    saved, because a file cannot hold functions.

    Args:
      model: not changed; its parameters are shared.
      edits: functions by name or pattern (see `capture`). A function gets values
        [B, T, ...] of tokens of a call, one token in decoding and in states, and
        returns an array of that shape. It must treat each token alone, so that chunks
        do not matter. Several that match a value are applied in turn.
      prompt: edits of what a call of the model, prefill and scoring read, alone.
      generated: edits of what generation reads, alone: the last token of the prompt and
        those that it writes. `generating` gives the model of this phase.

    Returns:
      The edited model, its layers not stacked.

    Raises:
      ValueError: there are no edits, one is not a function, or a pattern matches no
        value that can be replaced; the names of those are listed. (By a call of the
        model) a function returns another shape.
    """
    check.instance("model", model, Griffin, "a Griffin model")
    given = {"edits": edits, "prompt": prompt, "generated": generated}
    given = {name: some for name, some in given.items() if some is not None}
    if not any(given.values()):
        check.refuse("edits", "functions by name of a value", edits)
    replaceable = _list_names(model).replaceable
    for name, some in given.items():
        _check_edits(name, some, replaceable)
    first, second = (
        tuple(pair for name in phase for pair in given.get(name, {}).items())
        for phase in (("edits", "prompt"), ("edits", "generated"))
    )
    before = model.observer
    if isinstance(before, _Editor):
        first, second = before.prompt + first, before.generated + second
        before = before.inner
    return with_observer(model, _Editor(first, second, before, uuid.uuid4().hex))


def generating(model: Griffin) -> Griffin:
    """The model as it runs on what it generates: with the edits of that phase.

    The sampler uses it for every token that it draws. A model whose phases do not
    differ is returned as it is.
    """
    editor = model.observer
    if not isinstance(editor, _Editor) or editor.prompt == editor.generated:
        return model
    if not editor.generated:
        return with_observer(model, editor.inner)
    return with_observer(model, dataclasses.replace(editor, prompt=editor.generated))


def at(condition: Callable[[jax.Array], jax.Array], function: Function) -> Function:
    """An edit of some tokens alone.

    Args:
      condition: from positions in the document, int32 [B, T], to bool [B, T].
      function: the edit, for `edit`.
    """
    for name, value in (("condition", condition), ("function", function)):
        if not callable(value):
            check.refuse(name, "a function", value)
    return _At(condition, function)


def keep_heads(count: int | jax.Array, *, highest: bool = False) -> Function:
    """An edit of `probabilities`: each token keeps some heads, the others give zero.

    Args:
      count: heads of a layer that a token keeps: those of lowest entropy, whose
        attention is the most focused.
      highest: keep those of highest entropy.
    """

    def keep(probabilities: jax.Array) -> jax.Array:
        order = entropy(probabilities)
        order = jnp.argsort(-order if highest else order, axis=-1, stable=True)
        rank = jnp.argsort(order, axis=-1)
        return jnp.where((rank < count)[..., None], probabilities, 0.0)

    return keep


def entropy(probabilities: jax.Array) -> jax.Array:
    """The entropy of attention in nats: [B, T, N, S] -> [B, T, N]."""
    return jnp.sum(jax.scipy.special.entr(probabilities), axis=-1)


@functools.partial(jax.jit, static_argnames="patterns")
def _captured(model, patterns, tokens, positions, cache) -> Any:
    recorder = _Recorder(patterns, model.observer)
    observed = with_observer(model, recorder)
    # Values may not leave what is recomputed in the backward pass.
    observed.runtime = dataclasses.replace(model.runtime, remat=False)
    hidden, cache = observed(tokens, positions, cache)
    for pattern in patterns:
        _check_pattern("patterns", pattern, recorder.names, "values")
    # A plain dictionary would come out of jax.jit sorted by name.
    return hidden, cache, collections.OrderedDict(recorder.values)


def _check_edits(name: str, edits: Edits, replaceable: dict[str, None]) -> None:
    check.instance(name, edits, Mapping, "functions by name of a value")
    for pattern, function in edits.items():
        _check_pattern(name, pattern, replaceable, "values that can be replaced")
        if not callable(function):
            check.refuse(f"{name}[{pattern!r}]", "a function", function)


def _check_pattern(argument: str, pattern, known: dict[str, None], what: str) -> None:
    check.string(argument, pattern)
    if not fnmatch.filter(known, pattern):
        raise ValueError(
            f"{argument}: expected names of {what}, got {pattern!r}, which matches "
            f"none; there are {', '.join(known)}"
        )


def _matches(name: str, patterns) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


class _Recorder:
    """Keeps the values of the names that match, as another observer leaves them."""

    def __init__(self, patterns: tuple[str, ...], inner: Observer | None):
        self.values: dict[str, jax.Array] = {}
        self.names: dict[str, None] = {}
        self.key = "" if inner is None else inner.key
        self._patterns = patterns
        self._inner = inner

    def sees(self, name: str) -> bool:
        """Whether a pattern matches, or the other observer wants it."""
        self.names[name] = None
        inner = self._inner is not None and self._inner.sees(name)
        return inner or _matches(name, self._patterns)

    def replaces(self, name: str) -> bool:
        """Whether the other observer does."""
        return self._inner is not None and self._inner.replaces(name)

    def replace(self, name, value, positions):
        """What the other observer makes of it."""
        assert self._inner is not None
        return self._inner.replace(name, value, positions)

    def show(self, name: str, value: jax.Array) -> None:
        """Keeps the value if a pattern matches."""
        if self._inner is not None and self._inner.sees(name):
            self._inner.show(name, value)
        if _matches(name, self._patterns):
            self.values[name] = value


@dataclasses.dataclass(frozen=True)
class _At:
    """An edit of the tokens whose positions fulfil a condition."""

    condition: Callable[[jax.Array], jax.Array]
    function: Function

    def __call__(self, value: jax.Array, positions: jax.Array) -> jax.Array:
        chosen = jnp.expand_dims(self.condition(positions), range(2, value.ndim))
        return jnp.where(chosen, _applied(self.function, value, positions), value)


def _applied(function, value, positions):
    if isinstance(function, _At):
        return function(value, positions)
    new = jnp.asarray(function(value))
    if new.shape != value.shape:
        raise ValueError(
            f"edits: expected functions that return the shape they are given, got "
            f"{list(new.shape)} for {list(value.shape)}"
        )
    return new.astype(value.dtype)


@dataclasses.dataclass(frozen=True)
class _Editor:
    """Replaces the values that patterns match, after another observer did."""

    prompt: tuple[tuple[str, Function], ...]
    """Edits of the present phase: of what is read."""
    generated: tuple[tuple[str, Function], ...]
    inner: Observer | None
    key: str = dataclasses.field(compare=False)

    def sees(self, name: str) -> bool:
        """Whether it replaces the value, or the other observer wants it."""
        return self.replaces(name) or (self.inner is not None and self.inner.sees(name))

    def replaces(self, name: str) -> bool:
        """Whether an edit matches, or the other observer replaces it."""
        patterns = [pattern for pattern, _ in self.prompt]
        return _matches(name, patterns) or (
            self.inner is not None and self.inner.replaces(name)
        )

    def replace(self, name, value, positions):
        """The value after all edits that match."""
        if self.inner is not None and self.inner.replaces(name):
            value = self.inner.replace(name, value, positions)
        for pattern, function in self.prompt:
            if fnmatch.fnmatchcase(name, pattern):
                value = _applied(function, value, positions)
        return value

    def show(self, name: str, value: jax.Array) -> None:
        """Shows it to the other observer."""
        if self.inner is not None and self.inner.sees(name):
            self.inner.show(name, value)


class _Names:
    """Sees everything and keeps the names."""

    key = ""

    def __init__(self):
        self.seen: dict[str, None] = {}
        self.replaceable: dict[str, None] = {}

    def sees(self, name: str) -> bool:
        """Always."""
        self.seen[name] = None
        return True

    def replaces(self, name: str) -> bool:
        """Never; a module asks of what can be replaced alone."""
        self.replaceable[name] = None
        return False

    def replace(self, name, value, positions):
        """Not called."""
        raise AssertionError(name)

    def show(self, name: str, value: jax.Array) -> None:
        """Keeps nothing."""


def _list_names(model: Griffin) -> _Names:
    found = _Names()
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    jax.eval_shape(lambda model, x: model(x), with_observer(model, found), tokens)
    return found
