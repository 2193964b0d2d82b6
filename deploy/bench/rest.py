"""`steppe bench rest`: the REST service under load, beside bare Starlette with the same server in the same run.

Load comes from wrk, a process of its own. The bare application answers the same requests with answers made beforehand:
as bytes, and for many ids also as bare Starlette would answer them, by parsing the request and writing JSON.
"""

import contextlib
import json
import multiprocessing
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import orjson
import rich
from rich.table import Table

from deploy.bench.crash import make_rows
from services.client import Client
from shared.catalogue import Run
from shared.errors import ConfigError, ServiceError
from shared.samples import Images
from shared.score_store import Retention, ScoreWriter

NUM_SAMPLES = 1_000_000
BULK_IDS = 1000
CONNECTIONS = 16
SECONDS = 3  # of one load
COMMIT_ROWS = 8192
COMMITS_PER_S = 5
COMMITS_TO_A_COMPACTION = 15  # the writer's own rule would be 64
SNAPSHOTS = 9
POINT = """
request = function() return wrk.format("GET", "/v1/samples/" .. math.random(0, {last})) end
"""
POINT_BY_ROUTE = POINT.replace("{last}))", "{last}) .. '?measure=adm')")  # no shortcut is taken for it
PAUSES = "delay = function() return math.random(0, {most_ms}) end\n"  # so that about half of what it bears is asked
GZIPPED = 'wrk.headers["Accept-Encoding"] = "gzip"\n'
BULK = """
wrk.method, wrk.headers["Content-Type"] = "POST", "application/json"
bodies = {{}}
for i = 1, 64 do
  ids = {{}}
  for j = 1, {ids} do ids[j] = math.random(0, {last}) end
  bodies[i] = '{{"ids": [' .. table.concat(ids, ",") .. "]}}"
end
request = function() return wrk.format(nil, "/{path}", nil, bodies[math.random(1, 64)]) end
"""
UNITS_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}

Load = dict[str, float]


def measure(repeats: int) -> dict[str, Any]:
    """`repeats` rounds, each a load of every kind. Raises ConfigError without wrk."""
    if shutil.which("wrk") is None:
        raise ConfigError(
            "the load comes from wrk, which is not here", fix="install it: apt-get install wrk", key="wrk"
        )
    with tempfile.TemporaryDirectory(prefix="steppe-bench-") as place:
        return load(Path(place), repeats)


def load(place: Path, rounds: int, num_samples: int = NUM_SAMPLES, seconds: int = SECONDS) -> dict[str, Any]:
    """As `measure`, with a run below `place`."""
    images = Images(np.zeros((num_samples, 1, 1, 1), np.uint8), np.arange(num_samples) % 10, white=1, num_classes=10)
    run = Run.create(place / "run", dataset_fingerprint="", train=images, config={}, scoring_id="")
    with ScoreWriter(run.scores_uri, num_samples) as writer:
        writer.append(make_rows(np.arange(num_samples), 1))
        writer.commit()
        writer.compact()
    scripts = {
        "point": POINT.format(last=num_samples - 1),
        "bulk": BULK.format(last=num_samples - 1, ids=BULK_IDS, path="v1/scores:query"),
        "point_by_route": POINT_BY_ROUTE.format(last=num_samples - 1),
        "bulk_gzipped": GZIPPED + BULK.format(last=num_samples - 1, ids=BULK_IDS, path="v1/scores:query"),
        "bare_point": POINT.format(last=num_samples - 1),
        "bare_bulk": BULK.format(last=num_samples - 1, ids=BULK_IDS, path="v1/scores:query"),
        "bare_json_bulk": BULK.format(last=num_samples - 1, ids=BULK_IDS, path="json"),
    }
    paced = {
        "point_paced": PAUSES.format(most_ms=10) + scripts["point"],
        "bulk_paced": PAUSES.format(most_ms=60) + scripts["bulk"],
    }
    for name, script in (scripts | paced).items():
        (place / f"{name}.lua").write_text(script)
    found: dict[str, list[Load]] = {}

    def put_load(name: str, url: str, kept_as: str | None = None) -> None:
        found.setdefault(kept_as or name, []).append(_wrk(url, place / f"{name}.lua", seconds))

    with _process(_serve, run.path) as ours:
        sample, scores = _examples(ours, num_samples)
        with _process(_serve_bare, sample, scores) as bare:
            for _ in range(rounds):
                for name in scripts:
                    put_load(name, bare if name.startswith("bare") else ours)
        snapshot_ms = _snapshot_ms(ours, num_samples)
        for _ in range(rounds):
            put_load("point_paced", ours)
            put_load("bulk_paced", ours)
            with _process(_write, run.path):
                put_load("point_paced", ours, "point_paced_written")
                put_load("bulk_paced", ours, "bulk_paced_written")
    loads = {name: {key: round(median(one[key] for one in each), 3) for key in each[0]} for name, each in found.items()}
    return {
        "what": f"{num_samples:,} samples, {CONNECTIONS} connections, medians of {rounds} rounds of {seconds} s",
        "loads": loads,
        "point_to_bare": _ratio(found, "point", "bare_point"),
        "point_by_route_to_bare": _ratio(found, "point_by_route", "bare_point"),
        "bulk_gzipped_to_bare_json": _ratio(found, "bulk_gzipped", "bare_json_bulk"),
        "bulk_to_bare_json": _ratio(found, "bulk", "bare_json_bulk"),
        "bulk_to_bare_bytes": _ratio(found, "bulk", "bare_bulk"),
        "snapshot_ms": snapshot_ms,
        "point_p99_written_to_quiet": _ratio(found, "point_paced_written", "point_paced", "p99_ms"),
        "bulk_p99_written_to_quiet": _ratio(found, "bulk_paced_written", "bulk_paced", "p99_ms"),
    }


