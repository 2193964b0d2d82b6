"""Saved states: the newest whole one is found, whatever happened to the others."""

import json
import logging
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.state
from shared.errors import StateError
from shared.events import read_events
from shared.storage import Folder
from tests.raising import refuses
from tests.waiting import LIMIT_S
from trainer.state import SavedState, StateSaver, load_newest_state


class Killed(BaseException):
    """What `kill -9` is to a process: nothing of it runs any more."""


def make_state(step: int, weight: float | None = None) -> SavedState:
    value = float(step) if weight is None else weight
    return SavedState(step, step // 10, {"model": {"w": torch.tensor([0.5, value])}, "rng": {"state": 2**100 + step}})


def save(run: Path, step: int, attempt: int = 1, weight: float | None = None) -> StateSaver:
    saver = StateSaver(run, attempt)
    saver.close(make_state(step, weight))
    return saver


def newest_step(run: Path) -> int | None:
    state = load_newest_state(run)
    if state is not None:  # what is found is whole
        assert state.content["model"]["w"].tolist() == [0.5, float(state.step)]
    return state.step if state else None


def files(run: Path) -> list[str]:
    return [name for name in Folder(run / "train").names() if name.startswith("state-")]


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process grows beyond 100 bytes: a write that fails half-way, for real."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_saved_state_is_the_one_loaded(tmp_path: Path) -> None:
    assert load_newest_state(tmp_path) is None
    weights = torch.tensor([[1.1, -0.0], [float("-inf"), 1e-45]])
    content: dict[str, Any] = {
        "model": {"w": weights[:1], "counter": torch.tensor(2**62)},
        "optimizer": {"state": {0: {"momentum_buffer": weights}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
        "rng": {"state": {"state": 2**127 + 1, "inc": 3}, "has_uint32": 0},
        "ranges": ((1, 2), (5, 9)),
        "none": None,
    }
    StateSaver(tmp_path, 3).close(SavedState(460, 23, content))
    state = load_newest_state(tmp_path)

    assert state is not None
    assert (state.step, state.model_version) == (460, 23)
    assert state.content.keys() == content.keys()
    for name in ("rng", "none"):
        assert state.content[name] == content[name]
    assert [list(pair) for pair in state.content["ranges"]] == [[1, 2], [5, 9]]
    found = state.content["optimizer"]["state"][0]["momentum_buffer"]
    assert found.view(torch.int32).tolist() == weights.view(torch.int32).tolist()
    assert (state.content["model"]["counter"].item(), state.content["model"]["counter"].dtype) == (2**62, torch.int64)


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (5, 40, 300, 2000):
        save(tmp_path, step)

    assert [f"state-0001-00000{step}.{end}" for step in ("0300", "2000") for end in ("json", "pt")] == files(tmp_path)
    assert newest_step(tmp_path) == 2000


def test_later_attempt_is_newer_though_its_step_is_lower(tmp_path: Path) -> None:
    save(tmp_path, 460)
    save(tmp_path, 450, attempt=2)

    assert newest_step(tmp_path) == 450


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data, _: data.write_bytes(data.read_bytes()[:-1]), "checksum"),
        (lambda data, _: data.write_bytes(data.read_bytes().replace(b"model", b"modem", 1)), "checksum"),
        (lambda data, _: data.write_bytes(b""), "checksum"),
        (lambda data, _: data.unlink(), "No such file"),
        (lambda _, marker: marker.write_bytes(marker.read_bytes()[:-3]), "Unterminated"),
        (lambda _, marker: marker.write_bytes(b""), "Expecting value"),
        (lambda _, marker: marker.write_bytes(b"[]"), "indices"),
        (lambda _, marker: marker.write_bytes(b'{"step": 2}'), "sha256"),
        (lambda _, marker: marker.write_bytes(b"\xff"), "decode"),
    ],
    ids=["cut", "altered", "empty", "gone", "marker cut", "marker empty", "marker a list", "marker short", "no text"],
)
def test_damaged_state_leaves_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path, Path], Any], reason: str
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    data, marker = (tmp_path / "train" / f"state-0001-000000002.{end}" for end in ("pt", "json"))
    damage(data, marker)

    assert newest_step(tmp_path) == 1
    assert "state-0001-000000002 cannot be resumed from" in caplog.text
    skipped = [event for event in read_events(tmp_path) if event["event"] == "state_skipped"]
    assert [event["name"] for event in skipped] == ["state-0001-000000002"]
    assert reason in skipped[0]["reason"]


def test_code_in_a_state_is_not_run(tmp_path: Path) -> None:
    """Whoever can write the checksum could still not make a resume run what they like."""
    save(tmp_path, 1)
    StateSaver(tmp_path, 1).close(SavedState(2, 0, {"model": {}, "run": print}))

    assert newest_step(tmp_path) == 1


def test_all_damaged_is_an_error_each_time(tmp_path: Path) -> None:
    """Not a fresh start: that would give up what a repaired disk may still hold."""
    for step in (1, 2):
        save(tmp_path, step)
        (tmp_path / "train" / f"state-0001-00000000{step}.pt").write_bytes(b"")

    for _ in range(2):
        with refuses(StateError, str(tmp_path / "train"), "state-0001-000000002") as caught:
            load_newest_state(tmp_path)
        assert "state-0001-000000001" in caught.value.problem


