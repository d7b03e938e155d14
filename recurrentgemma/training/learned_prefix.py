"""A prefix whose state is learned: the model's parameters stay what they are.

What is trained are the floating-point leaves of the cache of a prefix: recurrent states,
inputs of the convolutions, and the keys and values of the window, at the positions of the
text that the prefix began with. A text of at least W tokens fills all of the window. The
result is an ordinary prefix: every command reads it, and its use costs nothing.

    >>> start = sampler.prefill("def " * 300)
    >>> config = LearnedPrefixConfig(steps=2)
    >>> prefix, losses = learn_prefix(model, start, [batch, batch], config)
    >>> prefix.save("style.prefix")

Learning the state alone: arXiv 2604.01168 and 2504.05097; keys and values: prefix tuning,
arXiv 2101.00190.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from recurrentgemma import _validation as check
from recurrentgemma import cache as cache_lib
from recurrentgemma.cache import Cache
from recurrentgemma.generation.model_digest import model_digest
from recurrentgemma.generation.prefix import Prefix
from recurrentgemma.griffin import Griffin
from recurrentgemma.training.chunks import in_chunks
from recurrentgemma.training.data import Batch
from recurrentgemma.training.options import option
from recurrentgemma.training.rows import continued_positions, in_later_document
from recurrentgemma.training.step import Metrics, batch_sums, mean_metrics, means


@dataclasses.dataclass(frozen=True)
class LearnedPrefixConfig:
    """How a prefix is learned: Adam with a cosine schedule.

    Raises:
      ValueError: a value is outside its range.
    """

    steps: int = option("number of updates of the prefix", default=200)
    learning_rate: float = option("highest learning rate", default=1e-2)
    chunk_tokens: int = option(
        "tokens of a row that are read at once; 0 reads rows whole", default=0
    )

    def __post_init__(self):
        check.positive_integer("steps", self.steps)
        check.number("learning_rate", self.learning_rate, above=0)
        check.count("chunk_tokens", self.chunk_tokens)


def num_values(prefix: Prefix) -> int:
    """Number of values of a row that are learned; empty slots of rings do not count."""
    count = 0
    for state in prefix.cache.layers:
        leaves = cache_lib.named_leaves(state)
        held = leaves.get("positions")
        share = 1.0 if held is None else float(np.mean(np.asarray(held) >= 0))
        floating = (x for x in leaves.values() if jnp.issubdtype(x.dtype, jnp.floating))
        count += round(share * sum(x.size for x in floating))
    return count // prefix.batch_size


def after_prefix(cache: Cache, last_token: jax.Array, batch: Batch) -> Batch:
    """The batch as it is read after a prefix.

    The first document of a row goes on after the prefix: the token that opens it, which
    is the begin token, makes room for the last token of the prefix. Give rows of one
    document each: targets of further ones do not count, because those documents begin
    with nothing.

    Args:
      cache: of the prefix, B rows.
      last_token: int32 [B], the last token of the prefix, which the cache lacks.
      batch: arrays [B, T] of rows that begin with nothing.
    """
    is_first = (jnp.cumsum(batch.positions >= 0, axis=1) == 1) & (batch.positions == 0)
    is_later = in_later_document(batch.positions)
    return batch._replace(
        tokens=jnp.where(is_first, last_token[:, None], batch.tokens),
        positions=continued_positions(batch.positions, cache.next_position),
        mask=jnp.where(is_later, 0.0, batch.mask),
    )


def one_document_rows(documents: Iterable[Sequence[int]], row_tokens: int) -> Batch:
    """Rows that each hold one part of a document, as `after_prefix` wants them.

    Args:
      documents: token ids of each, the begin token first.
      row_tokens: T.

    Returns:
      Arrays [N, T]: the begin token and T tokens of a document after it, T as inputs
      and T as targets; the end of a document is padded.

    Raises:
      ValueError: no document has a token after the begin token.
    """
    check.positive_integer("row_tokens", row_tokens)
    parts = [
        [ids[0], *ids[start : start + row_tokens]]
        for ids in documents
        for start in range(1, len(ids), row_tokens)
    ]
    if not parts:
        check.refuse("documents", "a token after the begin token of one", "none")
    rows = np.zeros((len(parts), row_tokens + 1), np.int32)
    for row, part in zip(rows, parts, strict=True):
        row[: len(part)] = part
    sizes = np.array([len(part) - 1 for part in parts])
    places = np.arange(row_tokens, dtype=np.int32)[None]
    is_counted = places < sizes[:, None]
    positions = np.where(is_counted, places, -1)
    mask = is_counted.astype(np.float32)
    return Batch(rows[:, :-1], positions.astype(np.int32), rows[:, 1:], mask)


def shuffled_batches(rows: Batch, batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches of rows [N, T] without end; every epoch has each row once."""
    count = len(rows.tokens)
    epochs = (
        np.random.default_rng([seed, epoch]).permutation(count)
        for epoch in itertools.count()
    )
    indices = itertools.chain.from_iterable(epochs)
    while True:
        chosen = np.fromiter(itertools.islice(indices, batch_size), int, batch_size)
        yield jax.tree.map(lambda array, chosen=chosen: array[chosen], rows)


