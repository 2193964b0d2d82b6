"""`steppe store`: verify names what is damaged, stats adds up, compact folds and keeps every answer."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from deploy.cli import app
from deploy.config import RunConfig
from shared.catalogue import Run
from shared.errors import RunError, StoreError
from shared.samples import Images
from shared.score_store import ScoreReader, ScoreWriter
from shared.store_check import verify
from tests.raising import refuses
from tests.rows import make_rows
from tests.stores import named

N = 5


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A snapshot of versions 1 and 2, and two fragments after it."""
    images = Images(np.zeros((N, 1, 2, 2), np.uint8), np.zeros(N, np.int64), white=1, num_classes=2)
    config = RunConfig().model_dump(mode="json")
    run = Run.create(tmp_path / "runs" / "one", dataset_fingerprint="f", train=images, config=config, scoring_id="s")
    with ScoreWriter(run.scores_uri, N, scoring_id="s") as writer:
        for version in (1, 2, 3, 4):
            writer.append(make_rows([0, version], version))
            writer.commit()
            if version == 2:
                writer.compact()
    return run


def store(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["store", *map(str, arguments)])


def parts(run: Run) -> list[Path]:
    """The files of the newest version, the snapshot first."""
    return named(run.scores_uri, "snapshots") + named(run.scores_uri, "fragments")[-2:]


def test_a_whole_store_is_whole(run: Run) -> None:
    found = store("verify", run.path)

    assert (found.exit_code, found.stdout) == (0, f"{run.scores_uri} is whole\n")
    assert json.loads(store("verify", run.path, "--json").stdout) == []


@pytest.mark.parametrize("index", range(3))
def test_one_bit_in_any_file_is_found(run: Run, index: int) -> None:
    path = parts(run)[index]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    found = store("verify", run.path)

    assert found.exit_code == 1
    assert str(path) in found.stdout
    assert found.stdout.endswith(f"{run.scores_uri}: files that are damaged: 1\n")
    assert [problem["file"] for problem in json.loads(store("verify", run.path, "--json").stdout)] == [str(path)]


def test_missing_and_torn_files_are_named(run: Run) -> None:
    snapshot, fragment, other = parts(run)
    snapshot.unlink()
    fragment.write_bytes(fragment.read_bytes()[:-1])
    told: list[tuple[int, int]] = []
    problems = verify(run.scores_uri, lambda done, total: told.append((done, total)))

    assert {problem.file for problem in problems} == {str(snapshot), str(fragment)}
    assert all("restore it from a copy" in problem.problem for problem in problems)
    assert told[-1][0] == told[-1][1] >= other.stat().st_size


def test_kept_versions_are_verified_too(run: Run) -> None:
    """Version 1 is in fragments that only the kept manifest of that time names."""
    first = named(run.scores_uri, "fragments")[0]
    first.unlink()

    assert ScoreReader(run.scores_uri).version == 4
    assert [problem.file for problem in verify(run.scores_uri)] == [str(first)]


def test_a_kept_manifest_that_is_gone_is_named_beside_other_damage(run: Run) -> None:
    (anchor,) = json.loads(max((run.scores_uri / "manifests").iterdir()).read_bytes().partition(b"\n")[0])["earlier"]
    path = run.scores_uri / "manifests" / f"{anchor['generation']:012d}.json"
    path.unlink()
    (snapshot,) = (run.scores_uri / "snapshots").iterdir()
    snapshot.write_bytes(b"")

    problems = verify(run.scores_uri)
    assert [problem.file for problem in problems] == [str(path), str(snapshot)]
    assert problems[0].problem.startswith(f"{path} is missing and was kept for versions 0 to 2; restore")


@pytest.mark.parametrize("name", ["store.json", "manifests"])
def test_what_says_what_there_is_to_verify_may_be_damaged_itself(run: Run, name: str) -> None:
    path = run.scores_uri / name
    path = path if path.is_file() else max(path.iterdir())
    path.write_bytes(path.read_bytes()[:-9])

    found = store("verify", run.path, "--json")
    assert found.exit_code == 1
    assert [problem["file"] for problem in json.loads(found.stdout)] == [str(path)]


def test_stats_add_up(run: Run) -> None:
    found = json.loads(store("stats", run.path, "--json").stdout)
    files = [path for kind in ("fragments", "snapshots") for path in (run.scores_uri / kind).iterdir()]

    assert {name: found[name] for name in ("store_version", "rows_committed", "snapshot_version", "snapshot_rows")} == {
        "store_version": 4,
        "rows_committed": 8,
        "snapshot_version": 2,
        "snapshot_rows": 3,
    }
    assert (found["fragments"], found["fragment_rows"], found["earlier_versions"]) == (2, 4, [[0, 2]])
    assert found["bytes"] == sum(path.stat().st_size for path in files)
    assert found["bytes"] == found["bytes_newest"] + found["bytes_earlier"] + found["bytes_unneeded"]
    assert f"store version       {4}" in store("stats", run.path).stdout


def test_compact_folds_and_changes_no_answer(run: Run) -> None:
    before = ScoreReader(run.scores_uri)
    found = json.loads(store("compact", run.path, "--json").stdout)

    assert (found["before"]["fragments"], found["after"]["fragments"]) == (2, 0)
    after = ScoreReader(run.scores_uri)
    assert (after.version, after.table()) == (4, before.table())
    assert after.table(1).num_rows == 2
    assert "0 fragments folded" in store("compact", run.path).stdout


def test_a_run_that_is_up_is_left_alone(run: Run) -> None:
    with run.locked():
        found = store("compact", run.path)

    assert isinstance(found.exception, RunError)
    assert found.exception.key == str(run.path)
    assert "steppe down" in found.exception.fix


def test_without_a_store_there_is_nothing_to_verify(run: Run, tmp_path: Path) -> None:
    images = Images(np.zeros((N, 1, 2, 2), np.uint8), np.zeros(N, np.int64), white=1, num_classes=2)
    bare = Run.create(tmp_path / "bare", dataset_fingerprint="f", train=images, config={}, scoring_id="s")

    with refuses(StoreError, value=bare.scores_uri):
        verify(bare.scores_uri)
