"""The score store's files: names, manifests, checks, and the collection of what nobody needs.

The format is written down in `shared.score_store`.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import secrets
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from shared.errors import StoreCorrupt, StoreError, StoreMismatch
from shared.schema import SNAPSHOT_SCHEMA, arrow_file
from shared.storage import Folder

FORMAT = 1
COLLECT_AFTER_S = 60.0  # a reader may still be opening what a manifest of this age names


@dataclasses.dataclass(frozen=True)
class Part:
    """A fragment or snapshot as a manifest names it; `version` is the store version that it brings one up to."""

    name: str
    rows: int
    bytes: int
    sha256: str
    version: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What the store holds at one generation.

    `rows` counts all rows ever committed, `metadata` is the writer's, `takes_over` marks a writer's first.
    """

    generation: int
    version: int
    writer: str
    committed_at: str
    rows: int
    snapshot: Part | None
    fragments: tuple[Part, ...]
    metadata: Mapping[str, Any]
    takes_over: bool = False

    @property
    def base_version(self) -> int:
        return self.snapshot.version if self.snapshot else 0

    def dump(self) -> bytes:
        body = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps({**body, "checksum": _checksum(body)}, indent=1).encode()

    @classmethod
    def parse(cls, data: bytes, name: str) -> "Manifest":
        """Raises StoreCorrupt for a torn or altered manifest, StoreMismatch for one of a newer format."""
        try:
            body = json.loads(data)
            written = body.pop("checksum")
            found = _checksum(body)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise StoreCorrupt(f"{name} is not a whole manifest: {error}") from error
        if written != found:
            raise StoreCorrupt(f"{name} does not match its checksum; restore the file or take the store from a copy")
        _check_format(body, name)
        del body["format"]
        snapshot = body.pop("snapshot")
        fragments = tuple(Part(**part) for part in body.pop("fragments"))
        return cls(**body, snapshot=Part(**snapshot) if snapshot else None, fragments=fragments)


class StoreFiles:
    """The store's files: names, checks and the collection of what nobody needs."""

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self._root = Folder(uri)
        self.path = self._root.path
        self._manifests = Folder(self.path / "manifests")
        self._parts = {name: Folder(self.path / name) for name in ("fragments", "snapshots")}

    def create(self, num_samples: int, scoring_id: str) -> None:
        for folder in (self._root, self._manifests, *self._parts.values()):
            folder.make()
        wanted = {"format": FORMAT, "num_samples": num_samples, "scoring_id": scoring_id}
        if not self._root.create("store.json", json.dumps(wanted).encode()):
            found = self.describe()
            for key in ("num_samples", "scoring_id"):
                if found[key] != wanted[key]:
                    raise StoreMismatch(
                        f"{self.path} holds scores with {key} {found[key]!r}, asked for {wanted[key]!r}; use a new run"
                    )

    def describe(self) -> dict[str, Any]:
        path = self.path / "store.json"
        try:
            description: dict[str, Any] = json.loads(self._root.read("store.json"))
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
        name = _name(generation)
        try:
            return Manifest.parse(self._manifests.read(name), str(self._manifests.path / name))
        except FileNotFoundError:
            return None

    def write_manifest(self, manifest: Manifest) -> bool:
        return self._manifests.create(_name(manifest.generation), manifest.dump())

    def write_part(self, kind: str, stem: str, rows: pa.Table, version: int) -> Part:
        data = arrow_file(rows)
        name = f"{stem}-{secrets.token_hex(3)}.arrow"
        self._parts[kind].put(name, data)
        return Part(name, rows.num_rows, data.size, hashlib.sha256(data).hexdigest(), version)

    def read_part(self, kind: str, part: Part) -> pa.Table:
        """The part's rows, memory-mapped, with store_version. FileNotFoundError when it was collected."""
        path = self._parts[kind].path / part.name
        length = path.stat().st_size
        if length != part.bytes:
            raise StoreCorrupt(f"{path} has {length} bytes, its manifest says {part.bytes}")
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except FileNotFoundError:
            raise
        except (pa.ArrowInvalid, OSError) as error:
            raise StoreCorrupt(f"{path}: {error}") from error
        if kind == "fragments":
            table = table.append_column("store_version", pa.array(np.full(table.num_rows, part.version)))
        if table.schema != SNAPSHOT_SCHEMA or table.num_rows != part.rows:
            raise StoreCorrupt(f"{path} does not hold what its manifest says")
        return table

    def collect(self, oldest_version: int) -> None:
        """Remove manifests that time travel to `oldest_version` does not need, and files that no needed one names.

        Of the manifests with one snapshot the last is enough: it names all fragments since. Manifests of takeovers stay
        for ever: they are what an old writer, however late, finds in its place.
        """
        manifests = [m for m in map(self.read_manifest, self.generations()) if m is not None]
        last_of_base = {m.base_version: m.generation for m in manifests}
        next_base = dict(itertools.pairwise(sorted(last_of_base)))
        needed = []
        for manifest in manifests:
            base = manifest.base_version
            is_needed = manifest.generation == last_of_base[base] and next_base.get(base, math.inf) > oldest_version
            if is_needed or self._is_young(self._manifests, _name(manifest.generation)):
                needed.append(manifest)
            elif not manifest.takes_over:
                self._manifests.delete(_name(manifest.generation))
        named = {part.name for m in needed for part in (*m.fragments, *([m.snapshot] if m.snapshot else []))}
        for folder in self._parts.values():
            for name in folder.names():
                if name not in named and not self._is_young(folder, name):
                    folder.delete(name)
        for folder in (self._root, self._manifests, *self._parts.values()):
            for name in folder.temporary_names():
                if not self._is_young(folder, name):
                    folder.delete(name)

    @staticmethod
    def _is_young(folder: Folder, name: str) -> bool:
        try:
            return time.time() - (folder.path / name).stat().st_mtime <= COLLECT_AFTER_S
        except FileNotFoundError:
            return False


def _name(generation: int) -> str:
    return f"{generation:012d}.json"


def _check_format(description: Mapping[str, Any], name: str) -> None:
    found = description["format"]
    if not isinstance(found, int) or found > FORMAT:
        raise StoreMismatch(f"{name} has format {found}; this steppe reads up to {FORMAT}: install a newer one")


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
