"""Worker: the official recurrentgemma 1.0.1 (PyPI, `recurrentgemma[jax]`)."""

import importlib
import importlib.metadata
import json
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint

# By name: here `recurrentgemma` is the other package.
recurrentgemma = importlib.import_module("recurrentgemma.jax")


class NumberVocabulary:
    """Texts are numbers with spaces between; the sampler puts BOS in front."""

    def EncodeAsIds(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def DecodeIds(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def pad_id(self) -> int:
        return 0

    def eos_id(self) -> int:
        return 1

    def bos_id(self) -> int:
        return 2


class Opponent:
    def __init__(self, directory: str):
        self.directory = Path(directory)
        fields = json.loads((self.directory / "config.json").read_text())
        self.tokens = np.load(self.directory / "tokens.npy")
        with orbax.checkpoint.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(self.directory / "official_flax")
        self.params = jax.tree.map(jnp.asarray, restored["params"])
        kinds = recurrentgemma.TemporalBlockType
        pattern = [kinds.RECURRENT, kinds.RECURRENT, kinds.ATTENTION]
        config = recurrentgemma.GriffinConfig(
            vocab_size=fields["vocab_size"],
            width=fields["width"],
            mlp_expanded_width=fields["mlp_width"],
            num_heads=fields["num_heads"],
            lru_width=fields["lru_width"],
            block_types=tuple(pattern[i % 3] for i in range(fields["num_layers"])),
            embeddings_scale_by_sqrt_dim=True,
            attention_window_size=fields["attention_window"],
            logits_soft_cap=fields["logits_soft_cap"],
        )
        self.model = recurrentgemma.Griffin(config, gradient_checkpointing=False)
        self.sampler = recurrentgemma.Sampler(
            self.model, NumberVocabulary(), self.params
        )
        self._prefill = jax.jit(partial(self._apply, return_logits=False))
        self._logits = jax.jit(partial(self._apply, return_cache=False))
        self._optimizer = optax.adamw(1e-4, b2=0.96, eps=1e-8, weight_decay=0.1)
        self._train_step = jax.jit(self._step, donate_argnums=(0, 1))
        self._training = None

    def _apply(self, params, tokens, positions, **options):
        logits, cache = self.model.apply(
            {"params": params}, tokens, positions, **options
        )
        return cache if logits is None else logits

    def _inputs(self, length: int) -> tuple[jax.Array, jax.Array]:
        tokens = jnp.asarray(self.tokens[:1, :length])
        return tokens, jnp.arange(length, dtype=jnp.int32)[None]

    def logits(self, length: int) -> str:
        path = self.directory / "official_logits.npy"
        np.save(path, self._logits(self.params, *self._inputs(length))[0])
        return str(path)

    def prefill(self, length: int) -> dict:
        inputs = jax.block_until_ready(self._inputs(length))
        start = time.perf_counter()
        jax.block_until_ready(self._prefill(self.params, *inputs))
        return {"seconds": time.perf_counter() - start}

    def generate(self, batch: int, prompt: int, new_tokens: int) -> dict:
        rows = self.tokens[:batch, 1:prompt].tolist()  # the sampler puts BOS first
        texts = [" ".join(map(str, row)) for row in rows]
        start = time.perf_counter()
        output = self.sampler(texts, new_tokens, end_sampling_at_eos_token=False)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": np.stack(output.tokens).tolist()}

    def _step(self, params, state, tokens, positions):
        def loss_of(params):
            logits = self._apply(params, tokens, positions, return_cache=False)
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits[:, :-1], tokens[:, 1:]
            )
            return losses.mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = self._optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    def train(self, length: int) -> dict:
        if self._training is None:
            params = jax.tree.map(jnp.copy, self.params)
            self._training = params, self._optimizer.init(params)
        inputs = jax.block_until_ready(self._inputs(length))
        start = time.perf_counter()
        *training, loss = jax.block_until_ready(
            self._train_step(*self._training, *inputs)
        )
        seconds = time.perf_counter() - start
        self._training = tuple(training)
        return {"seconds": seconds, "loss": float(loss)}
