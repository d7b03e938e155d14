"""`recurrentgemma score`: how probable a text is to a model."""

import json
import sys
from typing import Any

from absl import flags

from recurrentgemma.commands import _shared

USAGE = "[TEXT | - | --file PATH] [FLAGS]"
DETAILS = (
    "Shows the perplexity of a text and its bits per byte: minus its log-probability. A "
    "file or standard input is read line by line and may be endless: the memory does "
    "not depend on its length. What was found so far is shown meanwhile."
)


def define_flags(values: flags.FlagValues) -> None:
    _shared.define_model(values)
    _shared.define_variant(values)
    _shared.define_text(values)
    flags.DEFINE_boolean(
        "tokens",
        False,
        "first a line for each token: its piece, a tab and its log-probability",
        flag_values=values,
    )
    flags.DEFINE_string(
        "save-prefix",
        None,
        "save what was read in this file, to continue from",
        flag_values=values,
    )


def run(values: dict[str, Any], arguments: list[str]) -> None:
    import tqdm

    # None: where standard error is a terminal.
    hidden = True if values["tokens"] else None
    bar = tqdm.tqdm(unit="B", unit_scale=True, leave=False, disable=hidden)

    def show(taken: int, size: int | None) -> None:
        bar.total = size
        bar.update(taken - bar.n)

    text = _shared.find_text(values, arguments, progress=show)
    output = values["save-prefix"]
    if output is not None:
        _shared.check_target("--save-prefix", output)
    sampler, prefix = _shared.load_sampler(values)
    from recurrentgemma.evaluation.perplexity import TextFigures

    totals = TextFigures()
    with bar:
        for score in sampler.score_stream(text, prefix=prefix):
            prefix = score.prefix
            totals = totals.add(score)
            if values["tokens"]:
                _show_tokens(sampler.tokenizer, score)
            if totals.tokens:
                bar.set_postfix_str(f"{totals.bits_per_byte:.4f} bits per byte")
    if not totals.tokens:
        raise ValueError("there is nothing to score: the text is empty")
    if output is not None:
        assert prefix is not None
        with _shared.ctrl_c_raises():
            prefix.save(output)
    print(f"tokens          {totals.tokens:,}")
    print(f"bytes           {totals.bytes:,}")
    print(f"perplexity      {totals.perplexity:.4f}")
    print(f"bits per byte   {totals.bits_per_byte:.4f}")


def _show_tokens(tokenizer, score) -> None:
    for token, log_prob in zip(score.tokens, score.log_probs, strict=True):
        # A piece may hold tabs and ends of lines.
        piece = json.dumps(tokenizer.piece(token), ensure_ascii=False)
        sys.stdout.write(f"{piece}\t{log_prob:.4f}\n")
    sys.stdout.flush()
