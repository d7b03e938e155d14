"""`recurrentgemma batch`: continues all prompts of a file."""

from typing import Any

from absl import flags

from recurrentgemma.commands import UsageError, _shared

USAGE = "INPUT.jsonl OUTPUT.jsonl [FLAGS]"
DETAILS = (
    'Continues the "prompt" of every line of INPUT, a JSON object each, and writes the '
    "object with its text to OUTPUT as soon as it is finished, so not in the order of "
    'INPUT: see "line". The same command continues a job that was interrupted.'
)


def define_flags(values: flags.FlagValues) -> None:
    _shared.define_model(values)
    _shared.define_variant(values)
    flags.DEFINE_integer(
        "batch-size",
        16,
        "texts at a time; changes no text",
        lower_bound=1,
        flag_values=values,
    )
    _shared.define_generation(values, max_new_tokens=200)
    _shared.define_stop(values)


def run(values: dict[str, Any], arguments: list[str]) -> None:
    if len(arguments) != 2:
        raise UsageError(f"expected INPUT and OUTPUT, got {len(arguments)} arguments")
    settings = _shared.generation_settings(values)

    from recurrentgemma.generation.batch_jobs import BatchJob

    job = BatchJob(*arguments, **settings)
    sampler, _ = _shared.load_sampler(values)
    with _shared.ProgressBar("writing", "text", above=0) as progress:
        written = job.run(sampler, batch_size=values["batch-size"], progress=progress)
    there = job.num_prompts - written
    already = f", {there:,} were there" if there else ""
    print(f"{job.target}: {written:,} texts written{already}")
