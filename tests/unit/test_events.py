"""The diary, written by several processes at once, by torn lines and on disks that are full."""

import datetime
import json
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shared.events import EVENTS_FILE, TAIL_BYTES, EventFollower, Events, last_events, read_events

APPEND_MANY = """
import sys
from shared.events import Events
run, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
events = Events(run)
sys.stdin.readline()
for index in range(count):
    events.append("published", name=name, index=index, padding="x" * (97 * index % 5000))
assert events.failures == 0
"""


@contextmanager
def file_size_limited(limit: int) -> Iterator[None]:
    """No file of this process grows beyond `limit` bytes: what a full disk does to a write, for real."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(found: list[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in found]


def test_events_are_read_in_order_with_their_time_and_facts(tmp_path: Path) -> None:
    assert (list(read_events(tmp_path)), last_events(tmp_path, 5)) == ([], [])
    before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=1)
    Events(tmp_path).append("published", model_version=1, step=20)
    Events(tmp_path).append("quarantine", reason='a "reason"\nof two lines \u2028 \x85', path=tmp_path)
    first, second = read_events(tmp_path)

    assert before <= datetime.datetime.fromisoformat(first["time"]) <= datetime.datetime.now(datetime.UTC)
    assert {k: first[k] for k in first if k != "time"} == {"event": "published", "model_version": 1, "step": 20}
    assert (second["reason"], second["path"]) == ('a "reason"\nof two lines \u2028 \x85', str(tmp_path))


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", APPEND_MANY, tmp_path, str(i), "100"], stdin=subprocess.PIPE)
        for i in range(3)
    ]
    for writer in writers:  # all have the diary open in their sights before the first line
        assert writer.stdin is not None
        writer.stdin.write(b"go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
    found = list(read_events(tmp_path))

    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert Counter(event["name"] for event in found) == {"0": 100, "1": 100, "2": 100}
    for name in "012":
        assert list(range(100)) == [event["index"] for event in found if event["name"] == name]


@pytest.mark.parametrize(
    "line", [b"", b"{", b'{"event": "publ', b"[]", b"7", b"null", b"\xff\xfe", b'{"time": "2026"}', b"\x00" * 50]
)
def test_line_that_is_no_event_is_passed_over(tmp_path: Path, line: bytes) -> None:
    events = Events(tmp_path)
    events.append("started")
    with open(tmp_path / EVENTS_FILE, "ab") as file:
        file.write(line + b"\n")
    events.append("finished")

    assert names(list(read_events(tmp_path))) == ["started", "finished"]
    assert names(last_events(tmp_path, 5)) == ["started", "finished"]


def test_line_torn_at_the_end_is_passed_over(tmp_path: Path) -> None:
    events = Events(tmp_path)
    events.append("started")
    events.append("published", model_version=1)
    path = tmp_path / EVENTS_FILE
    path.write_bytes(path.read_bytes()[:-5])

    assert names(list(read_events(tmp_path))) == ["started"]


def test_event_after_a_torn_line_is_read(tmp_path: Path) -> None:
    """The first event after a power cut is the `resumed` that people look for."""
    events = Events(tmp_path)
    events.append("published", model_version=1)
    path = tmp_path / EVENTS_FILE
    path.write_bytes(path.read_bytes()[:-5])
    events.append("resumed", attempt=2)

    assert names(list(read_events(tmp_path))) == ["resumed"]


def test_event_that_a_full_disk_took_in_part_is_counted(tmp_path: Path) -> None:
    events = Events(tmp_path)
    events.append("started")
    with file_size_limited((tmp_path / EVENTS_FILE).stat().st_size + 10):
        events.append("published", model_version=1)

    assert names(list(read_events(tmp_path))) == ["started"]
    assert events.failures == 1


def test_full_disk_is_counted_and_fails_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    events = Events(tmp_path)
    events.append("started")
    with file_size_limited((tmp_path / EVENTS_FILE).stat().st_size):
        for _ in range(2):
            events.append("published", model_version=1)
    events.append("finished")

    assert names(list(read_events(tmp_path))) == ["started", "finished"]
    assert events.failures == 2
    assert "the event" in caplog.text
    assert "File too large" in caplog.text


@pytest.mark.parametrize("place", ["a folder of that name", "no run folder"])
def test_diary_that_cannot_be_opened_is_counted(tmp_path: Path, place: str) -> None:
    run = tmp_path / "run"
    if place == "a folder of that name":
        (run / EVENTS_FILE).mkdir(parents=True)
    events = Events(run)
    for _ in range(3):
        events.append("started")

    assert events.failures == 3


def test_last_events_are_the_last_in_order(tmp_path: Path) -> None:
    for step in range(5):
        Events(tmp_path).append("state_saved", step=step)

    assert [event["step"] for event in last_events(tmp_path, 2)] == [3, 4]
    assert [event["step"] for event in last_events(tmp_path, 99)] == [0, 1, 2, 3, 4]


def test_last_events_come_from_the_tail_without_its_torn_first_line(tmp_path: Path) -> None:
    """Lines of 100 bytes, of which 655 whole ones fit into 64 KiB; one that is longer than that hides the rest."""
    path = tmp_path / EVENTS_FILE
    lines = [json.dumps({"event": "state_saved", "step": step}).ljust(99) + "\n" for step in range(2000)]
    path.write_text("".join(lines), encoding="utf-8")
    tail = [event["step"] for event in last_events(tmp_path, 10**6)]
    Events(tmp_path).append("quarantine", reason="x" * TAIL_BYTES)

    assert list(range(1345, 2000)) == tail
    assert last_events(tmp_path, 10) == []
    assert len(list(read_events(tmp_path))) == 2001


def test_last_no_events_are_none(tmp_path: Path) -> None:
    Events(tmp_path).append("started")

    assert last_events(tmp_path, 0) == []


def test_follower_reads_each_event_once_and_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    follower, events = EventFollower(tmp_path), Events(tmp_path)
    found = [list(follower.new())]
    events.append("published", step=1)
    events.append("published", step=2)
    found.append(list(follower.new()))
    with open(tmp_path / EVENTS_FILE, "a") as file:
        file.write('{"event": "published",')
    found.append(list(follower.new()))
    with open(tmp_path / EVENTS_FILE, "a") as file:
        file.write(' "step": 3}\n')
    found.append(list(follower.new()))

    assert [[event["step"] for event in some] for some in found] == [[], [1, 2], [], [3]]
