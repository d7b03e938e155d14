"""What tells one model from another: a prefix and a batch job belong to one alone.

The digest is of the architecture and of numbers of every parameter, rounded to bfloat16,
so that it does not depend on the dtype that a checkpoint is loaded in. Of a large
parameter these are numbers at equal distances, so that fine-tuning, also by matrices of
low rank, changes some of them: at least one in each row and in each column of a matrix.
An edit of single numbers may be missed.
"""

import functools
import hashlib
import math
import weakref
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from recurrentgemma.griffin import Griffin
from recurrentgemma.kernels import meshes
from recurrentgemma.matrices import LowRank, is_matrix

MIN_SAMPLES = 1 << 13
"""Least count of numbers of a parameter that enter; a smaller parameter enters whole."""

_EVERY_FINE_TUNING = ("scale", "a_param")


class ModelDigest:
    """The digest of a model, computed again once a parameter was replaced.

    Optimizers and edits put new arrays into a model in place; arrays never change.
    """

    def __init__(self, model: Griffin):
        self._model = model
        self._leaves: Sequence[weakref.ref] = ()
        self._structure = jax.tree.structure(())
        self._digest = ""

    def __call__(self) -> str:
        """`model_digest` of the model as it is now."""
        leaves, structure = jax.tree.flatten(self._model)
        is_known = structure == self._structure and all(
            known() is leaf for known, leaf in zip(self._leaves, leaves, strict=True)
        )
        if not is_known:
            self._digest = model_digest(self._model)
            # Weak: the parameters of before an edit are not kept in memory.
            self._leaves = [weakref.ref(leaf) for leaf in leaves]
            self._structure = structure
        return self._digest


def model_digest(model: Griffin) -> str:
    """Architecture and weights as text: the config's fingerprint, a digest of every
    parameter, adapters and their factors included, and the key of the model's edits if
    there are any. Takes tens of milliseconds for billions of parameters."""
    samples = [
        leaf if leaf.size <= MIN_SAMPLES else _sample(leaf, *_places(leaf.shape))
        for leaf in jax.tree.leaves(model)
    ]
    return _join(model, jax.device_get(samples))


def digest_of_norms(model: Griffin) -> str:
    """The digest in prefixes of versions 1 and 2: of norm scales and `a_param`."""
    # The last key of a path is the variable's.
    chosen = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(model)
        if jax.tree_util.keystr(path[-2:-1], simple=True) in _EVERY_FINE_TUNING
    ]
    return _join(model, jax.device_get(chosen))


def _join(model: Griffin, arrays: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.asarray(array).astype(jnp.bfloat16).tobytes())
    for value in jax.tree.leaves(model, is_leaf=is_matrix):
        if isinstance(value, LowRank):
            digest.update(repr(value.scale).encode())
    edits = [] if model.observer is None else [model.observer.key]
    parts = [model.config.fingerprint(), digest.hexdigest(), *filter(None, edits)]
    return ":".join(parts)


def is_of_edited_model(digest: str) -> bool:
    """Whether the digest is of a model with edits, which this process alone has."""
    return digest.count(":") > 1


@jax.jit
@meshes.as_program
def _sample(leaf, *places):
    return leaf[places]


@functools.lru_cache(maxsize=64)
def _places(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Indices of numbers at equal distances in an array of this shape.

    The distance has no factor in common with the array's size, so that as many numbers
    in turn as a row is long lie in as many columns.
    """
    size, width = math.prod(shape), shape[-1]
    step = size // max(MIN_SAMPLES, size // width, width)
    while math.gcd(step, size) > 1:
        step -= 1
    flat = np.arange(0, size, step)
    return tuple(i.astype(np.int32) for i in np.unravel_index(flat, shape))
