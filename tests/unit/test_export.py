"""`steppe export`: what it prints and writes, from a real run folder."""

import csv
import errno
import io
import json
import os
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from deploy.cli import app
from shared.catalogue import Run
from shared.errors import ConfigError, RunError, SteppeError, StoreError
from shared.samples import Images
from shared.schema import arrow_file
from shared.score_store import ScoreWriter
from tests.rows import make_rows

READERS = {
    "parquet": pq.read_table,
    "arrow": lambda path: pa.ipc.open_file(pa.memory_map(str(path))).read_all(),
    "csv": pyarrow.csv.read_csv,
    "json": lambda path: pa.Table.from_pylist(json.loads(path.read_text())["scores"]),
}
ROOT = Path(__file__).parents[2]
SUSPECTS = [3, 1]
COLUMNS = ["sample_id", "key", "label", "predicted", "loss", "margin", "percentile", "adm", "model_version", "step"]


def make_run(folder: Path, samples: int = 4, clean: list[int | None] | None = None) -> Run:
    """Every label is 0; keys look like markup to rich, and hold what CSV must quote."""
    images = Images(np.zeros((samples, 1, 2, 2), np.uint8), np.zeros(samples, np.int64), white=1, num_classes=2)
    run = Run.create(folder, dataset_fingerprint="f", train=images, config={}, scoring_id="s")
    key, known = [f'a,"[b]{i}' for i in range(samples)], pa.array(clean or [None] * samples, pa.int64())
    table = pa.table({"sample_id": range(samples), "key": key, "label": images.label_N, "clean_label": known})
    (run.path / "samples.arrow").write_bytes(arrow_file(table))
    return run


