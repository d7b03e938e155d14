"""`recurrentgemma convert`: a checkpoint in another layout."""

import math
from typing import Any

from absl import flags

from recurrentgemma.checkpoints import FORMATS, Conversion, convert
from recurrentgemma.commands import UsageError
from recurrentgemma.config import find_preset

USAGE = "SOURCE TARGET --format NAME [FLAGS]"
DETAILS = (
    "Writes the checkpoint SOURCE (a directory, a .pt file, a bundled model's name, "
    "hf://ORG/NAME or kaggle://...) as the directory TARGET, tensor by tensor, and "
    f"shows what became of each tensor. Layouts: {', '.join(FORMATS)}."
)

DTYPES = ("float32", "bfloat16", "float16")


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_enum(
        "format", None, list(FORMATS), "the layout to write", flag_values=values
    )
    flags.DEFINE_string(
        "config",
        None,
        "the preset that SOURCE is of, if it does not say so itself",
        flag_values=values,
    )
    flags.DEFINE_string(
        "tokenizer",
        None,
        "a SentencePiece model, instead of the one of SOURCE",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "dtype",
        None,
        DTYPES,
        "the dtype of all tensors, instead of their own",
        flag_values=values,
    )


def run(values: dict[str, Any], arguments: list[str]) -> None:
    if len(arguments) != 2:
        raise UsageError(f"expected SOURCE and TARGET, got {len(arguments)} arguments")
    if values["format"] is None:
        raise UsageError(f"--format is required: one of {', '.join(FORMATS)}")
    source, target = arguments
    config = values["config"]
    conversion = convert(
        source,
        target,
        format=values["format"],
        config=None if config is None else find_preset(config),
        tokenizer=values["tokenizer"],
        dtype=values["dtype"],
    )
    print(_table(conversion))
    print()
    print(_summary(conversion, source, target))


def _table(conversion: Conversion) -> str:
    formats = (conversion.source_format, conversion.target_format)
    rows = [["native", *formats, "shape", "dtype"]]
    for tensor in conversion.tensors:
        dtype = str(tensor.dtype)
        if tensor.source_dtype != tensor.dtype:
            dtype = f"{tensor.source_dtype} -> {dtype}"
        shape = str(list(tensor.shape))
        rows.append([tensor.name, tensor.source_name, tensor.target_name, shape, dtype])
    # A layout that is the native one would repeat the first column.
    kept = [0, *(i for i, name in enumerate(formats, 1) if name != "native"), 3, 4]
    widths = [max(len(row[column]) for row in rows) for column in kept]
    return "\n".join(
        "  ".join(
            row[column].ljust(width) for column, width in zip(kept, widths, strict=True)
        ).rstrip()
        for row in rows
    )


def _summary(conversion: Conversion, source: str, target: str) -> str:
    parameters = sum(math.prod(tensor.shape) for tensor in conversion.tensors)
    size = sum(
        math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in conversion.tensors
    )
    tokenizer = "and the tokenizer" if conversion.has_tokenizer else "no tokenizer"
    return (
        f"{source} ({conversion.source_format}) -> {target} "
        f"({conversion.target_format}): {len(conversion.tensors)} tensors, "
        f"{parameters:,} parameters, {size:,} bytes, {tokenizer}."
    )
