# pyright: reportMissingImports=false
"""Worker: transformers on PyTorch, the model that the folder's config names."""

import importlib
import os
import time
from pathlib import Path

import numpy as np
import torch

# By name: to a type checker this file would be `transformers`.
transformers = importlib.import_module("transformers")

BOS = 2


class Opponent:
    def __init__(self, directory: str):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.directory = Path(directory)
        self.tokens = np.load(self.directory / "tokens.npy")
        self.model = self._load()
        self._training = None

    def _load(self):
        folder = self.directory / "hugging_face"
        library = transformers.AutoModelForCausalLM
        model = library.from_pretrained(folder, dtype=torch.float32)
        model.generation_config.eos_token_id = None
        return model.eval()

    def _inputs(self, batch: int, length: int) -> torch.Tensor:
        return torch.from_numpy(self.tokens[:batch, :length].astype(np.int64))

    @torch.inference_mode()
    def logits(self, length: int) -> str:
        logits = self.model(self._inputs(1, length), use_cache=False).logits
        path = self.directory / "transformers_logits.npy"
        np.save(path, logits[0].numpy())
        return str(path)

    @torch.inference_mode()
    def prefill(self, length: int) -> dict:
        tokens = self._inputs(1, length)
        start = time.perf_counter()
        self.model(tokens, use_cache=True, logits_to_keep=1)
        return {"seconds": time.perf_counter() - start}

    @torch.inference_mode()
    def generate(self, batch: int, prompt: int, new_tokens: int) -> dict:
        tokens = self._inputs(batch, prompt).clone()
        tokens[:, 0] = BOS
        start = time.perf_counter()
        output = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
        )
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": output[:, prompt:].tolist()}

    def train(self, length: int) -> dict:
        if self._training is None:
            model = self._load().train()
            optimizer = torch.optim.AdamW(
                model.parameters(), 1e-4, (0.9, 0.96), 1e-8, weight_decay=0.1
            )
            self._training = model, optimizer
        model, optimizer = self._training
        tokens = self._inputs(1, length)
        start = time.perf_counter()
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"seconds": time.perf_counter() - start, "loss": loss.item()}
