"""The certificate: right for the bundled model, and every check can fail."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from recurrentgemma import cli
from recurrentgemma.checkpoints import (
    find_checkpoint,
    load,
    named_parameters,
    open_checkpoint,
    save,
)
from recurrentgemma.config import PRESETS
from recurrentgemma.evaluation import checks, layer_states, reader, verify
from tests.checkpoints.checkpoints import FORMATS, model
from tests.models import forward, random_tokens
from tests.tolerances import assert_close

OWN_CHECKS = ["architecture", "weights", "generation", "splits", "text"]
TWO_LAYERS = {"block_pattern": ("recurrent", "local_attention"), "num_layers": 2}
PYTHONS = {
    name: os.environ.get(f"{name.upper()}_PYTHON") for name in layer_states.REFERENCES
}
"""Pythons that have the other packages, if they are in other environments."""


def changed(original, name, change):
    """The model with another value for one parameter."""
    leaves = [
        jnp.asarray(change(np.asarray(leaf))) if path == name else leaf
        for path, leaf in named_parameters(original).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(original), leaves)


@pytest.fixture
def saved(tmp_path):
    """Saves a tiny model, perhaps with another value for a parameter, and opens it."""

    def make(*, layout="native", name=None, change=None, **fields):
        made = model(**fields)
        if name is not None:
            made = changed(made, name, change)
        path = tmp_path / f"{layout}{len(list(tmp_path.iterdir()))}"
        save(path, made, None, format=layout)
        return open_checkpoint(path)

    return make


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Of the bundled model, made by the command."""
    path = tmp_path_factory.mktemp("certificate") / "new" / "nano.json"
    assert cli.main(["verify", "--output", str(path)]) == 0
    assert [file.name for file in path.parent.iterdir()] == ["nano.json"]
    return json.loads(path.read_text())


def test_the_bundled_model_passes(certificate):
    found = certificate["checks"]
    assert certificate["passed"] is True
    assert list(found) == [*OWN_CHECKS, *layer_states.REFERENCES]
    assert {found[name]["status"] for name in OWN_CHECKS} == {"passed"}
    assert found["architecture"]["preset"] == "nano"
    assert certificate["config_fingerprint"] == PRESETS["nano"].fingerprint()
    assert certificate["versions"]["jax"] == jax.__version__
    for continuation in found["generation"]["continuations"]:
        assert len(continuation["tokens"]) == len(continuation["log_probs"]) == 16


def test_the_digest_is_that_of_the_file(certificate):
    tensors = safetensors.numpy.load_file(find_checkpoint("nano") / "model.safetensors")
    digest = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        digest.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        digest.update(array.tobytes())
    assert certificate["checks"]["weights"]["sha256"] == digest.hexdigest()


def test_a_wrong_norm_fails_and_the_exit_status_says_so(certificate, tmp_path, capsys):
    nano, tokenizer = load("nano", param_dtype="float32")
    wrong = changed(nano, "final_norm.scale", lambda scale: -2 - scale)
    save(tmp_path / "wrong", wrong, tokenizer, format="hugging_face")
    status = cli.main(["verify", str(tmp_path / "wrong")])
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert status == 1
    assert err.splitlines()[-1] == "recurrentgemma: verify: failed: text."
    assert found["passed"] is False
    assert found["layout"] == "hugging_face"
    assert found["checks"]["text"]["status"] == "failed"
    right = certificate["checks"]
    assert found["checks"]["architecture"]["preset"] == "nano"
    assert found["checks"]["weights"]["sha256"] != right["weights"]["sha256"]
    assert found["checks"]["generation"] != right["generation"]


def test_every_layout_has_the_same_digest(saved):
    found = [
        checks.check_weights(saved(layout=layout).stored.tensors) for layout in FORMATS
    ]
    assert all(check == found[0] for check in found)
    assert found[0].status == "passed"


