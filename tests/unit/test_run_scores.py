"""A run for notebooks: one table of samples and scores, and other libraries on the same files."""

from pathlib import Path

import duckdb
import numpy as np
import polars
import pyarrow.dataset
import pytest

from shared import open_run, store_check
from shared.catalogue import Run
from shared.errors import ConfigError, DataError, RunError, StoreError
from shared.samples import Images
from shared.score_store import ScoreWriter
from tests.raising import refuses
from tests.rows import make_rows

LABELS = np.array([1, 0, 1, 0])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Samples 2 and 0 are scored at version 1, and 2 again at version 2; all but the last are in a snapshot."""
    images = Images(np.zeros((4, 1, 2, 2), np.uint8), LABELS, white=1, num_classes=2)
    run = Run.create(tmp_path / "run", dataset_fingerprint="f", train=images, config={}, scoring_id="s")
    with ScoreWriter(run.scores_uri, 4, scoring_id="s") as writer:
        writer.append(make_rows([0, 2], 1, margin=np.array([0.0, 1.0])))
        writer.commit()
        writer.compact()
        writer.append(make_rows([2], 2, margin=2.0))
    return run


def test_every_sample_has_a_row(run: Run) -> None:
    table = open_run(run.path).to_arrow()

    assert table.column("sample_id").to_pylist() == [0, 1, 2, 3]
    assert table.column("label").to_pylist() == LABELS.tolist()
    assert table.column("margin").to_pylist() == [0.0, None, 2.0, None]
    assert table.column("loss").to_pylist() == pytest.approx([np.log(2), None, np.log1p(np.exp(2)), None])
    assert table.column("adm").to_pylist() == pytest.approx([np.tanh(0.5), None, np.tanh(0.5), None])


def test_measures_are_columns_by_their_names(run: Run) -> None:
    table = open_run(run.path).to_arrow(measures=["gap", "el2n"])

    assert {"gap", "el2n"} < set(table.column_names)
    assert "adm" not in table.column_names
    with refuses(ConfigError, "measures", "'instability'") as caught:
        open_run(run.path).to_arrow(measures=["instability"])
    assert " adm," in caught.value.fix
    assert "instability" not in caught.value.fix
    with refuses(ConfigError, "measure", "'admm'"):
        open_run(run.path).to_arrow(measures=["admm"])


def test_a_data_frame_is_indexed_by_sample(run: Run) -> None:
    frame = open_run(run.path).to_pandas()

    assert frame.index.name == "sample_id"
    assert frame.loc[2, "model_version"] == 2
    assert frame["loss"].isna().tolist() == [False, True, False, True]


def test_history_has_a_row_for_each_version(run: Run) -> None:
    history = open_run(run.path).history(2)

    assert history.column("model_version").to_pylist() == [1, 2]
    assert history.column("margin").to_pylist() == [1.0, 2.0]
    assert history.column("loss").to_pylist() == pytest.approx([np.log1p(np.e), np.log1p(np.exp(2))])
    with refuses(DataError, "sample_id", 4):
        open_run(run.path).history(4)


def test_it_follows_the_run(run: Run) -> None:
    opened = open_run(run.path)
    with ScoreWriter(run.scores_uri, 4, scoring_id="s") as writer:
        writer.append(make_rows([3], 3))

    assert opened.to_arrow().column("model_version").to_pylist() == [1, None, 2, None]
    assert opened.refresh() == 3
    assert opened.to_arrow().column("model_version").to_pylist() == [1, None, 2, 3]
    assert repr(opened) == f"<run {run.path}: 4 samples, store version 3>"


def test_what_is_no_run_and_what_has_no_scores_is_named(run: Run, tmp_path: Path) -> None:
    with refuses(RunError, str(tmp_path)):
        open_run(tmp_path)
    images = Images(np.zeros((1, 1, 2, 2), np.uint8), LABELS[:1], white=1, num_classes=2)
    bare = Run.create(tmp_path / "bare", dataset_fingerprint="f", train=images, config={}, scoring_id="s")
    with refuses(StoreError, str(bare.scores_uri)):
        open_run(bare.path)


def test_polars_and_duckdb_read_a_snapshot_as_it_lies(run: Run) -> None:
    with ScoreWriter(run.scores_uri, 4, scoring_id="s") as writer:
        writer.compact()
    snapshot = store_check.stats(run.scores_uri)["snapshot_file"]

    by_polars = (
        polars.scan_ipc(snapshot).filter(polars.col("margin") > 1).select("sample_id", "model_version").collect()
    )
    snapshot_rows = pyarrow.dataset.dataset(snapshot, format="arrow")  # noqa: F841  named in the query
    by_duckdb = duckdb.sql("select sample_id, model_version from snapshot_rows where margin > 1").fetchall()

    assert by_polars.rows() == by_duckdb == [(2, 2)]
