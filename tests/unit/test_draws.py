"""The log of draws: what was drawn comes back, of attempts the line that went on, and damage is told."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shared.errors import StateError
from tests.raising import refuses
from tests.unit.test_sampler import graded
from trainer.draws import DrawLog, Recorded
from trainer.sampler import CurriculumSampler, Window

N = 30


def sampler(run: Path | None = None, attempt: int = 1, **given: object) -> tuple[CurriculumSampler, DrawLog | None]:
    log = DrawLog(run, attempt) if run else None
    settings = {"seed": 3, "windows_per_epoch": 3, "form": "sampling"} | given
    return CurriculumSampler(N, graded(N), "soft", recorder=log, **settings), log  # type: ignore[arg-type]


def replayed(run: Path, **given: object) -> CurriculumSampler:
    return sampler(recorded=Recorded(run), seed=99, **given)[0]


def take(one: CurriculumSampler, count: int) -> list[int]:
    draws = iter(one)
    return [next(draws) for _ in range(count)]


@pytest.mark.parametrize("form", ["sampling", "weighting"])
def test_the_same_draws_weights_and_worth(tmp_path: Path, form: str) -> None:
    first, log = sampler(tmp_path, form=form)
    drawn = [(i, first.loss_weights([i])) for _ in range(2) for i in first]
    assert log is not None
    log.close()
    again = replayed(tmp_path, form=form)

    assert [(i, again.loss_weights([i])) for _ in range(2) for i in again] == drawn
    assert (again.draws.fresh, again.draws.total) == (first.draws.fresh, 2 * N)
    assert again.draws.age_counts.tolist() == first.draws.age_counts.tolist()


def test_a_later_attempt_replaces_what_it_planned_anew(tmp_path: Path) -> None:
    """Resumed from a state in the first window: the windows that the first attempt planned after it count no more."""
    first, _ = sampler(tmp_path)
    given = take(first, 4)
    state = first.state_dict()
    take(first, 25)
    second, _ = sampler(tmp_path, attempt=2, seed=7)
    state["rng"] = second.state_dict()["rng"]  # so that it draws otherwise
    second.load_state_dict(state)
    given += list(second)

    assert list(replayed(tmp_path)) == given


def test_a_log_that_was_cut_off_is_replayed_up_to_there(tmp_path: Path) -> None:
    first, _ = sampler(tmp_path)
    drawn = list(first)
    (path,) = (tmp_path / "train").iterdir()
    path.write_bytes(path.read_bytes()[:-40])
    again = replayed(tmp_path)

    assert take(again, 20) == drawn[:20]
    with refuses(StateError, str(tmp_path / "train"), "epoch 0 from position 20"):
        list(again)


def test_damage_and_other_windows_are_told(tmp_path: Path) -> None:
    with refuses(StateError, str(tmp_path / "train")):
        Recorded(tmp_path)
    log = DrawLog(tmp_path, 1)
    ids = np.arange(10)
    log(Window(0, 0, 1, ids, None, sampler()[0].draws))
    log.close()
    with refuses(StateError, str(tmp_path / "train"), "epoch 0 from position 5"):
        Recorded(tmp_path)(0, 5)

    path = tmp_path / "train" / "draws-0001.arrows"
    rows = pa.ipc.open_stream(path.read_bytes()).read_all()
    wrong = rows.set_column(4, "ids", pa.array([ids[::-1].tolist()], pa.list_(pa.int64())))
    with pa.ipc.new_stream(path, rows.schema) as stream:
        stream.write_table(wrong)
    with refuses(StateError, str(path), "epoch 0, position 0"):
        Recorded(tmp_path)(0, 0)


def test_a_log_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "draws-0001.arrows").mkdir()
    first, log = sampler(tmp_path)

    assert len(list(first)) == N
    assert log is not None
    assert isinstance(log.failed, IsADirectoryError)
    log.close()
