"""The sampler: exact counts, credit, resuming, freshness, and where its scores come from."""

import collections
import dataclasses
import io
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from shared.catalogue import Run
from shared.checkpoints import CheckpointPublisher
from shared.errors import ConfigError, StateError
from shared.samples import Images
from shared.score_store import ScoreReader, ScoreWriter
from tests.raising import refuses
from tests.ranks import in_threads
from tests.rows import make_rows
from trainer.comm import Comm
from trainer.curriculum import CURRICULA, Seen, find_policy
from trainer.feed import ScoreFeed, ScoreView
from trainer.loader import CurriculumLoader
from trainer.sampler import CurriculumSampler, DrawCounts, draw


@dataclasses.dataclass
class FixedScores:
    """Scores made here: percentiles, the versions that they are of, the newest published version, and margins."""

    percentile_N: npt.NDArray[np.float64]
    model_version_N: npt.NDArray[np.int64]
    newest: int = 1
    bound: int = 4
    margin_N: npt.NDArray[np.float32] | None = None

    def view(self) -> ScoreView:
        percentile_N, version_N = self.percentile_N.copy(), self.model_version_N.copy()
        return ScoreView(self.newest, percentile_N, version_N, self.bound, margin_N=self.margin_N).frozen()

    def newest_version(self) -> int:
        return self.newest


def graded(num_samples: int, newest: int = 1, version: int = 1) -> FixedScores:
    return FixedScores((np.arange(num_samples) + 0.5) / num_samples, np.full(num_samples, version), newest)


@dataclasses.dataclass
class Recorded:
    """A neutral policy that keeps what it is asked."""

    measure: str = "adm"
    trust: list[list[float]] = dataclasses.field(default_factory=list)
    loss: list[list[float]] = dataclasses.field(default_factory=list)
    progress: list[float] = dataclasses.field(default_factory=list)

    def weights(self, seen: Seen, progress: float) -> npt.NDArray[np.float64]:
        self.trust.append(seen.trust_N.tolist())
        self.loss.append(seen.loss_N.tolist())
        self.progress.append(progress)
        return np.ones(len(seen.percentile_N))


def take(sampler: CurriculumSampler, count: int) -> list[int]:
    return list(itertools.islice(sampler, count))


def assert_floor_or_ceil(drawn: npt.ArrayLike, expected_N: npt.NDArray[np.float64]) -> None:
    counts = np.bincount(np.asarray(drawn), minlength=len(expected_N))

    assert (counts >= np.floor(expected_N - 1e-6)).all()
    assert (counts <= np.ceil(expected_N + 1e-6)).all()


@pytest.mark.parametrize("num_samples", [1, 2, 7, 100, 1437])
@pytest.mark.parametrize("windows", [1, 3, 8, 200])
def test_uniform_epoch_is_a_permutation(num_samples: int, windows: int) -> None:
    sampler = CurriculumSampler(num_samples, None, "uniform", windows_per_epoch=windows)
    epochs = [list(sampler) for _ in range(4)]

    assert [sorted(epoch) for epoch in epochs] == [list(range(num_samples))] * 4
    if num_samples > 7:
        assert epochs[0] != epochs[1]
        assert (sampler.draws.unscored, sampler.draws.total) == (4 * num_samples, 4 * num_samples)


def test_no_scores_and_any_policy_is_uniform() -> None:
    sampler = CurriculumSampler(50, None, find_policy("soft", strength=5))

    assert sorted(sampler) == list(range(50))


