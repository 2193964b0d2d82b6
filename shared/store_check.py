"""A score store examined: every byte of it against what its manifests say, and what lies in its folder."""

import contextlib
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from shared.errors import StoreCorrupt, StoreError
from shared.storage import Folder
from shared.store_files import FRAGMENTS, SNAPSHOTS, Manifest, Part, StoreFiles
from shared.store_view import column_array


@dataclasses.dataclass(frozen=True)
class Problem:
    """A file that is not as it must be, with what to do."""

    file: str
    problem: str


def verify(uri: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> list[Problem]:
    """Everything that is wrong with the store: lengths, checksums, Arrow files, ids, order. Reads every byte.

    The store may be written to meanwhile.

    Args:
        progress: is told how many bytes have been read, and of how many.

    Raises: StoreError when there is no store.
    """
    store = StoreFiles(uri)
    try:
        num_samples = store.describe()["num_samples"]
        parts, problems = _parts(store)
    except StoreCorrupt as error:  # of what says what there is to verify
        return [Problem(error.key, str(error))]
    done, total = 0, sum(part.bytes for _, part in parts)
    for kind, part in parts:
        path = store.part_path(kind, part)
        try:
            store.check_part(kind, part)
            _check_rows(store.read_part(kind, part), kind, num_samples, str(path))
        except FileNotFoundError:
            if (kind, part) in _parts(store)[0]:  # else it was collected meanwhile
                problems.append(Problem(str(path), str(StoreCorrupt.of(path, "is missing"))))
        except StoreCorrupt as error:
            problems.append(Problem(str(path), str(error)))
        except OSError as error:
            problems.append(Problem(str(path), f"{path} cannot be read: {error.strerror}"))
        done += part.bytes
        if progress is not None:
            progress(done, total)
    return problems


def stats(uri: str | os.PathLike[str]) -> dict[str, Any]:
    """What the store holds and how much room it takes, in bytes. Raises StoreError, StoreCorrupt."""
    store = StoreFiles(uri)
    description = store.describe()
    found = manifests(store)
    if not found:
        fix = "open a ScoreWriter, which writes the first one"
        raise StoreError(f"{store.path} has no manifest yet", fix=fix, key=str(store.path))
    newest, *earlier = found
    named = {(kind, part.name): part.bytes for m in (newest, *earlier) for kind, part in m.parts()}
    there = {}
    for kind in (FRAGMENTS, SNAPSHOTS):
        for name in Folder(store.path / kind).names():
            with contextlib.suppress(FileNotFoundError):  # collected meanwhile
                there[kind, name] = (store.path / kind / name).stat().st_size
    return {
        "store": str(store.path),
        **description,
        "store_version": newest.version,
        "generation": newest.generation,
        "committed_at": newest.committed_at if newest.version else None,
        "rows_committed": newest.rows,
        "snapshot_version": newest.base_version,
        "snapshot_rows": newest.snapshot.rows if newest.snapshot else 0,
        "snapshot_file": str(store.part_path(SNAPSHOTS, newest.snapshot)) if newest.snapshot else None,
        "fragments": len(newest.fragments),
        "fragment_rows": sum(part.rows for part in newest.fragments),
        "earlier_versions": [[m.base_version, m.version] for m in earlier],
        "bytes": sum(there.values()),
        "bytes_newest": sum(part.bytes for _, part in newest.parts()),
        "bytes_earlier": sum(named.values()) - sum(part.bytes for _, part in newest.parts()),
        "bytes_unneeded": sum(size for key, size in there.items() if key not in named),
    }


def manifests(store: StoreFiles) -> list[Manifest]:
    """The newest, and those that it keeps for earlier versions; none before a writer's first. Raises StoreCorrupt."""
    newest = store.newest()
    if newest is None:
        return []
    kept = [store.read_kept(anchor, newest) for anchor in newest.earlier]
    return [newest, *(manifest for manifest in kept if manifest is not None)]


def _parts(store: StoreFiles) -> tuple[list[tuple[str, Part]], list[Problem]]:
    """Folder and part, each once, by version; and the kept manifests that cannot say theirs. Raises StoreCorrupt."""
    newest = store.newest()
    if newest is None:
        return [], []
    found, problems = {*newest.parts()}, []
    for anchor in newest.earlier:
        try:
            kept = store.read_kept(anchor, newest)
        except StoreCorrupt as error:
            problems.append(Problem(error.key, str(error)))
        else:
            found |= {*kept.parts()} if kept else set()
    return sorted(found, key=lambda item: (item[1].version, item[1].name)), problems


def _check_rows(rows: pa.Table, kind: str, num_samples: int, path: str) -> None:
    ids = column_array(rows, "sample_id")
    if len(ids) and (ids.min() < 0 or ids.max() >= num_samples):
        raise StoreCorrupt.of(path, f"has sample ids {ids.min()}..{ids.max()}, outside 0..{num_samples - 1}")
    if kind == SNAPSHOTS and (np.diff(ids) <= 0).any():
        raise StoreCorrupt.of(path, "is not sorted by sample_id with one row of each")
