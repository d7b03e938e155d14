"""The README's picture: prefill speed against prompt length, from `versus.json`.

Draws the median tokens/s of this project, of transformers and of the official package
at each prompt length of the document `--output`, and writes a PNG beside it. A line ends
where an implementation does not fit in memory. Needs matplotlib (extra `notebooks`).
Nothing is measured here: run `versus` first.
"""

import argparse
import json

from recurrentgemma.benchmarks.report import RESULTS

STYLES = {
    "ours": ("this project", "o-", "#0b6e4f"),
    "transformers": ("transformers 5.23", "s--", "#b5651d"),
    "official": ("official recurrentgemma 1.0.1", "^--", "#5b5b8c"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The picture has no options: `--output` names the document that it is made from."""
    parser.set_defaults(output=RESULTS / "versus.json")


def run(options: argparse.Namespace) -> None:
    """Writes a PNG beside the JSON document."""
    import matplotlib.pyplot as plt

    document = json.loads(options.output.read_text(encoding="utf-8"))
    rates = {
        int(row["name"].removeprefix("prefill ")): row["median"]
        for row in document["rows"]
        if row["name"].startswith("prefill ")
    }
    lengths = sorted(rates)
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for name, (label, style, color) in STYLES.items():
        known = [n for n in lengths if name in rates[n]]
        speeds = [rates[n][name] for n in known]
        axes.plot(known, speeds, style, color=color, label=label)
        if known != lengths:
            axes.annotate(
                "does not fit beyond",
                (known[-1], speeds[-1]),
                textcoords="offset points",
                xytext=(6, -16),
                color=color,
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("prompt length, tokens")
    axes.set_ylabel("prefill, tokens/s")
    axes.set_title(f"67M parameters, float32, {document['cores']} CPU cores")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(options.output.with_suffix(".png"), dpi=150)
    plt.close(figure)
