"""The walk: every argument of every public function, with values that mean nothing.

Each is refused before any work, by an error that names the argument, or the table here
says that the value is legal. An argument that is missing here fails the test.
"""

import functools
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import recurrentgemma
from recurrentgemma import (
    Chat,
    Griffin,
    GriffinConfig,
    Prefix,
    Runtime,
    Sampler,
    Sampling,
    Tokenizer,
    kernels,
    load,
    save,
)
from recurrentgemma import cache as cache_lib
from recurrentgemma.cache import Cache
from recurrentgemma.chunk import check_positions
from recurrentgemma.generation import batch_jobs
from recurrentgemma.generation import prefix as prefix_lib
from recurrentgemma.generation.batch_jobs import BatchJob
from recurrentgemma.generation.history import History
from recurrentgemma.generation.model_digest import model_digest
from recurrentgemma.kernels import (
    Gate,
    KVCache,
    StepParameters,
    complex_rg_lru,
)
from tests.models import random_model, tiny_config

VALUES = {
    "None": None,
    "True": True,
    "False": False,
    "-1": -1,
    "0": 0,
    "1": 1,
    "large": 10**30,
    "huge": 10**400,
    "0.5": 0.5,
    "-0.5": -0.5,
    "1e300": 1e300,
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": float("-inf"),
    "text": "bogus",
    "empty text": "",
    "bytes": b"bogus",
    "empty list": [],
    "[None]": [None],
    "[nan]": [float("nan")],
    "[True]": [True],
    "[-1]": [-1],
    "[large]": [10**30],
    "[0.5]": [0.5],
    "[text]": ["bogus"],
    "[empty text]": [""],
    "ragged list": [[1], [1, 2]],
    "dict": {},
    "object": object(),
    "class": int,
    "NaN array": np.full(3, np.nan, np.float32),
    "0-d array": np.zeros(()),
    "empty array": np.zeros((0,), np.int32),
    "bool array": np.array([True]),
    "object array": np.array([object()]),
}
NUMBERS = {"-1", "0", "1", "0.5", "-0.5", "large"}
"""Finite numbers."""
IDS = {"empty list", "empty array"}
"""No tokens at all."""
STRINGS = {"empty list", "empty array", "dict", "[text]"}
"""Any iterable of strings."""
PATHS = {"text"}
"""A path; whether a file is there is another matter."""


def _alike(names, legal):
    return dict.fromkeys(names.split(), frozenset(legal))


