"""Batches that do not fit and samples that cannot be scored, with a real network."""

import weakref
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scorer.adm import score_batch
from scorer.attacks import Fgsm
from scorer.batches import BatchScorer, Columns, Ids, is_out_of_memory, one_line
from shared.errors import DataError
from shared.schema import FLOAT_COLUMNS, MEASURED_COLUMNS

SAMPLES = 32
X = torch.rand(SAMPLES, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(SAMPLES) % 3
ALL = np.arange(SAMPLES)
NET = nn.Linear(5, 3)
SHORTAGES = {
    "torch": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "python": MemoryError,
    "numpy": lambda: caught(lambda: np.empty(1 << 50)),
    "torch on the CPU": lambda: caught(lambda: torch.empty(1 << 50)),
    "torch on Windows": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp] data. not enough memory: you tried"),
    "the CUDA driver": lambda: torch.AcceleratorError("CUDA error: out of memory"),
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


def caught(call: Callable[[], object]) -> Exception:
    with pytest.raises(Exception, match="allocate") as info:
        call()
    return info.value


def measure(ids: Ids) -> Mapping[str, Tensor]:
    return score_batch(NET, X[ids], Y[ids], Fgsm(0.1))


class Trouble:
    """`measure`, except that `fault` may name an error for some ids; `sizes` are those of the batches tried."""

    def __init__(self, fault: Callable[[Ids], Exception | None]) -> None:
        self.fault = fault
        self.sizes: list[int] = []

    def __call__(self, ids: Ids) -> Mapping[str, Tensor]:
        self.sizes.append(len(ids))
        if (error := self.fault(ids)) is not None:
            raise error
        return measure(ids)


def culprits(*bad: int, error: Callable[[], Exception] = lambda: OSError("truncated")) -> Trouble:
    return Trouble(lambda ids: error() if np.isin(ids, bad).any() else None)


def never() -> bool:
    return False


def score(measure: Callable[[Ids], Mapping[str, Tensor]], batch_size: int, ids: Ids = ALL) -> tuple[Columns, dict]:
    scored = BatchScorer(measure, batch_size, on_halved=lambda _: None).score(ids, never)
    assert scored is not None
    return scored


def assert_same(expected: Columns, actual: Columns) -> None:
    for name in MEASURED_COLUMNS:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("shortage", SHORTAGES.values(), ids=SHORTAGES)
def test_batches_that_do_not_fit_become_smaller_for_good(shortage):
    told: list[str] = []
    tight = Trouble(lambda ids: shortage() if len(ids) > 3 else None)
    scorer = BatchScorer(tight, 16, told.append)
    first, second = scorer.score(ALL, never), scorer.score(ALL[:8], never)

    assert tight.sizes == [16, 8, 4] + [2] * 16 + [2] * 4
    assert [f"from {n} to {n // 2}: {one_line(shortage())}" for n in (16, 8, 4)] == told
    assert scorer.batch_size == 2
    expected, _ = score(measure, batch_size=2)
    for name in MEASURED_COLUMNS:
        np.testing.assert_array_equal(first[0][name], expected[name])
        np.testing.assert_array_equal(second[0][name], expected[name][:8])
    assert (first[1], second[1]) == ({}, {})


@pytest.mark.parametrize("batch_size", [5, 7, 100])
def test_odd_batches_lose_no_sample_and_mix_none_up(batch_size):
    ids = np.random.default_rng(0).permutation(SAMPLES)
    actual, failed = score(Trouble(lambda ids: MemoryError() if len(ids) > 2 else None), batch_size, ids)

    assert_same({name: column.numpy() for name, column in measure(ids).items()}, actual)
    assert failed == {}


def test_a_short_last_batch_is_halved_from_its_own_size():
    """Halving the batch size of 100 would try the same three samples again five times."""
    tight = Trouble(lambda ids: MemoryError() if len(ids) > 1 else None)
    score(tight, 100, ALL[:3])

    assert tight.sizes == [3, 1, 1, 1]


def test_the_memory_of_a_failed_batch_is_free_before_it_is_tried_again():
    alive: list[weakref.ref[Tensor]] = []

    def hungry(ids: Ids) -> Mapping[str, Tensor]:
        assert all(ref() is None for ref in alive)
        batch = X[ids].clone()
        alive.append(weakref.ref(batch))
        if len(ids) > 4:
            raise MemoryError
        return measure(ids)

    _, failed = score(hungry, 16)

    assert failed == {}
    assert len(alive) == 2 + 8


def test_a_sample_that_does_not_fit_alone_fails():
    actual, failed = score(culprits(5, error=lambda: torch.OutOfMemoryError("CUDA out of memory.\nMore")), 8)

    assert failed == {5: "OutOfMemoryError: CUDA out of memory."}
    assert np.flatnonzero(np.isnan(actual["margin"])).tolist() == [5]


@pytest.mark.parametrize("bad", [(0,), (31,), (3, 4), (8, 9, 10, 11, 12, 13, 14, 15), (1, 17, 30)], ids=str)
def test_bad_samples_fail_alone(bad):
    actual, failed = score(culprits(*bad), 8)
    good = np.setdiff1d(ALL, bad)

    assert dict.fromkeys(bad, "OSError: truncated") == failed
    assert_same(
        {name: column.numpy() for name, column in measure(good).items()}, {n: c[good] for n, c in actual.items()}
    )
    for name in FLOAT_COLUMNS:
        assert np.isnan(actual[name][list(bad)]).all()
    assert set(actual["predicted"][list(bad)]) == {-1}
    assert not (actual["correct"] | actual["robust"])[list(bad)].any()


def test_a_bad_sample_costs_few_tries_and_leaves_the_batch_size():
    """Two tries per halving: 32, 16+16, 8+8 ... 1+1."""
    trouble = culprits(9)
    scorer = BatchScorer(trouble, 32, on_halved=lambda _: None)
    scorer.score(ALL, never)

    assert len(trouble.sizes) == 11
    assert scorer.batch_size == 32


def test_short_memory_and_bad_samples_together():
    def fault(ids: Ids) -> Exception | None:
        if len(ids) > 4:
            return MemoryError()
        return DataError("label 9\nis too high") if 6 in ids else None

    actual, failed = score(Trouble(fault), 32)

    assert failed == {6: "DataError: label 9"}
    assert np.isfinite(actual["margin"]).sum() == SAMPLES - 1


@pytest.mark.parametrize("error", [OSError("the disk is gone"), MemoryError("none left")], ids=one_line)
def test_when_every_sample_of_a_block_fails_it_is_not_the_samples(error):
    with pytest.raises(type(error), match=str(error)):
        score(Trouble(lambda _: error), 4, ALL[:8])


def test_a_small_block_may_fail_as_a_whole():
    actual, failed = score(culprits(*range(7)), 4, ALL[:7])

    assert list(failed) == list(range(7))
    assert np.isnan(actual["margin"]).all()


def test_small_blocks_that_fail_in_a_row_are_not_the_samples():
    """Unless one in between could be scored."""
    scorer = BatchScorer(culprits(*range(16)), 4, on_halved=lambda _: None)
    for start, end in ((0, 4), (16, 17), (4, 8), (8, 11)):
        scorer.score(ALL[start:end], never)
    with pytest.raises(OSError, match="truncated"):
        scorer.score(ALL[11:12], never)


def test_a_lost_device_is_no_samples_fault():
    """After such an error CUDA refuses everything, and all samples to come would look bad."""
    trouble = culprits(20, error=lambda: torch.AcceleratorError("CUDA error: an illegal memory access"))
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        score(trouble, 8)

    assert trouble.sizes == [8, 8, 8]


@pytest.mark.parametrize("batches", [0, 1, 5])
def test_stop_is_noticed_before_each_batch(batches):
    """Also while it looks for a bad sample."""
    trouble = culprits(2)
    scored = BatchScorer(trouble, 8, lambda _: None).score(ALL, lambda: len(trouble.sizes) == batches)

    assert scored is None
    assert len(trouble.sizes) == batches


@pytest.mark.parametrize("error", [RuntimeError("shapes"), DataError("not enough memory"), OSError()], ids=one_line)
def test_other_errors_are_not_taken_for_short_memory(error):
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("a\nb"), "ValueError: a"), (ValueError(), "ValueError: "), (KeyError("a\nb"), "KeyError: 'a\\nb'")],
)
def test_one_line(error, line):
    assert line == one_line(error)
