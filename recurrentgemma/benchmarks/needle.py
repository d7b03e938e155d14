"""Needles in long texts: what models find again, by its distance and by the length.

Two questions. How far back: prompts of the longest length, and the needle at growing
distances from the question. How long: the needle always as near as the first distance,
and prompts of growing length, which is beyond what a model was trained on at some point.
Measured is how often the right number is the most probable of some, and how many nats
the text before gives to it (`evaluation.needle`). The rows of each model and kind are
kept as they are found; the same command goes on.
"""

from pathlib import Path
from typing import Any

from absl import flags

from recurrentgemma.benchmarks import picture
from recurrentgemma.benchmarks.report import Column, Report, Row
from recurrentgemma.benchmarks.sweep import MODELS_HELP, counts, earlier, places
from recurrentgemma.checkpoints import load
from recurrentgemma.evaluation import needle, retrieval_heads
from recurrentgemma.evaluation.scorer import Scorer
from recurrentgemma.generation.sampler import Sampler

KEY = ("model", "kind", "length", "distance")
SETTINGS = ("samples", "choices", "window")
COLUMNS = [
    *map(Column, KEY, KEY, (24, 14, 8, 9)),
    Column("accuracy", "accuracy", 9),
    Column("gain, nats", "gain", 11),
    Column("loss, nats", "nats", 11),
]


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this benchmark."""
    lengths = "512,1k,2k,4k,8k,16k,32k"
    for name, default, what in (
        ("models", ["nano"], MODELS_HELP),
        ("kinds", ["code", "passkey"], "kinds of needles"),
        ("lengths", lengths.split(","), "tokens of the prompts"),
        ("distances", ["0.0625", "0.25", "1", "4", "16", "64"], "in windows"),
    ):
        flags.DEFINE_list(name, default, what, flag_values=values)
    for name, default, what in (
        ("samples", 10, "prompts of each length and distance"),
        ("choices", 10, "numbers to choose among"),
        ("window", 256, "tokens of a window"),
        ("batch", 8, "rows at a time"),
    ):
        flags.DEFINE_integer(name, default, what, lower_bound=1, flag_values=values)
    flags.DEFINE_string(
        "note",
        None,
        "how the models were trained, for the document",
        flag_values=values,
    )


def run(values: dict[str, Any], folder: Path) -> None:
    """Asks each model, and draws both questions."""
    lengths = counts("lengths", values["lengths"])
    distances = sorted(float(text) for text in values["distances"])
    path = folder / "needle.json"
    settings = {name: values[name] for name in SETTINGS}
    known = earlier(path, benchmark="needle", **settings).get("rows", ())
    report = Report(
        path,
        COLUMNS,
        key=KEY,
        rows=known,
        benchmark="needle",
        **settings,
        note=values["note"],
    )
    text = retrieval_heads.bundled_text()
    for name, place in places(values["models"]).items():
        sampler = Sampler(*load(place), compile_ahead=False)
        scorer = Scorer(sampler, batch_size=values["batch"])
        for length in lengths:
            # Near needles at every length; all distances at the longest.
            asked = distances if length == lengths[-1] else distances[:1]
            for kind in values["kinds"]:
                about = {"model": name, "kind": kind, "length": length}
                wanted = [about | {"distance": _tokens(d, values)} for d in asked]
                if all(report.has(row) for row in wanted):
                    continue
                some = needle.NeedleSettings(
                    (kind,), (length,), tuple(asked), **settings
                )
                for row in needle.measure(scorer, text, some):
                    report.add(about | row)
    draw(report.rows, folder / "needle.png", _tokens(distances[0], values))


def _tokens(windows: float, values: dict[str, Any]) -> int:
    return round(windows * values["window"])


def draw(rows: list[Row], path: Path, near: int) -> None:
    """The picture: gain by distance at the longest length, and by length when near."""
    longest = max(row["length"] for row in rows)
    far = [row for row in rows if row["length"] == longest and row["distance"]]
    long = [row for row in rows if row["distance"] == near]
    panels = [
        picture.Panel(
            label,
            "nats that the needle gives to its number",
            picture.lines_of(some, "gain", x=x, names=("model", "kind")),
            is_linear=True,
        )
        for some, x, label in (
            (far, "distance", f"tokens since the needle, of {longest:,} read"),
            (long, "length", f"tokens read, the needle {near} tokens back"),
        )
    ]
    picture.draw(path, "Needles in long texts", panels)