def test_window_draws_floor_or_ceil_of_the_expected_count() -> None:
    scores = graded(60)
    policy = find_policy("soft", strength=2)
    p_N = np.exp(-4 * (scores.percentile_N - 0.5))
    for seed in range(30):
        sampler = CurriculumSampler(60, scores, policy, seed, windows_per_epoch=2)

        assert_floor_or_ceil(take(sampler, 30), 30 * p_N / p_N.sum())


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0])
def test_credit_sums_to_zero_and_frequencies_follow_the_weights(spread: float) -> None:
    """What was drawn never strays from what was due by more than a few draws, however long: no random walk."""
    rng = np.random.default_rng(3)
    p_N = np.exp(spread * rng.normal(size=50))
    credit_N, counts_N = np.zeros(50), np.zeros(50)
    for window in range(1, 501):
        ids, credit_N = draw(p_N, credit_N, 23, rng)
        counts_N += np.bincount(ids, minlength=50)

        assert len(ids) == 23
        assert abs(credit_N.sum()) < 1e-9
        assert np.abs(counts_N - 23 * window * p_N / p_N.sum()).max() < 4


def test_order_within_a_window_is_random() -> None:
    """Uniform, one window: each of 4 ids comes first in about a quarter of the seeds (1000 +- 5 sigma)."""
    first = collections.Counter(
        next(iter(CurriculumSampler(4, None, seed=seed, windows_per_epoch=1))) for seed in range(4000)
    )

    assert all(860 < first[sample_id] < 1140 for sample_id in range(4))


def test_neighbours_are_drawn_together() -> None:
    """Two of 4 alike: all six pairs come equally often (500 of 3000 +- 5 sigma); unshuffled, 0 and 1 never would."""
    rng = np.random.default_rng(0)
    pairs = collections.Counter(tuple(sorted(draw(np.ones(4), np.zeros(4), 2, rng)[0])) for _ in range(3000))

    assert sorted(pairs) == list(itertools.combinations(range(4), 2))
    assert all(398 < count < 602 for count in pairs.values())


def test_credit_is_paid_back_in_the_next_window() -> None:
    """Whoever waits in the first window is due in the second."""
    rng = np.random.default_rng(0)
    first, credit_N = draw(np.ones(6), np.zeros(6), 3, rng)
    second, credit_N = draw(np.ones(6), credit_N, 3, rng)

    assert sorted([*first, *second]) == list(range(6))
    assert np.abs(credit_N).max() < 1e-9


def test_window_of_a_million_reaches_every_id() -> None:
    """Weights 1.46 and 0.54 in turn: a float32 sum would draw the light ones thousands of times too often."""
    count = 1_000_000
    p_N = np.where(np.arange(count) % 2, 0.54, 1.46)
    ids, credit_N = draw(p_N, np.zeros(count), count, np.random.default_rng(1))

    assert_floor_or_ceil(ids, p_N)
    assert abs(credit_N.sum()) < 1e-3
    assert (ids % 2).sum() == pytest.approx(270_000, abs=1500)
    assert (ids >= count - 10_000).sum() == pytest.approx(10_000, abs=250)

    whole = np.fromiter(CurriculumSampler(count, None, "uniform", windows_per_epoch=1), dtype=np.int64)

    assert (np.sort(whole) == np.arange(count)).all()


@pytest.mark.parametrize("taken", [0, 5, 13, 100], ids=lambda n: f"after {n}")
def test_state_continues_with_the_same_draws(taken: int) -> None:
    """In another sampler, and twice in the same one; the saved state does not move meanwhile."""
    scores = graded(100)
    sampler = CurriculumSampler(100, scores, seed=4, epochs=5)
    take(sampler, taken)
    state = sampler.state_dict()
    expected = list(sampler) + list(sampler)

    fresh = CurriculumSampler(100, scores, seed=99, epochs=5)
    for resumed in (fresh, fresh, sampler):
        resumed.load_state_dict(state)

        assert len(resumed) == 100 - taken or taken == 100
        assert list(resumed) + list(resumed) == expected


def test_seed_decides_the_draws() -> None:
    draws = [list(CurriculumSampler(50, graded(50), seed=seed)) for seed in (1, 1, 2)]

    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ({"tempo": 1}, "tempo", "unknown fields ['tempo']"),
        ({"rng": ...}, "rng", "missing ['rng']"),
        ({"num_samples": 11}, "num_samples", 11),
    ],
    ids=["unknown", "missing", "size"],
)
def test_state_that_does_not_fit_is_refused(change: dict[str, Any], key: str, value: object) -> None:
    sampler = CurriculumSampler(10, None)
    take(sampler, 3)
    before = sampler.state_dict()
    state = {key: value for key, value in (sampler.state_dict() | change).items() if value is not ...}

    with refuses(StateError, key, value):
        sampler.load_state_dict(state)

    assert len(sampler) == 7
    assert sampler.state_dict()["window"].tolist() == before["window"].tolist()


