"""Configs: validation, JSON round trip, presets."""

import dataclasses
import json

import pytest

from recurrentgemma import PRESETS, GriffinConfig, Runtime
from recurrentgemma.blocks import TEMPORAL_MIXERS
from recurrentgemma.config import BLOCK_TYPES, find_preset
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
        ({"width": 0}, "width must be a positive integer, got 0"),
        ({"num_layers": 2.5}, "num_layers"),
        ({"block_pattern": ()}, "at least one"),
        ({"block_pattern": ("convolution",)}, "convolution.*expected some of"),
        ({"num_heads": 3, "num_kv_heads": 2}, "multiple of num_kv_heads"),
        ({"num_gate_blocks": 5}, "multiple of num_gate_blocks"),
        (
            {"lru_width": 36, "num_gate_blocks": 4, "complex_rg_lru": True},
            "multiple of twice num_gate_blocks",
        ),
        ({"rope_fraction": 1.5}, "rope_fraction"),
        ({"logits_soft_cap": 0.0}, "logits_soft_cap must be positive or None"),
    ],
)
def test_illegal_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


def test_every_block_type_has_a_mixer():
    assert set(TEMPORAL_MIXERS) == set(BLOCK_TYPES)


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
    with pytest.raises(ValueError, match="floating-point"):
        Runtime(compute_dtype="int8")
