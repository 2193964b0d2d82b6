"""The run's diary, `events.jsonl`: one line per thing that happened, for people, dashboards and tests.

Every process of a run appends to the one file. A line is one write to a file opened for appending, so that lines of
several processes do not mix; a line torn by a power cut is passed over by readers.
"""

import datetime
import errno
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

from shared.storage import local_path

logger = logging.getLogger(__name__)

EVENTS_FILE = "events.jsonl"
TAIL_BYTES = 64 * 1024


class Events:
    """Appends to the diary of the run folder `uri`. A disk that cannot take it fails nobody: `failures` counts.

    Lines hold `time` (UTC), `event` and the event's own facts. The events:

        started, resumed, finished                               the run        step, attempt, ...
        interrupted, diverged, failed                            the run        attempt, reason
        published, publish_failed                                trainer        model_version, step
        epoch                                                    trainer        epoch, step, steps, loss, accuracy
        state_saved, state_failed, state_skipped                 trainer        step
        committed, commit_failed                                 controller     store_version, rows
        quarantine                                               controller     rows, reason
        audited                                                  controller     model_version, fidelity, samples
        audit_skipped                                            controller     detail
        checkpoint_skipped, batch_halved, sample_failed          a scorer       scorer_id, detail
        controller_up                                            controller     pid
        scorer_up, scorer_down                                   the fleet      scorer_id, reason
        rest_up, rest_down                                       the fleet      url, reason
        scaled                                                   controller     wanted, before, reason
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self._path = local_path(uri) / EVENTS_FILE
        self.failures = 0

    def append(self, event: str, **facts: Any) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "event": event, **facts}, default=str) + "\n"
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                size = os.fstat(descriptor).st_size
                torn = size and os.pread(descriptor, 1, size - 1) != b"\n"
                data = f"\n{line}".encode() if torn else line.encode()
                if os.write(descriptor, data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(descriptor)
        except OSError as error:
            self.failures += 1
            logger.warning("the event %s could not be written: %s", line.strip(), error)


def read_events(uri: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The events of the run folder `uri`, in order; none when there is no diary yet."""
    try:
        data = (local_path(uri) / EVENTS_FILE).read_bytes()
    except FileNotFoundError:
        return
    yield from _parsed(data)


class EventFollower:
    """Reads the diary of the run folder `uri` as it grows: each event once."""

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self._path = local_path(uri) / EVENTS_FILE
        self._read = 0

    def new(self) -> Iterator[dict[str, Any]]:
        """The events since the last call, in order; a line that is being written is left for the next."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._read)
                data = file.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        yield from _parsed(whole)


def last_events(uri: str | os.PathLike[str], count: int) -> list[dict[str, Any]]:
    """The last `count` events at most, in order, from the last 64 KiB of the diary."""
    try:
        with open(local_path(uri) / EVENTS_FILE, "rb") as file:
            start = max(file.seek(0, os.SEEK_END) - TAIL_BYTES, 0)
            file.seek(start)
            data = file.read()
    except FileNotFoundError:
        return []
    whole = data if start == 0 else data.partition(b"\n")[2]
    return list(_parsed(whole))[-count:] if count else []


def _parsed(data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            yield event
