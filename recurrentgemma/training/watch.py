"""What a run shows and records, in its directory and on the terminal.

metrics.jsonl    a row for each step; with an evaluation: held-out loss, by position
                 too, and how long the channels of each RG-LRU layer remember
samples.jsonl    texts of the model, if `sample_every` is set
tensorboard/     the same, if `tensorboard` is set (extra `tensorboard`)
loss.png         at the end (extra `plot`)
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from recurrentgemma import plots
from recurrentgemma._validation import positive_integer
from recurrentgemma.generation.sampler import Sampler
from recurrentgemma.generation.sampling import Sampling
from recurrentgemma.griffin import Griffin
from recurrentgemma.tokenizer import Tokenizer
from recurrentgemma.training.options import option
from recurrentgemma.training.records import (
    MEMORY,
    JsonLines,
    TensorBoard,
    read_rows,
)

METRICS, SAMPLES, LOSS_PLOT = "metrics.jsonl", "samples.jsonl", "loss.png"
TENSORBOARD = "tensorboard"
_CPU_PRODUCT, _PRODUCT = 1024, 8192
"""Sizes of the square matrix product whose rate is measured."""
_PRODUCT_SAMPLES = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """What is shown and recorded besides the metrics.

    Raises:
      ValueError: a value is outside its range.
    """

    tensorboard: bool = option(
        "write the metrics for TensorBoard too (extra tensorboard)",
        default=False,
        may_change=True,
    )
    sample_every: int | None = option(
        "steps between texts of the model; none writes none",
        default=None,
        may_change=True,
    )
    sample_prompt: str = option(
        "text that the samples continue", default="", may_change=True
    )
    sample_tokens: int = option("most tokens of a sample", default=64, may_change=True)

    def __post_init__(self):
        positive_integer("sample_tokens", self.sample_tokens)
        if self.sample_every is not None:
            positive_integer("sample_every", self.sample_every)


class Watch:
    """Everything that looks at a run.

    Args:
      folder: of the run.
      config: what is shown.
      first_step: number of steps done so far.
      steps: number of steps of the run.
      tokens_per_step: tokens that a step reads.
      flops_per_step: FLOPs of the model in a step.
      peak_flops_per_s: rate that the devices reach; see `product_flops_per_s`.
    """

    def __init__(
        self,
        folder: Path,
        config: WatchConfig,
        *,
        first_step: int,
        steps: int,
        tokens_per_step: int,
        flops_per_step: float,
        peak_flops_per_s: float,
    ):
        self.config = config
        self._folder = folder
        self._tokens = tokens_per_step
        self._least_seconds = flops_per_step / peak_flops_per_s
        self._board = None
        if config.tensorboard:
            self._board = TensorBoard(folder / TENSORBOARD, first_step)
        self._log = JsonLines(folder / METRICS, first_step)
        self._samples = None
        if config.sample_every is not None:
            self._samples = JsonLines(folder / SAMPLES, first_step)
        self._bar = tqdm.tqdm(
            total=steps, initial=first_step, desc="train", unit="step"
        )

    def step(self, row: dict[str, Any], seconds: float) -> None:
        """Records a step.

        Args:
          row: `step` and its metrics.
          seconds: that it took.
        """
        speed, share = self._tokens / seconds, self._least_seconds / seconds
        row = {**row, "train_tokens_per_s": speed, "share_of_peak": share}
        self._log.write(row)
        if self._board:
            self._board.write(row)
        shown = f"loss {row['loss']:.3f}, {speed:,.0f} tokens/s, {share:.0%} of peak"
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update()

    def say(self, text: str) -> None:
        """Shows a line above the bar."""
        self._bar.write(text)

    def memories(self, model: Griffin, step: int) -> dict[str, Any]:
        """How long the channels of each RG-LRU layer remember, gate open.

        Returns:
          Entries of the step's row: for each layer the number of channels by memory
          length in tokens, in ranges [2^i, 2^(i + 1)) by their least; the first has
          all shorter ones.
        """
        decays = plots.slowest_decays(model)
        lengths = {
            f"blocks.{index}": plots.memory_lengths(decay)
            for index, decay in decays.items()
        }
        if self._board:
            self._board.write_memories(lengths, step)
        histograms = {}
        for layer, values in lengths.items():
            ranges = np.floor(np.log2(np.maximum(values, 1))).astype(int)
            found, counts = np.unique(ranges, return_counts=True)
            histograms[layer] = {
                str(2**i): n
                for i, n in zip(found.tolist(), counts.tolist(), strict=True)
            }
        return {MEMORY: histograms} if histograms else {}

    def sample(self, model: Griffin, tokenizer: Tokenizer, step: int) -> None:
        """Writes a text of the model, with the step as its seed."""
        prompt = self.config.sample_prompt
        [sample] = Sampler(model, tokenizer, compile_ahead=False)(
            [prompt],
            max_new_tokens=self.config.sample_tokens,
            sampling=Sampling(temperature=1.0),
            seed=step,
        )
        assert self._samples is not None
        self._samples.write({"step": step, "prompt": prompt, "text": sample.text})
        if self._board:
            self._board.write_text(prompt + sample.text, step)
        self.say(f"step {step}: {prompt + sample.text!r}")

    def plot(self) -> None:
        """Draws the losses of the run."""
        try:
            figure = plots.losses(read_rows(self._folder / METRICS))
        except ModuleNotFoundError as error:
            self.say(f"no {LOSS_PLOT}: {error}")
            return
        figure.savefig(self._folder / LOSS_PLOT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        for part in (self._log, self._samples, self._board):
            if part is not None:
                part.close()


@functools.cache
def product_flops_per_s(dtype: str) -> float:
    """Best rate of a square matrix product on one device, of operands of this dtype.

    What a train step is compared with. Measured once in a process, within a second.
    """
    size = _CPU_PRODUCT if jax.default_backend() == "cpu" else _PRODUCT
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(1 + _PRODUCT_SAMPLES):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])