def test_one_bit_and_one_infinity_show(saved):
    right = checks.check_weights(saved().stored.tensors)

    def next_float(values):
        values = values.copy()
        values[0] = np.nextafter(values[0], np.float32(9))
        return values

    other = saved(name="final_norm.scale", change=next_float)
    other = checks.check_weights(other.stored.tensors)
    assert other.status == "passed"
    assert other.figures["sha256"] != right.figures["sha256"]
    infinite = saved(name="final_norm.scale", change=lambda x: np.inf * x)
    check = checks.check_weights(infinite.stored.tensors)
    assert (check.status, check.message) == ("failed", "not finite: final_norm.scale")


def test_the_preset_is_named_and_contradictions_too(saved, monkeypatch):
    checkpoint = saved(layout="hugging_face")
    check = checks.check_architecture(checkpoint)
    assert (check.status, check.figures["preset"]) == ("passed", None)
    assert check.figures["stored_dtypes"] == {"float32": check.figures["tensors"]}
    other = dataclasses.replace(checkpoint.config, attention_window=5)
    monkeypatch.setitem(PRESETS, "tiny", other)
    check = checks.check_architecture(checkpoint)
    assert (check.status, check.figures["preset"]) == ("failed", "tiny")
    assert check.message.endswith("but attention_window is 6, not 5")
    # The same layers and the same scale, written otherwise.
    same = dataclasses.replace(
        checkpoint.config,
        block_pattern=checkpoint.config.block_types,
        query_scale=checkpoint.config.attention_scale,
    )
    monkeypatch.setitem(PRESETS, "small", same)
    check = checks.check_architecture(checkpoint)
    assert (check.status, check.figures["preset"]) == ("passed", "small")


def test_a_model_that_forgets_its_cache_fails(monkeypatch):
    tokens = random_tokens((600,)).tolist()
    subject = reader.Reader(model(**TWO_LAYERS), capacity=600)
    check = checks.check_splits(subject, tokens, 1e-4)
    assert (check.status, check.figures["tokens"]) == ("passed", 600)
    read = reader._read
    monkeypatch.setattr(reader, "_read", lambda m, t, p, c: (read(m, t, p, c)[0], c))
    assert checks.check_splits(subject, tokens, 1e-4).status == "failed"


def test_log_probabilities_are_those_of_the_plain_forward():
    tokens = random_tokens((300,))
    subject = reader.Reader(model(**TWO_LAYERS), 300)
    log_probs, below_best = subject.log_probs(tokens.tolist())
    logits, _ = forward(subject.model, tokens[None, :-1])
    expected = jax.nn.log_softmax(logits[0])
    chosen = jnp.take_along_axis(expected, tokens[1:, None], axis=-1)[:, 0]
    assert_close(log_probs, chosen, "logits")
    assert_close(below_best, expected.max(-1) - chosen, "logits")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"block_pattern": ("local_attention", "global_attention"), "post_norms": True},
    ],
    ids=["griffin", "gemma2"],
)
def test_the_layers_lead_to_the_model_s_own_logits(fields):
    tokens = random_tokens((1, 9))
    states = layer_states.layer_states(model(**fields), tokens[0].tolist())
    layers = [f"layer {i}" for i in range(3)]
    assert list(states) == ["embedding", *layers, "final norm", "logits"]
    logits, _ = forward(model(**fields), tokens)
    assert_close(states["logits"], logits[0], "logits")


@pytest.fixture
def fake_python(tmp_path):
    """An interpreter of which the scripts find the given states, or fail."""

    def make(states=None):
        prepared = tmp_path / "prepared.npz"
        fake = tmp_path / "python"
        lines = [f"#!{sys.executable}", "import json, shutil, sys"]
        if states is None:
            lines += ["print('no module named torch')", "sys.exit(3)"]
        else:
            np.savez(prepared, versions=json.dumps({"other": "1.0"}), **states)
            lines += [
                "assert sys.argv[1] == '-P' and sys.argv[2].endswith('.py')",
                "output = json.load(open(sys.argv[3]))['output']",
                f"shutil.copy({str(prepared)!r}, output)",
            ]
        fake.write_text("\n".join(lines))
        fake.chmod(0o755)
        return str(fake)

    return make


def our_states(checkpoint, tokens):
    loaded, _ = load(checkpoint.path)
    return layer_states.layer_states(loaded, tokens)


