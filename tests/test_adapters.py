"""An adapted model is one model wherever it runs, and the same one when it is merged."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from recurrentgemma import Prefix, Runtime, Sampler, Sampling, load, save
from recurrentgemma.adapters import (
    add_adapters,
    has_adapters,
    load_adapters,
    merge_adapters,
    remove_adapters,
    save_adapters,
)
from recurrentgemma.checkpoints.parameters import (
    named_parameters,
    parameter_values,
    with_values,
)
from recurrentgemma.generation.model_digest import ModelDigest, model_digest
from recurrentgemma.griffin import stack_layers, unstack_layers
from recurrentgemma.inspect import capture
from recurrentgemma.matrices import LowRank
from tests.checkpoints.checkpoints import config as config_of_any_layout
from tests.checkpoints.checkpoints import every_format
from tests.models import (
    EVERY_MATRIX,
    adapt,
    forward,
    random_model,
    random_tokens,
    tiny_config,
)
from tests.own_mixer import NAME, register
from tests.tolerances import assert_close

TOKENS = random_tokens((2, 12))
KINDS = [pytest.param(AxisType.Explicit, marks=pytest.mark.slow), AxisType.Auto]


@functools.cache
def plain():
    return random_model(tiny_config())


@functools.cache
def adapted():
    return adapt(plain())


@functools.cache
def merged():
    return merge_adapters(adapted())


@functools.cache
def logits():
    """Of the adapted model, in one call."""
    return forward(adapted(), TOKENS)[0]


def test_a_new_adapter_changes_nothing():
    new = add_adapters(plain(), EVERY_MATRIX, rank=2, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(forward(new, TOKENS)[0], forward(plain(), TOKENS)[0])
    assert has_adapters(new) and not has_adapters(plain())


def test_merged_equals_adapted():
    expected = forward(merged(), TOKENS)[0]
    assert_close(logits(), expected, "logits")
    assert np.abs(expected - forward(plain(), TOKENS)[0]).max() > 1
    assert list(named_parameters(merged())) == list(named_parameters(plain()))
    chex.assert_trees_all_equal(remove_adapters(adapted()), plain())


def test_chunks_and_decode_equal_one_call():
    """Chunks, then the fused decode step, beyond the window of the attention."""
    parts, cache = [], None
    for start, stop in [(0, 5), (5, 10), (10, 11), (11, 12)]:
        part, cache = forward(adapted(), TOKENS[:, start:stop], cache=cache)
        parts.append(part)
    assert_close(jnp.concatenate(parts, axis=1), logits(), "logits")


@pytest.mark.parametrize("is_stacked", [False, True], ids=["layers", "stacked"])
def test_gradients_of_the_adapters_alone(is_stacked):
    """They are those of W + scale A B, formed beforehand; also stacked, with remat."""
    config = tiny_config(block_pattern=("recurrent", "local_attention"), num_layers=4)
    model = random_model(config, runtime=Runtime(remat=True))
    model = adapt(stack_layers(model) if is_stacked else model)
    arrays = named_parameters(model)
    trained = {n: a for n, a in arrays.items() if n.endswith(("lora_a", "lora_b"))}
    structure = jax.tree.structure(model)

    def loss(trained, arrays, prepare):
        model = prepare(structure.unflatten((arrays | trained).values()))
        return jnp.mean(model.logits(model(TOKENS)[0]) ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=2)
    found = gradient(trained, arrays, lambda model: model)
    expected = gradient(trained, arrays, lambda m: merge_adapters(unstack_layers(m)))
    for name in trained:
        assert_close(found[name], expected[name], "gradient")
        assert np.abs(found[name]).max() > 0


def test_an_adapted_stacked_model_is_the_stacked_adapted_one():
    model = adapt(random_model(tiny_config(num_layers=6)), ["*.mlp.*", "*.rg_lru.*"])
    stacked = stack_layers(model)
    assert_close(forward(stacked, TOKENS)[0], forward(model, TOKENS)[0], "logits")
    chex.assert_trees_all_equal(unstack_layers(stacked), model)
    again = adapt(
        stack_layers(random_model(tiny_config(num_layers=6))), "groups.*.mlp*"
    )
    shape = named_parameters(again)["groups.0.mlp.up.kernel.lora_a"].shape
    assert shape == (2, again.config.width, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_sharded(kind):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(kind,) * 2)

    def place(leaf):
        columns = "tensor" if leaf.ndim > 1 and leaf.shape[-1] % 2 == 0 else None
        spec = P(*(None,) * (leaf.ndim - 1), columns)
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    model = jax.tree.map(place, adapted())
    tokens = jax.device_put(
        random_tokens((4, 12)), NamedSharding(mesh, P("data", None))
    )
    found = forward(model, tokens)[0]
    expected = forward(adapted(), random_tokens((4, 12)))[0]
    assert_close(jax.device_get(found), expected, "logits")


def test_a_mixer_of_ones_own():
    register()
    model = random_model(tiny_config(block_pattern=(NAME,), num_layers=2))
    model = adapt(model, "*.mixer.*")
    expected = forward(merge_adapters(model), TOKENS)[0]
    assert_close(forward(model, TOKENS)[0], expected, "logits")


def test_inspection():
    name = "blocks.1.mixer.recurrence"
    (*_, found), (*_, expected) = (
        capture(model, name)(TOKENS) for model in (adapted(), merged())
    )
    assert_close(found[name], expected[name], "layer")


REQUEST = {"max_new_tokens": 8, "sampling": Sampling(0), "end_tokens": []}
PROMPT = random_tokens((5,)).tolist()


def test_sampling_and_scoring():
    """The sampler's programs are of the merged model."""
    sampler = Sampler(adapted(), compile_ahead=False)
    [sample] = sampler([PROMPT], **REQUEST)
    text = jnp.array([PROMPT + sample.tokens])
    [predicted] = forward(merged(), text)[0]
    np.testing.assert_array_equal(sample.tokens, predicted[4:-1].argmax(-1))
    score = sampler.score(text[0].tolist())
    log_probs = jax.nn.log_softmax(predicted)
    expected = jnp.take_along_axis(log_probs[:-1], text[0, 1:, None], axis=1)[:, 0]
    assert_close(score.log_probs[-len(expected) :], expected, "logits")


