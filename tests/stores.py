"""What tests of the score store share."""

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from shared import store_check
from shared.schema import SCORE_SCHEMA
from shared.score_store import ScoreReader, ScoreWriter
from shared.store_files import StoreFiles
from tests.rows import make_rows

N = 10
Latest = dict[int, tuple[int, float]]


def latest(table: pa.Table) -> Latest:
    """sample_id -> (model_version, margin); the table must be sorted and have one row of each."""
    ids = table["sample_id"].to_pylist()
    assert ids == sorted(set(ids))
    assert table.schema == SCORE_SCHEMA
    return dict(
        zip(ids, zip(table["model_version"].to_pylist(), table["margin"].to_pylist(), strict=True), strict=True)
    )


def read(uri: Path) -> Latest:
    return latest(ScoreReader(uri).table())


def commit(writer: ScoreWriter, ids: Any, model_version: Any = 1, **columns: Any) -> int:
    writer.append(make_rows(ids, model_version, **columns))
    return writer.commit()


def an_hour_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the grace of what is unneeded."""
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600)


def names(uri: Path, folder: str) -> set[str]:
    """Without what is being written or prepared."""
    found = set()
    for name in os.listdir(uri / folder):
        with contextlib.suppress(FileNotFoundError):  # superseded meanwhile
            if not name.startswith(".") and (uri / folder / name).stat().st_size:
                found.add(name)
    return found


def named(uri: Path, folder: str) -> list[Path]:
    """The manifests, or what the newest and those that it keeps name, by version."""
    if folder == "manifests":
        return sorted((uri / folder).glob("[0-9]*"))
    kept = {item for manifest in store_check.manifests(StoreFiles(uri)) for item in manifest.parts()}
    return [uri / kind / part.name for kind, part in sorted(kept, key=lambda item: item[1].version) if kind == folder]