def test_set_epoch_keeps_a_resumed_epoch_and_progress() -> None:
    sampler = CurriculumSampler(10, None, "uniform", epochs=4)
    first = take(sampler, 4)
    sampler.set_epoch(0)

    assert (len(sampler), sampler.progress) == (6, pytest.approx(0.1))
    assert sorted(first + list(sampler)) == list(range(10))
    assert (len(sampler), sampler.progress) == (10, 0.25)

    sampler.set_epoch(1)
    first = take(sampler, 4)
    sampler.set_epoch(3)

    assert len(first) == 4
    assert (len(sampler), sampler.progress) == (10, 0.75)
    assert len(list(sampler)) == 10
    assert sampler.progress == 1
    list(sampler)
    assert sampler.progress == 1


def test_epoch_after_a_jump_is_a_permutation_too() -> None:
    sampler = CurriculumSampler(100, None, "uniform")
    take(sampler, 30)
    sampler.set_epoch(7)

    assert sorted(sampler) == list(range(100))


def test_jump_under_a_live_iterator_does_not_hang_it() -> None:
    sampler = CurriculumSampler(20, None, "uniform")
    draws = iter(sampler)
    next(draws)
    sampler.set_epoch(2)

    assert len(list(draws)) <= 20
    assert len(sampler) == 20


def test_progress_is_that_of_the_window_and_0_without_epochs() -> None:
    for epochs, expected in ((2, [0, 0.25, 0.5, 0.75]), (None, [0] * 4)):
        policy = Recorded()
        sampler = CurriculumSampler(10, None, policy, epochs=epochs, windows_per_epoch=2)
        list(sampler)
        list(sampler)

        assert policy.progress == expected


@pytest.mark.parametrize(
    ("lookahead", "trust", "fresh", "stale", "unscored"),
    [
        (0, [1, 1, 1, 0.75, 0, 0], 3, 2, 1),
        (1, [1, 1, 0.75, 0.5, 0, 0], 2, 3, 1),
        (4, [1, 0.25, 0, 0, 0, 0], 1, 4, 1),
        (5, [0.75, 0, 0, 0, 0, 0], 0, 5, 1),
    ],
)
def test_no_draw_counts_as_fresh_beyond_the_bound(
    lookahead: int, trust: list[float], fresh: int, stale: int, unscored: int
) -> None:
    """Bound 4, newest version 20: ages 0, 3, 4, 5, 19 and unscored, each later by what the window may see published."""
    scores = FixedScores(np.full(6, 0.5), np.array([20, 17, 16, 15, 1, -1]), newest=20)
    policy = Recorded()
    sampler = CurriculumSampler(6, scores, policy, windows_per_epoch=1, lookahead_versions=lookahead)

    list(sampler)

    assert policy.trust == [trust]
    assert (sampler.draws.fresh, sampler.draws.stale, sampler.draws.unscored) == (fresh, stale, unscored)
    assert np.flatnonzero(sampler.draws.age_counts).tolist() == [age + lookahead for age in (0, 3, 4, 5, 19)]


def test_ages_rise_from_window_to_window() -> None:
    scores = graded(8)
    sampler = CurriculumSampler(8, scores, "uniform", windows_per_epoch=2)
    take(sampler, 4)
    scores.newest = 6
    list(sampler)

    assert (sampler.draws.fresh, sampler.draws.stale) == (4, 4)
    assert sampler.draws.age_counts.tolist() == [4, 0, 0, 0, 0, 4]
    assert [sampler.draws.age_quantile(q) for q in (0.25, 0.5, 0.9)] == [0, 0, 5]
    assert DrawCounts().age_quantile(0.5) is None


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ScoreWriter]:
    """Ids 0..29 of 40 scored at version 3, log_ratio rising with the id."""
    with ScoreWriter(tmp_path / "scores", 40) as writer:
        writer.append(make_rows(np.arange(30), model_version=3, log_ratio=np.arange(30.0), margin=-np.arange(30.0)))
        writer.commit({"staleness_bound": 2})
        yield writer


