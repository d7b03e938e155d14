"""Names of Hugging Face and Kaggle, with libraries that only pretend to download."""

import sys
import types

import pytest

from recurrentgemma.checkpoints import load, read_config, save
from tests.checkpoints.checkpoints import assert_same_parameters, model

HUBS = {
    "huggingface_hub": ("snapshot_download", "hf://google/recurrentgemma-2b"),
    "kagglehub": ("model_download", "kaggle://google/recurrentgemma/flax/2b-it"),
}
every_hub = pytest.mark.parametrize("library", HUBS)


def pretend(monkeypatch, library, function):
    """Puts a module in the library's place, and forbids the other one."""
    monkeypatch.setattr(sys, "modules", {**sys.modules, **dict.fromkeys(HUBS)})
    if function is not None:
        module = types.SimpleNamespace(**{HUBS[library][0]: function})
        monkeypatch.setitem(sys.modules, library, module)


@every_hub
def test_a_name_is_downloaded(library, tmp_path, monkeypatch):
    save(tmp_path / "saved", model(), None)
    asked = []
    pretend(
        monkeypatch,
        library,
        lambda name: asked.append(name) or str(tmp_path / "saved"),
    )
    name = HUBS[library][1]
    assert_same_parameters(load(name)[0], model())
    assert read_config(name) == model().config
    assert asked == [name.split("://")[1]] * 2


def test_a_plain_name_is_of_hugging_face_unless_it_is_a_directory(
    tmp_path, monkeypatch
):
    save(tmp_path / "org" / "here", model(), None)
    save(tmp_path / "there", model(seed=1), None)
    monkeypatch.chdir(tmp_path)
    pretend(monkeypatch, "huggingface_hub", lambda name: {"org/name": "there"}[name])
    assert_same_parameters(load("org/here")[0], model())
    assert_same_parameters(load("org/name")[0], model(seed=1))
    for path in ("./org/name", "/org/name", "org/name/2b", "../name"):
        with pytest.raises(ValueError, match="There is no directory and no preset"):
            load(path)


@every_hub
def test_without_the_library_one_line_says_what_to_install(library, monkeypatch):
    pretend(monkeypatch, library, None)
    name = HUBS[library][1]
    with pytest.raises(ValueError, match=f"pip install {library}") as error:
        load(name)
    assert str(error.value).startswith(f"{name!r} is no directory here")
    assert "\n" not in str(error.value)


@every_hub
@pytest.mark.parametrize(
    "error",
    [
        OSError("403 Client Error.\nAccess to model is restricted.\n"),
        ConnectionError("offline mode is enabled"),
        RuntimeError(),
    ],
)
def test_a_refusal_is_one_line(library, error, monkeypatch):
    def refuse(name):
        raise error

    pretend(monkeypatch, library, refuse)
    with pytest.raises(ValueError, match="cannot download it: .*accept its terms") as e:
        load(HUBS[library][1])
    message = str(e.value)
    assert "\n" not in message
    assert (" ".join(str(error).split()).rstrip(".") or "RuntimeError") in message
    assert HUBS[library][1].split("://")[1] in message.split("accept its terms at")[1]