@pytest.mark.slow
def test_speculation():
    """A base drafts for its adapted model."""
    sampler = Sampler(adapted(), compile_ahead=False)
    draft = Sampler(adapted(), draft=plain(), num_draft_tokens=3, compile_ahead=False)
    [sample], [drafted] = (s([PROMPT], **REQUEST) for s in (sampler, draft))
    assert drafted.tokens == sample.tokens


def test_a_prefix_belongs_to_the_adapted_model_alone(tmp_path):
    prefix = Sampler(adapted(), compile_ahead=False).prefill(TOKENS[0].tolist())
    prefix.save(tmp_path / "prefix")
    Prefix.load(tmp_path / "prefix", adapted())
    halved = with_values(
        adapted(),
        {
            name: dataclasses.replace(value, scale=value.scale / 2)
            for name, value in parameter_values(adapted()).items()
            if not isinstance(value, jax.Array)
        },
    )
    for other in (plain(), adapt(plain(), seed=2), halved):
        with pytest.raises(ValueError, match="other weights, such as a fine-tuned"):
            Prefix.load(tmp_path / "prefix", other)


def test_a_digest_notices_another_factor_in_place():
    model = jax.tree.map(lambda leaf: leaf, adapted())
    digest = ModelDigest(model)
    before = digest()
    value = parameter_values(model)["embedder.embedding"]
    model.embedder.embedding = nnx.Param(dataclasses.replace(value, scale=7.0))
    assert digest() != before
    assert digest() == model_digest(model)