# By the name of a function and of an argument, the values that are legal.
LEGAL = {
    "Griffin": {},
    "Griffin.__call__": {"positions": {"None"}, "cache": {"None"}},
    "Griffin.logits": {},
    "Griffin.init_cache": {"batch_size": {"1"}, "capacity": {"None", "1"}},
    "GriffinConfig": {
        **_alike(
            "vocab_size width num_layers num_heads num_kv_heads head_dim "
            "attention_window lru_width num_gate_blocks conv_width",
            {"1"},
        ),
        "mlp_width": {"0", "1"},
        **_alike(
            "attention_bias complex_rg_lru mlp_bias post_norms", {"True", "False"}
        ),
        **_alike(
            "query_scale attention_soft_cap logits_soft_cap",
            {"None", "1", "0.5", "large"},
        ),
        "rope_fraction": {"1", "0.5"},
        "embedding_scale": NUMBERS,
    },
    "GriffinConfig.from_dict": {},
    "Runtime": {
        **_alike(
            "compute_dtype linear_scan rg_lru recurrent_step local_attention", {"None"}
        ),
        "remat": {"True", "False"},
    },
    "Sampling": {
        "temperature": {"0", "1", "0.5", "large"},
        "top_k": {"None", "1"},
        "top_p": {"None", "1", "0.5"},
        "min_p": {"None", "0", "1", "0.5"},
        "repetition_penalty": {"None", "1", "0.5", "large"},
    },
    "Sampler": {
        "tokenizer": {"None"},
        "draft": {"None"},
        "num_draft_tokens": {"1"},
        "compile_ahead": {"True", "False"},
    },
    "Sampler.__call__": {
        "prompts": {"[text]", "[empty text]", "ragged list"},
        "max_new_tokens": {"1"},
        "seed": {"0", "1"},
        "num_samples": {"1"},
        "prefix": {"None"},
        "stop": STRINGS,
        "end_tokens": {"None", *IDS},
        "return_logits": {"True", "False"},
        "batch_size": {"None", "1"},
        "progress": {"None", "class"},
    },
    "Sampler.stream": {
        "prompt": {"text", "empty text", "bytes"},
        "max_new_tokens": {"1"},
        "seed": {"0", "1"},
        "prefix": {"None"},
        "stop": STRINGS,
        "end_tokens": {"None", *IDS},
        "progress": {"None", "class"},
    },
    "Sampler.iterate": {
        "prompts": {*STRINGS, "[empty text]", "ragged list"},
        "batch_size": {"1"},
        "max_new_tokens": {"1"},
        "seed": {"0", "1"},
        "stop": STRINGS,
        "end_tokens": {"None", *IDS},
    },
    "Sampler.prefill": {
        "text": {"text", "empty text", "bytes"},
        "prefix": {"None"},
        "progress": {"None", "class"},
    },
    "Sampler.score": {"text": {"text", "empty text", "bytes"}, "prefix": {"None"}},
    "Sampler.score_stream": {
        "text": {"text", "empty text", "bytes", "dict", *IDS},
        "prefix": {"None"},
    },
    "Sampler.score_many": {
        "texts": {*STRINGS, "[empty text]", "ragged list"},
        "batch_size": {"1"},
        "prefix": {"None"},
        "progress": {"None", "class"},
    },
    "Chat": {
        "system": {"text", "empty text"},
        "max_new_tokens": {"1"},
        "seed": {"0", "1"},
    },
    "Chat.send": {"text": {"text"}},
    "Chat.stream": {"text": {"text"}},
    "Chat.save": {"path": PATHS},
    "Chat.load": {"path": PATHS},
    "Prefix": {"model_digest": {"text"}},
    "Prefix.from_cache": {
        "last_token": {"0", "1", "0-d array"},
        "num_tokens": {"None", "1"},
        "seen": {"None"},
    },
    "Prefix.take": {},
    "Prefix.repeat": {"count": {"1"}},
    "Prefix.check_model": {"model_digest": {"text"}},
    "Prefix.save": {"path": PATHS},
    "Prefix.load": {"path": PATHS},
    "Tokenizer": {"model": {"bytes", *PATHS}},
    "Tokenizer.special_id": {"piece": {"text"}},
    "Tokenizer.encode": {
        "text": {"text", "empty text", "bytes"},
        "add_bos": {"True", "False"},
    },
    "Tokenizer.decode": {"ids": {"dict", "[large]", *IDS}},
    "Tokenizer.format_turn": {
        "text": {"text", "empty text", "bytes"},
        "add_bos": {"True", "False"},
    },
    "Tokenizer.known_ids": {"ids": {"dict", "[large]", *IDS}},
    "Tokenizer.piece": {"token": {"0", "1"}},
    "Tokenizer.byte_of": {"token": {"0", "1"}},
    "load": {
        "path_or_preset": PATHS,
        "config": {"None"},
        "tokenizer": {"None", "bytes", *PATHS},
        "runtime": {"None"},
        "param_dtype": {"None"},
        "quantize": {"None"},
        "sharding": {"None", "class"},
    },
    "save": {"path": PATHS, "tokenizer": {"None"}},
    "batch_jobs.BatchJob": {
        "source": PATHS,
        "target": PATHS,
        "max_new_tokens": {"1"},
        "seed": {"0", "1"},
        "stop": STRINGS,
    },
    "batch_jobs.BatchJob.run": {"batch_size": {"1"}, "progress": {"None", "class"}},
    "cache.take": {},
    "cache.repeat": {"count": {"1"}},
    "cache.concatenate": {},
    "cache.grow": {"capacity": {"1"}},
    "cache.make_rewindable": {"count": {"0", "1"}},
    "cache.rewind": {},
    "chunk.check_positions": {"next_position": {"None"}},
    "prefix.concatenate": {},
    "kernels.linear_scan": {
        "h0": {"None"},
        "reverse": {"True", "False"},
        "implementation": {"None"},
    },
    "kernels.rg_lru": {
        "h0": {"None"},
        "implementation": {"None"},
        "linear_scan": {"None"},
    },
    "kernels.recurrent_step": {"implementation": {"None"}},
    "kernels.local_attention": {
        "cache": {"None"},
        "window": {"None", "1"},
        "scale": NUMBERS,
        "soft_cap": {"None", "1", "0.5", "large"},
        "implementation": {"None"},
    },
    "kernels.Gate": {},
    "kernels.KVCache": {},
    "kernels.StepParameters": {},
    "complex_rg_lru.complex_rg_lru": {"h0": {"None"}, "implementation": {"None"}},
    "complex_rg_lru.complex_linear_scan": {
        "h0": {"None"},
        "reverse": {"True", "False"},
        "implementation": {"None"},
    },
}
GOLDEN = Path(__file__).parent / "golden" / "sampler"


