"""`recurrentgemma tune`: learns a prefix, an ordinary file that every command reads."""

import dataclasses
import itertools
from typing import Any

from absl import flags

from recurrentgemma.commands import UsageError, _shared

USAGE = "--data PATH --output PATH [FLAGS]"
DETAILS = (
    "Learns the state that a model begins a kind of text with: recurrent states, inputs "
    "of the convolutions, keys and values of the window. The model stays as it is. "
    "--prefix of sample and score and --load of chat begin with the result, which costs "
    "no time there."
)
SIZES = {
    "batch-size": (4, "rows of a step"),
    "sequence-length": (512, "tokens of a row, which is a part of one document"),
    "seed": (0, "seed of the order of rows"),
}


def define_flags(values: flags.FlagValues) -> None:
    from recurrentgemma.training.learned_prefix import LearnedPrefixConfig

    _shared.define_model(values)
    _shared.define_variant(values)
    for name, text in (
        ("data", "a directory or a file of texts (required)"),
        ("prefix", "a prefix to begin with, instead of the first tokens of the data"),
        ("output", "the file of the learned prefix (required)"),
    ):
        flags.DEFINE_string(name, None, text, flag_values=values)
    for field in dataclasses.fields(LearnedPrefixConfig):
        default: Any = field.default
        is_integer = isinstance(default, int)
        define = flags.DEFINE_integer if is_integer else flags.DEFINE_float
        name = field.name.replace("_", "-")
        define(name, default, field.metadata["help"], flag_values=values)
    for name, (default, text) in SIZES.items():
        flags.DEFINE_integer(name, default, text, lower_bound=0, flag_values=values)


def run(values: dict[str, Any], arguments: list[str]) -> None:
    if arguments:
        raise UsageError(f"unexpected argument {arguments[0]!r}")
    for name in ("data", "output"):
        if values[name] is None:
            raise UsageError(f"--{name} is required")
    _shared.check_target("--output", values["output"])
    from recurrentgemma.training import learned_prefix
    from recurrentgemma.training.corpus import read_documents, split_held_out
    from recurrentgemma.training.data import encode_document

    fields = dataclasses.fields(learned_prefix.LearnedPrefixConfig)
    config = learned_prefix.LearnedPrefixConfig(
        **{field.name: values[field.name.replace("_", "-")] for field in fields}
    )
    documents, held_out = split_held_out(read_documents(values["data"]))
    sampler, prefix = _shared.load_sampler(values)
    model, tokenizer = sampler.model, sampler.tokenizer
    if tokenizer is None:
        raise ValueError("--model: expected a checkpoint with a tokenizer, got none")
    training, evaluation = (
        [encode_document(tokenizer, document) for document in part]
        for part in (documents, held_out or documents)
    )
    if prefix is None:
        count = model.config.attention_window + 1
        ids = itertools.islice(itertools.chain.from_iterable(training), count)
        prefix = sampler.prefill(list(ids))
    size, length = values["batch-size"], values["sequence-length"]
    rows, held_out_rows = (
        learned_prefix.one_document_rows(part, length)
        for part in (training, evaluation)
    )
    batches = learned_prefix.shuffled_batches(rows, size, values["seed"])
    learned, _ = learned_prefix.learn_prefix(model, prefix, batches, config)
    with _shared.ctrl_c_raises():
        learned.save(values["output"])
    before, after = (
        learned_prefix.loss_after(model, p, held_out_rows, size)
        for p in (prefix, learned)
    )
    what = "held-out" if held_out else "training"
    print(
        f"{values['output']}: {what} loss {before:.4f} before, {after:.4f} nats a token"
    )
