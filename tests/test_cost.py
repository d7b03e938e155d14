import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from recurrentgemma import cost
from recurrentgemma.blocks import TEMPORAL_MIXERS
from recurrentgemma.checkpoints.parameters import describe
from recurrentgemma.config import PRESETS, GriffinConfig, Runtime
from recurrentgemma.griffin import Griffin
from tests.models import forward

TINY = GriffinConfig(
    vocab_size=31,
    width=12,
    mlp_width=20,
    num_layers=5,
    block_pattern=("recurrent", "local_attention"),
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rope_fraction=1.0,
    attention_window=7,
    lru_width=18,
    num_gate_blocks=3,
    conv_width=3,
)
VARIANTS = {
    "mixed": TINY,
    "recurrent": dataclasses.replace(TINY, block_pattern=("recurrent",)),
    "local": dataclasses.replace(TINY, block_pattern=("local_attention",)),
    "global": dataclasses.replace(TINY, block_pattern=("global_attention",)),
    "all three": dataclasses.replace(
        TINY, block_pattern=("recurrent", "local_attention", "global_attention")
    ),
    "complex": dataclasses.replace(TINY, complex_rg_lru=True),
    "no MLP": dataclasses.replace(TINY, mlp_width=0, post_norms=True),
    "minGRU": dataclasses.replace(TINY, block_pattern=("min_gru", "local_attention")),
    "no biases, post norms": dataclasses.replace(
        TINY, attention_bias=False, mlp_bias=False, post_norms=True
    ),
}


def _abstract(config, **runtime):
    return nnx.eval_shape(
        lambda: Griffin(config, rngs=nnx.Rngs(0), runtime=Runtime(**runtime))
    )


def _leaves(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape")]


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("recurrentgemma-2b", 2_682_862_080),
        ("recurrentgemma-9b", 8_579_977_216),
        ("gemma-2b", 2_506_172_416),
        ("gemma-7b", 8_537_680_896),
        ("gemma2-2b", 2_614_341_888),
        ("gemma2-9b", 9_241_705_984),
        ("gemma2-27b", 27_227_128_320),
    ],
)
def test_parameters_of_the_released_models(preset, expected):
    assert cost.num_parameters(PRESETS[preset]) == expected


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_those_of_the_module(name):
    params = nnx.state(_abstract(VARIANTS[name]), nnx.Param)
    actual = sum(math.prod(leaf.shape) for leaf in _leaves(params))
    assert cost.num_parameters(VARIANTS[name]) == actual


@pytest.mark.parametrize("name", VARIANTS)
def test_matrices_are_the_parameters_called_kernel_or_embedding(name):
    params = nnx.state(_abstract(VARIANTS[name]), nnx.Param)
    expected = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        keys = jax.tree_util.keystr(path)
        is_matrix = ("kernel" in keys and "conv_1d" not in keys) or "embedder" in keys
        expected += math.prod(leaf.shape) * (2 if is_matrix else 4)
    assert cost.parameter_bytes(VARIANTS[name], "bfloat16") == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_cache_bytes_are_those_of_the_cache(name, dtype):
    model = _abstract(VARIANTS[name], compute_dtype=dtype)
    cache = jax.eval_shape(lambda: model.init_cache(3, capacity=16))
    actual = sum(
        math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in _leaves(cache)
    )
    assert cost.cache_bytes(VARIANTS[name], 3, dtype=dtype, capacity=16) == actual


def test_cache_of_the_released_models_is_as_published():
    for preset, megabytes in (("recurrentgemma-2b", 17.3), ("recurrentgemma-9b", 26.3)):
        assert round(cost.cache_bytes(PRESETS[preset]) / 1e6, 1) == megabytes


def test_global_attention_needs_a_capacity():
    with pytest.raises(ValueError, match="capacity: expected"):
        cost.cache_bytes(PRESETS["gemma-2b"])


@pytest.mark.parametrize("length", [1, 5, 8, 9, 40])
def test_attention_flops_count_every_visible_key(length):
    local, none = VARIANTS["local"], dataclasses.replace(TINY, attention_window=10**6)
    position = np.arange(length)
    keys = np.minimum(position, local.attention_window) + 1
    matrices = 2 * (
        cost.num_parameters(local)
        - local.width * (1 + 2 * local.num_layers)  # norms
        - local.num_layers * (2 * local.mlp_width + 2 * local.width)  # biases
    )
    attention = local.num_layers * 4 * local.num_heads * local.head_dim
    expected = matrices + attention * keys.mean()
    assert cost.forward_flops_per_token(local, length) == pytest.approx(expected)
    # A window wider than the sequence is global attention.
    wide = dataclasses.replace(none, block_pattern=("local_attention",))
    assert cost.forward_flops_per_token(wide, length) == pytest.approx(
        cost.forward_flops_per_token(VARIANTS["global"], length)
    )


