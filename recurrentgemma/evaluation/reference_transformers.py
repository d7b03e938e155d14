# pyright: reportMissingImports=false
"""Hidden states of each layer as transformers computes them.

    python -P reference_transformers.py REQUEST

Runs in an environment of its own (see `layer_states.py`, which writes the request) and
imports nothing of this package.
"""

import importlib
import json
import sys

import numpy as np
import torch

# By name: a file called like the library must not be what is found.
transformers = importlib.import_module("transformers")


def states(checkpoint: str, tokens: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    model, loading = transformers.RecurrentGemmaForCausalLM.from_pretrained(
        checkpoint, dtype=getattr(torch, dtype), output_loading_info=True
    )
    problems = {key: list(names) for key, names in loading.items() if names}
    if problems:
        raise ValueError(f"transformers does not take the tensors: {problems}")
    model.eval()
    found = {}

    def keep(name):
        def hook(module, inputs, output):
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def keep_input(module, inputs):
        found["embedding"] = inputs[0]

    layers = model.model.layers
    layers[0].register_forward_pre_hook(keep_input)
    for i, layer in enumerate(layers):
        layer.register_forward_hook(keep(f"layer {i}"))
    model.model.final_norm.register_forward_hook(keep("final norm"))
    with torch.inference_mode():
        inputs = torch.from_numpy(tokens.astype(np.int64))[None]
        found["logits"] = model(inputs, use_cache=False).logits
    return {name: value[0].float().numpy() for name, value in found.items()}


def main(request_file: str) -> None:
    with open(request_file) as file:
        request = json.load(file)
    tokens = np.asarray(request["tokens"], np.int32)
    found = states(request["checkpoint"], tokens, request["dtype"])
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    found["versions"] = np.asarray(json.dumps(versions))
    np.savez(request["output"], allow_pickle=False, **found)


if __name__ == "__main__":
    main(sys.argv[1])
