"""What transformers needs to read a tokenizer alone: `tokenizer.json` and its settings.

A SentencePiece model of type BPE joins, again and again, the two neighbours that make
the piece of the highest score, the leftmost of several. `tokenizer.json` lists pairs
instead, the first to be joined first. Both give the same ids with one pair for each
piece, in the order of scores: nothing outside of the characters of a piece takes part in
joining them, so the last two parts are the same wherever the piece comes up.

User-defined pieces are cut out of the text first, the longest at each place, as
SentencePiece does. Special tokens (control pieces and turn markers) are recognised in
text, which chat templates need; `recurrentgemma.Tokenizer` puts them in by id alone.

SentencePiece models that transformers would read differently are refused.
"""

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recurrentgemma._validation import refuse
from recurrentgemma.checkpoints.stored import write_json
from recurrentgemma.tokenizer import END_OF_TURN, START_OF_TURN, Tokenizer

BPE = 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces in a SentencePiece model."""
SPACE = "\u2581"
NO_LIMIT = 10**30
"""Length of a text, as transformers writes it."""
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for turn in turns %}"
    "{{ '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else turn['role'])"
    " + '\n' + (system if loop.first else '') + turn['content'] + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""The turns of `recurrentgemma.Chat`; a system text opens the first one."""


def write_tokenizer_files(path: Path, tokenizer: Tokenizer) -> None:
    """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and
    generation_config.json.

    Raises:
      ValueError: transformers cannot have this tokenizer; the message says why.
    """
    content = json.dumps(tokenizer_json(tokenizer), ensure_ascii=False)
    (path / "tokenizer.json").write_text(content, encoding="utf-8")
    special: dict[str, Any] = {
        f"{role}_token": tokenizer.piece(token)
        for role, token in {**_token_ids(tokenizer), "unk": tokenizer.unk_id}.items()
    }
    markers = _turn_markers(tokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": NO_LIMIT,
        "padding_side": "left",
    }
    generation: dict[str, Any] = {
        f"{role}_token_id": token for role, token in _token_ids(tokenizer).items()
    }
    if markers:
        special["additional_special_tokens"] = [*markers]
        settings["chat_template"] = CHAT_TEMPLATE
        generation["eos_token_id"] = [tokenizer.eos_id, markers[END_OF_TURN]]
    write_json(path / "tokenizer_config.json", settings)
    write_json(path / "special_tokens_map.json", special)
    write_json(path / "generation_config.json", generation)


def _token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    return {role: getattr(tokenizer, f"{role}_id") for role in ("bos", "eos", "pad")}


def _turn_markers(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of both turn markers; nothing if one is missing."""
    try:
        return {
            marker: tokenizer.special_id(marker)
            for marker in (START_OF_TURN, END_OF_TURN)
        }
    except ValueError:
        return {}


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json.

    Raises:
      ValueError: the tokenizers library would give other ids; the message says why.
    """
    model = tokenizer.model_proto()
    _check_settings(model)
    begin = tokenizer.piece(tokenizer.bos_id)
    markers = _turn_markers(tokenizer)
    added = []
    for index, piece in enumerate(model.pieces):
        special = piece.type in (CONTROL, UNKNOWN) or piece.piece in markers
        if special or piece.type == USER_DEFINED:
            added.append(
                {
                    "id": index,
                    "content": piece.piece,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    # Others are looked for behind the normalizer, as runs of spaces.
                    "normalized": not special,
                    "special": special,
                }
            )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _replace(" ", SPACE),
        "pre_tokenizer": None,
        "post_processor": _begin_first(begin, tokenizer.bos_id),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                _replace(SPACE, " "),
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokenizer.piece(tokenizer.unk_id),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": {piece.piece: index for index, piece in enumerate(model.pieces)},
            "merges": _merges(model),
        },
    }


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _begin_first(begin: str, token: int) -> dict[str, Any]:
    """The begin token before each text."""

    def text(name: str, type_id: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": begin, "type_id": type_id}},
            {"Sequence": {"id": name, "type_id": type_id}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": [*text("A", 0), *text("B", 1)],
        "special_tokens": {begin: {"id": begin, "ids": [token], "tokens": [begin]}},
    }


def _refuse(expected: str, found: Any) -> None:
    refuse(
        "tokenizer",
        f"{expected}, to be written for transformers",
        found,
        "save in the native format, or without the tokenizer",
    )


def _check_settings(model: Any) -> None:
    """Raises ValueError unless the text reaches the pieces as it is."""
    if model.trainer_spec.model_type != BPE:
        # Of Unigram, SentencePiece adds scores in float32, tokenizers in float64.
        names = model.trainer_spec.DESCRIPTOR.enum_types_by_name["ModelType"]
        kind = names.values_by_number[model.trainer_spec.model_type].name
        _refuse("a SentencePiece model of type BPE", kind)
    normalizer = model.normalizer_spec
    for name, found, expected in (
        ("no normalisation", bool(normalizer.precompiled_charsmap), False),
        ("no space put before texts", normalizer.add_dummy_prefix, False),
        ("no spaces removed", normalizer.remove_extra_whitespaces, False),
        ("spaces written as \u2581", normalizer.escape_whitespaces, True),
    ):
        if found != expected:
            _refuse(f"a SentencePiece model with {name}", normalizer.name or found)
    unused = [piece.piece for piece in model.pieces if piece.type == UNUSED]
    if unused:
        _refuse("a SentencePiece model without unused pieces", unused[0])


def _merges(model: Any) -> list[tuple[str, str]]:
    """The pair that makes each piece, those of high scores first."""
    normal = [piece for piece in model.pieces if piece.type == NORMAL]
    scores = {piece.piece: piece.score for piece in normal if len(piece.piece) > 1}
    characters = {piece.piece for piece in normal if len(piece.piece) == 1}
    pairs = {}
    for piece in scores:
        pair = _last_pair(piece, scores)
        if pair is None:
            continue
        if not characters.issuperset(piece):
            _refuse("a SentencePiece model with a piece for each character", piece)
        pairs[piece] = pair
    ordered = sorted(pairs, key=lambda piece: -scores[piece])
    for one, two in itertools.pairwise(ordered):
        if scores[one] == scores[two]:
            _refuse("a SentencePiece model whose pieces differ in score", (one, two))
    return [pairs[piece] for piece in ordered]


def _last_pair(piece: str, scores: Mapping[str, float]) -> tuple[str, str] | None:
    """The two parts that SentencePiece joins last; None if it never joins all."""
    parts = [*piece]
    while len(parts) > 2:
        joined = [one + two for one, two in itertools.pairwise(parts)]
        best = max(joined, key=lambda part: scores.get(part, -math.inf))
        if best not in scores:
            return None
        place = joined.index(best)
        parts[place : place + 2] = [best]
    return parts[0], parts[1]
