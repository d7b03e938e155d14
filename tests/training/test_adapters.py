"""Training of adapters: they learn, the rest stays, and a run leaves both forms."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recurrentgemma import load, save
from recurrentgemma.adapters import (
    TRAINED,
    add_adapters,
    load_adapters,
    merge_adapters,
)
from recurrentgemma.adapters import remove_adapters as base_of
from recurrentgemma.benchmarks import instructions
from recurrentgemma.benchmarks.adapters import ROW_TOKENS, fine_tune, loss_of
from recurrentgemma.checkpoints import named_parameters
from recurrentgemma.config import Runtime
from recurrentgemma.griffin import stack_layers
from recurrentgemma.tokenizer import Tokenizer
from recurrentgemma.training import TrainConfig, train
from recurrentgemma.training.adapters import ADAPTERS_FILE, AdapterConfig
from recurrentgemma.training.data import Batch, DataConfig
from tests.checkpoints.test_round_trips import TOKENIZER
from tests.models import random_model, random_tokens, tiny_config


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TOKENIZER)


def batch_of(tokens):
    length = tokens.shape[1] - 1
    positions = jnp.broadcast_to(jnp.arange(length), (len(tokens), length))
    mask = jnp.ones((len(tokens), length))
    return Batch(tokens[:, :-1], positions.astype(jnp.int32), tokens[:, 1:], mask)


def test_a_run_with_adapters(tmp_path):
    """Stacked, with remat: the adapters learn, and the run ends with both forms."""
    config = tiny_config(block_pattern=("recurrent",), num_layers=2)
    runtime = Runtime(remat=True)
    model = stack_layers(random_model(config, runtime=runtime))
    options = AdapterConfig(adapter_rank=3, adapter_alpha=6.0)
    adapted = options.add_to(model, seed=0)
    data = [batch_of(random_tokens((4, 13)))] * 8
    tuned = fine_tune(adapted, data, learning_rate=1e-2, trained=options.trained(()))
    assert loss_of(tuned, data[:1]) < 0.9 * loss_of(adapted, data[:1])
    chex.assert_trees_all_equal(base_of(tuned), model)
    merged = options.finish(tmp_path, tuned)
    base = random_model(config, runtime=runtime)
    again = load_adapters(tmp_path / ADAPTERS_FILE, base)
    chex.assert_trees_all_equal(stack_layers(again), tuned)
    chex.assert_trees_all_close(stack_layers(merge_adapters(again)), merged, rtol=1e-6)


def test_a_run_of_the_loop(tmp_path, monkeypatch):
    """From a checkpoint: its adapters, and the model with them merged."""
    config = tiny_config(vocab_size=4096, num_layers=1, width=16, lru_width=16)
    base = random_model(config)
    save(tmp_path / "base", base, None)
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 40)
    folder = train(
        TrainConfig(
            output=str(tmp_path / "run"),
            init_from=str(tmp_path / "base"),
            data=DataConfig(
                data=str(tmp_path / "text.txt"),
                held_out_share=0.0,
                batch_size=2,
                sequence_length=16,
            ),
            steps=3,
            adapters=AdapterConfig(adapter_rank=2),
        )
    )
    tuned = load_adapters(tmp_path / "run" / ADAPTERS_FILE, base)
    expected = named_parameters(merge_adapters(tuned))
    found = named_parameters(load(folder, param_dtype="float32")[0])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-2, atol=1e-3)
    name = "blocks.0.mlp.up.kernel.lora_b"
    assert np.abs(named_parameters(tuned)[name]).max() > 0


def test_without_adapters_nothing_changes(tmp_path):
    options, model = AdapterConfig(), random_model(tiny_config())
    assert options.add_to(model, 0) is model
    assert options.finish(tmp_path, model) is model
    assert options.trained(("*.mlp.*",)) == ("*.mlp.*",)
    assert AdapterConfig(adapter_rank=1).trained(("*.mlp.*",)) == ("*.mlp.*",)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", [{"adapter_rank": -1}, {"adapter_alpha": 0.0}])
def test_values_out_of_range(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        AdapterConfig(**field)


def test_instructions_are_deterministic_and_different():
    first = instructions.examples(300)
    assert first == instructions.examples(300)
    assert first[:50] == instructions.examples(50)
    assert first != instructions.examples(300, seed=1)
    assert len({example.prompt for example in first}) == 300
    assert {e.prompt[2:].split(":")[0] for e in first} == set(instructions.TASKS)
    answers = {
        "snake_case: readFileName": "read_file_name",
        "camelCase: read_file_name": "readFileName",
        "CONSTANT: read_file": "READ_FILE",
        "class: read_file": "ReadFile",
        "last word: read_file": "file",
        "arguments: read_file": "(read, file)",
    }
    for question, answer in answers.items():
        task, asked = question.split(": ")
        words = [w.lower() for w in ("read", "file", "name")][: 2 + ("ame" in asked)]
        ask, respond = instructions.TASKS[task]
        assert (ask(words), respond(words)) == (asked, answer)


def test_the_loss_is_of_the_response(tokenizer):
    """Its first token and the end token count, nothing of the prompt does."""
    example = instructions.Example("# say: a\n", "b\n")
    batch = instructions.encode(tokenizer, [example], 32)
    response = tokenizer.encode(example.response, add_bos=False)
    counted = batch.targets[batch.mask > 0]
    np.testing.assert_array_equal(counted, [*response, tokenizer.eos_id])
    count = len(tokenizer.encode(example.prompt)) + len(response)
    np.testing.assert_array_equal(batch.positions[0, : count + 1], np.arange(count + 1))
    assert (batch.positions[0, count + 1 :] == -1).all()
    with pytest.raises(ValueError, match="row_tokens: expected"):
        instructions.encode(tokenizer, [example], count - 1)


@pytest.mark.slow
def test_adapters_lower_the_held_out_loss_of_instructions():
    model, tokenizer = load("nano", param_dtype="float32")
    assert tokenizer is not None
    drawn = instructions.examples(64 + 40 * 8)
    data = list(
        instructions.batches(
            tokenizer, drawn[64:], steps=40, batch_size=8, row_tokens=ROW_TOKENS
        )
    )
    held_out = [instructions.encode(tokenizer, drawn[:64], ROW_TOKENS)]
    adapted = add_adapters(model, rank=8, rngs=nnx.Rngs(0))
    tuned = fine_tune(adapted, data, learning_rate=5e-3, trained=TRAINED)
    assert loss_of(tuned, held_out) < 0.75 * loss_of(model, held_out)
    assert jax.tree.structure(base_of(tuned)) == jax.tree.structure(model)
