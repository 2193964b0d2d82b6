"""Attempts and what they leave behind, and the ages of scores on the line that survives."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shared.attempts import Attempt, abandoned, attempts, begin
from shared.checkpoints import CheckpointPublisher
from shared.errors import RunError
from shared.freshness import ABANDONED, Status, age_versions, statuses
from shared.storage import Folder
from tests.raising import refuses


def fork(run: Path, last_valid: int, first: int) -> Attempt:
    return begin(run, fork_step=10 * last_valid, last_valid_version=last_valid, first_version=first)


def ages(version_N: list[int], newest: int, left_behind: tuple[tuple[int, int], ...]) -> list[int]:
    return age_versions(np.array(version_N), newest, left_behind).tolist()


def test_attempts_are_numbered_and_say_where_they_begin(tmp_path: Path) -> None:
    assert (attempts(tmp_path), abandoned(tmp_path)) == ([], ())
    made = [fork(tmp_path, 0, 1), fork(tmp_path, 23, 31)]

    assert made == attempts(tmp_path)
    assert [(one.attempt, one.fork_step, one.last_valid_version, one.first_version) for one in made] == [
        (1, 0, 0, 1),
        (2, 230, 23, 31),
    ]
    assert Folder(tmp_path / "train").names() == ["attempt-0001.json", "attempt-0002.json"]


def test_attempts_come_in_order_beyond_the_four_digits_and_other_files_are_none(tmp_path: Path) -> None:
    fork(tmp_path, 0, 1)
    for number in (9999, 10000):
        content = {"attempt": number, "fork_step": 0, "last_valid_version": 1, "first_version": 2, "started_at": ""}
        (tmp_path / "train" / f"attempt-{number:04d}.json").write_text(json.dumps(content))
    for name in ("attempt-0003.json.bak", "state-0001-000000004.json", ".attempt-0002.json.abc"):
        (tmp_path / "train" / name).write_text("{")

    assert [one.attempt for one in attempts(tmp_path)] == [1, 9999, 10000]
    assert fork(tmp_path, 1, 2).attempt == 10001


def test_of_two_at_once_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one's file comes between looking and writing."""
    create = Folder.create

    def create_late(folder: Folder, name: str, data: bytes) -> bool:
        create(folder, name, b"{}")
        return create(folder, name, data)

    monkeypatch.setattr(Folder, "create", create_late)

    with refuses(RunError, str(tmp_path / "train" / "attempt-0001.json")):
        fork(tmp_path, 0, 1)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"attempt": 1}', '{"attempt": 1, "weather": 2}', "\xff"])
def test_damaged_attempt_is_named(tmp_path: Path, content: str) -> None:
    fork(tmp_path, 0, 1)
    path = tmp_path / "train" / "attempt-0002.json"
    path.write_bytes(content.encode("latin-1"))

    for call in (attempts, abandoned, lambda run: fork(run, 1, 2)):
        with refuses(RunError, str(path)):
            call(tmp_path)


@pytest.mark.parametrize(
    ("forks", "expected"),
    [
        ([(0, 1)], ()),
        ([(0, 1), (0, 5)], ((1, 4),)),
        ([(0, 1), (7, 8)], ()),
        ([(0, 1), (23, 31)], ((24, 30),)),
        ([(0, 1), (23, 31), (40, 45)], ((24, 30), (41, 44))),
        ([(0, 1), (23, 31), (33, 41), (41, 41)], ((24, 30), (34, 40))),
        ([(0, 1), (23, 31), (31, 31), (30, 31)], ((24, 30),)),
        ([(0, 1), (23, 31), (10, 41)], ((11, 40),)),
        ([(0, 1), (5, 9), (12, 20), (23, 31), (4, 41)], ((5, 40),)),
        ([(0, 1), (5, 9), (12, 20), (11, 31)], ((6, 8), (12, 30))),
        ([(0, 1), (23, 31), (30, 32)], ((24, 31),)),
        ([(0, 1), (23, 31), (23, 32), (23, 33)], ((24, 32),)),
    ],
    ids=[
        "the first",
        "nothing was saved",
        "nothing was published since",
        "one fork",
        "two forks apart",
        "a fork without loss",
        "a state before the first version",
        "a fork behind a fork",
        "a fork behind all",
        "a fork behind the last of two",
        "an attempt without a version of its own",
        "attempts that saved nothing",
    ],
)
def test_abandoned_versions(
    tmp_path: Path, forks: list[tuple[int, int]], expected: tuple[tuple[int, int], ...]
) -> None:
    for last_valid, first in forks:
        fork(tmp_path, last_valid, first)

    assert expected == abandoned(tmp_path)


