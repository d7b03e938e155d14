"""Residual blocks and the temporal mixers that they hold: a file for each.

`mixer.py` says what a mixer is; `TEMPORAL_MIXERS` names the classes.
"""

from recurrentgemma.mixers import TEMPORAL_MIXERS

__all__ = ["TEMPORAL_MIXERS"]
