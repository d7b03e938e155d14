"""`recurrentgemma info`: what a model is and costs."""

from collections.abc import Mapping
from typing import Any

from absl import flags

from recurrentgemma import cost
from recurrentgemma.cache import grows
from recurrentgemma.commands import UsageError
from recurrentgemma.commands._shared import find_config
from recurrentgemma.config import PRESETS, GriffinConfig

USAGE = "[MODEL] [FLAGS]"
DETAILS = (
    "Shows what a model is and costs: a preset, of which no weights are needed "
    f"({', '.join(PRESETS)}), or a checkpoint's directory."
)

DTYPES = ("bfloat16", "float32")


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "model", "nano", "a preset or a checkpoint's directory", flag_values=values
    )
    flags.DEFINE_integer(
        "context",
        8192,
        "tokens for which compute and the cache of global attention are given",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "batch-size", 1, "texts in the cache", lower_bound=1, flag_values=values
    )


def run(values: dict[str, Any], arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise UsageError(f"expected one model, got {len(arguments)}")
    name = arguments[0] if arguments else values["model"]
    config = find_config(name)
    context, batch_size = values["context"], values["batch-size"]
    fields = {
        key: " ".join(value) if isinstance(value, list) else value
        for key, value in config.to_dict().items()
    }
    parameters = {
        part: f"{count:,}" for part, count in cost.parameter_counts(config).items()
    }
    forward = cost.forward_flops_per_token(config, context)
    train = cost.train_flops_per_token(config, context)
    sections = [
        name,
        _section("config", fields),
        _section(f"parameters             {cost.num_parameters(config):,}", parameters),
        _memory(config, batch_size, context),
        _section(
            f"compute for a token, mean over {context:,}",
            {"forward": f"{forward:,.0f} FLOPs", "train": f"{train:,.0f} FLOPs"},
        ),
    ]
    print("\n\n".join(sections))


def _section(title: str, rows: Mapping[str, object]) -> str:
    return "\n".join([title, *(f"  {name:20} {rows[name]}" for name in rows)])


def _memory(config: GriffinConfig, batch_size: int, context: int) -> str:
    parameters = [cost.parameter_bytes(config, dtype) for dtype in DTYPES]
    cache = [
        cost.cache_bytes(config, batch_size, dtype=dtype, capacity=context)
        for dtype in DTYPES
    ]
    rows = {"parameters": parameters, "cache": cache}
    rows["both"] = [sum(pair) for pair in zip(parameters, cache, strict=True)]
    return "\n".join(
        [
            "memory".ljust(20) + "".join(dtype.rjust(14) for dtype in DTYPES),
            *(
                f"  {title:18}" + "".join(_megabytes(size).rjust(14) for size in sizes)
                for title, sizes in rows.items()
            ),
            *(f"  {line}" for line in _about_cache(config, batch_size, context)),
        ]
    )


def _about_cache(config: GriffinConfig, batch_size: int, context: int) -> list[str]:
    texts = "one text" if batch_size == 1 else f"{batch_size} texts"

    def one_text(tokens):
        sizes = (cost.cache_bytes(config, dtype=d, capacity=tokens) for d in DTYPES)
        return list(sizes)

    if not grows(config):
        both = " or ".join(_megabytes(size) for size in one_text(1))
        return [
            f"The cache is for {texts}, however long.",
            f"A prefix is the cache of one text, however long: {both}.",
        ]
    growth = zip(one_text(1), one_text(2), strict=True)
    both = " or ".join(f"{after - before:,}" for before, after in growth)
    return [
        f"The cache grows with the text; here it is for {texts} of {context:,}.",
        f"A prefix grows with its text, by {both} bytes a token.",
    ]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
