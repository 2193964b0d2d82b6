"""IDX files, in which MNIST and its relatives come: arrays of unsigned bytes, plain or compressed."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shared.errors import DataError


def read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """An IDX file of unsigned bytes, `path` or `path`.gz: two zeros, type 8, rank, sizes (big endian), values.

    Raises DataError for a damaged file, OSError for one that is missing or cannot be read.
    """
    if path.exists():
        data = path.read_bytes()
    else:
        try:
            data = gzip.decompress(Path(f"{path}.gz").read_bytes())
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}.gz is damaged: {error}", fix="fetch it again", key=f"{path}.gz") from error
    head = 4 + 4 * dimensions
    if len(data) < head or data[:4] != bytes([0, 0, 8, dimensions]):
        wrong = f"{path} is not an IDX file of bytes with {dimensions} dimensions"
        raise DataError(wrong, fix="fetch it again", key=str(path))
    shape = struct.unpack(f">{dimensions}I", data[4:head])
    if len(data) != head + math.prod(shape):
        wrong = f"{path} has {len(data) - head} bytes of values, its header says {math.prod(shape)}"
        raise DataError(wrong, fix="fetch it again", key=str(path))
    return np.frombuffer(data, dtype=np.uint8, offset=head).reshape(shape)