def test_flops_against_a_count_by_hand():
    config = dataclasses.replace(
        VARIANTS["mixed"], width=128, mlp_width=384, lru_width=128, num_gate_blocks=1
    )
    matrices = cost.forward_flops_per_token(config, 1)
    by_hand = 2 * (
        31 * 128  # logits
        + 3 * (3 * 128 * 128 + 2 * 128 * 128)  # recurrent: x, y, out and two gates
        + 2 * 128 * 6 * (2 * 4 + 2 * 2)  # attention: q, out and k, v
        + 5 * 3 * 128 * 384  # MLPs
    )
    assert matrices == pytest.approx(by_hand, rel=0.01)
    assert cost.train_flops_per_token(config, 1) == 3 * matrices


WIDE = GriffinConfig(
    vocab_size=256,
    width=512,
    mlp_width=256,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=128,
    attention_window=1023,
    lru_width=512,
    num_gate_blocks=4,
)
"""Wide enough that element-wise work, which is not counted, is small."""
HELD = 1024
"""Tokens before the one that is counted."""


def _step_flops(config):
    """(of the compiler, of the formulas) for one token after `HELD` others."""
    # Faster forms of attention multiply several heads of keys at once, with zeros, or
    # loop, where the compiler counts one round.
    model = describe(config, Runtime(local_attention="reference"))
    cache = jax.eval_shape(lambda: model.init_cache(1, capacity=HELD))
    token = jax.ShapeDtypeStruct((1, 1), np.int32)
    program = forward.lower(model, token, None, cache)
    counted = sum(
        sign * length * cost.forward_flops_per_token(config, length)
        for sign, length in ((1, HELD + 1), (-1, HELD))
    )
    return np.array([program.cost_analysis()["flops"], counted])


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        *(
            (kind, {"block_pattern": (kind,), "num_layers": 2})
            for kind in TEMPORAL_MIXERS
        ),
        ("MLP", {"mlp_width": 1024}),
        ("logits", {"vocab_size": 1024}),
    ],
)
def test_flops_are_those_of_the_compiler(part, changes):
    """What a layer, or a wider one, adds to a step."""
    before = dataclasses.replace(
        WIDE, block_pattern=changes.get("block_pattern", WIDE.block_pattern)
    )
    less, more = (
        _step_flops(before),
        _step_flops(dataclasses.replace(before, **changes)),
    )
    compiler, counted = more - less
    assert counted == pytest.approx(compiler, rel=0.05)


@pytest.mark.parametrize("name", ["recurrent", "complex", "minGRU"])
def test_a_recurrent_model_costs_the_same_at_any_length(name):
    config = dataclasses.replace(
        VARIANTS[name], block_pattern=VARIANTS[name].block_pattern[:1]
    )
    assert cost.forward_flops_per_token(config, 1) == cost.forward_flops_per_token(
        config, 10**8
    )
    with pytest.raises(ValueError, match="length: expected"):
        cost.forward_flops_per_token(config, 0)


def test_flops_of_the_recurrences_against_a_count_by_hand():
    real, of_complex, min_gru = (
        cost.forward_flops_per_token(dataclasses.replace(TINY, num_layers=1, **f), 9)
        for f in (
            {"block_pattern": ("recurrent",)},
            {"block_pattern": ("recurrent",), "complex_rg_lru": True},
            {"block_pattern": ("min_gru",)},
        )
    )
    # Gates half as large; a complex product and sum for each pair of channels.
    assert of_complex - real == -2 * (18 * 18 // 3) + 2 * 18
    # Neither gates nor convolution.
    assert real - min_gru == 2 * (2 * 18 * 18 // 3) + 2 * 3 * 18


def test_decode_moves_parameters_and_cache_once():
    config = PRESETS["recurrentgemma-2b"]
    for batch_size in (1, 16):
        assert cost.decode_bytes(config, batch_size) == cost.parameter_bytes(
            config, "bfloat16"
        ) + batch_size * cost.cache_bytes(config)
