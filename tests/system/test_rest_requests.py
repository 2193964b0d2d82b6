"""The REST service under requests that its own description makes, and under a writer that never rests."""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.client import Client, facts
from shared.catalogue import Run
from shared.errors import DataError
from tests.raising import refuses
from tests.rest import (
    SAMPLES,
    TOKEN,
    ask,
    committing,
    controller_of,
    make_run,
    score_some,
    serving,
)

REQUESTS = 400


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run")


@pytest.fixture
def scored(run: Run) -> Run:
    score_some(run)
    return run


@pytest.fixture
def url(scored: Run) -> Iterator[str]:
    with controller_of(scored) as controller, serving(scored, fleet=controller) as url:
        yield url


def delete(run: Run) -> None:
    shutil.rmtree(run.scores_uri)


def make_newer(run: Run) -> None:
    """Of a format that this steppe does not know."""
    path = run.scores_uri / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 3}))


def damage(run: Run) -> None:
    for path in (run.scores_uri / "fragments").iterdir():
        path.unlink()  # to shorten what a reader has mapped would end that reader's process: SIGBUS
        path.write_bytes(b"")
    os.utime(run.scores_uri / "store.json", (0, 0))  # so that it is opened anew


def test_answers_are_as_described(url: str) -> None:
    seen = ask(url, REQUESTS)

    assert seen["200"] > REQUESTS / 10
    assert seen["422"] > REQUESTS / 20
    assert seen["404"] > 0


def test_answers_are_as_described_while_the_store_is_empty(run: Run) -> None:
    with controller_of(run) as controller, serving(run, fleet=controller) as url:
        ask(url, REQUESTS // 4)


def test_answers_are_as_described_while_the_store_is_written_and_compacted(scored: Run) -> None:
    with serving(scored) as url, committing(scored):
        seen = ask(url, REQUESTS // 4, is_well=False)  # there are no scorers

    assert seen["503"] <= seen["GET /v1/scorers"] + seen["PATCH /v1/scorers"]


@pytest.mark.parametrize("change", [delete, make_newer, damage])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_answers_are_as_described_of_a_store_that_cannot_be_read(
    scored: Run, change: Callable[[Run], None], when: str
) -> None:
    if when == "before":
        change(scored)
    with serving(scored) as url:
        if when == "meanwhile":
            assert Client(url).sample(0)["status"] == "fresh"
            change(scored)
        seen = ask(url, REQUESTS // 8, is_well=False)

    assert seen["503"] > 10


def test_a_samples_folder_that_is_gone_is_a_problem(scored: Run) -> None:
    (scored.path / "samples.arrow").unlink()
    with serving(scored) as url:
        assert ask(url, REQUESTS // 8, is_well=False)["503"] > 10


def test_pages_of_a_cursor_and_every_answer_belong_to_one_version(scored: Run) -> None:
    """Commit v brings all samples, with margin v: an answer that mixed two versions would hold two margins."""
    versions = set()
    with serving(scored) as url, committing(scored), Client(url) as client:
        done = threading.Event()

        def stats_without_end() -> None:
            with Client(url) as other:
                while not done.is_set():
                    other.stats()

        beside = threading.Thread(target=stats_without_end)
        beside.start()
        try:
            while len(versions) < 20:
                pages = list(client.pages(measure="margin", limit=17))
                assert len({facts(page)["store_version"] for page in pages}) == 1
                ids = [i for page in pages for i in page.column("sample_id").to_pylist()]
                assert sorted(ids) == list(range(SAMPLES))
                versions.add(facts(pages[0])["store_version"])
                if facts(pages[0])["store_version"] <= 3:
                    continue
                assert len({v for page in pages for v in page.column("value").to_pylist()}) == 1
                many = client.scores(range(SAMPLES), "margin")
                assert len(set(many.column("value").to_pylist())) == 1
                assert set(many.column("value").to_pylist()) == set(many.column("model_version").to_pylist())
                table = client.snapshot()
                assert set(table.column("store_version").to_pylist()) == {facts(table)["version"]}
                assert len(set(table.column("margin").to_pylist())) == 1
                one = client.sample(7, measure="margin")
                assert one["value"] == one["model_version"] == one["measures"]["margin"]
        finally:
            done.set()
            beside.join()


def test_deltas_lead_from_one_snapshot_to_the_next(scored: Run) -> None:
    with serving(scored) as url, Client(url) as client:
        table = client.snapshot(compression="zstd")
        known = {row["sample_id"]: row for row in table.to_pylist()}
        sizes, versions = set(), set()
        with committing(scored, share=0.02):
            while len(versions) < 20:
                since = facts(table)["version"]
                table = client.snapshot(since=since, store=facts(table)["store"])
                known |= {row["sample_id"]: row for row in table.to_pylist()}
                versions.add(facts(table)["version"])
                sizes.add(table.num_rows)
                assert all(version > since for version in table.column("store_version").to_pylist())

        assert [known[i] for i in sorted(known)] == client.snapshot(version=facts(table)["version"]).to_pylist()
        assert max(sizes) > 0
        assert min(sizes) < SAMPLES
        with refuses(DataError, value=10**9):
            client.snapshot(since=10**9)


def test_the_client_scales_with_the_token_alone(scored: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEPPE_TOKEN", raising=False)
    with controller_of(scored) as controller, serving(scored, fleet=controller) as url:
        assert Client(url, token=TOKEN).scale(2)["wanted"] == 2
        monkeypatch.setenv("STEPPE_TOKEN", TOKEN)
        assert Client(url).scale(3)["wanted"] == 3
        assert controller.status()["wanted"] == 3