LOW_HALF = math.exp(0.5) / (1 + math.exp(0.5))  # of the default curriculum, b = 1/2


def test_a_named_policy_guards_by_the_classes_of_the_run_that_its_scores_are_of(tmp_path: Path) -> None:
    """A loss of 3 is worse than chance among 10 classes, and better among 100."""
    images = Images(np.zeros((100, 1, 1, 1), np.uint8), np.arange(100), white=1, num_classes=100)
    run = Run.create(tmp_path / "run", dataset_fingerprint="f", train=images, config={}, scoring_id="")
    with ScoreWriter(run.scores_uri, 100) as writer:
        writer.append(make_rows(np.arange(100), 1))
    percentile_N = (np.arange(100) + 0.5) / 100
    seen = Seen(percentile_N, np.ones(100), np.where(percentile_N < 0.4, 3.0, 0.0))
    expected = {k: find_policy("soft", num_classes=k).weights(seen, 0.5).tolist() for k in (10, 100)}

    def weights(scores: Any, **settings: Any) -> list[float]:
        found: list[float] = CurriculumSampler(100, scores, **settings).policy.weights(seen, 0.5).tolist()
        return found

    assert expected[10] != expected[100]
    with ScoreFeed(run.path, 100) as feed:
        for scores in (ScoreReader(run.scores_uri), run.scores_uri, feed):
            assert weights(scores) == expected[100]
    assert weights(run.scores_uri, num_classes=10) == expected[10]
    assert weights(None) == expected[10]
    assert weights(None, num_classes=100) == expected[100]


def low_share(sampler: CurriculumSampler, epochs: int = 40) -> float:
    """Share of the draws of ids 0..29 that are of ids 0..14."""
    ids = np.array([sample_id for _ in range(epochs) for sample_id in sampler])
    return float((ids < 15).sum() / (ids < 30).sum())


def test_reader_scores_are_used_and_followed(store: ScoreWriter, tmp_path: Path) -> None:
    """exp(-2 b (q - 1/2)) over q = (i + 1/2) / 30: the lower half weighs e^b / (1 + e^b). Version 9 ages the rest."""
    sampler = CurriculumSampler(40, ScoreReader(tmp_path / "scores"))

    assert low_share(sampler) == pytest.approx(LOW_HALF, abs=0.02)
    assert sampler.draws.stale == 0 < sampler.draws.unscored

    store.append(make_rows([39], model_version=9))
    store.commit()

    assert low_share(sampler) == pytest.approx(0.5, abs=0.03)
    assert sampler.draws.stale > 0


def test_measure_is_the_policys(store: ScoreWriter, tmp_path: Path) -> None:
    """Loss falls as log_ratio rises in these rows."""
    sampler = CurriculumSampler(40, ScoreReader(tmp_path / "scores"), find_policy("soft", measure="loss"))

    assert low_share(sampler) == pytest.approx(1 - LOW_HALF, abs=0.02)


def test_scores_by_another_measure_than_the_policys_are_refused(tmp_path: Path) -> None:
    with ScoreFeed(tmp_path, 40, "adm") as feed, refuses(ConfigError, "measure", "'adm', the policy wants 'loss'"):
        CurriculumSampler(40, feed, find_policy("soft", measure="loss"))


def test_a_policy_by_name_has_the_samplers_seed() -> None:
    """So that a random order is another one for each seed."""
    view = {"order": "random"}
    percentile_N = (np.arange(40) + 0.5) / 40
    what = Seen(percentile_N, np.ones(40), np.zeros(40))
    one, two = (find_policy("soft", seed=seed, **view).weights(what, 0.0) for seed in (1, 2))

    assert sorted(one) == pytest.approx(sorted(two))
    assert (one != two).any()


