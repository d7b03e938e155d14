"""`recurrentgemma verify`: a certificate of a checkpoint, without its weights."""

import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

from recurrentgemma._atomic import replace_file
from recurrentgemma.commands import UsageError
from recurrentgemma.commands._shared import check_target, define_model

USAGE = "[PATH] [FLAGS]"
DETAILS = (
    "Checks a checkpoint and prints a certificate (JSON) that holds no weights: the "
    "preset that it is, a digest of the weights, greedy continuations of fixed prompts, "
    "whether a text in pieces gives what the whole gives, bits a byte of a bundled text, "
    "and the distance to transformers and to the official package, layer by layer, where "
    "they are installed. What is done is told on standard error. The exit status is 1 if "
    "a check fails."
)

DTYPES = ("float32", "bfloat16")


def define_flags(values: flags.FlagValues) -> None:
    define_model(values)
    flags.DEFINE_string(
        "output", None, "write the certificate to this file", flag_values=values
    )
    flags.DEFINE_string(
        "config",
        None,
        "the preset that the checkpoint is of, if it does not say so itself",
        flag_values=values,
    )
    flags.DEFINE_string(
        "tokenizer",
        None,
        "a SentencePiece model, instead of the checkpoint's own",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "dtype",
        "float32",
        DTYPES,
        "what to compute in; bfloat16 takes half the memory and shows less",
        flag_values=values,
    )
    flags.DEFINE_string(
        "transformers-python",
        None,
        "the Python of an environment that has transformers",
        flag_values=values,
    )
    flags.DEFINE_string(
        "official-python",
        None,
        "the Python of an environment that has the official recurrentgemma",
        flag_values=values,
    )


def run(values: dict[str, Any], arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise UsageError(f"expected one checkpoint, got {len(arguments)}")
    if values["output"] is not None:
        check_target("--output", values["output"])
    from recurrentgemma.config import find_preset
    from recurrentgemma.evaluation.verify import verify

    config = values["config"]
    certificate = verify(
        arguments[0] if arguments else values["model"],
        config=None if config is None else find_preset(config),
        tokenizer=values["tokenizer"],
        dtype=values["dtype"],
        pythons={
            "transformers": values["transformers-python"],
            "official": values["official-python"],
        },
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    text = json.dumps(certificate, indent=1) + "\n"
    if values["output"] is None:
        sys.stdout.write(text)
    else:
        with replace_file(Path(values["output"])) as partial:
            partial.write_text(text, encoding="utf-8")
    failed = [
        name
        for name, check in certificate["checks"].items()
        if check["status"] == "failed"
    ]
    if failed:
        sys.stdout.flush()
        raise ValueError(f"failed: {', '.join(failed)}.")
