"""Configs as flags, overrides and files; which parameters a run trains; where it begins."""

import dataclasses
import json

import pytest

from recurrentgemma import PRESETS, save
from recurrentgemma.checkpoints import named_parameters, read_config
from recurrentgemma.training import OptimizerConfig, TrainConfig, options
from recurrentgemma.training.config import RECORD, claim, read_record
from recurrentgemma.training.selection import split_parameters
from recurrentgemma.training.start import architecture_of, with_overrides
from tests.golden_models import GOLDEN
from tests.models import random_model, tiny_config

TINY = tiny_config()
CONFIG = TrainConfig(output="run")


def test_any_field_can_be_set():
    found = with_overrides(
        CONFIG,
        [
            "steps=7",
            "optimizer.learning_rate=1e-3",
            "optimizer.cooldown_steps=none",
            "guard.spike_ratio=4",
            "compute.remat=True",
            "freeze=embedder.*, final_norm.scale",
            "tokenizer=here=there",
            "model.num_layers=3",
        ],
    )
    assert found.steps == 7 and found.guard.spike_ratio == 4.0
    assert found.optimizer == OptimizerConfig(learning_rate=1e-3)
    assert found.compute.remat is True
    assert found.freeze == ("embedder.*", "final_norm.scale")
    assert found.tokenizer == "here=there"
    assert found.model == dataclasses.replace(PRESETS["nano"], num_layers=3)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps", "expected FIELD=VALUE, got 'steps'"),
        ("stepps=7", "got 'stepps'; did you mean steps"),
        ("optimizer.learningrate=7", "did you mean learning_rate"),
        ("optimizer=7", "expected a field of 'optimizer', such as optimizer.learning"),
        ("steps.x=7", "names a field of 'steps', which has none"),
        ("steps=7.5", "set steps: expected an integer, got '7.5'"),
        ("steps=none", "set steps: expected an integer, got 'none'"),
        ("steps=0", "set steps: steps: expected an integer of at least 1, got 0"),
        ("optimizer.b1=x", "set optimizer.b1: expected a number, got 'x'"),
        ("compute.remat=yes", "expected true or false, got 'yes'"),
        ("model.width=0", "width: expected an integer"),
    ],
)
def test_a_wrong_override_says_what_was_expected(assignment, message):
    with pytest.raises(ValueError, match=message):
        with_overrides(CONFIG, [assignment])


@pytest.mark.parametrize(
    "fields",
    [
        {"accumulation": 3},
        {"z_loss": -1.0},
        {"keep_every": 0},
        {"keep_checkpoints": 0},
    ],
)
def test_values_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        TrainConfig(output="run", **fields)


def test_a_record_gives_the_config_back(tmp_path):
    config = dataclasses.replace(
        CONFIG,
        output=str(tmp_path),
        model=TINY,
        train_only=("*.mlp.*",),
        optimizer=OptimizerConfig(schedule="wsd"),
    )
    claim(tmp_path, config, TINY)
    record = read_record(tmp_path / RECORD)
    assert "output" not in record
    assert TrainConfig(output=config.output, **record) == config
    claim(tmp_path, config, TINY)
    # What changes no number may change; the record follows.
    claim(tmp_path, dataclasses.replace(config, checkpoint_every=7), TINY)
    assert read_record(tmp_path / RECORD)["checkpoint_every"] == 7
    # Another name for the same architecture.
    claim(tmp_path, dataclasses.replace(config, model="somewhere"), TINY)
    wider = dataclasses.replace(TINY, width=28)
    with pytest.raises(ValueError, match="architecture is .*'width': 24.*: 28"):
        claim(tmp_path, config, wider)
    other = dataclasses.replace(config, optimizer=OptimizerConfig())
    with pytest.raises(ValueError, match="optimizer.schedule is 'wsd', not 'cosine'"):
        claim(tmp_path, other, TINY)


def test_a_file_that_is_no_record_says_so(tmp_path):
    for content, message in (
        ("", "expected the record of a run"),
        ("[1]", "expected the record of a run"),
        ('{"stepps": 7}', "expected fields of TrainConfig, got stepps; known are"),
    ):
        (tmp_path / RECORD).write_text(content)
        with pytest.raises(ValueError, match=message):
            read_record(tmp_path / RECORD)


def test_the_architecture_comes_from_anything_that_tells_it(tmp_path):
    save(tmp_path / "native", random_model(TINY), None)
    (tmp_path / "plain.json").write_text(json.dumps(TINY.to_dict()))

    def architecture(**fields):
        return architecture_of(dataclasses.replace(CONFIG, **fields))

    assert architecture() == architecture(model="nano") == PRESETS["nano"]
    for given in ("native", "native/config.json", "plain.json"):
        assert architecture(model=str(tmp_path / given)) == TINY
    assert architecture(init_from=str(tmp_path / "native")) == TINY
    assert architecture(model=TINY) is TINY
    transformers = GOLDEN / "transformers" / "recurrent_gemma" / "config.json"
    assert architecture(model=str(transformers)) == read_config(transformers.parent)
    for given in ("nanno", str(tmp_path / RECORD), str(tmp_path)):
        with pytest.raises(ValueError, match="nano|not a checkpoint|preset"):
            architecture(model=given)
    (tmp_path / "plain.json").write_text("[]")
    with pytest.raises(ValueError, match="model: expected the config of a model in"):
        architecture(model=str(tmp_path / "plain.json"))


def test_patterns_choose_what_is_trained():
    params = named_parameters(random_model(TINY))

    def trained(train_only=(), freeze=()):
        chosen, frozen = split_parameters(params, train_only, freeze)
        assert chosen.keys() | frozen.keys() == params.keys()
        assert not chosen.keys() & frozen.keys()
        return list(chosen)

    assert trained() == list(params)
    scales = trained(["*.scale"])
    assert scales and all(name.endswith(".scale") for name in scales)
    assert trained(["*.scale"], ["blocks.*"]) == ["final_norm.scale"]
    assert trained((), ["blocks.*", "final_norm.*"]) == ["embedder.embedding"]
    with pytest.raises(
        ValueError,
        match=r"'blocks.0.mixer.linear_x.kernal'.* near it "
        r"are blocks.0.mixer.linear_x.kernel",
    ):
        trained(["blocks.0.mixer.linear_x.kernal"])
    with pytest.raises(ValueError, match="freeze: expected a pattern .*'lora'"):
        trained((), ["lora"])
    with pytest.raises(ValueError, match="every parameter is frozen"):
        trained(["final_norm.*"], ["final_norm.*"])


def test_kinds_of_options():
    kinds = {
        f.name: options.kind_of(c, f) for c, f in options.option_fields(TrainConfig)
    }
    assert kinds["steps"] == (int, False) and kinds["keep_every"] == (int, True)
    assert kinds["spike_ratio"] == (float, True) and kinds["remat"] == (bool, False)
    assert kinds["freeze"] == (tuple, False) and kinds["model"] == (str, True)
