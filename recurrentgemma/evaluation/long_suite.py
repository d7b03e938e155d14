"""The suite `long`: tasks of lm-evaluation-harness on long texts, and their settings.

The harness's tasks as they are, with these lengths and shots. RULER and BABILong count
tokens with the model's tokenizer, which they open with transformers.
"""

import dataclasses
from typing import Any

RULER_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
"""Lengths of RULER's prompts in tokens, one metric each (arXiv 2404.06654)."""
BABILONG_LENGTHS = ("0k", "1k", "2k", "4k", "8k", "16k", "32k", "64k", "128k")
"""Names of BABILong's sets, by length in tokens (arXiv 2406.10149)."""
ROOM = 1024
"""Tokens for what a task puts around a text of a given length, answer included."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Tasks that are run together.

    Attributes:
      name: Name of the results.
      tasks: Names of tasks or groups of the harness.
      max_length: Most tokens of a text.
      metadata: What the harness hands to the tasks.
      needs_tokenizer: Whether they open the model's tokenizer with transformers.
      num_fewshot: Number of examples; None takes the task's.
    """

    name: str
    tasks: tuple[str, ...]
    max_length: int
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    needs_tokenizer: bool = False
    num_fewshot: int | None = None


LONG = (
    Run(
        "ruler",
        ("ruler",),
        RULER_LENGTHS[-1] + ROOM,
        {"max_seq_lengths": list(RULER_LENGTHS)},
        needs_tokenizer=True,
    ),
    *(
        Run(
            f"babilong {length}",
            ("babilong_longctx",),
            int(length[:-1]) * 1024 + 2 * ROOM,
            {"max_seq_lengths": length},
            needs_tokenizer=True,
        )
        for length in BABILONG_LENGTHS
    ),
    # LongBench's longest texts have about 65,000 tokens (arXiv 2308.14508).
    Run("longbench", ("longbench",), 65536 + ROOM),
    # Recall tasks of "Based" (arXiv 2402.18668), without examples.
    Run("recall", ("fda", "swde", "squad_completion"), 65536, num_fewshot=0),
)
SUITES = {"long": LONG}
"""Suites by name."""