def test_adapters_are_saved_alone_and_belong_to_their_base(tmp_path):
    path = tmp_path / "adapters.safetensors"
    save_adapters(path, adapted())
    loaded = load_adapters(path, plain())
    assert jax.tree.structure(loaded) == jax.tree.structure(adapted())
    chex.assert_trees_all_equal(loaded, adapted())
    size = sum(
        array.nbytes for n, array in named_parameters(adapted()).items() if "lora_" in n
    )
    assert size < path.stat().st_size < size + 10_000
    stacked = stack_layers(plain())
    chex.assert_trees_all_equal(load_adapters(path, stacked), stack_layers(adapted()))
    save_adapters(path, stack_layers(adapted()))
    chex.assert_trees_all_equal(load_adapters(path, plain()), adapted())
    for other, message in [
        (random_model(tiny_config(), seed=1), "belongs to another model"),
        (merged(), "belongs to another model"),
        (adapted(), "expected one without adapters"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_adapters(path, other)
    with pytest.raises(ValueError, match="expected one with adapters"):
        save_adapters(path, plain())


def test_damaged_and_foreign_files(tmp_path):
    save(tmp_path / "model", plain(), None)
    with pytest.raises(ValueError, match="is not a file of adapters"):
        load_adapters(tmp_path / "model" / "model.safetensors", plain())
    with pytest.raises(ValueError, match="Cannot read"):
        load_adapters(tmp_path / "missing", plain())
    path = tmp_path / "adapters.safetensors"
    save_adapters(path, adapted())
    content = path.read_bytes()
    for damaged in (
        content[:-1],
        content.replace(b".up.kernel.lora_a", b".xx.kernel.lora_a"),
        content.replace(b'"scales":"{', b'"scales":"!'),
    ):
        assert damaged != content
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged|is truncated"):
            load_adapters(path, plain())


@every_format
def test_the_merged_model_is_saved_in_every_layout(layout, tmp_path):
    model = adapt(random_model(config_of_any_layout()))
    with pytest.raises(ValueError, match="expected one without adapters"):
        save(tmp_path / "saved", model, None, format=layout)
    save(tmp_path / "saved", merge_adapters(model), None, format=layout)
    loaded, _ = load(tmp_path / "saved", config=model.config, param_dtype=jnp.float32)
    assert_close(forward(loaded, TOKENS)[0], forward(model, TOKENS)[0], "logits")


@pytest.mark.parametrize(
    ("patterns", "settings", "message"),
    [
        ("*.nothing", {}, r"'\*.nothing', which matches none of:\n  blocks"),
        (["*.mlp.*", "*.conv_1d.*"], {}, r"'\*.conv_1d.\*', which matches none"),
        ("*.mlp.*", {"rank": 0}, "rank: expected"),
        ("*.mlp.*", {"alpha": -1.0}, "alpha: expected a positive number"),
        ("*.mlp.*", {"rngs": 0}, "rngs: expected nnx.Rngs"),
    ],
)
def test_what_cannot_be_adapted(patterns, settings, message):
    settings = {"rank": 2, "rngs": nnx.Rngs(0), **settings}
    with pytest.raises(ValueError, match=message):
        add_adapters(plain(), patterns, **settings)


@pytest.mark.parametrize("is_stacked", [False, True])
def test_every_linear_layer_if_nothing_is_said(is_stacked):
    model = stack_layers(plain()) if is_stacked else plain()
    model = add_adapters(model, rank=2, rngs=nnx.Rngs(0))
    found = {n for n, v in parameter_values(model).items() if isinstance(v, LowRank)}
    assert {name.split(".", 2)[2] for name in found} == {
        *(f"mixer.linear_{x}.kernel" for x in ("x", "y", "out")),
        *(f"mixer.proj_{x}.kernel" for x in ("q", "k", "v", "out")),
        *(f"mlp.{x}.kernel" for x in ("gate", "up", "down")),
    }
    assert len(found) == 2 * 6 + 7


def test_layers_that_differ_are_not_stacked():
    model = adapt(random_model(tiny_config(num_layers=6)), "blocks.1.mlp.*")
    with pytest.raises(ValueError, match="expected layers 1, 4, ... to be alike"):
        stack_layers(model)


def test_no_second_adapter_on_a_matrix():
    with pytest.raises(ValueError, match="got blocks.0.mlp.down.kernel, which has one"):
        adapt(adapted(), "*.mlp.*")
