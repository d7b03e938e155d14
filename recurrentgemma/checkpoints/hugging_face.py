"""The layout of transformers: config.json, safetensors (one file, or shards with an
index), tokenizer.model, and what transformers needs to read the tokenizer alone.

`MODEL_TYPES` holds the models that are known; config.json names one of them.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from recurrentgemma.checkpoints.gemma import GEMMA, GEMMA2
from recurrentgemma.checkpoints.model_types import (
    IGNORED,
    ModelType,
    config_from_json,
    config_to_json,
)
from recurrentgemma.checkpoints.recurrent_gemma import RECURRENT_GEMMA
from recurrentgemma.checkpoints.safetensors_file import (
    read_safetensors,
    tensor_bytes,
    write_safetensors,
)
from recurrentgemma.checkpoints.stored import (
    CONFIG_FILE,
    NOT_THIS_JSON,
    TOKENIZER_FILE,
    Stored,
    find_tokenizer,
    read_config_json,
    write_json,
    write_tokenizer,
)
from recurrentgemma.checkpoints.tensors import TensorSource
from recurrentgemma.checkpoints.transformers_tokenizer import write_tokenizer_files
from recurrentgemma.config import GriffinConfig
from recurrentgemma.tokenizer import Tokenizer

MODEL_TYPES: dict[str, ModelType] = {
    "recurrent_gemma": RECURRENT_GEMMA,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
}
"""Models by the `model_type` of config.json.

Of two names of one layout the first is written, whichever was read: the names stand for
the same tensors and the same settings, so nothing else of the file differs.
"""
MODEL_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
FILES = re.compile(
    r"config\.json|tokenizer\.model|model(-\d+-of-\d+)?\.safetensors"
    r"|model\.safetensors\.index\.json"
    r"|(tokenizer|(tokenizer|generation)_config|special_tokens_map)\.json"
)


def detect(path: Path) -> bool:
    """Whether config.json names a model type."""
    return "model_type" in (read_config_json(path) or {})


def read(path: Path) -> Stored:
    """The checkpoint; raises ValueError if it is damaged or not supported."""
    content = read_config_json(path) or {}
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise ValueError(
            f"{path / CONFIG_FILE}: model_type is {kind!r}; expected one of "
            f"{', '.join(MODEL_TYPES)}."
        )
    model_type = MODEL_TYPES[kind]
    try:
        config = config_from_json(model_type, content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path / CONFIG_FILE}: {error}") from error
    tensors = {}
    sources, files = _read_files(path)
    for name, source in sources.items():
        if not IGNORED.fullmatch(name):
            native, orientation = model_type.names.to_native(name)
            tensors[native] = orientation.to_native(source)
    return Stored(
        config=config,
        tensors=tensors,
        tokenizer_path=find_tokenizer(path),
        stored_name=lambda name: model_type.names.to_stored(name)[0],
        files=[*files, path / CONFIG_FILE, path / INDEX_FILE, path / TOKENIZER_FILE],
    )


def _read_files(path: Path) -> tuple[dict[str, TensorSource], list[Path]]:
    """The tensors by stored name, and the files that hold them."""
    index_file = path / INDEX_FILE
    if not index_file.exists():
        return read_safetensors(path / MODEL_FILE), [path / MODEL_FILE]
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(index.values()))
    except (OSError, RecursionError, *NOT_THIS_JSON) as error:
        raise ValueError(f"{index_file} is not an index of shards.") from error
    sources = {}
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index_file} names a file elsewhere: {file!r}.")
        sources.update(read_safetensors(path / file))
    absent = sorted(set(index) - set(sources))
    if absent:
        raise ValueError(f"{index_file} names tensors that no shard has: {absent}.")
    return sources, [path / file for file in files]


def write(
    path: Path,
    config: GriffinConfig,
    tensors: Mapping[str, TensorSource],
    tokenizer: Tokenizer | None,
) -> None:
    """Writes into an empty directory; raises ValueError if transformers has no such
    model or tokenizer."""
    kind, content = config_to_json(MODEL_TYPES, config)
    if tokenizer is not None:
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            content[key] = getattr(tokenizer, key.replace("_token", ""))
        write_tokenizer_files(path, tokenizer)
    content["dtype"] = tensors["embedder.embedding"].dtype.name
    write_json(path / CONFIG_FILE, content)
    stored = {}
    for name, source in tensors.items():
        stored_name, orientation = MODEL_TYPES[kind].names.to_stored(name)
        stored[stored_name] = orientation.from_native(source)
    _write_files(path, stored)
    write_tokenizer(path, tokenizer)


def _write_files(path: Path, tensors: Mapping[str, TensorSource]) -> None:
    metadata = {"format": "pt"}
    shards: list[dict[str, TensorSource]] = [{}]
    size = 0
    for name, source in tensors.items():
        if shards[-1] and size + tensor_bytes(source) > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = source
        size += tensor_bytes(source)
    if len(shards) == 1:
        write_safetensors(path / MODEL_FILE, tensors, metadata)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(path / file, shard, metadata)
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor_bytes(source) for source in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(path / INDEX_FILE, index)
