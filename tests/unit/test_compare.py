"""What a comparison does without training: its configuration, cells, search, epochs, and the time that is left."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from deploy.compare import cells
from deploy.compare import compare as module
from deploy.compare.cells import Cell, CellStore, Facts, make_cell
from deploy.compare.compare import compare, epochs_for, report_only
from deploy.compare.config import CompareConfig, stages
from deploy.compare.progress import Progress
from deploy.compare.report import to_text
from deploy.compare.workers import Workers
from deploy.config import RunConfig
from shared.config import make_config, read_config
from shared.errors import CellFailed, ConfigError, DataError, RunError, SteppeError
from tests.raising import refuses

BASE: dict[str, Any] = {
    "name": "tiny",
    "candidate": "adm",
    "controls": ["sam"],
    "seeds": 2,
    "search_seeds": 2,
    "base": {"train": {"epochs": 4}},
    "data": {"digits": {"validation": 300, "set": {}}},
    "method": {
        "sam": {"set": {"scoring.mode": "off"}, "search": {"train.sam.rho": [0.02, 0.05]}},
        "adm": {"like": "sam", "set": {"scoring.mode": "every_epoch"}},
    },
}


def configured(**changes: Any) -> CompareConfig:
    return make_config(CompareConfig, BASE | changes)


def methods(**added: Any) -> dict[str, Any]:
    return BASE["method"] | added


class Trained:
    """In place of trainings: accuracies by a function of the cell. Nothing is started, cells are written as ever."""

    def __init__(self, accuracy: Any) -> None:
        self._accuracy = accuracy
        self.trained: list[Cell] = []

    def train(self, store: CellStore, cells: Sequence[Cell], workers: Workers, cores: int, on_done: Any) -> None:
        for cell in cells:
            if store.result(cell) is None:
                self.trained.append(cell)
                store._folder.put(f"{cell.key}.json", json.dumps(self.facts(cell)).encode())
                on_done(cell, store.result(cell))

    def facts(self, cell: Cell) -> Facts:
        accuracy = self._accuracy(cell)
        if accuracy is None:
            return {"accuracy": None, "failed": "the loss is nan"}
        scored = 3 * (cell.config.train.epochs - 1) if cell.config.scoring.mode == "every_epoch" else 0
        return {
            "accuracy": accuracy,
            "seconds": 1.0,
            "seconds_per_epoch": 1.0,
            "forward_equivalents": 1437 * (6 * cell.config.train.epochs + scored),
            "fidelity": None,
            "age_versions_p50": None,
            "age_versions_p95": None,
        }


def _train_by(store: CellStore, fake: Trained, *given: Any) -> None:
    fake.train(store, *given)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Any:
    def by(accuracy: Any) -> Trained:
        fake = Trained(accuracy)
        monkeypatch.setattr(CellStore, "train", functools.partialmethod(_train_by, fake))
        monkeypatch.setattr(module._Comparison, "_plot", lambda *_: None)
        return fake

    return by


def rho(cell: Cell) -> float:
    return cell.config.train.sam.rho


def chosen(folder: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((folder / "settings.json").read_bytes())["chosen"]["digits"]
    return found


def test_toml_is_read_with_set_and_nested_sections(tmp_path: Path) -> None:
    path = tmp_path / "compare.toml"
    path.write_text(
        'name = "n"\ncandidate = "a"\ncontrols = ["b"]\n[base.train.sam]\nrho = 0.1\n[data.d]\nvalidation = 10\n'
        'set = { "data.name" = "digits" }\n[method.a]\nset = { "train.epochs" = 2 }\n[method.b]\nlike = "a"\n'
    )
    config = read_config(CompareConfig, path, ["seeds=3"])

    assert config.base == {"train": {"sam": {"rho": 0.1}}}
    assert config.data["d"].settings == {"data.name": "digits"}
    assert config.method["a"].settings == {"train.epochs": 2}
    assert config.seeds == 3


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"candidate": "adn"}, "candidate", "'adn'"),
        ({"controls": ["sam", "erm"]}, "controls", "'erm'"),
        ({"controls": ["adm"]}, "controls", "candidate, adm"),
        ({"controls": ["sam", "sam"]}, "controls", "sam, sam"),
        ({"equivalences": [{"a": "sam", "b": "asam"}]}, "equivalences", "'asam'"),
        ({"method": methods(x={"like": "y"})}, "method.x", "'y'"),
        (
            {"method": methods(x={"like": "y"}, y={"equal_compute": "x"}, z={"like": "x"})},
            "method.x",
            "x -> y -> x",
        ),
        ({"method": methods(z={"like": "x"}, x={"like": "x"})}, "method.x", ": x -> x"),
        ({"method": methods(x={"search": {"train.sam.rho": []}})}, "method.x.search.train.sam.rho", "[]"),
        ({"method": methods(x={"set": {"train.sam.rho": [1]}})}, "method.x.set.train.sam.rho", "[1]"),
        ({"method": methods(x={"set": {"train.seed": 3}})}, "method.x.set.train.seed", "first_seed"),
        ({"method": methods(x={"search": {"data.validation": [3]}})}, "method.x.search.data.validation", "search"),
        ({"base": {"data": {"noise_seed": 3}}}, "base.data.noise_seed", "seed"),
        ({"data": {"digits": {"validation": 9, "set": {"data.validation": 5}}}}, "data.digits.set.data.validation", ""),
        (
            {"method": methods(x={"equal_compute": "sam", "set": {"train.epochs": 3}})},
            "method.x.set.train.epochs",
            "equal_compute",
        ),
        (
            {"method": methods(x={"equal_compute": "sam", "search": {"train.epochs": [3]}})},
            "method.x.search.train.epochs",
            "equal_compute",
        ),
        ({"method": methods(x={"equal_compute": "sam"}, y={"like": "x"})}, "method.y.like", "x"),
        ({"data": {"digits": {"set": {}}}}, "data.digits.validation", "missing"),
        ({"seeds": 1}, "seeds", 1),
    ],
)
def test_what_cannot_work_is_refused_by_name(changes: dict[str, Any], key: str, value: object) -> None:
    with refuses(ConfigError, key, value):
        configured(**changes)


def test_for_an_unknown_key_of_a_method_the_nearest_is_proposed() -> None:
    with refuses(ConfigError, "method.x.sett") as caught:
        configured(method=methods(x={"sett": {}}))

    assert "method.x.set" in caught.value.fix


def test_stages_follow_what_methods_need() -> None:
    config = configured(method=methods(random={"like": "adm"}, plain={}, more={"like": "sam", "equal_compute": "adm"}))

    assert stages(config) == [["sam", "plain"], ["adm"], ["random", "more"]]


def test_two_cells_with_the_same_settings_have_one_key() -> None:
    base = {"run": {"root": "here"}}
    same = [make_cell("digits", name, 3, base, {"train.sam.rho": 0.1}) for name in ("a", "b")]
    others = [
        make_cell("digits", "a", 4, {}, {"train.sam.rho": 0.1}),
        make_cell("digits", "a", 3, {}, {"train.sam.rho": 0.2}),
        make_cell("digits", "a", 3, {}, {"train.sam.rho": 0.1, "data.label_noise": 0.2}),
    ]

    assert same[0].key == same[1].key == make_cell("digits", "a", 3, {}, {"train.sam.rho": 0.1}).key
    assert len({cell.key for cell in (*same, *others)}) == 4


def test_settings_reach_a_run_as_they_are_written() -> None:
    """Through TOML and back: texts beyond ASCII, exponents, booleans."""
    written = {"data.root": "/Bilder/🖼 „x“", "train.weight_decay": 1e-7, "train.sam.adaptive": True}
    config = make_cell("d", "m", 0, {}, written).config

    assert (config.data.root, config.train.weight_decay, config.train.sam.adaptive) == tuple(written.values())


def test_scorers_beside_the_training_take_a_core() -> None:
    slots = {mode: make_cell("d", "m", 0, {}, {"scoring.mode": mode}).slots for mode in ("off", "every_epoch", "async")}

    assert slots == {"off": 1, "every_epoch": 1, "async": 2}
    assert make_cell("d", "m", 0, {}, {"train.threads": 3}).slots == 4


def test_the_best_mean_on_validation_is_chosen_and_inherited(trained: Any, tmp_path: Path) -> None:
    """0.05 is best by seed 0 alone, 0.02 by the mean."""
    values = {(0.02, 0): 0.8, (0.02, 1): 0.8, (0.05, 0): 0.9, (0.05, 1): 0.6}
    fake = trained(lambda cell: values.get((rho(cell), cell.seed), 0.5))
    compare(configured(), tmp_path, "", 1, str)

    assert chosen(tmp_path) == {
        "sam": {"scoring.mode": "off", "train.sam.rho": 0.02},
        "adm": {"scoring.mode": "every_epoch", "train.sam.rho": 0.02},
    }
    assert {rho(cell) for cell in fake.trained if cell.seed >= 1000} == {0.02}


def test_of_equals_the_first_listed_is_chosen(trained: Any, tmp_path: Path) -> None:
    trained(lambda _: 0.5)
    compare(configured(), tmp_path, "", 1, str)

    assert chosen(tmp_path)["sam"]["train.sam.rho"] == 0.02


def test_a_diverged_trial_counts_as_nothing_right(trained: Any, tmp_path: Path) -> None:
    """0.02: 0.9 and diverged; 0.05: 0.5 twice."""
    trained(lambda cell: {(0.02, 0): 0.9, (0.02, 1): None}.get((rho(cell), cell.seed), 0.5))
    compare(configured(), tmp_path, "", 1, str)

    assert chosen(tmp_path)["sam"]["train.sam.rho"] == 0.05


def test_each_data_set_has_settings_of_its_own(trained: Any, tmp_path: Path) -> None:
    data = {"digits": {"validation": 300, "set": {}}, "few": {"validation": 300, "set": {"data.subset": 100}}}
    trained(lambda cell: rho(cell) if cell.data == "digits" else 1 - rho(cell))
    compare(configured(data=data), tmp_path, "", 1, str)
    found = json.loads((tmp_path / "settings.json").read_bytes())["chosen"]

    assert [found[name]["adm"]["train.sam.rho"] for name in ("digits", "few")] == [0.05, 0.02]


def test_the_search_sees_other_seeds_and_no_test_split(trained: Any, tmp_path: Path) -> None:
    fake = trained(lambda _: 0.5)
    compare(configured(), tmp_path, "", 1, str)
    seen = [(cell.config.data.validation, cell.config.train.seed) for cell in fake.trained]

    assert seen == [(300, 0), (300, 1)] * 2 + [(None, 1000), (None, 1001)] * 2


def test_a_diverged_final_run_is_said_and_in_no_mean(trained: Any, tmp_path: Path) -> None:
    trained(lambda cell: None if (cell.method, cell.seed) == ("adm", 1001) else 0.5)
    said: list[str] = []
    found = compare(configured(), tmp_path, "", 1, said.append)
    results = json.loads((tmp_path / "results.json").read_bytes())

    assert [row["n"] for row in found["tables"][0]["rows"]] == [2, 1]
    assert results["diverged"] == [{"data": "digits", "method": "adm", "seed": 1001, "reason": "the loss is nan"}]
    assert "Diverged, and in no mean: digits adm seed 1001." in to_text(found)
    assert "Unfinished" not in to_text(found)
    assert any("digits adm seed 1001: diverged: the loss is nan" in line for line in said)


def test_equal_compute_has_no_cost_when_all_diverged(trained: Any, tmp_path: Path) -> None:
    trained(lambda cell: None if cell.method == "adm" else 0.5)
    with refuses(ConfigError, "method.more.equal_compute", "adm on digits"):
        compare(configured(method=methods(more={"like": "sam", "equal_compute": "adm"})), tmp_path, "", 1, str)


def test_equal_compute_stays_as_settled_when_seeds_are_added(trained: Any, tmp_path: Path) -> None:
    """4 epochs of SAM with scores before three of them: 4 * 6 + 3 * 3 = 33 a sample, 5.5 epochs of SAM alone."""
    fake = trained(lambda _: 0.5)
    method = methods(more={"like": "sam", "equal_compute": "adm"})
    compare(configured(method=method), tmp_path, "", 1, str)
    assert json.loads((tmp_path / "epochs.json").read_bytes()) == {"digits": {"more": 6}}

    fake.trained.clear()
    (tmp_path / "epochs.json").write_text('{"digits": {"more": 7}}')
    compare(configured(method=method, seeds=3), tmp_path, "", 1, str)
    assert {(cell.method, cell.seed, cell.config.train.epochs) for cell in fake.trained} >= {
        ("sam", 1002, 4),
        ("adm", 1002, 4),
        ("more", 1002, 7),
    }


@pytest.mark.parametrize(
    ("settings", "cost", "epochs"),
    [
        ({"train.sam.rho": 0.05, "scoring.mode": "off"}, 6 * 100 * 7, 7),
        ({"train.sam.rho": 0.0, "scoring.mode": "off"}, 6 * 100 * 7, 14),
        ({"train.sam.rho": 0.05, "scoring.mode": "every_epoch"}, 100 * (6 * 7 + 3 * 6), 7),
        ({"train.sam.rho": 0.05, "scoring.mode": "off"}, 1.0, 1),
    ],
)
def test_epochs_for_a_cost(settings: dict[str, Any], cost: float, epochs: int) -> None:
    assert epochs_for(cost, make_cell("d", "m", 0, {}, settings).config, 100) == epochs


@pytest.mark.parametrize(
    ("changes", "kind", "key", "value", "cell"),
    [
        ({"base": {"train": {"epoch": 3}}}, ConfigError, "train.epoch", "", "sam on digits"),
        (
            {"method": methods(x={"search": {"train.sam.rho": [0.1, -1]}})},
            ConfigError,
            "train.sam.rho",
            -1,
            "x on digits",
        ),
        ({"data": {"d": {"validation": 1437, "set": {}}}}, DataError, "data.validation", 1437, "sam on d"),
        (
            {"data": {"d": {"validation": 9, "set": {"data.name": "fashion_mnist", "data.root": "/nowhere"}}}},
            DataError,
            "data.root",
            "/nowhere",
            "sam on d",
        ),
        ({"base": {"train": {"batch_size": 1400}}}, ConfigError, "train.batch_size", 1400, "sam on digits"),
        (
            {"method": methods(x={"equal_compute": "sam", "set": {"scoring.mode": "async"}})},
            ConfigError,
            "scoring.mode",
            "'async'",
            "x on digits",
        ),
    ],
)
def test_no_cell_is_trained_when_one_cannot_be(
    trained: Any,
    tmp_path: Path,
    changes: dict[str, Any],
    kind: type[SteppeError],
    key: str,
    value: object,
    cell: str,
) -> None:
    fake = trained(lambda _: 0.5)
    with refuses(kind, key, value) as caught:
        compare(configured(**changes), tmp_path, "", 1, str)

    assert cell in caught.value.problem
    assert not fake.trained


def test_other_images_are_refused(trained: Any, tmp_path: Path) -> None:
    trained(lambda _: 0.5)
    compare(configured(), tmp_path, "", 1, str)
    committed = json.loads((tmp_path / "settings.json").read_bytes())
    (tmp_path / "settings.json").write_text(json.dumps(committed | {"fingerprints": {"digits": "another"}}))

    with refuses(ConfigError, "data.digits", tmp_path / "settings.json"):
        compare(configured(), tmp_path, "", 1, str)


@pytest.mark.parametrize(("content", "value"), [("{", "line 1"), ("{}", "'of'")])
def test_a_damaged_commitment_is_refused(trained: Any, tmp_path: Path, content: str, value: str) -> None:
    fake = trained(lambda _: 0.5)
    (tmp_path / "settings.json").write_text(content)
    with refuses(ConfigError, str(tmp_path / "settings.json"), value):
        compare(configured(), tmp_path, "", 1, str)

    assert not fake.trained


def test_candidate_controls_and_labels_may_change_afterwards(trained: Any, tmp_path: Path) -> None:
    fake = trained(lambda _: 0.5)
    compare(configured(), tmp_path, "", 1, str)
    count = len(fake.trained)
    method = {name: spec | {"label": f"method {name}"} for name, spec in BASE["method"].items()}
    found = compare(configured(candidate="sam", controls=["adm"], method=method), tmp_path, "", 1, str)

    assert found["candidate_label"] == "method sam"
    assert len(fake.trained) == count
    assert found["changed"] == ["candidate (adm, now sam)", "controls (['sam'], now ['adm'])"]


@pytest.mark.parametrize(
    ("mode", "changes", "value"),
    [
        ("async", {}, None),
        ("async", {"coverage": 0.5}, "50%"),
        ("off", {"coverage": 0.0}, None),
        ("every_epoch", {"scored_rows": 200}, None),
        ("every_epoch", {"scored_rows": 199}, "199 of 200"),
        ("every_epoch", {"scored_rows": 150, "quarantined_rows": 50}, None),
    ],
)
def test_a_training_without_its_scores_is_no_result(
    tmp_path: Path, mode: str, changes: dict[str, Any], value: str | None
) -> None:
    (tmp_path / "run.json").write_text(
        json.dumps(
            {
                "run_id": "r",
                "num_samples": 100,
                "dataset_fingerprint": "d",
                "scoring_id": "s",
                "config": {},
                "created_at": "2026-01-02",
            }
        )
    )
    config = RunConfig.model_validate({"scoring": {"mode": mode}, "train": {"epochs": 3}})
    summary = {
        "coverage": 1.0,
        "scored_rows": 0,
        "quarantined_rows": 0,
        "run_folder": str(tmp_path),
    }

    if value is None:
        cells._check_scored(config, summary | changes)
    else:
        with refuses(CellFailed, "scoring.mode", value):
            cells._check_scored(config, summary | changes)


def test_nothing_to_report_before_the_settings_are_chosen(tmp_path: Path) -> None:
    with refuses(ConfigError, "settings.json", tmp_path / "none"):
        report_only(configured(), tmp_path / "none", "")

    assert not (tmp_path / "none").exists()


def test_nothing_to_report_before_a_final_run(trained: Any, tmp_path: Path) -> None:
    trained(lambda cell: 0.5 if cell.seed < 1000 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compare(configured(), tmp_path, "", 1, str)
    with refuses(ConfigError, "cells", tmp_path):
        report_only(configured(), tmp_path, "")


def test_time_left_counts_the_cores_that_have_a_cell(tmp_path: Path) -> None:
    """Of four cells of 60 s each: 3 * 60 / 2 after the first; with 8 cores the last ones still take a minute."""
    for cores, expected in ((2, ["about 2 min", "about 60 s", "about 60 s"]), (8, ["about 60 s"] * 3)):
        cells = [make_cell("digits", "sam", seed, {}, {"scoring.mode": "off"}) for seed in range(4)]
        said: list[str] = []
        progress = Progress("search", cells, CellStore(tmp_path), cores, said.append)
        for cell in cells:
            progress.done(cell, {"accuracy": 0.5, "seconds": 60.0})

        assert said[0] == "search: 4 trainings"
        assert [line.split("; ")[1] for line in said[1:-1]] == [f"{text} left" for text in expected]
        assert said[-1] == "search 4/4  digits sam seed 3: accuracy 0.5000 in 60 s"


def test_a_folder_at_work_is_refused(trained: Any, tmp_path: Path) -> None:
    trained(lambda _: 0.5)
    with (
        module._locked(tmp_path),
        refuses(RunError, str(tmp_path)),
    ):
        compare(configured(), tmp_path, "", 1, str)
