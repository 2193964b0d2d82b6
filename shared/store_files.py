"""The score store's files: names, manifests, checks, and the collection of what nobody needs.

The format is written down in `shared.score_store`.
"""

import contextlib
import dataclasses
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import xxhash

from shared.errors import StoreCorrupt, StoreError, StoreMismatch
from shared.schema import SNAPSHOT_SCHEMA, arrow_file
from shared.storage import Folder, is_mappable

FORMAT = 2
SUPERSEDED_MANIFESTS_KEPT = 8  # a listing may miss names that come and go while it is made, but not so many
READ_BYTES = 1 << 24
FRAGMENTS, SNAPSHOTS = "fragments", "snapshots"


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
            raise StoreCorrupt(f"{name} does not match its checksum; restore the file or take the store from a copy")
        try:
            body = orjson.loads(text)
            _check_format(body, name)
            del body["format"]
            body["snapshot"] = Part(**body["snapshot"]) if body["snapshot"] else None
            body["fragments"] = tuple(Part(**part) for part in body["fragments"])
            body["earlier"] = tuple(Anchor(**anchor) for anchor in body["earlier"])
            return cls(**body)
        except (ValueError, KeyError, TypeError) as error:
            raise (
                error if isinstance(error, StoreMismatch) else StoreCorrupt(f"{name} is not a manifest: {error}")
            ) from error


