"""The Griffin family in JAX: the public names, and nothing else.

They are imported when first used, so that `recurrentgemma.kernels` costs no more than
jax.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recurrentgemma.checkpoints import load, save
    from recurrentgemma.config import PRESETS, GriffinConfig, Runtime
    from recurrentgemma.generation.chat import Chat
    from recurrentgemma.generation.prefix import Prefix
    from recurrentgemma.generation.sampler import Sampler
    from recurrentgemma.generation.sampling import Sampling
    from recurrentgemma.griffin import Griffin
    from recurrentgemma.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Chat",
    "Griffin",
    "GriffinConfig",
    "Prefix",
    "Runtime",
    "Sampler",
    "Sampling",
    "Tokenizer",
    "load",
    "save",
]

_MODULE_OF = {
    "PRESETS": "config",
    "Chat": "generation.chat",
    "Griffin": "griffin",
    "GriffinConfig": "config",
    "Prefix": "generation.prefix",
    "Runtime": "config",
    "Sampler": "generation.sampler",
    "Sampling": "generation.sampling",
    "Tokenizer": "tokenizer",
    "load": "checkpoints",
    "save": "checkpoints",
}


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULE_OF[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
