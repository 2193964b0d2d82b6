"""The score store's files: names, manifests, checks, and the collection of what nobody needs.

The format is written down in `shared.score_store`.
"""

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import xxhash

from shared.beside import Beside
from shared.errors import StoreCorrupt, StoreError, StoreMismatch
from shared.schema import SNAPSHOT_SCHEMA, arrow_file
from shared.storage import Folder, is_mappable

FORMAT = 2
SUPERSEDED_MANIFESTS_KEPT = 8  # a listing may miss names that come and go while it is made, but not so many
READ_BYTES = 1 << 24
WRITING_THREADS = 3  # a commit's fragment, what is prepared for the next, and a snapshot
FRAGMENTS, SNAPSHOTS = "fragments", "snapshots"
PART_SUFFIX = ".arrow"
NOTES = "unneeded.json"
Name = tuple[str, str]  # folder and name
Names = frozenset[Name]
MANIFEST_NAME = re.compile(r"[0-9]{12}\.json")
PART_NAME = re.compile(r"[0-9a-f]{24}\.arrow")


@dataclasses.dataclass(frozen=True)
class Part:
    """A fragment or snapshot as a manifest names it; `version` is the store version that it brings one up to."""

    name: str
    rows: int
    bytes: int
    xxh3_128: str
    version: int


@dataclasses.dataclass(frozen=True)
class Anchor:
    """An earlier manifest that retention keeps: of its snapshot's version `first` up to version `last`."""

    generation: int
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What the store holds at one generation.

    `rows` counts all rows ever committed, `metadata` is the writer's, `earlier` are for time travel, oldest first.
    """

    generation: int
    version: int
    writer: str
    committed_at: str
    rows: int
    snapshot: Part | None
    fragments: tuple[Part, ...]
    earlier: tuple[Anchor, ...]
    metadata: Mapping[str, Any]

    @property
    def base_version(self) -> int:
        return self.snapshot.version if self.snapshot else 0

    @property
    def anchor(self) -> Anchor:
        """How later manifests name this one."""
        return Anchor(self.generation, self.base_version, self.version)

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Folder and part, in the order in which their rows fold."""
        if self.snapshot:
            yield SNAPSHOTS, self.snapshot
        for fragment in self.fragments:
            yield FRAGMENTS, fragment

    def dump(self) -> bytes:
        body = orjson.dumps({"format": FORMAT, **vars(self)}, option=orjson.OPT_SERIALIZE_NUMPY)
        return body + b"\n" + _checksum(body).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes, name: str) -> "Manifest":
        """Raises StoreCorrupt for a torn or altered manifest, StoreMismatch for one of another format."""
        text, _, checksum = data.partition(b"\n")
        if _checksum(text).encode() + b"\n" != checksum:
            raise StoreCorrupt.of(name, "does not match its checksum")
        try:
            body = orjson.loads(text)
            _check_format(body, name)
            del body["format"]
            body["snapshot"] = Part(**body["snapshot"]) if body["snapshot"] else None
            body["fragments"] = tuple(Part(**part) for part in body["fragments"])
            body["earlier"] = tuple(Anchor(**anchor) for anchor in body["earlier"])
            return cls(**body)
        except StoreMismatch:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise StoreCorrupt.of(name, f"is not a manifest: {error}") from error


