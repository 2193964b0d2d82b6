import json
import os
import stat
from pathlib import Path

import numpy as np

from shared.catalogue import Run, newest_run
from shared.errors import ConfigError, RunError
from shared.samples import Images
from tests.raising import refuses

TRAIN = Images(np.zeros((3, 1, 2, 2), dtype=np.uint8), np.array([7, 0, 7]), white=255, num_classes=8)


def create(path: Path | str, config: dict[str, object] | None = None) -> Run:
    return Run.create(path, dataset_fingerprint="abc", train=TRAIN, config=config or {}, scoring_id="s1")


def test_created_run_is_the_one_opened(tmp_path: Path) -> None:
    create(tmp_path / "runs" / "first", {"train": {"epochs": 3}})
    run = Run(tmp_path / "runs" / "first")

    assert run.num_samples == 3
    assert run.scores_uri == tmp_path / "runs" / "first" / "scores"
    assert run.samples().to_pydict() == {
        "sample_id": [0, 1, 2],
        "key": ["0", "1", "2"],
        "label": [7, 0, 7],
        "clean_label": [None, None, None],
        "domain": [None, None, None],
    }
    created = run.description
    assert (created["run_id"], created["scoring_id"], created["config"]) == ("first", "s1", {"train": {"epochs": 3}})


def test_samples_of_noisy_data_keep_their_keys_and_clean_labels(tmp_path: Path) -> None:
    train = TRAIN.select(np.array([2, 0])).relabelled(np.array([1, 7]))
    run = Run.create(tmp_path, dataset_fingerprint="abc", train=train, config={}, scoring_id="s1")
    samples = run.samples()

    assert samples.drop_columns("domain").to_pydict() == {
        "sample_id": [0, 1],
        "key": ["2", "0"],
        "label": [1, 7],
        "clean_label": [7, 7],
    }
    assert samples.schema == create(tmp_path / "clean").samples().schema
    assert [str(samples.schema.field(name).type) for name in ("clean_label", "domain")] == ["int64", "string"]


def test_second_run_in_a_folder_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    first = create(tmp_path / "run").description

    with refuses(RunError, str(tmp_path / "run")):
        create(tmp_path / "run", {"other": 1})
    assert Run(tmp_path / "run").description == first


def test_other_data_set_is_refused(tmp_path: Path) -> None:
    run = create(tmp_path)
    run.check_dataset("abc")

    with refuses(RunError, str(tmp_path), "abd"):
        run.check_dataset("abd")


def test_token_is_new_each_time_and_for_this_user_only(tmp_path: Path) -> None:
    run = create(tmp_path)
    assert run.token() is None
    (tmp_path / "token").write_text("left over, readable by all")
    umask = os.umask(0)
    try:
        tokens = [run.create_token(), run.create_token()]
    finally:
        os.umask(umask)

    assert len(set(tokens)) == 2
    assert min(map(len, tokens)) >= 32
    assert Run(tmp_path).token() == tokens[1]
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600


def test_files_of_the_run(tmp_path: Path) -> None:
    run = create(tmp_path)

    assert run.read("runtime.json") is None
    run.write("runtime.json", {"pid": 1})
    run.write("runtime.json", {"pid": 2})
    assert run.read("runtime.json") == {"pid": 2}
    run.remove("runtime.json")
    run.remove("runtime.json")
    assert run.read("runtime.json") is None


def test_newest_run_is_the_last_created_whatever_its_name_or_file_times(tmp_path: Path) -> None:
    for name, created_at in (("b", "2026-01-02"), ("c", "2026-01-03"), ("a", "2026-01-01")):
        description = create(tmp_path / name).description | {"created_at": f"{created_at}T00:00:00+00:00"}
        (tmp_path / name / "run.json").write_text(json.dumps(description))
    (tmp_path / "no run").mkdir()

    assert newest_run(tmp_path).path == tmp_path / "c"


def test_later_run_is_newer(tmp_path: Path) -> None:
    create(tmp_path / "b")
    create(tmp_path / "a")

    assert newest_run(tmp_path).path == tmp_path / "a"


def test_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    for root in (tmp_path, tmp_path / "nowhere"):
        with refuses(RunError, str(root)):
            newest_run(root)
    with refuses(RunError, str(tmp_path), "run.json"):
        Run(tmp_path)
    for unwritable in (tmp_path / "file", tmp_path / "file" / "run"):
        with refuses(RunError, str(unwritable)):
            create(unwritable)
    with refuses(ConfigError, "s3://bucket/run"):
        create("s3://bucket/run")


def test_damaged_description_is_named(tmp_path: Path) -> None:
    create(tmp_path)
    (tmp_path / "run.json").write_text('{"run_id": "x')

    with refuses(RunError, str(tmp_path / "run.json")):
        Run(tmp_path)


def test_newest_run_prefers_one_that_is_up(tmp_path: Path) -> None:
    """A short second start must not hide the run that is still going."""
    up = create(tmp_path / "up")
    up.write("runtime.json", {"url": "http://127.0.0.1:1"})
    create(tmp_path / "later")

    assert newest_run(tmp_path).path == up.path
    up.remove("runtime.json")
    assert newest_run(tmp_path).path == tmp_path / "later"
