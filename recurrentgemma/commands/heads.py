"""`recurrentgemma heads`: which attention heads find a fact in a long text."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from recurrentgemma.commands import UsageError, _shared

USAGE = "[FLAGS]"
DETAILS = (
    "Hides a pass key in a text, asks for it, and ablates attention heads while the "
    "prompt is read, while the answer is generated, or both (arXiv 2510.19861). Shows "
    "the share of answers that greedy decoding gives and the log-probability of a token "
    "of the answers, beside the model as it is."
)


def define_flags(values: flags.FlagValues) -> None:
    from recurrentgemma.evaluation.retrieval_heads import Settings

    default: dict[str, Any] = dataclasses.asdict(Settings())
    _shared.define_model(values)
    for name, text in (
        ("lengths", "numbers of tokens of the prompts, with commas between them"),
        ("depths", "where the pass key stands, as shares of the text"),
        (
            "keep",
            "heads of a layer that each token keeps by entropy; all counts if none",
        ),
    ):
        shown = ",".join(map(str, default[name] or ()))
        flags.DEFINE_string(name, shown or None, text, flag_values=values)
    flags.DEFINE_boolean(
        "highest",
        False,
        "keep the heads of highest entropy, not of lowest",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "each-head", False, "ablate each head alone, too", flag_values=values
    )
    for name, text in (
        ("samples", "pass keys, each asked for at every depth"),
        ("batch-size", "prompts that are read together"),
    ):
        number = default[name.replace("-", "_")]
        flags.DEFINE_integer(name, number, text, lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "seed", default["seed"], "another seed gives other keys", flag_values=values
    )
    for name, text in (
        ("needle", "the sentence to hide, with {answer} in it"),
        ("question", "the end of the prompt"),
        ("file", "hide it in the text of this file"),
        ("output", "write all figures to this file (JSON)"),
    ):
        flags.DEFINE_string(name, default.get(name), text, flag_values=values)


def run(values: dict[str, Any], arguments: list[str]) -> None:
    if arguments:
        raise UsageError(f"expected no arguments, got {arguments[0]!r}")
    from recurrentgemma.evaluation import retrieval_heads

    settings = retrieval_heads.Settings(
        lengths=_numbers("lengths", values, int) or (),
        depths=_numbers("depths", values, float) or (),
        keep=_numbers("keep", values, int),
        **{
            name: values[name.replace("_", "-")]
            for name in ("highest", "each_head", "samples", "batch_size", "seed")
        },
        needle=values["needle"],
        question=values["question"],
    )
    if values["file"] is not None:
        _shared.check_file("--file", values["file"])
        text = "".join(_shared.find_text(values, []))
    else:
        text = retrieval_heads.bundled_text()
    if values["output"] is not None:
        _shared.check_target("--output", values["output"])
    from recurrentgemma.checkpoints import load

    model, tokenizer = load(values["model"])
    if tokenizer is None:
        raise ValueError(f"--model: {values['model']} has no tokenizer")
    print(_line("tokens", "ablation", "phase", "accuracy", "log-prob.", "change"))
    rows, whole = [], 0.0
    for row in retrieval_heads.study(model, tokenizer, text, settings):
        rows.append(row)
        if row["phase"] == "none":
            whole = row["log_prob"]
        cells = row["length"], row["ablation"], row["phase"]
        accuracy, log_prob = f"{row['accuracy']:.2f}", f"{row['log_prob']:.3f}"
        change = f"{row['log_prob'] - whole:+.3f}"
        print(_line(*cells, accuracy, log_prob, change), flush=True)
    if values["output"] is not None:
        _write(Path(values["output"]), values["model"], model.config, settings, rows)


def _line(length, ablation, phase, *figures) -> str:
    shown = "".join(f"{figure:>11}" for figure in figures)
    return f"{length:>7}  {ablation:14}{phase:10}{shown}"


def _numbers(
    name: str, values: dict[str, Any], kind: Callable[[str], Any]
) -> tuple[Any, ...] | None:
    """The numbers of a list with commas; None if there is no list."""
    return _shared.numbers(name, values[name], kind) if values[name] else None


def _write(path: Path, name: str, config, settings, rows: list[dict[str, Any]]) -> None:
    import jax

    from recurrentgemma import __version__
    from recurrentgemma._atomic import replace_file

    document = {
        "model": name,
        "config": config.to_dict(),
        "versions": {"recurrentgemma": __version__, "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
        "settings": dataclasses.asdict(settings),
        "rows": rows,
    }
    with replace_file(path) as partial:
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
