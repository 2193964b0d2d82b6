"""The score store's files: names, manifests, checks, and the collection of what nobody needs.

The format is written down in `shared.score_store`.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from shared.errors import StoreCorrupt, StoreError, StoreMismatch
from shared.schema import SNAPSHOT_SCHEMA
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
    """What the store holds at one generation. `rows` counts all rows ever committed, `metadata` is the writer's."""

    generation: int
    version: int
    writer: str
    committed_at: str
    rows: int
    snapshot: Part | None
    fragments: tuple[Part, ...]
    metadata: Mapping[str, Any]

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
        except (ValueError, KeyError, AttributeError) as error:
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
        return [int(name.removesuffix(".json")) for name in self._manifests.names() if name.endswith(".json")]

    def newest(self, known: Manifest | None = None) -> Manifest | None:
        """The newest manifest; `known` itself when it still is."""
        while generations := self.generations():
            if known is not None and generations[-1] <= known.generation:
                return known
            if (manifest := self.read_manifest(generations[-1])) is not None:
                return manifest
        return known

    def read_manifest(self, generation: int) -> Manifest | None:
        name = f"{generation:012d}.json"
        try:
            return Manifest.parse(self._manifests.read(name), str(self._manifests.path / name))
        except FileNotFoundError:
            return None

    def write_manifest(self, manifest: Manifest) -> bool:
        return self._manifests.create(f"{manifest.generation:012d}.json", manifest.dump())

    def write_part(self, kind: str, stem: str, rows: pa.Table, version: int) -> Part:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, rows.schema) as file:
            file.write_table(rows.combine_chunks())
        data = sink.getvalue()
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
        except pa.ArrowInvalid as error:
            raise StoreCorrupt(f"{path}: {error}") from error
        if kind == "fragments":
            table = table.append_column("store_version", pa.array(np.full(table.num_rows, part.version)))
        if table.schema != SNAPSHOT_SCHEMA or table.num_rows != part.rows:
            raise StoreCorrupt(f"{path} does not hold what its manifest says")
        return table

    def collect(self, current: Manifest, oldest_version: int) -> None:
        """Remove manifests that time travel to `oldest_version` does not need, then the files that no manifest names.

        Of the manifests with one snapshot the last is enough: it names all fragments since.
        """
        last_of_base: dict[str | None, Manifest] = {}
        spare: list[Manifest] = []
        for generation in self.generations():
            if (manifest := self.read_manifest(generation)) is None:
                continue
            key = manifest.snapshot.name if manifest.snapshot else None
            if key in last_of_base:
                spare.append(last_of_base[key])
            last_of_base[key] = manifest
        spare += [m for m in last_of_base.values() if m.version < oldest_version]
        for manifest in spare:
            if manifest.generation != current.generation:
                self._delete_old(self._manifests, f"{manifest.generation:012d}.json")
        kept = [m for m in map(self.read_manifest, self.generations()) if m is not None]
        named = {part.name for m in kept for part in (*m.fragments, *([m.snapshot] if m.snapshot else []))}
        for folder in self._parts.values():
            for name in folder.names():
                if name not in named:
                    self._delete_old(folder, name)

    @staticmethod
    def _delete_old(folder: Folder, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            if time.time() - (folder.path / name).stat().st_mtime > COLLECT_AFTER_S:
                folder.delete(name)


def _check_format(description: Mapping[str, Any], name: str) -> None:
    found = description["format"]
    if not isinstance(found, int) or found > FORMAT:
        raise StoreMismatch(f"{name} has format {found}; this steppe reads up to {FORMAT}: install a newer one")


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
