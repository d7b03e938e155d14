"""Data of a run: from a config to batches, each a function of the seed and the step.

    recurrentgemma train --output runs/mixed --data notes.jsonl:0.7,books:0.3

The parts, each in its file: `documents` (kinds of documents, and their tokens), `record_forms`
(JSON objects), `sources` (files and collections), `corpus` (names and paths), `streams`
(tokens in memory or in mapped files), `packing` (rows), `mixture` (batches).
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from recurrentgemma import _validation as check
from recurrentgemma._atomic import replace_file
from recurrentgemma.tokenizer import Tokenizer
from recurrentgemma.training.corpus import PYTHON_STDLIB, find_files, parse_sources
from recurrentgemma.training.documents import (
    CHARACTERS_PER_CUT,
    Cuts,
    encode_document,
)
from recurrentgemma.training.mixture import CONTINUOUS, ORDERS, SHUFFLED, Mixture
from recurrentgemma.training.options import option
from recurrentgemma.training.packing import Batch, PackedTokens
from recurrentgemma.training.sources import (
    READERS,
    Collected,
    RandomAccess,
    SourceFile,
)
from recurrentgemma.training.streams import (
    SourceStreams,
    TokenSettings,
    TokenStream,
    tokenize,
)

__all__ = [
    "Batch",
    "DataConfig",
    "Mixture",
    "PackedTokens",
    "check_unchanged",
    "encode_document",
    "lift_record",
    "open_data",
]

_TOKENIZER = "the tokenizer"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads, and how it is cut into batches.

    Raises:
      ValueError: a value is outside its range.
    """

    data: str = option(
        f"{PYTHON_STDLIB} (the Python files of the standard library), a file, or a "
        f"directory of files: text, or records ({', '.join(READERS)}), or a dataset of "
        "Hugging Face on disk; several with weights as in a.jsonl:0.7,books:0.3",
        default=PYTHON_STDLIB,
    )
    ignored_fields: str = option(
        "fields of records that are not used, such as id,source; * for all that are "
        "unknown; others are an error",
        default="",
    )
    batch_size: int = option("rows of a step", default=4)
    sequence_length: int = option(
        "tokens of a row; examples with a response lose what does not fit", default=512
    )
    order: str = option(
        "order of rows: shuffled, or continuous, where each row of a batch continues "
        "that of the batch before",
        default=SHUFFLED,
    )
    characters_per_cut: int = option(
        "mean characters between random cuts of texts to train on, each part of which "
        "is encoded alone; 0 cuts nothing",
        default=CHARACTERS_PER_CUT,
    )
    held_out_share: float = option(
        "share of the documents that is kept for evaluation, about; 0 evaluates never",
        default=0.05,
    )
    held_out_data: str | None = option(
        "sources to evaluate on instead of a share, given as for data", default=None
    )
    data_cache: str | None = option(
        "directory that keeps the tokens in files, which runs map; without one each "
        "start encodes the texts again, into memory",
        default=None,
        may_change=True,
    )

    def __post_init__(self):
        for name in ("batch_size", "sequence_length"):
            check.positive_integer(name, getattr(self, name))
        check.choice("order", self.order, ORDERS)
        check.integer("characters_per_cut", self.characters_per_cut, least=0)
        check.share("held_out_share", self.held_out_share)


def open_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    seed: int,
    *,
    collections: Mapping[str, RandomAccess] | None = None,
) -> tuple[Mixture, Mixture | None]:
    """Reads, encodes and packs all sources.

    Example:
        >>> config = DataConfig(
        ...     data="book.txt:0.7,answers:0.3", batch_size=2, sequence_length=16
        ... )
        >>> answers = [{"prompt": "def f", "response": "(x):"}]
        >>> training, held_out = open_data(
        ...     config, tokenizer, seed=0, collections={"answers": answers}
        ... )
        >>> batch = training.batch(step=7)
        >>> assert batch.tokens.shape == batch.mask.shape == (2, 16)

    Args:
      config: what is read.
      tokenizer: encodes the texts.
      seed: seed of the order of rows and of the places of cuts.
      collections: records in Python, such as a `datasets.Dataset` or a source of
          grain, by the names under which `config.data` has them.

    Returns:
      The batches to train on, and those to evaluate on; None if nothing is held out.

    Raises:
      ValueError: a source does not exist, cannot be read or holds no document; the
          message names the file and the line.
      OSError: the cache cannot be written.
    """
    collections = collections or {}
    share = 0.0 if config.held_out_data else config.held_out_share
    cuts = Cuts(seed, config.characters_per_cut)
    settings = TokenSettings(tokenizer, share, cuts if cuts.characters else None)
    opened = _open(config.data, config, settings, collections)
    digests = {_TOKENIZER: {"model": hashlib.sha256(tokenizer.model_bytes).hexdigest()}}
    digests |= {source.name: source.streams.digests for source in opened}
    if config.held_out_data:
        settings = TokenSettings(tokenizer)
        others = _open(config.held_out_data, config, settings, collections)
        digests |= {f"held-out {s.name}": s.streams.digests for s in others}
        evaluated = [(s, s.streams.training) for s in others]
    else:
        evaluated = [(s, s.streams.held_out) for s in opened if s.streams.held_out]
    training = _mix([(s, s.streams.training) for s in opened], config, seed, digests)
    if evaluated:
        # Rows are evaluated one by one, whatever the order of training.
        shuffled = dataclasses.replace(config, order=SHUFFLED)
        return training, _mix(evaluated, shuffled, seed, digests)
    if config.held_out_share:
        logging.warning(
            "data: none of the %d documents is held out, so the run has no held-out "
            "loss. Give more files, a larger held_out_share, or held_out_data.",
            sum(source.streams.num_documents for source in opened),
        )
    return training, None