def test_feed_scores_are_used(store: ScoreWriter, tmp_path: Path) -> None:
    feed = ScoreFeed(tmp_path, 40, refresh_interval_s=3600, newest_version=lambda: 3)
    feed.close()
    feed.refresh()
    sampler = CurriculumSampler(40, feed)

    assert low_share(sampler) == pytest.approx(LOW_HALF, abs=0.02)


@pytest.mark.parametrize("form", ["batch_sampler", "sampler"])
def test_data_loader_gives_what_the_sampler_draws(form: str) -> None:
    """23 samples in batches of 5, two epochs: the last batch has the rest."""
    dataset = TensorDataset(torch.arange(23) * 10)
    sampler, twin = (CurriculumSampler(23, graded(23), seed=5) for _ in range(2))
    loader: DataLoader[Any] = (
        DataLoader(dataset, batch_sampler=BatchSampler(sampler, 5, drop_last=False))
        if form == "batch_sampler"
        else DataLoader(dataset, batch_size=5, sampler=sampler)
    )
    for _ in range(2):
        assert len(loader) == 5

        batches = [values.tolist() for (values,) in loader]

        assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
        assert [value // 10 for batch in batches for value in batch] == list(twin)


def test_policy_by_name() -> None:
    scores = graded(40)
    by_name, by_hand, default = (CurriculumSampler(40, scores, *p) for p in (["soft"], [find_policy("soft")], []))

    assert list(by_name) == list(by_hand) == list(default)
    assert sorted(CurriculumSampler(40, scores, "uniform")) == list(range(40))
    with refuses(ConfigError, "name", "'hard_first'") as caught:
        CurriculumSampler(40, scores, "hard_first")
    assert all(name in caught.value.fix for name in CURRICULA)


def test_policy_is_told_the_losses() -> None:
    """Of margins; without any, such as of scores that somebody else made, they are unknown."""
    told, untold = Recorded(), Recorded()
    scores = FixedScores(np.full(3, 0.5), np.array([1, 1, -1]), margin_N=np.array([0, 50, np.nan], dtype=np.float32))
    list(CurriculumSampler(3, scores, told, windows_per_epoch=1))
    list(CurriculumSampler(3, dataclasses.replace(scores, margin_N=None), untold, windows_per_epoch=1))

    assert told.loss == [pytest.approx([math.log(2), 50, math.nan], nan_ok=True)]
    assert untold.loss == [pytest.approx([math.nan] * 3, nan_ok=True)]


def test_memory_of_the_policy_is_that_of_a_readers_scores(store: ScoreWriter, tmp_path: Path) -> None:
    """The order turns round in version 4; with a memory of 0.9 the lower half stays first, on weights e^(1 - 2 q)."""
    samplers = [
        CurriculumSampler(40, ScoreReader(tmp_path / "scores"), find_policy("soft", memory=memory))
        for memory in (None, 0.9)
    ]
    store.append(make_rows(np.arange(30), model_version=4, log_ratio=-np.arange(30.0)))
    store.commit()
    forgetful, mindful = (low_share(sampler) for sampler in samplers)

    assert forgetful == pytest.approx(1 - LOW_HALF, abs=0.02)
    assert mindful > 0.6


# -- weights of the loss -----------------------------------------------------------------------------------------------


def weighting(num_samples: int, scores: FixedScores | None, **settings: Any) -> CurriculumSampler:
    return CurriculumSampler(
        num_samples, scores, find_policy("soft", strength=2), seed=3, form="weighting", **({"epochs": 4} | settings)
    )


@pytest.mark.parametrize("windows", [1, 3, 8])
def test_weighting_form_draws_every_sample_once_an_epoch(windows: int) -> None:
    sampler = weighting(50, graded(50), windows_per_epoch=windows)

    assert [sorted(sampler) for _ in range(3)] == [list(range(50))] * 3


def test_weights_of_the_loss_are_the_policys_with_mean_1() -> None:
    """v = exp(-4 (q - 1/2)), as the weights of the sampling form, fading from window to window."""
    scores = graded(50)
    sampler = weighting(50, scores, windows_per_epoch=2)

    assert sampler.loss_weights([0, 7]).tolist() == [1.0, 1.0]

    for progress in (0.0, 1 / 8, 2 / 8, 3 / 8):
        drawn = take(sampler, 25)
        v_N = np.exp(-4 * (1 - progress / 0.7) * (scores.percentile_N - 0.5))
        expected_N = v_N / v_N.mean()

        assert sampler.loss_weights(np.arange(50)).mean() == pytest.approx(1.0, rel=1e-12)
        np.testing.assert_allclose(sampler.loss_weights(drawn), expected_N[drawn], rtol=1e-12)


def test_both_forms_have_the_same_expected_gradient_over_an_epoch() -> None:
    """One gradient per sample. Weighting gives sum_i v_i g_i at once, sampling in the mean over many epochs."""
    gradient_ND = np.random.default_rng(0).normal(1.0, 1.0, (40, 3))
    weighted = CurriculumSampler(40, graded(40), form="weighting", windows_per_epoch=1)
    sampled = CurriculumSampler(40, graded(40), seed=5, windows_per_epoch=4)
    by_weight = sum(weighted.loss_weights([i])[0] * gradient_ND[i] for i in weighted)
    by_draws = sum(gradient_ND[i] for _ in range(200) for i in sampled) / 200

    v_N = np.exp(-2 * 0.5 * (graded(40).percentile_N - 0.5))
    np.testing.assert_allclose(by_weight, 40 * v_N @ gradient_ND / v_N.sum(), rtol=1e-12)
    np.testing.assert_allclose(by_draws, by_weight, rtol=0.01)


def test_sampling_form_has_no_weights_of_the_loss() -> None:
    assert CurriculumSampler(5, graded(5)).loss_weights([0]) is None


@pytest.mark.parametrize("taken", [3, 10, 33, 50])
def test_state_of_the_weighting_form_goes_on_with_its_weights(taken: int) -> None:
    """Through torch.save; within a window the weights are those of its beginning."""
    sampler, resumed = (weighting(50, graded(50), windows_per_epoch=5) for _ in range(2))
    take(sampler, taken)
    file = io.BytesIO()
    torch.save(sampler.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file))
    for _ in range(70):
        assert resumed.loss_weights(np.arange(50)).tolist() == sampler.loss_weights(np.arange(50)).tolist()
        assert take(resumed, 1) == take(sampler, 1)


