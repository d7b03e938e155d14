"""Checksums that tell whether the bytes of a checkpoint are those that were written.

CRC-32 of a tensor, which is read in slices along any axis: each run of bytes that lies
together has one CRC-32, and those are joined by the arithmetic of polynomials over two
elements. The cache of Hugging Face names each file by its SHA-256, or, if it is small,
by the SHA-1 that Git gives it; a snapshot is a directory of links to them.
"""

import functools
import hashlib
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from recurrentgemma.checkpoints.tensors import TensorSource, blocks_of

POLYNOMIAL = 0xEDB88320
"""Of CRC-32: the coefficient of x^31 in the lowest bit; x^32 is left out."""
ONE, X = 1 << 31, 1 << 30
BLOBS = "blobs"
"""The directory of a Hugging Face cache whose files are named by their content."""
BUFFER_BYTES = 1 << 20


def verified(source: TensorSource, checksum: str, name: str) -> TensorSource:
    """The tensor, whose CRC-32 is compared when it has been read from start to end.

    Args:
      source: the tensor.
      checksum: CRC-32 of its bytes in C order, eight hexadecimal digits.
      name: what the error calls it.

    Returns:
      A source; reading its end raises ValueError if the checksum differs.
    """
    shape, axis = source.shape, source.axis
    count = math.prod(shape[:axis])
    run_bytes = math.prod(shape[axis:]) * source.dtype.itemsize
    position, found = 0, [0] * count

    def see(start: int, part: np.ndarray) -> None:
        nonlocal position, found
        if start == 0:
            position, found = 0, [0] * count
        if start != position:
            return
        position += part.shape[axis]
        runs = np.ascontiguousarray(part).reshape(count, -1).view(np.uint8)
        found = [zlib.crc32(run.data, c) for run, c in zip(runs, found, strict=True)]
        if position == shape[axis] and joined(found, run_bytes) != checksum:
            raise ValueError(f"{name} is damaged: its checksum differs.")

    return source.watched(see)


def crc32(array: np.ndarray) -> str:
    """CRC-32 of the bytes of an array in C order, eight hexadecimal digits."""
    checksum = 0
    for block in blocks_of(array):
        checksum = zlib.crc32(block, checksum)
    return f"{checksum:08x}"


def joined(checksums: Sequence[int], run_bytes: int) -> str:
    """CRC-32, as eight hexadecimal digits, of runs of bytes of one size in a row."""
    shift = _power_of_x(8 * run_bytes)
    whole = functools.reduce(lambda one, two: _product(one, shift) ^ two, checksums)
    return f"{whole:08x}"


def _power_of_x(exponent: int) -> int:
    power, square = ONE, X
    while exponent:
        if exponent & 1:
            power = _product(power, square)
        square = _product(square, square)
        exponent >>= 1
    return power


def _product(one: int, two: int) -> int:
    """The product of two polynomials modulo that of CRC-32."""
    result = 0
    for bit in range(31, -1, -1):
        if one >> bit & 1:
            result ^= two
        two = two >> 1 ^ (POLYNOMIAL if two & 1 else 0)
    return result


def checked_before(source: TensorSource, check: Callable[[], None]) -> TensorSource:
    """The tensor, before each read of which check() is called."""

    def read(start: int, stop: int) -> np.ndarray:
        check()
        return source.read(start, stop)

    return source._replace(read=read)


def check_blobs(files: Iterable[Path]) -> None:
    """Compares files of a Hugging Face cache with the checksums that name them.

    Other files are not read.

    Raises:
      ValueError: a file differs.
    """
    for file in files:
        blob = file.resolve()
        if not file.is_symlink() or blob.parent.name != BLOBS:
            continue
        try:
            if len(blob.name) == 2 * hashlib.sha256().digest_size:
                found = _digest(blob, hashlib.sha256())
            elif len(blob.name) == 2 * hashlib.sha1().digest_size:
                found = _digest(blob, hashlib.sha1(b"blob %d\0" % blob.stat().st_size))
            else:
                continue
        except OSError as error:
            raise ValueError(f"Cannot read {file}: {error.strerror}.") from error
        if found != blob.name:
            raise ValueError(
                f"{file} is damaged: its checksum is not the one that the cache of "
                f"Hugging Face names it by; delete {blob} and download it again."
            )


def _digest(file: Path, digest) -> str:
    with file.open("rb", buffering=0) as opened:
        while block := opened.read(BUFFER_BYTES):
            digest.update(block)
    return digest.hexdigest()


def check_crc(file: Path, offset: int, size: int, checksum: int, name: str) -> None:
    """Compares the CRC-32 of a part of a file.

    Raises:
      ValueError: it differs; the message calls the part `name`.
    """
    found = 0
    with file.open("rb") as opened:
        opened.seek(offset)
        while size and (block := opened.read(min(size, BUFFER_BYTES))):
            found = zlib.crc32(block, found)
            size -= len(block)
    if size or found != checksum:
        raise ValueError(f"{name} is damaged: its checksum differs.")