@pytest.mark.parametrize(
    ("newest", "left_behind", "expected"),
    [
        (10, (), [-1, 10, 7, 6, 5, 0, 0]),
        (10, ((4, 4),), [-1, 9, 6, ABANDONED, 5, 0, 0]),
        (10, ((4, 9),), [-1, 4, 1, ABANDONED, ABANDONED, 0, 0]),
        (10, ((1, 2), (4, 5), (7, 8)), [-1, 4, 3, ABANDONED, ABANDONED, 0, 0]),
        (6, ((4, 8),), [-1, 3, 0, ABANDONED, ABANDONED, 0, 0]),
        (3, ((4, 12),), [-1, 3, 0, ABANDONED, ABANDONED, ABANDONED, ABANDONED]),
    ],
    ids=["none", "one", "up to the newest", "three", "the newest among them", "all after the newest"],
)
def test_ages_count_versions_of_the_surviving_line(
    newest: int, left_behind: tuple[tuple[int, int], ...], expected: list[int]
) -> None:
    assert expected == ages([-1, 0, 3, 4, 5, 10, 12], newest, left_behind)


def test_abandoned_scores_are_stale_whatever_the_bound() -> None:
    age_N = age_versions(np.array([-1, 3, 4, 9]), 9, ((4, 8),))

    assert statuses(age_N, 10**9).tolist() == ["unscored", "fresh", "stale", "fresh"]
    assert {Status.STALE} == set(statuses(age_N[2:3], 0))


@st.composite
def lives(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[int], int]:
    """Forks (last valid version, first version); the versions that survive them all; the newest version."""
    surviving: list[int] = []
    forks, newest = [], 0
    for _ in range(draw(st.integers(1, 6))):
        kept = draw(st.integers(0, len(surviving)))
        surviving = surviving[:kept]
        first = newest + 1 + draw(st.integers(0, 2))  # folders of versions that never became stable
        forks.append((surviving[-1] if surviving else 0, first))
        count = draw(st.integers(0, 5))
        surviving += range(first, first + count)
        newest = first + count - 1
    return forks, surviving, newest


@given(lives())
def test_ages_agree_with_counting_one_by_one(life: tuple[list[tuple[int, int]], list[int], int]) -> None:
    forks, surviving, newest = life
    left_behind = _abandoned_of(forks)
    expected = [
        sum(other > version for other in surviving) if version in surviving else ABANDONED
        for version in range(1, newest + 1)
    ]

    assert expected == ages(list(range(1, newest + 1)), newest, left_behind)
    assert all(a[1] + 1 < b[0] for a, b in itertools.pairwise(left_behind))


def _abandoned_of(forks: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """`abandoned` without a disk."""
    made = [Attempt(i, 0, last_valid, first, "") for i, (last_valid, first) in enumerate(forks, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shared.attempts.attempts", lambda _: made)
        return abandoned("nowhere")


def test_a_training_of_ones_own_says_where_it_goes_on(tmp_path: Path) -> None:
    """What was published after its state is left behind; where older versions were removed, all that is left is."""
    model = nn.Linear(2, 2)
    with CheckpointPublisher(tmp_path, keep_last=3) as publisher:
        for step in (10, 20, 30, 40, 50):
            publisher.publish(model, step)
            publisher.flush()
    assert abandoned(tmp_path) == ()
    with CheckpointPublisher(tmp_path, keep_last=3, resumed_at=45) as publisher:
        assert publisher.publish(model, 55) == 6
    assert abandoned(tmp_path) == ((5, 5),)
    assert [(one.fork_step, one.last_valid_version, one.first_version) for one in attempts(tmp_path)] == [(45, 4, 6)]

    with CheckpointPublisher(tmp_path, resumed_at=5) as publisher:
        publisher.publish(model, 15)
    assert abandoned(tmp_path) == ((4, 6),)

    with CheckpointPublisher(tmp_path, resumed_at=0) as publisher:  # from scratch: nothing of before counts
        publisher.publish(model, 10)
    assert abandoned(tmp_path) == ((1, 7),)
