"""What a model is (`GriffinConfig`, `PRESETS`) and how it runs (`Runtime`).

The architecture is data: a block pattern cycled over the layers, and sizes. Griffin,
Hawk, the multi-query Transformer of the Griffin paper (arXiv 2402.19427),
RecurrentGemma (arXiv 2404.07839) and Gemma 1 and 2 differ in nothing else.
"""

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from recurrentgemma._validation import (
    boolean,
    choice,
    count,
    floating_dtype,
    number,
    positive_integer,
    refuse,
)
from recurrentgemma.kernels.linear_scan import IMPLEMENTATIONS as LINEAR_SCANS
from recurrentgemma.kernels.local_attention import IMPLEMENTATIONS as ATTENTIONS
from recurrentgemma.kernels.recurrent_step import IMPLEMENTATIONS as RECURRENT_STEPS
from recurrentgemma.kernels.rg_lru import IMPLEMENTATIONS as RG_LRUS
from recurrentgemma.mixers import TEMPORAL_MIXERS

_SIZES = (
    "vocab_size",
    "width",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "attention_window",
    "lru_width",
    "num_gate_blocks",
    "conv_width",
)
_SWITCHES = ("attention_bias", "complex_rg_lru", "mlp_bias", "post_norms")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GriffinConfig:
    """The architecture of a Griffin-family model.

    Sizes that must fit each other are checked by the mixers that use them, when a model
    is made.

    Raises:
      ValueError: a field has a wrong type or is out of range, or the pattern has a block
        type that `TEMPORAL_MIXERS` does not have.
    """

    vocab_size: int
    """Number of rows of the embedding, V, which is also the output projection."""
    width: int
    """Size of the residual stream, D."""
    mlp_width: int
    """Hidden size of the gated MLP; 0 leaves the MLP and its norm out of every block."""
    num_layers: int
    """Number of residual blocks, each a temporal-mixing block and an MLP."""
    block_pattern: tuple[str, ...] = ("recurrent", "recurrent", "local_attention")
    """Temporal-mixing block types, names of `TEMPORAL_MIXERS`, cycled over the layers."""
    num_heads: int
    """Number of query heads of attention, N."""
    num_kv_heads: int = 1
    """Number of key-value heads; 1 is multi-query attention."""
    head_dim: int
    """Size of a head, H."""
    query_scale: float | None = None
    """Factor on attention scores; None means head_dim ** -0.5."""
    rope_fraction: float = 0.5
    """Share of each head, from its start, that the rotary embedding turns."""
    attention_window: int = 2048
    """Number of past keys that local attention sees, W, besides the query's own."""
    attention_soft_cap: float | None = None
    """Attention scores are bounded as c tanh(score / c); None leaves them."""
    attention_bias: bool = True
    """Whether the output projection of attention has a bias."""
    lru_width: int
    """Number of channels of the RG-LRU, E."""
    num_gate_blocks: int
    """Number of diagonal blocks of the RG-LRU gate matrices."""
    complex_rg_lru: bool = False
    """Whether the RG-LRU is complex (CG-LRU, Griffin paper, appendix B): the first half
    of its channels holds real parts, the second half imaginary ones."""
    conv_width: int = 4
    """Number of taps of the causal convolution before the RG-LRU."""
    mlp_bias: bool = True
    """Whether the three MLP projections have biases."""
    post_norms: bool = False
    """Whether mixer and MLP outputs are normalised too (Gemma 2)."""
    embedding_scale: float = 1.0
    """Factor on the input embeddings."""
    logits_soft_cap: float | None = None
    """Logits are bounded as c tanh(logit / c); None leaves them."""

    def __post_init__(self):
        fields: dict[str, Any] = {}
        for name in _SIZES:
            fields[name] = positive_integer(name, getattr(self, name))
        fields["mlp_width"] = count("mlp_width", self.mlp_width)
        for name in _SWITCHES:
            fields[name] = boolean(name, getattr(self, name))
        for name in ("attention_soft_cap", "logits_soft_cap", "query_scale"):
            if getattr(self, name) is not None:
                fields[name] = number(name, getattr(self, name), above=0)
        fields["embedding_scale"] = number("embedding_scale", self.embedding_scale)
        fields["rope_fraction"] = number(
            "rope_fraction", self.rope_fraction, above=0, most=1
        )
        fields["block_pattern"] = _check_pattern(self.block_pattern)
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def block_types(self) -> tuple[str, ...]:
        """The temporal-mixing block type of each layer."""
        pattern = self.block_pattern
        return tuple(pattern[i % len(pattern)] for i in range(self.num_layers))

    @property
    def attention_scale(self) -> float:
        """The factor on attention scores."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {**dataclasses.asdict(self), "block_pattern": list(self.block_pattern)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "GriffinConfig":
        """The config with these fields.

        Raises:
          ValueError: naming unknown, missing or illegal fields.
        """
        if not isinstance(fields, Mapping):
            refuse("fields", "a mapping of the fields of a GriffinConfig", fields)
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - set(known), key=str)
        required = {
            name
            for name, field in known.items()
            if field.default is dataclasses.MISSING
        }
        missing = sorted(required - set(fields))
        if unknown or missing:
            raise ValueError(
                f"fields: expected those of a GriffinConfig, got unknown fields "
                f"{unknown}, missing fields {missing}; known are {', '.join(known)}"
            )
        return cls(**fields)

    def fingerprint(self) -> str:
        """A digest of the architecture: equal exactly if all fields are.

        A field at its default is left out, so that one that is added later, with what
        held before as its default, does not make saved prefixes strange.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        chosen = {
            name: value
            for name, value in self.to_dict().items()
            if getattr(self, name) != defaults[name]
        }
        canonical = json.dumps(chosen, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


def _check_pattern(pattern: Any) -> tuple[str, ...]:
    """The block pattern as a tuple of known names."""
    if isinstance(pattern, str) or not isinstance(pattern, list | tuple) or not pattern:
        refuse(
            "block_pattern",
            "a list of at least one block type",
            pattern,
            f"known are {', '.join(TEMPORAL_MIXERS)}",
        )
    for i, kind in enumerate(pattern):
        choice(
            f"block_pattern[{i}]",
            kind,
            TEMPORAL_MIXERS,
            "register a class of your own first: "
            f"recurrentgemma.blocks.TEMPORAL_MIXERS[{kind!r}] = YourMixer",
        )
    return tuple(pattern)


_IMPLEMENTATIONS = {
    "linear_scan": LINEAR_SCANS,
    "rg_lru": RG_LRUS,
    "recurrent_step": RECURRENT_STEPS,
    "local_attention": ATTENTIONS,
}
FLOAT32_PRECISIONS = ("highest", "high", "default")
"""From exact to fast."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a model runs; never saved with it.

    Raises:
      ValueError: compute_dtype is not a floating-point dtype, an op has no such
        implementation, or there is no such precision.
    """

    compute_dtype: str | None = None
    """Dtype of matrix products and activations; None is the device's best: float32 on
    CPU, bfloat16 on TPU and on GPUs that have it, float16 on older GPUs."""
    linear_scan: str | None = None
    """Implementation of `recurrentgemma.kernels.linear_scan`; None is the best. On GPU
    that depends on the one that is here (`kernels/gpu.py`): to compile ahead of time for
    another, name the implementation, here and for `rg_lru`."""
    rg_lru: str | None = None
    """Implementation of `recurrentgemma.kernels.rg_lru`; None is the best."""
    recurrent_step: str | None = None
    """Implementation of `recurrentgemma.kernels.recurrent_step`, which runs instead for
    a single token; None is the best."""
    local_attention: str | None = None
    """Implementation of `recurrentgemma.kernels.local_attention`; None is the best."""
    float32_precision: str = "highest"
    """Precision of the model's matrix products where they are float32: "highest" is
    float32. "high" and "default" are faster modes of accelerators (TensorFloat-32 on
    GPU; three and one bfloat16 passes on TPU). A CPU knows float32 alone."""
    remat: bool = False
    """Recompute each residual block (each pattern group if stacked) in the backward
    pass instead of keeping its activations."""

    def __post_init__(self):
        if self.compute_dtype is not None:
            dtype = floating_dtype("compute_dtype", self.compute_dtype)
            object.__setattr__(self, "compute_dtype", dtype.name)
        for name, table in _IMPLEMENTATIONS.items():
            if getattr(self, name) is not None:
                choice(name, getattr(self, name), table, "None picks the best")
        choice("float32_precision", self.float32_precision, FLOAT32_PRECISIONS)
        boolean("remat", self.remat)

    @property
    def dtype(self) -> jnp.dtype:
        """The compute dtype, with None resolved for the default device."""
        return jnp.dtype(self.compute_dtype or _best_compute_dtype())

    @property
    def matmul_precision(self) -> str | None:
        """The value for `jax.default_matmul_precision` around the model's products.

        None, JAX's own default, unless they are float32: other dtypes have one way to
        be multiplied.
        """
        return self.float32_precision if self.dtype == jnp.float32 else None


def _best_compute_dtype() -> str:
    device = jax.devices()[0]
    if device.platform == "cpu":
        return "float32"
    capability = getattr(device, "compute_capability", None)
    if device.platform == "gpu" and capability and float(capability) < 8:
        return "float16"
    return "bfloat16"


def find_preset(name: str) -> GriffinConfig:
    """The preset of this name.

    Raises:
      ValueError: there is none; close names are listed.
    """
    if name in PRESETS:
        return PRESETS[name]
    close = difflib.get_close_matches(name, PRESETS, n=3) or list(PRESETS)
    raise ValueError(f"Unknown preset {name!r}. Did you mean {', '.join(close)}?")


def _recurrentgemma(*, width: int, num_layers: int, num_heads: int) -> GriffinConfig:
    """RecurrentGemma report, table 1; the embedding scale is rounded to bfloat16."""
    return GriffinConfig(
        vocab_size=256_000,
        width=width,
        mlp_width=3 * width,
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=width // num_heads,
        lru_width=width,
        num_gate_blocks=num_heads,
        embedding_scale=float(jnp.dtype("bfloat16").type(math.sqrt(width))),
        logits_soft_cap=30.0,
    )


_PAPER_SIZES = {
    # width, lru width, layers, heads (Griffin paper, table 2 and appendix C)
    "100m": (768, 1024, 12, 6),
    "200m": (1024, 1536, 12, 8),
    "400m": (1536, 2048, 12, 12),
    "1.3b": (2048, 2560, 24, 16),
    "3b": (3072, 4096, 24, 24),
    "7b": (4096, 5632, 32, 32),
    "14b": (5120, 8192, 40, 40),
}
_PAPER_PATTERNS = {
    "griffin": ("recurrent", "recurrent", "local_attention"),
    "hawk": ("recurrent",),
    "mqa-transformer": ("global_attention",),
}


def _paper(family: str, size: str) -> GriffinConfig:
    """A model of the Griffin paper.

    The 7B Griffin and Hawk follow the presets of the released code: a gate block for
    each head and the vocabulary of Gemma.
    """
    width, lru_width, num_layers, num_heads = _PAPER_SIZES[size]
    released = size == "7b" and family != "mqa-transformer"
    return GriffinConfig(
        vocab_size=256_000 if released else 32_000,
        width=width,
        mlp_width=3 * width,
        num_layers=num_layers,
        block_pattern=_PAPER_PATTERNS[family],
        num_heads=num_heads,
        head_dim=128,
        attention_window=1024,
        lru_width=lru_width,
        num_gate_blocks=num_heads if released else 16,
    )


def _gemma(*, width: int, **fields: Any) -> GriffinConfig:
    """Gemma 1 and 2: no biases, whole-head rotary, unrounded embedding scale."""
    defaults: dict[str, Any] = {
        "vocab_size": 256_000,
        "width": width,
        "block_pattern": ("global_attention",),
        "head_dim": 256,
        "rope_fraction": 1.0,
        "attention_bias": False,
        "mlp_bias": False,
        "lru_width": width,
        "num_gate_blocks": 1,
        "embedding_scale": math.sqrt(width),
    }
    return GriffinConfig(**{**defaults, **fields})


def _gemma2(**fields: Any) -> GriffinConfig:
    """Gemma 2: local layers see 4096 keys, which is a window of 4095 past ones."""
    defaults: dict[str, Any] = {
        "block_pattern": ("local_attention", "global_attention"),
        "attention_window": 4095,
        "attention_soft_cap": 50.0,
        "logits_soft_cap": 30.0,
        "post_norms": True,
    }
    return _gemma(**{**defaults, **fields})


def _nano(**fields: Any) -> GriffinConfig:
    """The bundled model, and its Transformer twin of the same parameter count."""
    defaults: dict[str, Any] = {
        "vocab_size": 4096,
        "width": 256,
        "mlp_width": 640,
        "num_layers": 6,
        "num_heads": 4,
        "head_dim": 64,
        "attention_window": 256,
        "lru_width": 256,
        "num_gate_blocks": 4,
        "embedding_scale": 16.0,
        "logits_soft_cap": 30.0,
    }
    return GriffinConfig(**{**defaults, **fields})


PRESETS: dict[str, GriffinConfig] = {
    "nano": _nano(),
    "nano-transformer": _nano(block_pattern=("global_attention",), mlp_width=696),
    "recurrentgemma-2b": _recurrentgemma(width=2560, num_layers=26, num_heads=10),
    "recurrentgemma-9b": _recurrentgemma(width=4096, num_layers=38, num_heads=16),
    **{
        f"{family}-{size}": _paper(family, size)
        for family in _PAPER_PATTERNS
        for size in _PAPER_SIZES
    },
    "gemma-2b": _gemma(
        width=2048, num_layers=18, num_heads=8, num_kv_heads=1, mlp_width=16384
    ),
    "gemma-7b": _gemma(
        width=3072, num_layers=28, num_heads=16, num_kv_heads=16, mlp_width=24576
    ),
    "gemma2-2b": _gemma2(
        width=2304, num_layers=26, num_heads=8, num_kv_heads=4, mlp_width=9216
    ),
    "gemma2-9b": _gemma2(
        width=3584, num_layers=42, num_heads=16, num_kv_heads=8, mlp_width=14336
    ),
    "gemma2-27b": _gemma2(
        width=4608,
        num_layers=46,
        num_heads=32,
        num_kv_heads=16,
        mlp_width=36864,
        head_dim=128,
        query_scale=(4608 / 32) ** -0.5,
    ),
}
"""Architectures by name. "nano" is bundled; the others are shapes."""