class StoreFiles:
    """The store's files: names, checks and the collection of what nobody needs."""

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self._root = Folder(uri)
        self.path = self._root.path
        self._manifests = Folder(self.path / "manifests")
        self._parts = {name: Folder(self.path / name) for name in (FRAGMENTS, SNAPSHOTS)}
        self._maps = is_mappable(self.path)
        self._unneeded: dict[tuple[str, str], float] = {}  # folder and name -> since when, by time.monotonic

    def create(self, num_samples: int, scoring_id: str) -> None:
        for folder in (self._root, self._manifests, *self._parts.values()):
            folder.make()
        wanted = {"format": FORMAT, "num_samples": num_samples, "scoring_id": scoring_id}
        if not self._root.create("store.json", orjson.dumps(wanted)):
            self._root.sync()  # whoever created it may not have come to that
            found = self.describe()
            for key in ("num_samples", "scoring_id"):
                if found[key] != wanted[key]:
                    raise StoreMismatch(
                        f"{self.path} holds scores with {key} {found[key]!r}, asked for {wanted[key]!r}; use a new run"
                    )

    def describe(self) -> dict[str, Any]:
        path = self.path / "store.json"
        try:
            description: dict[str, Any] = orjson.loads(self._root.read("store.json"))
            _check_format(description, str(path))
            description["num_samples"], description["scoring_id"]
        except FileNotFoundError:
            raise StoreError(f"no score store at {self.path}; a ScoreWriter creates one") from None
        except (ValueError, KeyError, TypeError) as error:
            raise (error if isinstance(error, StoreMismatch) else StoreCorrupt(f"{path}: {error}")) from error
        return description

    def generations(self) -> list[int]:
        stems = [name.removesuffix(".json") for name in self._manifests.names() if name.endswith(".json")]
        return [int(stem) for stem in stems if stem.isdecimal()]

    def newest(self, known: Manifest | None = None) -> Manifest | None:
        """The newest manifest; `known` itself when it still is."""
        while generations := self.generations():
            if known is not None and generations[-1] <= known.generation:
                return known
            if (manifest := self.read_manifest(generations[-1])) is not None:
                return manifest
        return known

    def read_manifest(self, generation: int) -> Manifest | None:
        """None when there is none, or none any more."""
        name = _name(generation)
        try:
            return Manifest.parse(self._manifests.read(name), str(self._manifests.path / name))
        except FileNotFoundError:
            return None

    def write_manifest(self, manifest: Manifest, after: Callable[[], None] | None = None) -> bool:
        """Whether it counts: its generation was free, and none newer is there.

        The second matters to a writer that slept while its successors went on and removed what lay in its place.

        Args:
            after: waits until all that the manifest names is durable.
        """
        superseded = manifest.generation - SUPERSEDED_MANIFESTS_KEPT - 1
        is_kept = any(anchor.generation == superseded for anchor in manifest.earlier)
        with contextlib.nullcontext() if is_kept else self._manifests.dropping(_name(superseded)):
            if not self._manifests.create(_name(manifest.generation), manifest.dump(), after):
                return False
            if self.generations()[-1] > manifest.generation:
                self._manifests.delete(_name(manifest.generation))
                return False
            return True

    def sync_manifests(self) -> None:
        self._manifests.sync()

    def begin_part(self, kind: str, rows: pa.Table, version: int) -> tuple[Part, Callable[[], None]]:
        """Begin to write a part, and what waits until it is durable."""
        data = arrow_file(rows)
        name = f"{version:012d}-{secrets.token_hex(8)}.arrow"
        wait = self._parts[kind].add(name, data)
        return Part(name, rows.num_rows, data.size, _checksum(data), version), wait

    def read_part(self, kind: str, part: Part) -> pa.Table:
        """The part's rows with store_version, memory-mapped on a local disk. FileNotFoundError when it is gone."""
        path = self.part_path(kind, part)
        length = path.stat().st_size
        if length != part.bytes:
            raise StoreCorrupt(f"{path} has {length} bytes, its manifest says {part.bytes}")
        try:
            with pa.memory_map(str(path)) if self._maps else pa.OSFile(str(path)) as file:
                table = pa.ipc.open_file(file).read_all()
        except FileNotFoundError:
            raise
        except (pa.ArrowInvalid, OSError) as error:
            raise StoreCorrupt(f"{path}: {error}") from error
        if kind == FRAGMENTS:
            table = table.append_column("store_version", pa.array(np.full(table.num_rows, part.version)))
        if table.schema != SNAPSHOT_SCHEMA or table.num_rows != part.rows:
            raise StoreCorrupt(f"{path} does not hold what its manifest says")
        return table

    def check_part(self, kind: str, part: Part) -> None:
        """Every byte against the manifest's checksum. Raises StoreCorrupt, FileNotFoundError."""
        path = self.part_path(kind, part)
        digest = xxhash.xxh3_128()
        with open(path, "rb") as file:
            while some := file.read(READ_BYTES):
                digest.update(some)
        if digest.hexdigest() != part.xxh3_128:
            raise StoreCorrupt(f"{path} does not match its checksum in the manifest")
        self.read_part(kind, part)

    def part_path(self, kind: str, part: Part) -> Path:
        return self._parts[kind].path / part.name

    def collect(self, needed: Iterable[Manifest], newest: Manifest, grace_s: float) -> None:
        """Remove manifests that do not count any more, and files that no needed manifest has named for `grace_s`.

        The grace is for readers that are about to open what an older manifest named. Only the store's writer may
        collect, and not while it writes: what it has begun to write is not named yet.
        """
        needed = list(needed)
        generations = {manifest.generation for manifest in needed}
        for generation in self.generations():
            superseded = generation <= newest.generation - SUPERSEDED_MANIFESTS_KEPT
            if superseded and generation not in generations:
                self._manifests.delete(_name(generation))
        named = {(kind, part.name) for manifest in (*needed, newest) for kind, part in manifest.parts()}
        there = {(kind, name) for kind, folder in self._parts.items() for name in folder.names()} - named
        for kind, folder in (("", self._root), ("manifests", self._manifests), *self._parts.items()):
            there |= {(kind, name) for name in folder.temporary_names()}
        now = time.monotonic()
        self._unneeded = {key: self._unneeded.get(key, now - self._age(*key, newest)) for key in there}
        for (kind, name), since in self._unneeded.items():
            if now - since >= grace_s:
                Folder(self.path / kind).delete(name)

    def _age(self, kind: str, name: str, newest: Manifest) -> float:
        """Seconds for which a file that is found unneeded for the first time has been so, at least."""
        paths = [self.path / kind / name]
        if newest.snapshot and not name.startswith("."):  # when this snapshot came at the latest
            paths.append(self.path / SNAPSHOTS / newest.snapshot.name)
        try:
            return max(time.time() - max(path.stat().st_mtime for path in paths), 0.0)
        except FileNotFoundError:
            return 0.0


def _name(generation: int) -> str:
    return f"{generation:012d}.json"


def _checksum(data: "bytes | pa.Buffer") -> str:
    return xxhash.xxh3_128_hexdigest(data)


def _check_format(description: Mapping[str, Any], name: str) -> None:
    found = description["format"]
    if not isinstance(found, int) or found > FORMAT:
        raise StoreMismatch(f"{name} has format {found}; this steppe reads {FORMAT}: install a newer one")
    if found < FORMAT:
        raise StoreMismatch(f"{name} has format {found}; this steppe reads {FORMAT}: score the run again")
