"""Scoring many samples in batches that fit into memory, such that a bad sample fails alone.

A batch that fails is tried again in halves, down to the single samples. Memory that is short makes the batches smaller
for good; any other error is the fault of some samples, which are named and left out.
"""

import traceback
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch

from shared.schema import FLOAT_COLUMNS

Ids = npt.NDArray[np.int64]
Measure = Callable[[Ids], Mapping[str, torch.Tensor]]
Columns = dict[str, npt.NDArray[np.generic]]

FAILURES_THAT_BLAME_THE_SCORER = 8
_OUT_OF_MEMORY_TEXTS = (
    "not enough memory",
    "can't allocate memory",
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "ALLOC_FAILED",  # cuBLAS and cuDNN
)


class BatchScorer:
    """Scores samples batch by batch, in order.

    When all of 8 or more samples fail, in one call of `score` or in several in a row, then it is not the samples: the
    last error is raised. Fewer may fail without another that succeeds, since a block can be as small as one sample.

    Args:
        measure: the columns of `shared.schema.MEASURED_COLUMNS` of some sample ids, in their order.
        batch_size: ids per call of `measure`, to begin with.
        on_halved: told in words when the batch size went down.
    """

    def __init__(self, measure: Measure, batch_size: int, on_halved: Callable[[str], None]) -> None:
        self._measure = measure
        self._on_halved = on_halved
        self._failed_since_a_row = 0
        self.batch_size = batch_size

    def score(self, ids: Ids, stopped: Callable[[], bool]) -> tuple[Columns, dict[int, str]] | None:
        """The columns of all `ids` and why some could not be scored, by id; None when `stopped` between two batches.

        Raises: the last error when it is not the samples' fault.
        """
        columns = _columns_of_failed(len(ids))
        failed: dict[int, str] = {}
        error: Exception | None = None
        before = self.batch_size
        pending = [(0, len(ids))]  # a stack: the first of the remaining samples on top
        while pending:
            if stopped():
                return None
            start, end = pending.pop()
            if end - start > self.batch_size:
                pending += [(start + self.batch_size, end), (start, start + self.batch_size)]
            elif (raised := self._fill(columns, ids, start, end)) is None:
                continue
            elif end - start == 1:
                error = raised
                failed[int(ids[start])] = one_line(raised)
                if is_out_of_memory(raised):  # one sample too large for any batch says nothing of the others
                    self.batch_size = before
            else:
                half = (end - start) // 2
                if is_out_of_memory(raised):
                    self._shrink(half, raised)
                pending += [(start + half, end), (start, start + half)]
        self._failed_since_a_row = self._failed_since_a_row + len(failed) if len(failed) == len(ids) else 0
        if error is not None and self._failed_since_a_row >= FAILURES_THAT_BLAME_THE_SCORER:
            raise error
        return columns, failed

    def _fill(self, columns: Columns, ids: Ids, start: int, end: int) -> Exception | None:
        """Measure one batch. Returns what was raised, unless the device is lost: no sample can do that."""
        try:
            measured = self._measure(ids[start:end])
            for name, column in columns.items():
                column[start:end] = measured[name].numpy()
        except Exception as error:
            if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the batch's tensors, and with them the memory
            return error
        return None

    def _shrink(self, batch_size: int, error: Exception) -> None:
        torch.cuda.empty_cache()  # does nothing where CUDA is not in use
        before, self.batch_size = self.batch_size, batch_size
        self._on_halved(f"from {before} to {batch_size}: {one_line(error)}")


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY_TEXTS)


def one_line(error: BaseException) -> str:
    """The error's type and the first line of what it says."""
    first, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first}"


def _columns_of_failed(count: int) -> Columns:
    """The columns of samples that could not be scored."""
    return {
        **{name: np.full(count, np.nan, dtype=np.float32) for name in FLOAT_COLUMNS},
        "predicted": np.full(count, -1, dtype=np.int32),
        "correct": np.zeros(count, dtype=bool),
        "robust": np.zeros(count, dtype=bool),
    }