def _all_of(function):
    """A function that takes what another one yields; each item is checked then."""

    @functools.wraps(function)
    def run(**arguments):
        return list(function(**arguments))

    return run


def _made_into(kind, function):
    """A function of a tuple's fields, which are checked where the tuple is used."""

    @functools.wraps(kind)
    def run(**fields):
        function(kind(**fields))

    return run


def _signature(function):
    made = function.__init__ if inspect.isclass(function) else function
    names = list(inspect.signature(made).parameters)
    return names[1:] if inspect.isclass(function) else names


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Every public function, and arguments that it takes."""
    folder = tmp_path_factory.mktemp("walk")
    tokenizer = Tokenizer(GOLDEN / "tokenizer.model")
    config = tiny_config(vocab_size=tokenizer.vocab_size)
    model = random_model(config)
    sampler = Sampler(model, tokenizer, compile_ahead=False)
    cache = Cache(
        tuple(
            model.blocks[i].mixer.init_state(2, None) for i in range(config.num_layers)
        ),
        np.zeros(2, np.int32),
    )
    seen = np.zeros((2, config.vocab_size), bool)
    history = History(np.ones(2, np.int32), np.ones(2, np.int32), seen)
    digest = model_digest(model)
    prefix = Prefix(cache, history, digest)
    tokens = np.zeros((2, 3), np.int32)
    x = np.zeros((2, 3, 4), np.float32)
    gate = Gate(np.zeros((2, 2, 2), np.float32), np.zeros((2, 2), np.float32))
    step = StepParameters(x[0], x[0, 0], gate, gate, x[0, 0])
    q, k = np.zeros((2, 3, 2, 4), np.float32), np.zeros((2, 3, 1, 4), np.float32)
    attention = {"q": q, "k": k, "v": k, "positions": tokens, "cache": None}
    attention |= {"window": 4, "scale": 1.0, "soft_cap": None}
    text = {"max_new_tokens": 1, "sampling": Sampling(), "seed": 0, "stop": ()}
    text |= {"end_tokens": None}
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    job = BatchJob(prompts, folder / "texts", max_new_tokens=1)
    chat = Chat(sampler)
    chat._now = prefix.take([0]), 1

    def in_rg_lru(gate):
        kernels.rg_lru(x, gate, gate, x[0, 0], tokens)

    def in_attention(cache):
        options = {"positions": tokens, "window": 3, "scale": 1.0, "soft_cap": None}
        kernels.local_attention(q, k, k, cache=cache, **options)

    def in_step(parameters):
        kernels.recurrent_step(x[:, 0], parameters, tokens[:, 0], x[:, 0], x[:, :2])

    return {
        "Griffin": (Griffin, {"config": config, "rngs": nnx.Rngs(0)}),
        "Griffin.__call__": (model.__call__, {"tokens": tokens}),
        "Griffin.logits": (model.logits, {"hidden": np.zeros((2, 3, config.width))}),
        "Griffin.init_cache": (model.init_cache, {"batch_size": 1}),
        "GriffinConfig": (GriffinConfig, config.to_dict()),
        "GriffinConfig.from_dict": (
            GriffinConfig.from_dict,
            {"fields": config.to_dict()},
        ),
        "Runtime": (Runtime, {}),
        "Sampling": (Sampling, {}),
        "Sampler": (Sampler, {"model": model}),
        "Sampler.__call__": (sampler.__call__, {"prompts": ["a"], **text}),
        "Sampler.stream": (sampler.stream, {"prompt": "a", **text}),
        "Sampler.iterate": (
            _all_of(sampler.iterate),
            {"prompts": ["a"], "batch_size": 1, **text},
        ),
        "Sampler.prefill": (sampler.prefill, {"text": "a"}),
        "Sampler.score": (sampler.score, {"text": "a"}),
        "Sampler.score_stream": (_all_of(sampler.score_stream), {"text": "a"}),
        "Sampler.score_many": (sampler.score_many, {"texts": ["a"]}),
        "Chat": (Chat, {"sampler": sampler}),
        "Chat.send": (chat.send, {"text": "a"}),
        "Chat.stream": (chat.stream, {"text": "a"}),
        "Chat.save": (chat.save, {"path": folder / "chat"}),
        "Chat.load": (chat.load, {"path": folder / "chat"}),
        "Prefix": (
            Prefix,
            {"cache": cache, "history": history, "model_digest": digest},
        ),
        "Prefix.from_cache": (
            Prefix.from_cache,
            {"model": model, "cache": model.init_cache(1), "last_token": 1},
        ),
        "Prefix.take": (prefix.take, {"rows": [0]}),
        "Prefix.repeat": (prefix.repeat, {"count": 1}),
        "Prefix.check_model": (
            prefix.check_model,
            {"model_digest": prefix.model_digest},
        ),
        "Prefix.save": (prefix.save, {"path": folder / "prefix"}),
        "Prefix.load": (Prefix.load, {"path": folder / "prefix", "model": model}),
        "Tokenizer": (Tokenizer, {"model": GOLDEN / "tokenizer.model"}),
        "Tokenizer.special_id": (tokenizer.special_id, {"piece": "<bos>"}),
        "Tokenizer.encode": (tokenizer.encode, {"text": "a"}),
        "Tokenizer.decode": (tokenizer.decode, {"ids": [1]}),
        "Tokenizer.format_turn": (tokenizer.format_turn, {"text": "a"}),
        "Tokenizer.known_ids": (tokenizer.known_ids, {"ids": [1]}),
        "Tokenizer.piece": (tokenizer.piece, {"token": 1}),
        "Tokenizer.byte_of": (tokenizer.byte_of, {"token": 1}),
        "load": (load, {"path_or_preset": "nano"}),
        "save": (
            save,
            {"path": folder / "model", "model": model, "tokenizer": tokenizer},
        ),
        "batch_jobs.BatchJob": (
            BatchJob,
            {"source": prompts, "target": folder / "texts"},
        ),
        "batch_jobs.BatchJob.run": (job.run, {"sampler": sampler}),
        "cache.take": (cache_lib.take, {"cache": cache, "rows": [0]}),
        "cache.repeat": (cache_lib.repeat, {"cache": cache, "count": 1}),
        "cache.concatenate": (cache_lib.concatenate, {"caches": [cache]}),
        "cache.grow": (
            cache_lib.grow,
            {"cache": cache, "config": config, "capacity": 8},
        ),
        "cache.make_rewindable": (
            cache_lib.make_rewindable,
            {"cache": cache, "config": config, "count": 0},
        ),
        "cache.rewind": (
            cache_lib.rewind,
            {"cache": cache, "config": config, "counts": np.zeros(2, np.int32)},
        ),
        "chunk.check_positions": (check_positions, {"positions": tokens}),
        "prefix.concatenate": (prefix_lib.concatenate, {"prefixes": [prefix]}),
        "kernels.linear_scan": (kernels.linear_scan, {"x": x, "a": x}),
        "kernels.rg_lru": (
            kernels.rg_lru,
            {
                "x": x,
                "recurrence_gate": x,
                "input_gate": x,
                "a_param": x[0, 0],
                "positions": tokens,
            },
        ),
        "kernels.recurrent_step": (
            kernels.recurrent_step,
            {
                "x": x[:, 0],
                "parameters": step,
                "positions": tokens[:, 0],
                "h": x[:, 0],
                "conv_state": x[:, :2],
            },
        ),
        "kernels.local_attention": (
            kernels.local_attention,
            attention,
        ),
        "complex_rg_lru.complex_rg_lru": (
            complex_rg_lru.complex_rg_lru,
            {
                "x": x,
                "recurrence_logits": x[..., :2],
                "input_logits": x[..., :2],
                "a_param": x[0, 0, :2],
                "a_imag_param": x[0, 0, :2],
                "positions": tokens,
            },
        ),
        "complex_rg_lru.complex_linear_scan": (
            complex_rg_lru.complex_linear_scan,
            {"x": x, "a": x},
        ),
        "kernels.Gate": (_made_into(Gate, in_rg_lru), gate._asdict()),
        "kernels.KVCache": (
            _made_into(KVCache, in_attention),
            KVCache(k, k, tokens)._asdict(),
        ),
        "kernels.StepParameters": (
            _made_into(StepParameters, in_step),
            step._asdict(),
        ),
    }


def _public():
    """Names of all public functions, classes and methods that take arguments."""
    names = set()
    spaces = {"": (recurrentgemma, recurrentgemma.__all__)}
    spaces["kernels."] = (kernels, kernels.__all__)
    spaces["batch_jobs."] = (batch_jobs, ["BatchJob"])
    own = [
        one
        for one, value in vars(complex_rg_lru).items()
        if one[0] != "_" and getattr(value, "__module__", "") == complex_rg_lru.__name__
    ]
    spaces["complex_rg_lru."] = (complex_rg_lru, own)
    for space, (module, public) in spaces.items():
        for name in public:
            value = getattr(module, name)
            if not callable(value):
                continue
            names.add(space + name)
            if inspect.isclass(value) and not issubclass(value, tuple):
                names |= {
                    f"{space}{name}.{method}"
                    for method, found in vars(value).items()
                    if (method == "__call__" or method[0] != "_")
                    and inspect.isroutine(getattr(value, method))
                    and _arguments(getattr(value, method), found)
                }
    names |= {
        f"cache.{name}"
        for name in ("take", "repeat", "concatenate", "grow", "make_rewindable")
    }
    return names | {"cache.rewind", "chunk.check_positions", "prefix.concatenate"}


def _arguments(function, found):
    bound = isinstance(found, classmethod | staticmethod)
    names = list(inspect.signature(function).parameters)
    return names if bound else names[1:]


def test_the_walk_is_complete(good):
    assert set(good) == set(LEGAL) == _public()
    for name, (function, _) in good.items():
        assert set(LEGAL[name]) <= set(_signature(function)), name


def test_every_argument_is_checked_and_named(good, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    walked, named, problems = 0, 0, []
    for name, (function, arguments) in good.items():
        for argument in _signature(function):
            legal = LEGAL[name].get(argument, set())
            for label in sorted(VALUES.keys() - legal):
                walked += 1
                problem = _problem(
                    function, {**arguments, argument: VALUES[label]}, argument
                )
                if problem is None:
                    named += 1
                else:
                    problems.append(f"{name}({argument}={label}): {problem}")
    print(f"{walked} pairs of an argument and a value, {named} named the argument")
    assert not problems, "\n".join([f"{len(problems)} of {walked}:", *problems])
    assert not list(tmp_path.iterdir()), "something was written"


def _problem(function, arguments, name) -> str | None:
    """What is wrong with the refusal of these arguments; None if nothing is."""
    kinds = (ValueError, TypeError)
    if name in ("implementation", "linear_scan"):
        kinds = (*kinds, NotImplementedError)
    try:
        function(**arguments)
    except kinds as error:
        # The argument, or a part of it.
        if re.match(rf"(\w+\.)?{name}[\w.\[\], ]*: expected .*, got ", str(error)):
            return None
        return f"{type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 whatever it is, it is listed
        return f"{type(error).__name__}: {error}"
    return "accepted"
