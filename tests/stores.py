"""What tests of the score store share."""

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from shared.schema import SCORE_SCHEMA
from shared.score_store import ScoreReader, ScoreWriter
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


def age(uri: Path) -> None:
    """Make all files of the store an hour old."""
    for path in uri.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a writer gets ready for its next commit
            os.utime(path, (time.time() - 3600,) * 2)


def names(uri: Path, folder: str) -> set[str]:
    """Without temporary ones."""
    return {name for name in os.listdir(uri / folder) if not name.startswith(".")}
