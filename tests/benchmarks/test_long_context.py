"""Cost against length: the sizes are the model's, and nothing compiles while timed."""

import types

import pytest

from recurrentgemma import Runtime, cost
from recurrentgemma.benchmarks import long_context
from recurrentgemma.checkpoints import named_parameters
from recurrentgemma.generation import programs
from tests.models import tiny_config

LENGTHS = [1024, 2048]
ROUNDS = 2
CONFIGS = {
    "griffin": tiny_config(
        block_pattern=("recurrent", "local_attention"), num_layers=2
    ),
    "transformer": tiny_config(block_pattern=("global_attention",), num_layers=1),
}


def compiled_programs() -> int:
    both = programs.read_chunk.jitted(1), programs.decode_block.jitted(1)
    return sum(one._cache_size() for one in both)


@pytest.mark.parametrize("name", CONFIGS)
def test_curve(name, monkeypatch):
    config, compiled = CONFIGS[name], []
    model = long_context.random_model(config)

    # What a chunk, a long text and a single token take, the least of the rounds.
    taken = [d for d in (2.0, 0.75, 0.25) for d in (d + 1, d)] * len(LENGTHS)
    times = iter([moment for seconds in taken for moment in (5.0, 5.0 + seconds)])

    def clock():
        compiled.append(compiled_programs())
        return next(times)

    monkeypatch.setattr(long_context, "time", types.SimpleNamespace(perf_counter=clock))
    points = long_context.curve(model, LENGTHS, rounds=ROUNDS)
    assert [point.tokens for point in points] == LENGTHS
    for point in points:
        written = long_context.WRITTEN_TOKENS
        chunk = min(long_context.CHUNK_TOKENS, point.tokens - written)
        assert point.prefill_tokens_per_s == chunk / 2.0
        assert point.decode_tokens_per_s == (written - 1) / 0.5
        expected = cost.cache_bytes(config, dtype="float32", capacity=point.tokens)
        assert point.cache_bytes == expected
    grows = points[1].cache_bytes > points[0].cache_bytes
    assert grows == ("global_attention" in config.block_pattern)
    # Programs before and after each timed run: nothing compiles in between.
    runs = list(zip(compiled[::2], compiled[1::2], strict=True))
    assert len(runs) == len(LENGTHS) * 3 * ROUNDS
    assert all(before == after for before, after in runs)
    assert compiled[-1] > 0


@pytest.mark.parametrize("lengths", [[], [1000], [1024, 2000], [2048, 1024]])
def test_other_lengths(lengths):
    model = long_context.random_model(CONFIGS["griffin"])
    with pytest.raises(ValueError, match="^lengths: expected at least one, each"):
        long_context.curve(model, lengths)


def test_random_model_has_the_dtypes_of_inference():
    runtime = Runtime(compute_dtype="bfloat16")
    model = long_context.random_model(CONFIGS["griffin"], runtime)
    dtypes = {name: leaf.dtype for name, leaf in named_parameters(model).items()}
    assert dtypes["embedder.embedding"] == "bfloat16"
    assert dtypes["final_norm.scale"] == "float32"
    assert sum(leaf.nbytes for leaf in named_parameters(model).values()) == (
        cost.parameter_bytes(model.config, "bfloat16")
    )


def test_card():
    model = long_context.random_model(CONFIGS["transformer"])
    small, large = (long_context.card(model, tokens) for tokens in (1024, 2048))
    assert small["parameters"] == f"{cost.num_parameters(model.config):,}"
    sizes = cost.cache_bytes(model.config, dtype="float32", capacity=2048)
    assert large["cache bytes at 2,048 tokens"] == f"{sizes:,}"
    assert small["dtype"] == "float32" and small["device"].startswith("cpu: ")
    read = "bytes that a decode step must read"
    assert small[read] != large[read]