def show(found: Mapping[str, Any]) -> None:
    """A table of the loads, and what follows from them."""
    table = Table("load", "requests/s", "p50 ms", "p99 ms", title=str(found["what"]))
    for name, one in found["loads"].items():
        table.add_row(name, f"{one['per_s']:,.0f}", f"{one['p50_ms']:.2f}", f"{one['p99_ms']:.2f}")
    rich.print(table)
    for name, value in found.items():
        if name not in ("what", "loads", "bench"):
            rich.print(f"{name:28} {value}")


def _ratio(found: Mapping[str, list[Load]], name: str, other: str, key: str = "per_s") -> float:
    """The median of the rounds' ratios."""
    return round(median(a[key] / b[key] for a, b in zip(found[name], found[other], strict=True)), 3)


def _wrk(url: str, script: Path, seconds: int) -> Load:
    """Requests a second, and their latencies. Raises ConfigError for answers that are errors."""
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--latency", "-s", str(script), url]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in out or "Socket errors" in out:
        raise ConfigError(f"{url} did not bear the load: {out}", fix="measure again on a quiet machine", key=url)
    rate = re.search(r"Requests/sec:\s+([0-9.]+)", out)
    latency = {share: re.search(rf"{share}%\s+([0-9.]+)(us|ms|s)", out) for share in (50, 99)}
    if rate is None or None in latency.values():
        raise ConfigError(f"wrk says what this cannot read: {out}", fix="install another version of it", key="wrk")
    return {"per_s": float(rate[1])} | {
        f"p{share}_ms": float(match[1]) * UNITS_MS[match[2]] for share, match in latency.items() if match
    }


def _examples(url: str, num_samples: int) -> tuple[bytes, bytes]:
    """An answer about one sample and one about many."""
    ids = np.random.default_rng(0).integers(0, num_samples, BULK_IDS).tolist()
    with Client(url) as client:
        answers = client.get("/v1/samples/7"), client.post("/v1/scores:query", {"ids": ids})
    sample, scores = (orjson.dumps(answer) for answer in answers)
    return sample, scores


def _snapshot_ms(url: str, num_samples: int) -> float:
    """From the request to a pyarrow Table of all rows; the median."""
    taken = []
    with Client(url) as client:
        for _ in range(SNAPSHOTS):
            began = time.perf_counter()
            table = client.snapshot()
            taken.append(1e3 * (time.perf_counter() - began))
            if table.num_rows != num_samples:
                raise ConfigError(f"the snapshot has {table.num_rows} rows of {num_samples}", key=url)
    return round(median(taken), 1)


@contextlib.contextmanager
def _process(act: Any, *arguments: Any) -> Iterator[Any]:
    """Another process that does `act` until the end of the block; gives what it says first."""
    processes = multiprocessing.get_context("spawn")
    ours, theirs = processes.Pipe()
    process = processes.Process(target=act, args=(theirs, *arguments))
    process.start()
    theirs.close()
    try:
        yield ours.recv()
        if not process.is_alive():
            raise ServiceError(
                f"the process that should {act.__name__.strip('_')} ended with {process.exitcode}",
                fix="see above what it said",
            )
    finally:
        with contextlib.suppress(OSError):  # it is gone
            ours.send("end")
        process.join()


def _serve(pipe: Connection, folder: Path) -> None:
    from services.api import create_app

    _serve_until_told(pipe, create_app(Run(folder)))


def _serve_bare(pipe: Connection, sample: bytes, scores: bytes) -> None:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    content = json.loads(scores)

    async def point(_: Request) -> Response:
        return Response(sample, media_type="application/json")

    async def bulk(request: Request) -> Response:
        await request.body()
        return Response(scores, media_type="application/json")

    async def json_bulk(request: Request) -> Response:
        await request.json()
        return JSONResponse(content)

    routes = [
        Route("/v1/samples/{sample_id:int}", point),
        Route("/v1/scores:query", bulk, methods=["POST"]),
        Route("/json", json_bulk, methods=["POST"]),
    ]
    _serve_until_told(pipe, Starlette(routes=routes))


def _serve_until_told(pipe: Connection, app: Any) -> None:
    from services.server import Server

    server = Server(app, "127.0.0.1", 0)
    pipe.send(server.start())
    pipe.recv()
    server.stop()


def _write(pipe: Connection, folder: Path) -> None:
    """Commits and compacts until told."""
    with ScoreWriter(folder / "scores", Run(folder).num_samples, retention=Retention(8), grace_s=1.0) as writer:
        version, rows = int(writer.metadata.get("model_version", 1)), min(COMMIT_ROWS, writer.num_samples)
        blocks = np.random.default_rng().permutation(writer.num_samples)[: writer.num_samples // rows * rows]
        blocks = blocks.reshape(-1, rows)
        pipe.send("begun")
        while not pipe.poll(1 / COMMITS_PER_S):
            version += 1
            writer.append(make_rows(blocks[version % len(blocks)], version))
            writer.commit({"model_version": version})
            if version % COMMITS_TO_A_COMPACTION == 0:
                writer.compact()