def commit(run: Run, *tables: pa.Table) -> None:
    with ScoreWriter(run.scores_uri, run.num_samples, scoring_id="s") as writer:
        for table in tables:
            writer.append(table)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Samples 3 and 1 look mislabelled, 0 does not, 2 is unscored; 3 is mislabelled indeed."""
    run = make_run(tmp_path / "runs" / "one", clean=[0, 0, 0, 1])
    commit(run, make_rows([0, 1, 3], 2, margin=np.array([-1.0, 1.0, 2.0]), predicted=np.array([0, 1, 1])))
    return run


def export(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)], catch_exceptions=False)

    assert result.exit_code == 0
    return result.stdout


def refused(*arguments: object) -> SteppeError:
    """What a command that fails and prints nothing raises, for one line with a fix."""
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])

    assert isinstance(result.exception, SteppeError)
    assert (result.output, str(result.exception).count("\n")) == ("", 0)
    assert result.exception.fix
    return result.exception


def test_table_shows_the_suspects_and_what_is_known_of_the_list(run):
    lines = export(run.path, "--suspects").splitlines()

    assert [line.split() for line in lines[:3]] == [
        ["id", "key", "label", "predicted", "loss", "percentile", "adm", "version", "clean"],
        ["3", 'a,"[b]3', "0", "1", "2.1269", "0.8333", "0.4621", "2", "1"],
        ["1", 'a,"[b]1', "0", "1", "1.3133", "0.5000", "0.4621", "2", "0"],
    ]
    assert lines[3:] == [
        "2 of 3 scored samples look mislabelled (66.7%), by loss at store version 1",
        "against the 3 clean labels that are known, 1 of them different: "
        "precision 0.5000, recall 1.0000, AUC of the ranking 1.0000",
    ]


@pytest.mark.parametrize(("arguments", "shown"), [((), 20), (("--limit", 22), 22), (("--limit", 99), 25)])
def test_table_is_cut_and_says_so(tmp_path, arguments, shown):
    run = make_run(tmp_path / "run", 30)
    commit(run, make_rows(range(25), margin=3.0, predicted=1))
    lines = export(run.path, "--suspects", *arguments).splitlines()
    ids = [int(line.split()[0]) for line in lines[1 : shown + 1]]

    assert ids == list(range(shown))
    assert lines[shown + 1].startswith("25 of 25 scored samples")
    assert lines[shown + 2 :] == ([f"shown: the {shown} most suspicious; more with --limit"] if shown < 25 else [])


def test_table_without_suspects_is_one_line(tmp_path):
    run = make_run(tmp_path / "run")
    commit(run, make_rows([0, 1]))

    assert export(run.path, "--suspects") == (
        "0 of 2 scored samples look mislabelled (0.0%), by loss at store version 1\n"
    )


def test_json_is_one_object_whose_facts_are_of_the_whole_list(run):
    found = json.loads(export(run.path, "--suspects", "--format", "json", "--limit", 1))

    assert [row["sample_id"] for row in found.pop("suspects")] == SUSPECTS[:1]
    assert "less likely than chance" in found.pop("meaning")
    assert found == {
        "run": "one",
        "store_version": 1,
        "measure": "loss",
        "scored": 3,
        "found": 2,
        "share": pytest.approx(2 / 3),
        "quality": {"precision": 0.5, "recall": 1.0, "auc": 1.0, "mislabelled": 1, "known": 3},
    }


def test_json_says_null_where_no_clean_label_is_known(tmp_path):
    run = make_run(tmp_path / "run")
    commit(run, make_rows([0]))
    found = json.loads(export(run.path, "--suspects", "--format", "json"))

    assert (found["suspects"], found["quality"]) == ([], None)


def test_csv_reads_back_as_the_json_rows(run):
    text = export(run.path, "--suspects", "--format", "csv")
    rows = json.loads(export(run.path, "--suspects", "--format", "json"))["suspects"]

    assert [row["key"] for row in rows] == ['a,"[b]3', 'a,"[b]1']
    assert list(rows[0]) == [*COLUMNS, "clean_label"]
    for read, row in zip(csv.DictReader(io.StringIO(text)), rows, strict=True):
        assert read.keys() == row.keys()
        assert read["key"] == row["key"]
        assert [float(read[name]) for name in row if name != "key"] == pytest.approx(
            [value for name, value in row.items() if name != "key"]
        )


@pytest.mark.parametrize("form", ["parquet", "arrow", "csv", "json"])
def test_all_samples_come_with_what_is_known_of_them(run, tmp_path, form):
    """Sample 2 is unscored: it has nulls, not zeros."""
    out = tmp_path / f"all.{form}"
    said = export(run.path, "--out", out)
    table = READERS[form](out)

    assert said == f"wrote 4 scores to {out}\n"
    assert table.column("sample_id").to_pylist() == [0, 1, 2, 3]
    assert table.column("key").to_pylist() == [f'a,"[b]{i}' for i in range(4)]
    assert table.column("clean_label").to_pylist() == [0, 0, 0, 1]
    assert table.column("margin").to_pylist() == [-1, 1, None, 2]
    assert table.column("loss").to_pylist() == pytest.approx([0.3132617, 1.3132617, None, 2.126928])
    assert table.column("model_version").to_pylist() == [2, 2, None, 2]


def test_the_first_samples_are_shown_as_a_table(run):
    lines = export(run.path, "--limit", 3).splitlines()

    assert [line.split() for line in lines[:4]] == [
        ["id", "key", "label", "predicted", "loss", "adm", "version"],
        ["0", 'a,"[b]0', "0", "0", "0.3133", "0.4621", "2"],
        ["1", 'a,"[b]1', "0", "1", "1.3133", "0.4621", "2"],
        ["2", 'a,"[b]2', "0", "-", "-", "-", "-"],
    ]
    assert lines[4:] == [
        "3 of 4 samples are scored, at store version 1",
        "shown: the first 3; more with --limit, all of them with --out FILE",
    ]


def test_arrow_file_holds_rows_and_facts(run, tmp_path):
    export(run.path, "--suspects", "--out", tmp_path / "found.arrow")
    table = pa.ipc.open_file(pa.memory_map(str(tmp_path / "found.arrow"))).read_all()
    found = json.loads(export(run.path, "--suspects", "--format", "json"))

    assert table.to_pylist() == found.pop("suspects")
    assert json.loads(table.schema.metadata[b"steppe"]) == found


@pytest.mark.parametrize("form", ["csv", "json"])
def test_file_holds_what_stdout_shows(run, tmp_path, form):
    """In the format that its name ends in, unless told."""
    out = tmp_path / f"found.{form}"
    out.write_text("old" * 1000)
    said = export(run.path, "--suspects", "--out", out)
    export(run.path, "--suspects", "--out", tmp_path / "other.txt", "--format", form)

    assert said == f"wrote 2 suspects to {out}\n"
    assert out.read_text() == (tmp_path / "other.txt").read_text()
    assert out.read_text() == export(run.path, "--suspects", "--format", form)


def test_run_is_the_newest_below_root_unless_named(run, tmp_path):
    make_run(tmp_path / "elsewhere" / "two")

    assert json.loads(export("--suspects", "--format=json", "--root", tmp_path / "runs"))["run"] == "one"


def test_full_disk_leaves_the_old_file_and_no_other(run, tmp_path, monkeypatch):
    def full(*_: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out" / "found.csv"
    out.parent.mkdir()
    out.write_text("old")
    monkeypatch.setattr("shared.storage.os.fsync", full)
    error = refused(run.path, "--suspects", "--out", out)

    assert (type(error), error.key) == (ConfigError, "--out")
    assert os.strerror(errno.ENOSPC) in error.problem
    assert [(path.name, path.read_text()) for path in out.parent.iterdir()] == [("found.csv", "old")]


@pytest.mark.parametrize(
    ("arguments", "key", "value", "fix"),
    [
        (["--suspects", "--format", "xml"], "--format", "'xml'", "table, csv, json, arrow"),
        (["--suspects", "--format", "arrow"], "--out", "arrow", "--out"),
        (["--format", "parquet"], "--out", "parquet", "--out"),
        (["--suspects", "--format", "table", "--out", "a.txt"], "--format", "a.txt", "csv, json, arrow"),
        (["--suspects", "--out", "found.txt"], "--format", "found.txt", "csv or json"),
        (["--suspects", "--out", "found"], "--format", "found", "csv or json"),
        (["--suspects", "--out", "no/where/a.csv"], "--out", "no/where", "make it"),
        (["--suspects", "--out", "/dev/null", "--format", "csv"], "--out", "/dev/null", "file"),
        (["--suspects", "--out", ".", "--format", "csv"], "--out", " . ", "file"),
    ],
)
def test_what_cannot_be_exported_is_refused(run, tmp_path, monkeypatch, arguments, key, value, fix):
    monkeypatch.chdir(tmp_path)
    error = refused(run.path, *arguments)

    assert (type(error), error.key) == (ConfigError, key)
    assert value in error.problem
    assert fix in error.fix
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize("stored", [False, True], ids=["no store", "nothing committed"])
def test_unscored_run_is_named(tmp_path, stored):
    run = make_run(tmp_path / "run")
    if stored:
        commit(run)

    error = refused(run.path, "--suspects")
    assert (type(error), error.key) == (StoreError, str(run.scores_uri))


@pytest.mark.parametrize("content", [None, b"torn"], ids=["missing", "torn"])
def test_damaged_samples_are_named(run, content):
    (run.path / "samples.arrow").unlink()
    if content is not None:
        (run.path / "samples.arrow").write_bytes(content)

    error = refused(run.path, "--suspects")
    assert (type(error), error.key) == (RunError, str(run.path / "samples.arrow"))
