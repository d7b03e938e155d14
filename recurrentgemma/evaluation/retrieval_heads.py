"""Which attention heads find a fact in a long text: the study of arXiv 2510.19861.

A needle, such as "The pass key is 48213.", stands somewhere in a long text, behind which
a question asks for it. Attention heads are ablated while the prompt is read, while the
answer is generated, or in both phases. Measured is what is left of the answer: its
log-probability, and whether greedy decoding gives it. Two kinds of ablation:

    keep K         each token keeps the K heads of a layer whose attention has the lowest
                   entropy (or the highest)
    without L.H    head H of layer L gives zero

The last token of the prompt is read with the first token of the answer, as in the
sampler: it belongs to generation. All ablations are one compiled program.
"""

import dataclasses
import functools
import importlib.resources
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recurrentgemma import _validation as check
from recurrentgemma.griffin import Griffin
from recurrentgemma.inspect import edit, keep_heads, names
from recurrentgemma.tokenizer import Tokenizer

PHASES = ("prompt", "generated", "both")
"""When heads are ablated."""
PLACEHOLDER = "{answer}"
CHUNK_TOKENS = 256
"""Most tokens of a row that one call reads."""
_PROBABILITIES = ".mixer.probabilities"
_LARGEST_KEY = 10**5

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is asked of a model."""

    lengths: tuple[int, ...] = (256, 1024)
    """Numbers of tokens of the prompts."""
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    """Where the needle begins, as a share of the text around it, 0 to 1."""
    samples: int = 2
    """Number of pass keys, each asked for at every depth."""
    keep: tuple[int, ...] | None = None
    """Numbers of heads of a layer that are kept; None is all from 0 to N - 1."""
    highest: bool = False
    """Whether the heads of highest entropy are kept, rather than the lowest."""
    each_head: bool = False
    """Whether each head is also ablated alone."""
    needle: str = "\nThe pass key is {answer}. Remember it: {answer} is the pass key.\n"
    """A sentence with `{answer}` in it."""
    question: str = "\nWhat is the pass key? The pass key is"
    """The end of the prompt."""
    seed: int = 0
    """Another seed gives other pass keys."""
    batch_size: int = 8
    """Prompts that are read together."""

    def __post_init__(self):
        for name in ("lengths", "depths"):
            if not check.series(name, getattr(self, name), "a list of numbers"):
                check.refuse(name, "a list of at least one number", getattr(self, name))
        for length in self.lengths:
            check.positive_integer("lengths", length)
        for depth in self.depths:
            check.number("depths", depth, least=0, most=1)
        for name in ("samples", "batch_size"):
            check.positive_integer(name, getattr(self, name))
        if PLACEHOLDER not in self.needle:
            check.refuse("needle", f"a sentence with {PLACEHOLDER} in it", self.needle)


class Ablation(NamedTuple):
    """Heads that give zero.

    Attributes:
      name: Text that stands in the table.
      keep: Number of heads of a layer that a token keeps by entropy.
      mask: 0 at the heads that are ablated for all tokens, else 1, float32 [A, N] for
        the A attention layers.
    """

    name: str
    keep: int
    mask: np.ndarray


class Prompts(NamedTuple):
    """Prompts of one length.

    Attributes:
      tokens: int32 [R, L].
      answers: Token ids of each answer.
      depths: Depth of each needle.
    """

    tokens: np.ndarray
    answers: list[list[int]]
    depths: list[float]


def bundled_text() -> str:
    """The text that needles are hidden in if no other is given."""
    assets = importlib.resources.files("recurrentgemma") / "assets"
    return (assets / "verify.txt").read_text(encoding="utf-8")


def make_prompts(
    tokenizer: Tokenizer, text: str, length: int, settings: Settings
) -> Prompts:
    """A prompt of exactly `length` tokens for each depth and sample.

    Args:
      tokenizer: of the model.
      text: what the needle is hidden in; repeated if it is too short.
      length: tokens of a prompt, the begin token included.
      settings: needle, question, depths, number of samples.

    Raises:
      ValueError: the text is empty, or needle and question do not fit.
    """
    filler = tokenizer.encode(text, add_bos=False)
    if not filler:
        raise ValueError("text: expected at least one token, got none")
    rng = np.random.default_rng(settings.seed)
    keys = rng.integers(_LARGEST_KEY // 10, _LARGEST_KEY, settings.samples)
    rows, answers, depths = [], [], []
    for depth in settings.depths:
        for key in map(str, keys):
            needle = settings.needle.replace(PLACEHOLDER, key)
            needle = tokenizer.encode(needle, add_bos=False)
            question, answer = _split(tokenizer, settings.question, key)
            room = length - len(needle) - len(question) - 1
            if room < 0:
                raise ValueError(
                    f"lengths: expected at least {length - room} tokens, which needle "
                    f"and question take, got {length}"
                )
            around = np.resize(filler, room).tolist()
            place = round(depth * room)
            row = [*around[:place], *needle, *around[place:], *question]
            rows.append([tokenizer.bos_id, *row])
            answers.append(answer)
            depths.append(depth)
    return Prompts(np.array(rows, np.int32), answers, depths)


def _split(tokenizer, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokens of both, with a space between them, cut before the answer's characters."""
    tokens = tokenizer.encode(f"{question} {answer}", add_bos=False)
    place = len(tokens)
    while not f"{question} ".startswith(tokenizer.decode(tokens[:place])):
        place -= 1
    return tokens[:place], tokens[place:]