def test_state_of_the_other_form_is_refused() -> None:
    sampling = CurriculumSampler(50, None, epochs=4)
    for one, other in ((sampling, weighting(50, None)), (weighting(50, None), sampling)):
        with refuses(StateError, "form"):
            one.load_state_dict(other.state_dict())


def test_unknown_form_is_refused() -> None:
    with refuses(ConfigError, "form", "'weights'"):
        CurriculumSampler(5, None, form="weights")


def test_policy_that_gives_no_weights_to_draw_by_is_refused() -> None:
    class Bad(Recorded):
        def weights(self, seen: Seen, progress: float) -> npt.NDArray[np.float64]:
            return np.array([1.0, -0.5])

    for form in ("sampling", "weighting"):
        with refuses(ConfigError, "policy", "-0.5 to 1.0"):
            next(iter(CurriculumSampler(2, None, Bad(), form=form)))


@pytest.mark.parametrize(
    ("num_samples", "settings"),
    [(0, {}), (5, {"windows_per_epoch": 0}), (5, {"lookahead_versions": -1}), (5, {"epochs": 0})],
    ids=str,
)
def test_settings_out_of_range_are_refused(num_samples: int, settings: dict[str, int]) -> None:
    key, value = next(iter(settings.items()), ("num_samples", num_samples))
    with refuses(ConfigError, key, value):
        CurriculumSampler(num_samples, None, **settings)


