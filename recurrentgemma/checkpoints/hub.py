"""Checkpoints by their name on Hugging Face or Kaggle, whose libraries download them.

hf://ORG/NAME, or ORG/NAME if there is no such directory
kaggle://OWNER/MODEL/FRAMEWORK/VARIATION
"""

import importlib
import re
from pathlib import Path

HUBS = {
    r"(?:hf://)?(\w[\w.-]*/[\w.-]+)": (
        ("huggingface_hub", "snapshot_download"),
        "https://huggingface.co/",
    ),
    r"kaggle://(.+)": (
        ("kagglehub", "model_download"),
        "https://www.kaggle.com/models/",
    ),
}
"""By the pattern of a name: library and function, and where the terms are accepted."""


def download(name: str) -> Path | None:
    """The directory of a downloaded checkpoint; None if the name is of no hub.

    Raises:
      ValueError: the library is missing, access is refused, the hub cannot be reached,
        or it has no such model.
    """
    for pattern, (function, site) in HUBS.items():
        if match := re.fullmatch(pattern, name):
            return _download(name, *function, match[1], site + match[1])
    return None


def _download(name: str, library: str, function: str, there: str, page: str) -> Path:
    try:
        module = importlib.import_module(library)
    except ImportError as error:
        raise ValueError(
            f"{name!r} is no directory here, and to download it takes {library}: pip "
            f"install {library}."
        ) from error
    try:
        return Path(getattr(module, function)(there))
    except Exception as error:  # The libraries have no common type for refusals.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{name!r} is no directory here, and {library} cannot download it: "
            f"{reason.rstrip('.')}. If it is gated, accept its terms at {page} and log "
            f"in as {library} demands."
        ) from error
