"""Configs: validation, JSON round trip, presets."""

import dataclasses
import json

import pytest

from recurrentgemma import PRESETS, GriffinConfig, Runtime, cost
from recurrentgemma.checkpoints.parameters import describe
from recurrentgemma.config import find_preset
from tests.models import tiny_config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name):
    config = PRESETS[name]
    fields = json.loads(json.dumps(config.to_dict()))
    again = GriffinConfig.from_dict(fields)
    assert again == config
    assert again.fingerprint() == config.fingerprint()


def test_every_size_of_the_paper_is_there():
    for family, kinds in {
        "griffin": {"recurrent", "local_attention"},
        "hawk": {"recurrent"},
        "mqa-transformer": {"global_attention"},
    }.items():
        for size in ("100m", "200m", "400m", "1.3b", "3b", "7b", "14b"):
            assert set(PRESETS[f"{family}-{size}"].block_types) == kinds


def test_fingerprint_tells_architectures_apart():
    assert len({c.fingerprint() for c in PRESETS.values()}) == len(PRESETS)
    changed = dataclasses.replace(tiny_config(), attention_window=7)
    assert changed.fingerprint() != tiny_config().fingerprint()


def test_fingerprints_stay_what_they_are():
    """Saved prefixes hold them: if this fails, their format's version must rise."""
    digest = "99b48117642cb0a04a2d7a571e212031a76d55579890db2e0e3d7286a63f8667"
    assert PRESETS["recurrentgemma-2b"].fingerprint() == digest


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 0}, "width: expected an integer of at least 1, got 0"),
        ({"num_layers": 2.5}, "num_layers: expected an integer"),
        ({"num_heads": True}, "num_heads: expected an integer"),
        ({"block_pattern": ()}, "block_pattern: expected .* at least one"),
        ({"block_pattern": "recurrent"}, "block_pattern: expected a list"),
        (
            {"block_pattern": ("convolution",)},
            r"block_pattern\[0\]: expected one of .*, got 'convolution'; register",
        ),
        ({"rope_fraction": 1.5}, "rope_fraction: expected .* at most 1, got 1.5"),
        ({"attention_bias": "false"}, "attention_bias: expected True or False"),
        ({"post_norms": 1}, "post_norms: expected True or False"),
        ({"query_scale": float("nan")}, "query_scale: expected a finite number"),
        ({"query_scale": True}, "query_scale: expected a finite number"),
        ({"embedding_scale": "5"}, "embedding_scale: expected a finite number"),
        ({"embedding_scale": float("inf")}, "embedding_scale: expected a finite"),
        ({"attention_soft_cap": float("inf")}, "attention_soft_cap: expected a fin"),
        ({"logits_soft_cap": 0.0}, "logits_soft_cap: expected .* above 0, got 0.0"),
    ],
)
def test_illegal_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_heads": 3, "num_kv_heads": 2},
            "num_heads: expected a multiple of num_kv",
        ),
        ({"rope_fraction": 0.4}, "rope_fraction: expected an even part of head_dim"),
        ({"num_gate_blocks": 5}, "lru_width: expected a multiple of num_gate_blocks"),
        (
            {"lru_width": 36, "num_gate_blocks": 4, "complex_rg_lru": True},
            "lru_width: expected a multiple of twice num_gate_blocks",
        ),
    ],
)
def test_fields_that_do_not_fit_are_refused_where_they_are_used(fields, message):
    config = tiny_config(**fields)
    for use in (describe, cost.num_parameters):
        with pytest.raises(ValueError, match=message):
            use(config)


def test_sizes_that_no_mixer_uses_are_not_checked():
    unused = {"num_heads": 3, "num_kv_heads": 2, "rope_fraction": 0.4}
    hawk = tiny_config(block_pattern=("recurrent",), num_layers=1, **unused)
    assert len(describe(hawk).blocks) == 1
    transformer = tiny_config(block_pattern=("global_attention",), num_gate_blocks=5)
    assert cost.num_parameters(transformer) > 0


def test_from_dict_names_fields():
    fields = tiny_config().to_dict()
    del fields["width"]
    fields["depth"] = 3
    with pytest.raises(ValueError, match=r"\['depth'\].*\['width'\]"):
        GriffinConfig.from_dict(fields)


def test_unknown_preset_lists_close_names():
    with pytest.raises(ValueError, match="recurrentgemma-2b"):
        find_preset("recurrentgema-2b")


def test_runtime_dtype():
    assert Runtime(compute_dtype="bfloat16").dtype == "bfloat16"
    with pytest.raises(ValueError, match="compute_dtype: expected a floating-point"):
        Runtime(compute_dtype="int8")


@pytest.mark.parametrize(
    "name", ["linear_scan", "rg_lru", "recurrent_step", "local_attention"]
)
def test_unknown_implementations_are_refused(name):
    assert getattr(Runtime(**{name: "reference"}), name) == "reference"
    with pytest.raises(ValueError, match=f"{name}: expected one of .*got 'bogus'"):
        Runtime(**{name: "bogus"})


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="float32_precision: expected one of highest"):
        Runtime(float32_precision="exact")
    with pytest.raises(ValueError, match="remat: expected True or False"):
        Runtime(remat="no")
