"""Worker: this package, through the entry points that its users call."""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recurrentgemma.checkpoints import load, named_parameters
from recurrentgemma.generation import programs
from recurrentgemma.generation.sampler import Sampler
from recurrentgemma.generation.sampling import Sampling
from recurrentgemma.training.data import Batch
from recurrentgemma.training.state import TrainState
from recurrentgemma.training.step import make_train_step

BOS = 2


class Opponent:
    def __init__(self, directory: str):
        self.directory = Path(directory)
        self.tokens = np.load(self.directory / "tokens.npy")
        self.model, _ = load(self.directory / "hugging_face")
        self.sampler = Sampler(self.model)
        self._logits = jax.jit(lambda model, tokens: model.logits(model(tokens)[0]))
        optimizer = optax.adamw(1e-4, b2=0.96, eps=1e-8, weight_decay=0.1)
        self._optimizer = optimizer
        self._train_step = make_train_step(self.model, optimizer)
        self._training: TrainState | None = None

    def logits(self, length: int) -> str:
        path = self.directory / "ours_logits.npy"
        np.save(path, self._logits(self.model, self.tokens[:1, :length])[0])
        return str(path)

    def prefill(self, length: int) -> dict:
        tokens, read, chunks = self.tokens[:1], 0, programs.plan_chunks(length)
        assert sum(chunks) == length, "choose lengths that need no padding"
        start = time.perf_counter()
        cache = programs.new_cache(self.model, batch_size=1, capacity=None)
        for size in chunks:
            chunk, lengths = tokens[:, read : read + size], np.array([size], np.int32)
            cache = programs.read_chunk(self.model, cache, chunk, lengths)
            read += size
        jax.block_until_ready(cache)
        return {"seconds": time.perf_counter() - start}

    def generate(self, batch: int, prompt: int, new_tokens: int) -> dict:
        rows = [[BOS, *row] for row in self.tokens[:batch, 1:prompt].tolist()]
        self.sampler.wait_until_compiled()
        start = time.perf_counter()
        samples = self.sampler(
            rows,
            max_new_tokens=new_tokens,
            sampling=Sampling(temperature=0),
            end_tokens=[],
        )
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": [sample.tokens for sample in samples]}

    def train(self, length: int) -> dict:
        if self._training is None:
            params = jax.tree.map(jnp.copy, named_parameters(self.model))
            state = self._optimizer.init(params)
            self._training = TrainState(params, state, jnp.int32(0))
        tokens = self.tokens[:1, :length]
        batch = jax.device_put(
            Batch(
                tokens=tokens,
                targets=np.roll(tokens, -1, axis=1),
                positions=np.arange(length, dtype=np.int32)[None],
                mask=(np.arange(length) < length - 1).astype(np.float32)[None],
            )
        )
        start = time.perf_counter()
        self._training, metrics = jax.block_until_ready(
            self._train_step(self._training, {}, batch)
        )
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "loss": float(metrics["loss"])}