def test_another_package_that_disagrees_makes_it_fail(saved, fake_python):
    tokens = random_tokens((6,)).tolist()
    theirs = our_states(saved(), tokens)
    python = fake_python(theirs)

    def check(checkpoint):
        ours = our_states(checkpoint, tokens)
        return verify._check_reference(
            "official", python, True, checkpoint, tokens, ours, "float32"
        )

    right = check(saved())
    assert (right.status, right.figures["versions"]) == ("passed", {"other": "1.0"})
    assert right.message.startswith("6 states agree")
    wrong = check(
        saved(name="blocks.1.channel_pre_norm.scale", change=lambda x: 1.02 * x)
    )
    assert wrong.status == "failed"
    assert wrong.message.startswith("4 of 6 states differ, first layer 1: relative RMS")


@pytest.mark.parametrize(("asked", "status"), [(True, "failed"), (False, "skipped")])
def test_another_package_that_crashes(asked, status, saved, fake_python):
    found = verify._check_reference(
        "official", fake_python(), asked, saved(), [2, 3], {}, "float32"
    )
    assert found.status == status
    assert found.message == (
        "official failed with 3; the last that it wrote: no module named torch"
    )


def test_what_another_package_does_not_have_is_skipped(saved, fake_python):
    check = verify._check_reference(
        "transformers", fake_python(), True, saved(post_norms=True), [2], {}, "float32"
    )
    assert check.status == "skipped"
    assert "transformers has no such model" in check.message
    assert "post_norms" in check.message


def test_numbers_that_are_not_finite_are_valid_json():
    value = {"a": [float("nan"), 1.5], "b": (float("inf"), "x", None, True, 2)}
    plain = verify._plain(value)
    assert plain == {"a": ["nan", 1.5], "b": ["inf", "x", None, True, 2]}
    json.dumps(plain, allow_nan=False)


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["a", "b"], 2, "expected one checkpoint, got 2"),
        (["--dtype=int8"], 2, "int8"),
        (["nanoo"], 1, "Did you mean nano"),
        (["--output=."], 1, "is a directory; expected a file"),
        (["--official-python=gone"], 1, "gone is not a Python interpreter"),
        (["--config=nanoo"], 1, "Unknown preset"),
        (["saved"], 1, "has no tokenizer, which the prompts need"),
        (["saved", "--config=nano"], 1, "do not fit its config"),
    ],
)
def test_a_mistake_is_one_line(argv, status, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save("saved", model(), None)
    assert cli.main(["verify", *argv]) == status
    out, err = capsys.readouterr()
    assert (out, message in err.splitlines()[-1]) == ("", True), err


def available(name):
    modules = layer_states.REFERENCES[name].modules
    here = modules and all(map(importlib.util.find_spec, modules))
    return bool(here or PYTHONS[name])


@pytest.mark.parametrize("name", layer_states.REFERENCES)
def test_the_packages_themselves(name, tmp_path):
    if not available(name):
        pytest.skip(f"{name} is not installed; {name.upper()}_PYTHON may name a Python")
    # Ours is read from the tensors of one layer scaled: the reference sees the file.
    save(tmp_path / "saved", model(num_layers=4), None, format="native")
    checkpoint = open_checkpoint(tmp_path / "saved")
    tokens = random_tokens((6,)).tolist()
    ours = our_states(checkpoint, tokens)
    python = layer_states.find_python(name, PYTHONS[name])
    arguments = (name, python, True, checkpoint, tokens)
    right = verify._check_reference(*arguments, ours, "float32")
    assert right.status == "passed", right
    wrong = changed(model(num_layers=4), "blocks.2.mixer.proj_k.kernel", np.flip)
    save(tmp_path / "wrong", wrong, None)
    ours = our_states(open_checkpoint(tmp_path / "wrong"), tokens)
    check = verify._check_reference(*arguments, ours, "float32")
    assert check.message.startswith("4 of 7 states differ, first layer 2"), check


@pytest.mark.slow
def test_bfloat16_and_again_the_same(certificate):
    again = verify.verify("nano")
    assert again["checks"]["generation"] == certificate["checks"]["generation"]
    assert again["checks"]["text"] == certificate["checks"]["text"]
    assert verify.verify("nano", dtype="bfloat16")["passed"]