def lift_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run, with what belongs to its data under `data`.

    Args:
      record: fields of a config; older records have those of `DataConfig` beside the
          others, and a name or path as `data`.
    """
    if not isinstance(record.get("data"), str):
        return dict(record)
    names = {field.name for field in dataclasses.fields(DataConfig)}
    lifted = {name: value for name, value in record.items() if name not in names}
    return lifted | {"data": {name: record[name] for name in names & record.keys()}}


def check_unchanged(path: Path, data: Mixture) -> None:
    """Records digests of a new run's data; refuses to resume a run with other data.

    Args:
      path: a file in the run's directory.
      data: the batches to train on, from `open_data`.

    Raises:
      ValueError: the run began with other data; the message names what differs.
      OSError: the record cannot be written.
    """
    if not path.exists():
        with replace_file(path) as partial:
            partial.write_text(json.dumps(data.digests, indent=1), encoding="utf-8")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for source in before | data.digests:
        old, new = before.get(source, {}), data.digests.get(source, {})
        changed = sorted(file for file in old | new if old.get(file) != new.get(file))
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise ValueError(
                f"data: expected what the run began with, got other content in {source}: "
                f"{changed[0]}{more}; restore it, or choose another output"
            )


@dataclasses.dataclass(frozen=True)
class _Source:
    name: str
    weight: float | None
    streams: SourceStreams


def _open(
    data: str,
    config: DataConfig,
    settings: TokenSettings,
    collections: Mapping[str, RandomAccess],
) -> list[_Source]:
    ignored = tuple(filter(None, map(str.strip, config.ignored_fields.split(","))))
    cache = None if config.data_cache is None else Path(config.data_cache)

    def files_of(name: str) -> Sequence[SourceFile]:
        if name in collections:
            return [Collected(name, collections[name], ignored)]
        return find_files(name, ignored)

    # Every source is looked for before the first one is read.
    found = [(n, w, files_of(n)) for n, w in parse_sources(data, [*collections])]
    return [
        _Source(name, weight, tokenize(name, files, settings, cache))
        for name, weight, files in found
    ]


def _mix(
    sources: Sequence[tuple[_Source, TokenStream]],
    config: DataConfig,
    seed: int,
    digests: Mapping[str, Mapping[str, str]],
) -> Mixture:
    weights = [source.weight for source, _ in sources if source.weight is not None]
    return Mixture(
        [_pack(source.name, stream, config) for source, stream in sources],
        weights or None,
        batch_size=config.batch_size,
        seed=seed,
        order=config.order,
        digests=digests,
    )


def _pack(name: str, stream: TokenStream, config: DataConfig) -> PackedTokens:
    # In continuous order, the carried state brings a prompt to the next row.
    whole = stream.has_responses and config.order != CONTINUOUS
    try:
        packed = PackedTokens(stream, config.sequence_length, whole=whole)
    except ValueError as error:
        raise ValueError(f"data: {name}: {error}") from error
    if packed.num_shortened or packed.num_left_out:
        logging.warning(
            "data: of %s, %d documents are longer than a row and lose their ends, and %d "
            "are left out, whose responses begin after the row's end. A larger "
            "sequence_length keeps more; the longest has %d tokens.",
            name,
            packed.num_shortened,
            packed.num_left_out,
            int(stream.positions.max()) + 1,
        )
    return packed