def test_state_without_its_marker_does_not_count_and_the_next_save_removes_it(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "train" / "state-0001-000000002.json").unlink()

    assert newest_step(tmp_path) == 1
    save(tmp_path, 3)
    assert [f"state-0001-00000000{step}.{end}" for step in (1, 3) for end in ("json", "pt")] == files(tmp_path)


def killed_at(instant: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends before its `instant`-th change of a folder, counted from 0."""
    left = [instant]

    def dying(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return method(*args)

        return call

    for name in ("put", "delete"):
        monkeypatch.setattr(Folder, name, dying(getattr(Folder, name)))


@pytest.mark.parametrize("instant", range(5))
def test_kill_at_any_instant_leaves_a_whole_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instant: int
) -> None:
    """Of the four changes of the third save, the second is the marker: from then on it counts."""
    for step in (1, 2):
        save(tmp_path, step)
    with monkeypatch.context() as patch:
        killed_at(instant, patch)
        if instant < 4:
            with pytest.raises(Killed):
                save(tmp_path, 3)
        else:
            save(tmp_path, 3)

    assert newest_step(tmp_path) == (2 if instant < 2 else 3)
    save(tmp_path, 4)
    assert newest_step(tmp_path) == 4
    assert len(files(tmp_path)) == 4


def test_saving_the_same_step_again_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the end of an epoch where Ctrl-C or the end of the training comes too; here of the first epoch."""
    save(tmp_path, 6)
    with monkeypatch.context() as patch:
        killed_at(0, patch)
        save(tmp_path, 6)
    with full_disk():
        save(tmp_path, 6)

    assert newest_step(tmp_path) == 6


def test_after_a_resume_from_the_one_before_two_whole_ones_are_kept(tmp_path: Path) -> None:
    """A damaged newest one leaves the one before; the resumed attempt's first save must not remove that."""
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "train" / "state-0001-000000002.pt").write_bytes(b"")
    assert newest_step(tmp_path) == 1
    save(tmp_path, 3, attempt=2)
    (tmp_path / "train" / "state-0002-000000003.pt").write_bytes(b"")

    assert newest_step(tmp_path) == 1


def test_what_a_killed_save_left_half_written_is_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "train" / ".state-0001-000000002.pt.0123456789ab").write_bytes(b"half")
    save(tmp_path, 3, attempt=2)

    assert Folder(tmp_path / "train").temporary_names() == []


def test_weights_that_hold_nan_are_never_saved(tmp_path: Path) -> None:
    saver = StateSaver(tmp_path, 1)
    saver.save(make_state(1))
    saver.close(make_state(2, float("nan")))

    assert saver.failed == 1
    assert newest_step(tmp_path) == 1
    assert [(event["event"], event["step"]) for event in read_events(tmp_path)] == [
        ("state_saved", 1),
        ("state_failed", 2),
    ]


@pytest.mark.parametrize("cause", ["full disk", "train is a file"])
def test_save_that_the_disk_refuses_is_counted_and_the_next_tried(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cause: str
) -> None:
    saver = StateSaver(tmp_path, 1)
    if cause == "full disk":
        with full_disk():
            saver.save(make_state(1))
            _wait(saver)
    else:
        (tmp_path / "train").rmdir()
        (tmp_path / "train").write_text("")
        saver.save(make_state(1))
        _wait(saver)
        (tmp_path / "train").unlink()
        (tmp_path / "train").mkdir()

    assert saver.failed == 1
    assert "the state at step 1 could not be saved" in caplog.text
    assert load_newest_state(tmp_path) is None
    saver.close(make_state(2))
    assert (saver.failed, newest_step(tmp_path)) == (1, 2)


def _wait(saver: StateSaver) -> None:
    """Until the background thread has nothing to write."""
    assert saver._writing is not None
    saver._writing.result()


def test_saving_copies_at_once_and_skips_while_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer goes on while the disk is slow: it is held up by neither, and what it changes is not saved."""
    slow, encode = threading.Event(), trainer.state._encode

    def encode_slowly(state: SavedState) -> bytes:
        assert slow.wait(LIMIT_S)
        return encode(state)

    monkeypatch.setattr(trainer.state, "_encode", encode_slowly)
    saver, state = StateSaver(tmp_path, 1), make_state(1)
    saver.save(state)
    state.content["model"]["w"].fill_(99.0)
    saver.save(make_state(2))
    slow.set()
    saver.close()

    assert newest_step(tmp_path) == 1
    assert [event["step"] for event in read_events(tmp_path)] == [1]


def test_marker_names_step_version_and_checksum(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        save(tmp_path, 460)
    marker = json.loads((tmp_path / "train" / "state-0001-000000460.json").read_text())

    assert (marker["step"], marker["model_version"], len(marker["sha256"])) == (460, 46, 64)
    assert caplog.text == ""