def study(
    model: Griffin, tokenizer: Tokenizer, text: str, settings: Settings
) -> Iterator[Row]:
    """Measures every ablation at every length.

    Args:
      model: a model with attention layers.
      tokenizer: its tokenizer.
      text: what needles are hidden in.
      settings: what is asked.

    Yields:
      Rows as they are found: `length`, `ablation`, `phase` (of `PHASES`, or "none" for
      the model as it is), `accuracy` (share of answers that greedy decoding gives),
      `log_prob` (mean of a token of the answers, in nats), and `samples`, a list of
      `depth`, `answer` (token ids), `log_prob` (of the whole answer), `correct`.

    Raises:
      ValueError: the model has no attention layer, a number of heads is not below that
        of a layer, or needle and question do not fit in a length.
    """
    first, *others = _ablations(model, settings)
    prompts = [
        make_prompts(tokenizer, text, length, settings) for length in settings.lengths
    ]
    for some in prompts:
        reader = _Reader(model, some, settings)
        whole = reader.read(first)
        yield reader.row(first, "none", first, whole)
        for ablation in others:
            ablated = reader.read(ablation)
            yield reader.row(ablation, "prompt", first, ablated)
            yield reader.row(ablation, "generated", ablation, whole)
            yield reader.row(ablation, "both", ablation, ablated)


def _ablations(model: Griffin, settings: Settings) -> list[Ablation]:
    """The model as it is, then all ablations."""
    layers = _attention_layers(model)
    if not layers:
        raise ValueError(
            "model: expected one with attention layers, got none of them; choose a "
            "model whose block pattern has attention"
        )
    heads = model.config.num_heads
    kept = range(heads) if settings.keep is None else settings.keep
    for count in kept:
        check.integer("keep", count, least=0, most=heads - 1)
    ones = np.ones((len(layers), heads), np.float32)
    found = [Ablation("none", heads, ones)]
    found += [Ablation(f"keep {count}", count, ones) for count in kept]
    if settings.each_head:
        for place, head in np.ndindex(ones.shape):
            mask = ones.copy()
            mask[place, head] = 0
            found.append(Ablation(f"without {layers[place]}.{head}", heads, mask))
    return found


def _attention_layers(model: Griffin) -> list[int]:
    """Indices of the layers that have attention probabilities."""
    found = [name for name in names(model) if name.endswith(_PROBABILITIES)]
    return [int(name.split(".")[1]) for name in found]


