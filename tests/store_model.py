"""Any interleaving of what can happen to a score store, against a plain dictionary."""

import contextlib
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from shared import store_check, store_files
from shared.errors import Fenced, NoSuchVersion, StoreError
from shared.score_store import Retention, ScoreReader, ScoreWriter
from shared.store_files import Manifest, NewPart
from tests.rows import make_rows
from tests.stores import Latest, latest

N = 2
VERSIONS_CHECKED = 8
Row = tuple[int, int, float]  # sample_id, model_version, margin
ROWS = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 2), st.sampled_from([0.0, 1.0])), min_size=1, max_size=4)
RETENTIONS = [Retention(keep_all=True), Retention(0), Retention(2), Retention(0, keep_every=3)]


@contextlib.contextmanager
def naming_a_file_of(folder: Path) -> Iterator[None]:
    """Whatever is wrong with a store must be said with the file's or the store's name."""
    try:
        yield
    except StoreError as error:
        if not Path(error.key).is_relative_to(folder):
            raise AssertionError("an error that names no file") from error


class AgainstADict(RuleBasedStateMachine):
    """The store's model: rows in order of appending; a row wins unless the one it meets has a higher model_version."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.uri = Path(self._folder.name) / "scores"
        self.pending: list[Row] = []
        self.rows: dict[tuple[int, int], float] = {}  # (sample_id, model_version) -> margin, of all that is committed
        self.history: list[Latest] = [{}]  # by store version
        self.seen = 0

    @initialize(retention=st.sampled_from(RETENTIONS))
    def begin(self, retention: Retention) -> None:
        self.retention = retention
        self.writer = self.open()
        self.reader = ScoreReader(self.uri)

    def open(self) -> ScoreWriter:
        return ScoreWriter(self.uri, N, retention=self.retention, grace_s=0.0)

    def teardown(self) -> None:
        self.writer.close()
        self._folder.cleanup()

    @rule(rows=ROWS)
    def append(self, rows: list[Row]) -> None:
        ids, versions, margins = zip(*rows, strict=True)
        self.writer.append(make_rows(ids, np.array(versions), margin=np.array(margins)))
        self.pending += rows

    @rule(rows=ROWS)
    def append_and_commit(self, rows: list[Row]) -> None:
        self.append(rows)
        self.commit()

    @rule()
    def commit(self) -> None:
        before, now = self.history[-1], dict(self.history[-1])
        for sample_id, version, margin in self.pending:
            if version >= now.get(sample_id, (0,))[0]:
                now[sample_id] = (version, margin)
        known = all(before.get(row[0]) == row[1:] for row in self.pending)
        version = self.writer.commit()

        assert version - len(self.history) + 1 in ((0,) if known else (1,) if now != before else (0, 1))
        if version == len(self.history):
            self.history.append(now)
        self.rows |= {row[:2]: row[2] for row in self.pending}
        self.pending = []
        assert latest(ScoreReader(self.uri).table()) == self.history[-1]

    @rule(rows=ROWS, after=st.booleans())
    def commit_fails_at_its_manifest(self, rows: list[Row], after: bool) -> None:
        """Before or after that became visible; the next commit finds out."""
        link = os.link

        def fail(*names: Any) -> None:
            if after:
                link(*names)
            raise OSError("the disk says no")

        self.append(rows)
        with mock.patch.object(os, "link", fail), contextlib.suppress(OSError):
            self.writer.commit()
        self.commit()
        self.check()

    @rule(old_acts=st.sampled_from([(), ("commit",), ("compact", "commit")]), sleeps=st.booleans())
    def reopen(self, old_acts: tuple[str, ...], sleeps: bool) -> None:
        """A successor; what the old writer had not committed is lost with it."""
        old, self.writer = self.writer, self.open()
        lost, self.pending = self.pending, []
        if sleeps:  # until the successor has removed what lay in its place
            for _ in range(store_files.SUPERSEDED_MANIFESTS_KEPT + 1):
                self.append_and_commit([(0, 2, float(len(self.history)))])
        for act in old_acts:
            has_work = act == "compact" or any(self.history[-1].get(row[0]) != row[1:] for row in lost)
            with pytest.raises(Fenced) if has_work else contextlib.suppress(Fenced):
                getattr(old, act)()
        self.check()

    @rule()
    def compact(self) -> None:
        self.writer.compact()
        self.check()
        assert store_check.verify(self.uri) == []

    @rule(rows=ROWS)
    def commit_while_compacting(self, rows: list[Row]) -> None:
        fold: Callable[[Manifest], NewPart] = self.writer._fold

        def fold_and_commit(manifest: Manifest) -> NewPart:
            snapshot = fold(manifest)
            self.append_and_commit(rows)
            return snapshot

        with mock.patch.object(self.writer, "_fold", fold_and_commit):
            self.writer.compact()
        self.check()

    @rule()
    def refresh(self) -> None:
        self.seen = self.reader.refresh()

        assert self.seen == len(self.history) - 1

    @rule(seed=st.integers(0, 1000))
    def half_copied(self, seed: int) -> None:
        """Some of the files: then whatever opens is right, or an error names what is missing."""
        chance, copy = random.Random(seed), self.uri.with_name("copy")
        shutil.copytree(self.uri, copy, copy_function=copy_if_there)
        files = [path for path in sorted(copy.rglob("*")) if path.is_file()]
        for path in chance.sample(files, chance.randint(1, len(files))):
            path.unlink()
        with naming_a_file_of(copy):
            reader = ScoreReader(copy)
            assert latest(reader.table()) == self.history[reader.version]
            for version in range(reader.version):
                with naming_a_file_of(copy):
                    self.is_right_or_not_kept(reader, version, len(self.history))
        shutil.rmtree(copy)

    @invariant()
    def reader_is_at_the_version_it_last_saw(self) -> None:
        if hasattr(self, "reader"):
            assert latest(self.reader.table()) == self.history[self.seen]

    @rule()
    def check(self) -> None:
        """A new reader agrees with the model at any version, as far as retention says."""
        reader = ScoreReader(self.uri)
        newest = len(self.history) - 1
        assert reader.version == newest
        first_kept = max(newest - self.retention.keep_last, 0) if not self.retention.keep_all else 0
        kept = []
        some = random.Random(newest).sample(range(newest + 1), min(newest + 1, VERSIONS_CHECKED))
        for version in some:
            if self.is_right_or_not_kept(reader, version, first_kept):
                kept.append(version)
            changes = latest(reader.changes(version))
            assert changes.items() <= self.history[-1].items()
            assert changes.items() >= self.history[-1].items() - self.history[version].items()
        for sample_id in range(N):
            table = reader.history(sample_id)
            rows = dict(zip(table["model_version"].to_pylist(), table["margin"].to_pylist(), strict=True))
            assert list(rows) == table["model_version"].to_pylist() == sorted(rows)
            assert rows.keys() >= {self.history[v][sample_id][0] for v in kept if sample_id in self.history[v]}
            everything = {version: margin for (i, version), margin in self.rows.items() if i == sample_id}
            if self.retention.keep_all:
                assert rows == everything
            else:
                assert rows.keys() <= everything.keys()

    def is_right_or_not_kept(self, reader: ScoreReader, version: int, first_kept: int) -> bool:
        """Whether it is kept."""
        every = self.retention.keep_every
        with contextlib.suppress(NoSuchVersion):
            assert latest(reader.table(version)) == self.history[version]
            return True
        assert version < first_kept
        assert version == 0 or not every or version % every
        return False


def copy_if_there(source: str, target: str) -> None:
    """Copy a file; what the writer's own thread removes meanwhile is not there."""
    with contextlib.suppress(FileNotFoundError):
        shutil.copy2(source, target)


def settings_of(examples: int, steps: int) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
    )