class StoreFiles:
    """The store's files: names, checks and the collection of what nobody needs."""

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self._root = Folder(uri)
        self.path = self._root.path
        self._manifests = Folder(self.path / "manifests")
        self._parts = {name: Folder(self.path / name) for name in (FRAGMENTS, SNAPSHOTS)}
        self._maps = is_mappable(self.path)
        self._beside = Beside(WRITING_THREADS)
        self._names: dict[int, Names] = {}  # generation of a kept manifest -> what it names
        self._unneeded: dict[str, float] | None = None  # as in the notes, once these are read

    def create(self, num_samples: int, scoring_id: str) -> None:
        """Make the store, or check that it is there with these; nothing is touched when it is not."""
        wanted = {"format": FORMAT, "num_samples": num_samples, "scoring_id": scoring_id}
        if "store.json" in self._root.names() or self._is_begun():
            self._check(wanted)
        if not self._root.make().create("store.json", orjson.dumps(wanted | {"xxh3_128": _description_sum(wanted)})):
            self._check(wanted)
        for folder in (self._manifests, *self._parts.values()):
            folder.make()  # syncs the root: whoever created store.json may not have come to that

    def _check(self, wanted: Mapping[str, Any]) -> None:
        found = self.describe()
        for key in ("num_samples", "scoring_id"):
            if found[key] != wanted[key]:
                raise StoreMismatch(
                    f"{self.path} holds scores with {key} {found[key]!r}, asked for {wanted[key]!r}",
                    fix="use a new run",
                    key=key,
                )

    def describe(self, is_begun: bool = False) -> dict[str, Any]:
        """What store.json says. Raises StoreError when there is no store, StoreCorrupt when it is damaged.

        Args:
            is_begun: that something was there which comes after that file.
        """
        path = self.path / "store.json"
        try:
            description: dict[str, Any] = orjson.loads(self._root.read("store.json"))
            _check_format(description, str(path))
            if description["xxh3_128"] != _description_sum(description):
                raise StoreCorrupt.of(path, "does not match its checksum")
        except FileNotFoundError:
            if is_begun:
                raise StoreCorrupt.of(path, "is missing") from None
            if self._is_begun():  # perhaps all of it came since
                return self.describe(is_begun=True)
            fix = "wait until the run's scoring begins, which makes it"
            raise StoreError(f"no score store at {self.path} yet", fix=fix, key=str(self.path)) from None
        except (StoreMismatch, StoreCorrupt):
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise StoreCorrupt.of(path, f"does not describe a score store: {error}") from error
        return description

    def _is_begun(self) -> bool:
        """Whether there is anything that comes after store.json."""
        return bool(self.generations()) or any(folder.names() for folder in self._parts.values())

    def generations(self) -> list[int]:
        """Of the manifests that are there, rising."""
        return [int(name[:12]) for name in self._manifests.names() if MANIFEST_NAME.fullmatch(name)]

    def newest(self, known: Manifest | None = None) -> Manifest | None:
        """The newest manifest, `known` itself when it still is; None before the first.

        Raises StoreCorrupt when manifests must have been there and are not: the store was half copied or removed, or an
        older copy was put in its place.
        """
        gone, has_looked_again = -1, False
        while True:
            if not (generations := self.generations()):
                if known is None and not self._is_begun():
                    return None
                if not self.generations():  # the first may have come before those parts
                    raise StoreCorrupt.of(self._manifests.path, "has no manifest")
                continue
            if known is not None and generations[-1] < known.generation:
                if not has_looked_again:  # a long listing is no one instant's
                    has_looked_again = True
                    continue
                raise StoreCorrupt.of(self._manifests.path, f"has lost its generations from {known.generation} on")
            if known is not None and generations[-1] == known.generation:
                return known
            if (manifest := self.read_manifest(generations[-1])) is not None:
                return manifest
            if generations[-1] == gone:
                raise StoreCorrupt.of(self._manifests.path / _name(gone), "is listed and is not there")
            gone = generations[-1]

    def read_manifest(self, generation: int) -> Manifest | None:
        """None when there is none, or none any more."""
        path = self._manifests.path / _name(generation)
        try:
            manifest = Manifest.parse(self._manifests.read(path.name), str(path))
        except FileNotFoundError:
            return None
        if manifest.generation != generation:
            raise StoreCorrupt.of(path, f"is the manifest of generation {manifest.generation}")
        return manifest

    def read_kept(self, anchor: Anchor, newest: Manifest) -> Manifest | None:
        """An earlier manifest; None when the newest, `newest` or a later one, does not keep it any more.

        Raises StoreCorrupt, naming the file, when it is missing.
        """
        found = self.read_manifest(anchor.generation)
        newest = self.newest(newest) or newest
        if anchor not in newest.earlier:
            return None
        if found is None:
            path = self._manifests.path / _name(anchor.generation)
            raise StoreCorrupt.of(path, f"is missing and was kept for versions {anchor.first} to {anchor.last}")
        return found

    def write_manifest(self, manifest: Manifest, part: "NewPart | None" = None) -> bool:
        """Write it durably unless its generation is taken; whether that was free.

        Raises FileNotFoundError when the one before it is not there.

        Args:
            part: what it names and may not be durable yet; it is before the manifest appears.
        """
        name = _name(manifest.generation)
        draft = self._manifests.draft(manifest.dump())
        try:
            if part is not None:
                part.wait()
            if manifest.generation > 1:  # else somebody took it away: then what this one names may be gone too
                (self._manifests.path / _name(manifest.generation - 1)).stat()
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        return self._manifests.publish(draft, name)

    def prepare(self, newest: Manifest) -> None:
        """Beside what comes next: have names ready, and remove the manifests that were superseded long enough ago.

        Only for the store's writer. Another may have followed meanwhile: it keeps none of those either.
        """
        stay = {anchor.generation for anchor in newest.earlier}
        stay_from = newest.generation - SUPERSEDED_MANIFESTS_KEPT

        def prepare() -> None:
            with contextlib.suppress(OSError):  # next time
                self._parts[FRAGMENTS].prepare(PART_SUFFIX)
                for generation in self.generations():
                    if generation < stay_from and generation not in stay:
                        self._manifests.delete(_name(generation))

        self._beside(prepare)

    def close(self) -> None:
        """Remove what was prepared."""
        self._beside.close()
        with contextlib.suppress(OSError):
            self._parts[FRAGMENTS].tidy()

    def sync_manifests(self) -> None:
        self._manifests.sync()

    def begin_part(self, kind: str, rows: pa.Table, version: int) -> "NewPart":
        return NewPart(self._parts[kind], rows, version, self._beside)

    def read_part(self, kind: str, part: Part) -> pa.Table:
        """The part's rows with store_version, memory-mapped on a local disk. FileNotFoundError when it is gone."""
        path = self.part_path(kind, part)
        length = path.stat().st_size
        if length != part.bytes:
            raise StoreCorrupt.of(path, f"has {length} bytes where its manifest says {part.bytes}")
        try:
            with pa.memory_map(str(path)) if self._maps else pa.OSFile(str(path)) as file:
                table = pa.ipc.open_file(file).read_all()
        except (pa.ArrowException, OSError, ValueError) as error:
            if (
                isinstance(error, OSError) and error.errno is not None
            ):  # the system's, not Arrow's of what is in the file
                raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
            raise StoreCorrupt.of(path, f"is not an Arrow file: {error}") from error
        if kind == FRAGMENTS:
            table = table.append_column("store_version", pa.array(np.full(table.num_rows, part.version)))
        if table.schema != SNAPSHOT_SCHEMA or table.num_rows != part.rows:
            raise StoreCorrupt.of(path, "does not hold what its manifest says")
        if any(column.null_count for column in table.columns):
            raise StoreCorrupt.of(path, "has nulls where rows of scores have none")
        return table

    def check_part(self, kind: str, part: Part) -> None:
        """Every byte against the manifest's checksum. Raises StoreCorrupt, FileNotFoundError."""
        self.read_part(kind, part)
        path, digest = self.part_path(kind, part), xxhash.xxh3_128()
        with open(path, "rb") as file:
            while some := file.read(READ_BYTES):
                digest.update(some)
        if digest.hexdigest() != part.xxh3_128:
            raise StoreCorrupt.of(path, "does not match its checksum in the manifest")

    def part_path(self, kind: str, part: Part) -> Path:
        return self._parts[kind].path / part.name

    def collect(self, newest: Manifest, grace_s: float) -> bool:
        """Remove the files that were found unneeded `grace_s` ago; and note which are, for the writers that follow.

        The grace is for readers that are about to open what an older manifest named. Only the store's writer may
        collect, and not while it writes: what it has begun to write is not named yet. Time is by the clock of whoever
        writes. Where the notes cannot be written (OSError), what had to go is gone.

        Returns: False, with nothing removed, when `newest` is not the newest any more. A successor's files that are
        listed here came after its manifest, and so before that is looked for.
        """
        self._names = {anchor.generation: self._named_by(anchor, newest) for anchor in newest.earlier}
        named = names_of(newest).union(*self._names.values())
        there = {(kind, name) for kind, folder in self._parts.items() for name in folder.names()}
        found = {f"{kind}/{name}" for kind, name in there - named if PART_NAME.fullmatch(name)}
        found |= {f"manifests/{name}" for name in self._manifests.temporary_names()} | {*self._root.temporary_names()}
        if self.newest(newest) is not newest:
            return False
        noted, now = self._noted() if self._unneeded is None else self._unneeded, time.time()
        since = {path: min(noted.get(path, now), now) for path in found}
        self._unneeded = {path: when for path, when in since.items() if now - when < grace_s}
        for path in found - self._unneeded.keys():
            self._root.delete(path)
        if self._unneeded != noted:
            self._root.put(NOTES, orjson.dumps(self._unneeded))
        return True

    def _named_by(self, anchor: Anchor, newest: Manifest) -> Names:
        known = self._names.get(anchor.generation)
        if known is None:  # None again: a successor has let it go
            known = names_of(manifest) if (manifest := self.read_kept(anchor, newest)) else frozenset()
        return known

    def _noted(self) -> dict[str, float]:
        """What was found unneeded, by path, and when it first was (seconds since 1970); nothing without whole notes."""
        try:
            noted = orjson.loads(self._root.read(NOTES))
            return {path: since for path, since in noted.items() if isinstance(since, float)}
        except (FileNotFoundError, ValueError, AttributeError):
            return {}


