"""`TEMPORAL_MIXERS`: the table of temporal mixers, by the names of `block_pattern`.

A mixer is one file and one line here. A class of a user's own is registered by

    TEMPORAL_MIXERS["mine"] = Mine

and is then trained, sampled, saved and loaded like the others. The class says everything
that the rest needs to know; see `recurrentgemma.blocks.mixer.Mixer`.
"""

import importlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any


class MixerTable(MutableMapping[str, Any]):
    """Classes by name. A class given as "module.Class" is imported when first used, so
    that the names are known before flax is imported."""

    def __init__(self, entries: Mapping[str, type | str]):
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Any:
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, class_name = entry.rpartition(".")
            entry = getattr(importlib.import_module(module), class_name)
            self._entries[name] = entry
        return entry

    def __setitem__(self, name: str, mixer: type) -> None:
        if not isinstance(name, str) or not name:
            raise TypeError(
                f"TEMPORAL_MIXERS: expected a name as the key, got {name!r}; use a "
                "string that block_pattern can hold"
            )
        if not isinstance(mixer, type) or not hasattr(mixer, "init_state"):
            raise TypeError(
                f"TEMPORAL_MIXERS[{name!r}]: expected a class, got {mixer!r}; derive "
                "one from recurrentgemma.blocks.mixer.Mixer"
            )
        self._entries[name] = mixer

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


TEMPORAL_MIXERS = MixerTable(
    {
        "recurrent": "recurrentgemma.blocks.recurrent.RecurrentBlock",
        "local_attention": "recurrentgemma.blocks.attention.LocalAttentionBlock",
        "global_attention": "recurrentgemma.blocks.attention.GlobalAttentionBlock",
        "min_gru": "recurrentgemma.blocks.min_gru.MinGRUBlock",
    }
)