@pytest.mark.parametrize("kind", ["reader", "feed"])
def test_scores_of_another_number_of_samples_are_refused(kind: str, store: ScoreWriter, tmp_path: Path) -> None:
    with ScoreFeed(tmp_path / "elsewhere", 40) as feed, refuses(ConfigError, "scores", "40 samples, the sampler of 39"):
        CurriculumSampler(39, ScoreReader(tmp_path / "scores") if kind == "reader" else feed)


def test_draws_of_an_epoch_are_floor_or_ceil_of_what_was_expected() -> None:
    """Over all windows together: credit makes up for what one window drew ahead."""
    rng = np.random.default_rng(0)
    p_N = np.exp(-2 * (rng.random(1000) - 0.5))
    credit_N, drawn_N, expected_N = np.zeros(1000), np.zeros(1000), np.zeros(1000)
    for _ in range(80):
        ids, credit_N = draw(p_N, credit_N, 125, rng)
        drawn_N += np.bincount(ids, minlength=1000)
        expected_N += 125 * p_N / p_N.sum()

        assert (np.abs(drawn_N - expected_N) < 1 + 1e-6).all()


def test_state_goes_through_torch_save_with_its_safe_default() -> None:
    sampler = CurriculumSampler(50, None, epochs=2)
    stream = iter(sampler)
    first = [next(stream) for _ in range(13)]
    file = io.BytesIO()
    torch.save(sampler.state_dict(), file)
    file.seek(0)
    other = CurriculumSampler(50, None, epochs=2, seed=9)
    other.load_state_dict(torch.load(file))

    assert list(other) == list(stream)
    assert len(first) == 13


@pytest.mark.parametrize("batch_size", [4, 5])
def test_state_after_the_last_batch_of_an_epoch_begins_the_next(batch_size: int) -> None:
    """Whether or not the batch size divides the epoch."""
    sampler = CurriculumSampler(12, None)
    batches = iter(BatchSampler(sampler, batch_size, drop_last=False))
    for _ in range(math.ceil(12 / batch_size)):
        next(batches)
    other = CurriculumSampler(12, None, seed=5)
    other.load_state_dict(sampler.state_dict())

    assert len(list(other)) == 12


def test_ages_of_a_store_count_against_the_runs_newest_checkpoint(tmp_path: Path) -> None:
    """Scores of version 1, while six were published: stale, though nothing newer was scored."""
    with ScoreWriter(tmp_path / "scores", 10) as writer:
        writer.append(make_rows(range(10), 1))
    with CheckpointPublisher(tmp_path) as publisher:
        for step in range(6):
            publisher.publish(torch.nn.Linear(1, 1), step)
            publisher.flush()

    for scores in (ScoreReader(tmp_path / "scores"), tmp_path / "scores", str(tmp_path / "scores")):
        sampler = CurriculumSampler(10, scores)
        assert sorted(sampler) != []
        assert (sampler.draws.fresh, sampler.draws.stale) == (0, 10)


def test_a_state_counts_only_what_was_used() -> None:
    """A DataLoader with workers has drawn more: those draws come again, the window's rest too."""
    sampler = CurriculumSampler(20, graded(20), "soft", seed=3, windows_per_epoch=4)
    whole = list(sampler)
    again = CurriculumSampler(20, graded(20), "soft", seed=3, windows_per_epoch=4)
    first = take(again, 13)
    state = again.state_dict(consumed=7)
    resumed = CurriculumSampler(20, graded(20), "soft", seed=9, windows_per_epoch=4)
    resumed.load_state_dict(state)

    assert (resumed.epoch, resumed.position) == (0, 7)
    assert first[:7] + list(resumed) == whole
    assert again.state_dict(consumed=13)["position"] == 13


def test_a_state_within_an_epoch_that_was_drawn_to_its_end() -> None:
    sampler = CurriculumSampler(20, None, "uniform", seed=3)
    drawn = list(sampler)
    resumed = CurriculumSampler(20, None, "uniform", seed=3)
    resumed.load_state_dict(sampler.state_dict(consumed=16))

    assert (resumed.epoch, resumed.position) == (0, 16)
    assert list(resumed) == drawn[16:]
    assert list(resumed) == list(sampler)
    over = sampler.state_dict(consumed=20)
    assert (over["epoch"], over["position"]) == (2, 0)


