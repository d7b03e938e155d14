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

BLOCK_TYPES = ("recurrent", "local_attention", "global_attention", "min_gru")

_SIZES = (
    "vocab_size",
    "width",
    "mlp_width",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "attention_window",
    "lru_width",
    "num_gate_blocks",
    "conv_width",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GriffinConfig:
    """The architecture of a Griffin-family model.

    Raises:
      ValueError: a size is not positive, sizes do not divide, or a block type of the
        pattern does not exist.
    """

    vocab_size: int
    """V, rows of the embedding, which is also the output projection."""
    width: int
    """D, size of the residual stream."""
    mlp_width: int
    """Hidden size of the gated MLP."""
    num_layers: int
    """Residual blocks, each a temporal-mixing block and an MLP."""
    block_pattern: tuple[str, ...] = ("recurrent", "recurrent", "local_attention")
    """Temporal-mixing block types, cycled over the layers."""
    num_heads: int
    """N, query heads of attention."""
    num_kv_heads: int = 1
    """Key-value heads; 1 is multi-query attention."""
    head_dim: int
    """H, size of a head."""
    query_scale: float | None = None
    """Factor on attention scores; None means head_dim ** -0.5."""
    rope_fraction: float = 0.5
    """Share of each head, from its start, that the rotary embedding turns."""
    attention_window: int = 2048
    """W, past keys that local attention sees, besides the query's own."""
    attention_soft_cap: float | None = None
    """Attention scores are bounded as c tanh(score / c); None leaves them."""
    attention_bias: bool = True
    """Whether the output projection of attention has a bias."""
    lru_width: int
    """E, channels of the RG-LRU."""
    num_gate_blocks: int
    """Diagonal blocks of the RG-LRU gate matrices."""
    complex_rg_lru: bool = False
    """Whether the RG-LRU is complex (CG-LRU, Griffin paper, appendix B): the first half
    of its channels holds real parts, the second half imaginary ones."""
    conv_width: int = 4
    """Taps of the causal convolution before the RG-LRU."""
    mlp_bias: bool = True
    """Whether the three MLP projections have biases."""
    post_norms: bool = False
    """Whether mixer and MLP outputs are normalised too (Gemma 2)."""
    embedding_scale: float = 1.0
    """Factor on the input embeddings."""
    logits_soft_cap: float | None = None
    """Logits are bounded as c tanh(logit / c); None leaves them."""

    def __post_init__(self):
        object.__setattr__(self, "block_pattern", tuple(self.block_pattern))
        for name in _SIZES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        if not self.block_pattern:
            raise ValueError("block_pattern must name at least one block type.")
        for block_type in self.block_pattern:
            if block_type not in BLOCK_TYPES:
                raise ValueError(
                    f"block_pattern holds {block_type!r}; expected some of "
                    f"{', '.join(BLOCK_TYPES)}."
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads})."
            )
        if self.lru_width % self.num_gate_blocks:
            raise ValueError(
                f"lru_width ({self.lru_width}) must be a multiple of num_gate_blocks "
                f"({self.num_gate_blocks})."
            )
        if self.complex_rg_lru and self.lru_width % (2 * self.num_gate_blocks):
            raise ValueError(
                f"lru_width ({self.lru_width}) must be a multiple of twice "
                f"num_gate_blocks ({self.num_gate_blocks}) if complex_rg_lru is true."
            )
        for name in ("attention_soft_cap", "logits_soft_cap", "query_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive or None, got {value!r}.")
        rotated = self.rope_fraction * self.head_dim
        if not 0 < self.rope_fraction <= 1 or rotated % 2:
            raise ValueError(
                f"rope_fraction ({self.rope_fraction}) must lie in (0, 1] and select "
                f"an even part of head_dim ({self.head_dim})."
            )

    @property
    def block_types(self) -> tuple[str, ...]:
        """The temporal-mixing block type of each layer."""
        pattern = self.block_pattern
        return tuple(pattern[i % len(pattern)] for i in range(self.num_layers))

    @property
    def attention_scale(self) -> float:
        """The factor on attention scores."""
        return self.query_scale or self.head_dim**-0.5

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {**dataclasses.asdict(self), "block_pattern": list(self.block_pattern)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "GriffinConfig":
        """The config with these fields.

        Raises:
          ValueError: naming unknown, missing or illegal fields.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - set(known))
        required = {
            name
            for name, field in known.items()
            if field.default is dataclasses.MISSING
        }
        missing = sorted(required - set(fields))
        if unknown or missing:
            raise ValueError(
                f"Not a GriffinConfig: unknown fields {unknown}, missing fields "
                f"{missing}. Expected fields: {', '.join(known)}."
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a model runs; never saved with it.

    Raises:
      ValueError: compute_dtype is not a floating-point dtype.
    """

    compute_dtype: str | None = None
    """Dtype of matrix products and activations; None is the device's best: float32 on
    CPU, bfloat16 on TPU and on GPUs that have it, float16 on older GPUs."""
    linear_scan: str | None = None
    """Implementation of `recurrentgemma.kernels.linear_scan`; None is the best."""
    rg_lru: str | None = None
    """Implementation of `recurrentgemma.kernels.rg_lru`; None is the best."""
    recurrent_step: str | None = None
    """Implementation of `recurrentgemma.kernels.recurrent_step`, which runs instead for
    a single token; None is the best."""
    local_attention: str | None = None
    """Implementation of `recurrentgemma.kernels.local_attention`; None is the best."""
    remat: bool = False
    """Recompute each residual block (each pattern group if stacked) in the backward
    pass instead of keeping its activations."""

    def __post_init__(self):
        if self.compute_dtype is not None:
            dtype = jnp.dtype(self.compute_dtype)
            if not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(
                    f"compute_dtype must be a floating-point dtype, got {dtype}."
                )
            object.__setattr__(self, "compute_dtype", dtype.name)

    @property
    def dtype(self) -> jnp.dtype:
        """The compute dtype, with None resolved for the default device."""
        return jnp.dtype(self.compute_dtype or _best_compute_dtype())


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