class _Reader:
    """Reads prompts of one length with some heads, and answers with others."""

    def __init__(self, model: Griffin, prompts: Prompts, settings: Settings):
        self._model, self._prompts = model, prompts
        self._highest = settings.highest
        rows = len(prompts.answers)
        self._batches = [
            slice(start, start + settings.batch_size)
            for start in range(0, rows, settings.batch_size)
        ]
        longest = max(map(len, prompts.answers))
        self._capacity = prompts.tokens.shape[1] + longest
        # What is fed: the prompt's last token and the answer but for its last one.
        self._targets = np.zeros((rows, longest), np.int32)
        for row, answer in zip(self._targets, prompts.answers, strict=True):
            row[: len(answer)] = answer
        self._fed = np.concatenate([prompts.tokens[:, -1:], self._targets[:, :-1]], 1)

    def read(self, ablation: Ablation) -> list[Any]:
        """The cache of each batch after its prompts but for their last tokens."""
        caches = []
        for batch in self._batches:
            tokens = self._prompts.tokens[batch, :-1]
            cache = self._model.init_cache(len(tokens), capacity=self._capacity)
            start = 0
            # The odd part comes first, so that lengths share the program of the rest.
            size = tokens.shape[1] % CHUNK_TOKENS or CHUNK_TOKENS
            while start < tokens.shape[1]:
                chunk = tokens[:, start : start + size]
                cache = _read_chunk(
                    self._model, *ablation[1:], chunk, cache, highest=self._highest
                )
                start, size = start + size, CHUNK_TOKENS
            caches.append(cache)
        return caches

    def row(
        self, ablation: Ablation, phase: str, writing: Ablation, caches: list[Any]
    ) -> Row:
        """The answers of all prompts from these caches."""
        samples = []
        for batch, cache in zip(self._batches, caches, strict=True):
            fed, targets = self._fed[batch], self._targets[batch]
            scores = _score_answer(
                self._model, *writing[1:], fed, targets, cache, highest=self._highest
            )
            for i, (log_probs, right) in enumerate(zip(*scores, strict=True)):
                answer = self._prompts.answers[batch.start + i]
                samples.append(
                    {
                        "depth": self._prompts.depths[batch.start + i],
                        "answer": answer,
                        "log_prob": float(np.sum(log_probs[: len(answer)])),
                        "correct": bool(np.all(right[: len(answer)])),
                    }
                )
        tokens = sum(len(sample["answer"]) for sample in samples)
        return {
            "length": self._prompts.tokens.shape[1],
            "ablation": ablation.name,
            "phase": phase,
            "accuracy": float(np.mean([sample["correct"] for sample in samples])),
            "log_prob": sum(sample["log_prob"] for sample in samples) / tokens,
            "samples": samples,
        }


def _ablated(model, keep, mask, highest):
    """The model with these heads; `keep` and `mask` may be traced."""

    def edit_of(of_layer):
        kept = keep_heads(keep, highest=highest)
        return lambda weights: kept(weights) * of_layer[None, None, :, None]

    layers = _attention_layers(model)
    return edit(
        model,
        {
            f"blocks.{layer}{_PROBABILITIES}": edit_of(mask[place])
            for place, layer in enumerate(layers)
        },
    )


@functools.partial(jax.jit, static_argnames="highest")
def _read_chunk(model, keep, mask, tokens, cache, *, highest):
    return _ablated(model, keep, mask, highest)(tokens, None, cache)[1]


@functools.partial(jax.jit, static_argnames="highest")
def _score_answer(model, keep, mask, tokens, targets, cache, *, highest):
    """Log-probability of each target, float32 [B, T], and whether it is the largest."""
    model = _ablated(model, keep, mask, highest)
    hidden, _ = model(tokens, None, cache)
    log_probs = jax.nn.log_softmax(model.logits(hidden))
    chosen = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return chosen, jnp.argmax(log_probs, axis=-1) == targets