def names_of(manifest: Manifest) -> Names:
    """Folder and name of its parts."""
    return frozenset((kind, part.name) for kind, part in manifest.parts())


class NewPart:
    """A part in the making, which no manifest names yet. Another thread writes it."""

    def __init__(self, folder: Folder, rows: pa.Table, version: int, beside: Beside) -> None:
        self._folder, self._rows, self._version = folder, rows.num_rows, version
        self._name = folder.new_name(PART_SUFFIX)
        self._data = data = arrow_file(rows)
        self.wait = beside(lambda: folder.fill(self._name, data))
        """Waits until it is durable."""
        time.sleep(0)  # lets the other thread begin

    def part(self) -> Part:
        """How a manifest names it."""
        return Part(self._name, self._rows, self._data.size, _checksum(self._data), self._version)

    def give_up(self) -> None:
        """Remove it: nothing will name it."""
        with contextlib.suppress(OSError):  # `collect` finds it
            self.wait()
        with contextlib.suppress(OSError):
            self._folder.delete(self._name)


def _name(generation: int) -> str:
    return f"{generation:012d}.json"


def _checksum(data: "bytes | pa.Buffer") -> str:
    return xxhash.xxh3_128_hexdigest(data)


def _description_sum(description: Mapping[str, Any]) -> str:
    return _checksum("{format} {num_samples} {scoring_id}".format_map(description).encode())


def _check_format(description: Mapping[str, Any], name: str) -> None:
    found = description["format"]
    if not isinstance(found, int) or found != FORMAT:
        is_older = isinstance(found, int) and found < FORMAT
        raise StoreMismatch(
            f"{name} has format {found}, and this steppe reads {FORMAT}",
            fix="score the run again" if is_older else "install a newer steppe",
            key=name,
        )