def prefix_sums(
    model: Griffin,
    values: dict[str, jax.Array],
    prefix: Prefix,
    batch: Batch,
    *,
    chunk_tokens: int = 0,
) -> Metrics:
    """`step.batch_sums` after a prefix, as a function of its values.

    Args:
      model: the model of the prefix.
      values: floating-point leaves of the prefix's cache, by name.
      prefix: a prefix of one row.
      batch: arrays [B, T]; see `after_prefix`.
      chunk_tokens: tokens of a row that are read at once; 0 reads rows whole.
    """
    batch_size, length = batch.tokens.shape
    cache = prefix.cache.with_floating(values)
    if cache.capacity is not None:
        cache = cache_lib.grow(cache, model.config, cache.capacity + length)
    cache = cache_lib.repeat(cache, batch_size)
    last_token = jnp.repeat(jnp.asarray(prefix.history.last_token), batch_size)
    read = in_chunks(batch_sums, chunk_tokens) if chunk_tokens else batch_sums
    return read(model, after_prefix(cache, last_token, batch), cache)[0]


def loss_after(
    model: Griffin, prefix: Prefix, rows: Batch, batch_size: int = 4
) -> float:
    """Mean nats of a counted target after a prefix, over rows [N, T]."""

    @jax.jit
    def sums_of(model, values, batch):
        return prefix_sums(model, values, prefix, batch)

    found = []
    for start in range(0, len(rows.tokens), batch_size):
        places = np.arange(start, start + batch_size)
        chosen = np.minimum(places, len(rows.tokens) - 1)
        batch = jax.tree.map(lambda array, chosen=chosen: array[chosen], rows)
        is_row = (places < len(rows.tokens))[:, None]
        batch = batch._replace(mask=batch.mask * is_row)
        found.append(sums_of(model, prefix.cache.floating(), batch))
    return means(found)["loss"]


def learn_prefix(
    model: Griffin,
    prefix: Prefix,
    batches: Iterable[Batch],
    config: LearnedPrefixConfig = LearnedPrefixConfig(),
    *,
    progress: bool = True,
) -> tuple[Prefix, list[float]]:
    """Learns the state of a prefix, by the gradient of the loss of what follows it.

    Args:
      model: stays what it is.
      prefix: one row of at least two tokens, what the learned prefix begins as. It
          stays valid.
      batches: at least `config.steps` of them; see `after_prefix`.
      config: steps and learning rate.
      progress: whether a progress bar is shown.

    Returns:
      The learned prefix, and the loss of each step in nats a token.

    Raises:
      ValueError: the prefix has several rows or a single token, belongs to another
          model, or there are too few batches.
    """
    if prefix.batch_size != 1:
        check.refuse("prefix", "one row", prefix.batch_size, "use take")
    if not int(prefix.cache.next_position[0]):
        advice = "a text begins anew after a single token, whatever the state"
        check.refuse("prefix", "at least two tokens", prefix.num_tokens[0], advice)
    prefix.check_model(model_digest(model))
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    optimizer = optax.adam(schedule)

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(model, values, optimizer_state, batch):
        def loss_of(values):
            sums = prefix_sums(
                model, values, prefix, batch, chunk_tokens=config.chunk_tokens
            )
            return mean_metrics(sums)["loss"]

        loss, gradients = jax.value_and_grad(loss_of)(values)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state)
        return optax.apply_updates(values, updates), optimizer_state, loss

    values = {
        name: jnp.array(leaf, jnp.float32)
        for name, leaf in prefix.cache.floating().items()
    }
    state, losses = optimizer.init(values), []
    remaining = iter(batches)
    steps = tqdm.trange(config.steps, desc="prefix", unit="step", disable=not progress)
    for done in steps:
        if (batch := next(remaining, None)) is None:
            check.refuse("batches", f"{config.steps} of them", done)
        values, state, loss = step(model, values, state, batch)
        losses.append(float(loss))
    learned = Prefix.from_cache(
        model,
        prefix.cache.with_floating(values),
        prefix.history.last_token,
        num_tokens=prefix.num_tokens,
        seen=prefix.history.seen,
    )
    return learned, losses