def test_the_state_an_epoch_begins_with_draws_all_of_it_again() -> None:
    """For frameworks that pass over the first batches themselves; also when resumed again and again."""
    sampler = CurriculumSampler(20, graded(20), "soft", seed=3)
    drawn = list(CurriculumSampler(20, graded(20), "soft", seed=3))
    for count in (3, 5, 20):
        assert take(sampler, count) == drawn[:count]
        state = sampler.state_dict(consumed=0)
        sampler = CurriculumSampler(20, graded(20), "soft", seed=3)
        sampler.load_state_dict(state)
        assert (sampler.epoch, sampler.position) == (0, 0)


def test_draws_that_are_not_remembered_cannot_be_taken_back() -> None:
    sampler = CurriculumSampler(20, None, "uniform")
    take(sampler, 9)
    resumed = CurriculumSampler(20, None, "uniform")
    resumed.load_state_dict(sampler.state_dict())
    take(resumed, 4)

    assert resumed.state_dict(consumed=9)["position"] == 9
    for consumed in (8, 14):
        with refuses(StateError, "consumed", consumed) as caught:
            resumed.state_dict(consumed=consumed)
        assert "from 9 to 13" in caught.value.fix


def test_every_rank_draws_all_where_a_framework_deals_out() -> None:
    def draws(comm: Comm) -> list[int]:
        return list(CurriculumSampler(23, None, "uniform", seed=comm.rank, comm=comm, is_sharded=False))

    first, second = in_threads(2, draws)
    assert first == second
    assert sorted(first) == list(range(23))


def test_ranks_draw_as_many_each_without_the_last() -> None:
    def draws(comm: Comm) -> tuple[int, list[int], int]:
        sampler = CurriculumSampler(23, None, "uniform", comm=comm, drop_last=True)
        return len(sampler), list(sampler), sampler.epoch

    ranks = in_threads(3, draws)
    assert [(length, len(ids), epoch) for length, ids, epoch in ranks] == [(7, 7, 1)] * 3
    assert len({i for _, ids, _ in ranks for i in ids}) == 21


def test_frequencies_are_those_of_the_weights() -> None:
    """Chi-square over single draws of fresh samplers, which are independent."""
    weight_N = np.array([0.5, 1.0, 2.0, 4.0, 0.1, 1.4])
    rng, count = np.random.default_rng(1), 20_000
    counts = np.zeros(6)
    for _ in range(count):
        window, _ = draw(weight_N, np.zeros(6), 1, rng)
        counts[window] += 1
    expected = count * weight_N / weight_N.sum()

    assert ((counts - expected) ** 2 / expected).sum() < 20.5  # the 99.9 % quantile with 5 degrees of freedom


@pytest.mark.parametrize(("workers", "drop_last"), [(0, False), (0, True), (2, False)])
def test_a_loader_goes_on_after_the_last_batch_that_it_gave(workers: int, drop_last: bool) -> None:
    def loader() -> CurriculumLoader:
        sampler = CurriculumSampler(50, None, "uniform", seed=3)
        return CurriculumLoader(TensorDataset(torch.arange(50)), 8, sampler, num_workers=workers, drop_last=drop_last)

    def batches(one: CurriculumLoader, count: int | None = None) -> list[list[int]]:
        return [batch[0].tolist() for batch in itertools.islice(one, count)]

    whole = loader()
    expected = batches(whole) + batches(whole)
    per_epoch = 6 if drop_last else 7
    assert len(expected) == 2 * per_epoch
    assert len(whole) == per_epoch
    for count in (3, 7) if workers else (1, 3, 6, 7):
        first = loader()
        given = [batch[0].tolist() for batch in itertools.islice(itertools.chain(first, first), count)]
        second = loader()
        second.load_state_dict(first.state_dict())
        while len(given) < len(expected):
            given += batches(second)
        assert given == expected
