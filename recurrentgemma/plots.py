"""Plots of what `recurrentgemma.inspect` shows (decays, gates, attention), and losses.

Each function takes a model or captured values, [B, T, ...] by name, of which row 0 is
drawn, and returns a matplotlib figure (extra `plot`), which a notebook shows and
`figure.savefig` writes. The numbers come from functions of their own.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from recurrentgemma.griffin import Griffin
from recurrentgemma.kernels.rg_lru.reference import log_decay
from recurrentgemma.layers import RGLRU

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = Mapping[str, jax.Array | np.ndarray]
MOST_PIECES = 96
"""Up to so many tokens, their pieces stand at an axis."""
_COLORS = "viridis"
_PANEL_INCHES = 3.2
_SMALLEST_RATE = 1e-9
"""Forgetting in nats a token, below which a memory is drawn as that long."""


def slowest_decays(model: Griffin) -> dict[int, np.ndarray]:
    """The decay a of each channel at a fully open recurrence gate, r = 1.

    With a gate that is closed in part a channel forgets more slowly: a^r.

    Returns:
      float64 [E] for each layer that has an RG-LRU, by the layer's index.
    """
    found = {}
    for index in range(model.config.num_layers):
        unit = getattr(model._layer(index).mixer, "rg_lru", None)
        if type(unit) is RGLRU:
            parameter = unit.a_param[...]
            if parameter.ndim > 1:  # A stacked layer.
                parameter = parameter[index // len(model.groups)]
            found[index] = np.exp(np.asarray(log_decay(parameter), np.float64))
    return found


def memory_lengths(decays: np.ndarray) -> np.ndarray:
    """Tokens after which a channel holds 1/e of what it held, -1 / mean(log a).

    Args:
      decays: [T, E], of the tokens of a text; or [E].

    Returns:
      float64 [E].
    """
    decays = np.asarray(decays, np.float64)
    rates = -np.log(np.maximum(decays, np.finfo(np.float64).tiny))
    rates = rates.mean(axis=tuple(range(decays.ndim - 1)))
    return 1 / np.maximum(rates, _SMALLEST_RATE)


def mean_weights(weights: np.ndarray) -> np.ndarray:
    """How much a token takes from each token, over all heads or channels.

    Args:
      weights: `probabilities` or `effective_attention` of a row, [T, N, S].

    Returns:
      float64 [T, S]: the mean of their absolute values; each row sums to 1.
    """
    mean = np.abs(np.asarray(weights, np.float64)).mean(axis=1)
    return mean / np.maximum(mean.sum(axis=-1, keepdims=True), np.finfo(float).tiny)


def decay_spectrum(model: Griffin, values: Values | None = None) -> "Figure":
    """Decays and memory lengths of all channels, the shortest first, by layer.

    Args:
      model: a model with RG-LRU layers.
      values: `blocks.*.mixer.decay` of a text, whose memory lengths are drawn too.
    """
    decays = slowest_decays(model)
    if not decays:
        raise ValueError("model: expected one with RG-LRU layers, got one without")
    figure = _figure(2.6 * _PANEL_INCHES, _PANEL_INCHES)
    left, right = figure.subplots(1, 2)
    for index, decay in decays.items():
        channels = np.linspace(0, 1, len(decay))
        [line] = left.plot(channels, np.sort(decay), label=f"layer {index}")
        open_gate = np.sort(memory_lengths(decay))
        right.plot(channels, open_gate, "--", color=line.get_color())
        name = f"blocks.{index}.mixer.decay"
        if values is not None and name in values:
            lengths = np.sort(memory_lengths(np.asarray(values[name])[0]))
            right.plot(channels, lengths, color=line.get_color())
    left.set(title="decay, gate open", xlabel="share of channels", ylabel="a")
    right.set(title="memory length", xlabel="share of channels", ylabel="tokens")
    right.set_yscale("log")
    right.plot([], [], "k--", label="gate open")
    if values is not None:
        right.plot([], [], "k", label="over the text")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend()
    return figure


def gates(values: Values, pieces: Sequence[str] | None = None) -> "Figure":
    """The recurrence gate and the input gate over a text, mean over channels, by layer.

    Args:
      values: `blocks.*.mixer.recurrence_gate` and `blocks.*.mixer.input_gate`.
      pieces: text of each token.
    """
    kinds = ("recurrence_gate", "input_gate")
    by_kind = {kind: _by_layer(values, kind) for kind in kinds}
    layers = len(by_kind[kinds[0]])
    figure = _figure(3 * _PANEL_INCHES, (0.6 + 0.24 * layers) * _PANEL_INCHES)
    panels = figure.subplots(len(kinds), 1, sharex=True)
    for axes, (kind, found) in zip(panels, by_kind.items(), strict=True):
        means = [value.mean(-1) for value in found.values()]
        image = axes.imshow(means, aspect="auto", cmap=_COLORS, interpolation="nearest")
        axes.set(title=kind.replace("_", " "), ylabel="layer")
        axes.set_yticks(range(len(found)), list(map(str, found)))
        figure.colorbar(image, ax=axes)
    _label_tokens(panels[-1], pieces, "x")
    return figure


def attention(values: Values, pieces: Sequence[str] | None = None) -> "Figure":
    """Where each layer takes from: effective attention beside attention.

    A panel is `mean_weights` of a layer, on a square-root scale of colour.

    Args:
      values: `blocks.*.mixer.effective_attention` and `blocks.*.mixer.probabilities` of
        a call without a cache.
      pieces: text of each token.
    """
    from_states = _by_layer(values, "effective_attention", needed=False)
    heads = _by_layer(values, "probabilities", needed=False)
    found = {
        **{i: ("RG-LRU", value) for i, value in from_states.items()},
        **{i: ("attention", value) for i, value in heads.items()},
    }
    if not found:
        raise ValueError(
            "values: expected effective_attention or probabilities of a layer, got "
            f"{', '.join(values) or 'none'}"
        )
    figure = _figure(0.2 + _PANEL_INCHES * len(found), _PANEL_INCHES)
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    for axes, (index, (kind, value)) in zip(panels, sorted(found.items()), strict=True):
        weights = mean_weights(value)
        image = axes.imshow(
            weights, cmap=_COLORS, norm=PowerNorm(0.5), interpolation="nearest"
        )
        axes.set(title=f"layer {index}: {kind}", xlabel="takes from")
        for ticks in (axes.xaxis, axes.yaxis):
            ticks.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axes, shrink=0.7)
    panels[0].set_ylabel("token")
    _label_tokens(panels[0], pieces, "y")
    return figure


def losses(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """The losses of a training run by step, and the last held-out one by position.

    Args:
      rows: the rows of its `metrics.jsonl`.
    """
    figure = _figure(2.6 * _PANEL_INCHES, _PANEL_INCHES)
    left, right = figure.subplots(1, 2)
    trained = [(row["step"], row["loss"]) for row in rows if row["loss"] is not None]
    left.plot(*zip(*trained, strict=True), lw=0.5, alpha=0.6, label="training")
    held_out = [row for row in rows if "held_out_loss" in row]
    if held_out:
        curve = [(row["step"], row["held_out_loss"]) for row in held_out]
        left.plot(*zip(*curve, strict=True), ".-", label="held out")
        last = held_out[-1].get("held_out_loss_by_position", {})
        right.plot([int(first) + 1 for first in last], list(last.values()), ".-")
    left.set(xlabel="step", ylabel="nats a token")
    left.legend()
    right.set(xlabel="position + 1", ylabel="held-out nats a token", xscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModuleNotFoundError(
            "matplotlib: expected it to be installed, got none; run pip install "
            "'recurrentgemma[plot]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _by_layer(
    values: Values, kind: str, *, needed: bool = True
) -> dict[int, np.ndarray]:
    """Row 0 of the values of a kind, by the layer's index, in order."""
    suffix = f".mixer.{kind}"
    found = {
        int(name.split(".")[1]): np.asarray(value, np.float64)[0]
        for name, value in values.items()
        if name.endswith(suffix)
    }
    if needed and not found:
        raise ValueError(
            f"values: expected blocks.*{suffix}, got {', '.join(values) or 'none'}; "
            "capture them"
        )
    return dict(sorted(found.items()))


def _label_tokens(axes: "Axes", pieces: Sequence[str] | None, axis: str) -> None:
    if pieces is None or len(pieces) > MOST_PIECES:
        if axis == "x":
            axes.set_xlabel("token")
        return
    # A dollar sign would begin a formula, and the end of a line would move the others.
    shown = [repr(piece)[1:-1].replace("$", r"\$") for piece in pieces]
    places = range(len(shown))
    if axis == "x":
        axes.set_xticks(places, shown, rotation=90, fontsize=6, family="monospace")
    else:
        axes.set_yticks(places, shown, fontsize=6, family="monospace")
