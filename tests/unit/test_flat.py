"""What textbook float32 and the margin form say of samples at chosen margins."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from deploy.bench import BENCHES, flat, run_bench
from deploy.bench.flat import MEANINGS, Study, margin_form, rank_correlation, reference, textbook, told_apart
from shared.errors import ConfigError
from tests.raising import refuses

EPSILON = 1 / 16


class TwoClasses(nn.Module):
    """Logits (g x, 0) of one-pixel images x: the margin of label 0 is -g x, that of label 1 is g x."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        z_N = self.gain * x_NCHW.flatten(1)[:, 0]
        return torch.stack([z_N, torch.zeros_like(z_N)], dim=1)


def images(*pixels: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(pixels).view(-1, 1, 1, 1), torch.zeros(len(pixels), dtype=torch.int64)


@pytest.mark.parametrize(
    ("values", "share"),
    [([1.0, 2.0, 3.0, 4.0], 1.0), ([1.0, 1.0, 2.0, 3.0], 0.5), ([0.0] * 4, 0.0), ([np.nan, np.inf, 1.0, 2.0], 0.5)],
    ids=["all differ", "a pair is equal", "all equal", "neither NaN nor infinity"],
)
def test_told_apart_is_the_share_with_a_value_of_its_own(values: list[float], share: float) -> None:
    assert told_apart(np.array(values)) == share


def test_rank_correlation_gives_nan_the_mean_rank() -> None:
    """Ranks less their mean: -1, 0, 0, 1 against -1.5, -0.5, 0.5, 1.5: 3 / (sqrt 2 sqrt 5)."""
    found = rank_correlation(np.array([1.0, np.nan, 2.0, 3.0]), np.array([1.0, 2.0, 3.0, 4.0]))

    assert found == pytest.approx(3 / math.sqrt(10))
    assert rank_correlation(np.zeros(4), np.arange(4.0)) == 0


def test_both_forms_are_right_at_small_margins() -> None:
    """Margin -5 x; the attack moves x by a 16th towards 0."""
    model, (x, y) = TwoClasses(5.0), images(1.0, 0.75, 0.5)
    loss, attacked = (np.log1p(np.exp(-5 * (np.array([1.0, 0.75, 0.5]) - shift))) for shift in (0.0, EPSILON))

    for values in (textbook(model, x, y, EPSILON), reference(model, x, y, EPSILON)):
        np.testing.assert_allclose(values["loss"], loss, rtol=1e-4)
        np.testing.assert_allclose(values["gap"], attacked - loss, rtol=1e-3)
        np.testing.assert_allclose(values["adm_by_clean"], attacked / loss - 1, rtol=1e-3)
        np.testing.assert_allclose(values["confidence"], 1 - np.exp(-loss), rtol=1e-4)
        np.testing.assert_allclose(values["el2n"], math.sqrt(2) * (1 - np.exp(-loss)), rtol=1e-4)
        np.testing.assert_allclose(values["margin"], [-5.0, -3.75, -2.5], rtol=1e-5)
        np.testing.assert_allclose(values["robust_margin"], [-4.6875, -3.4375, -2.1875], rtol=1e-5)
    ranked = margin_form(model, x, y, EPSILON)
    np.testing.assert_allclose(ranked["adm"], np.log(attacked / loss), rtol=1e-4)


def test_textbook_float32_goes_blind_where_the_margin_form_does_not() -> None:
    """Margins of -40 to -30: in float32 the loss is 0, its gradient towards the label too, and the ratio 0/0."""
    model, (x, y) = TwoClasses(40.0), images(1.0, 0.9, 0.8, 0.75)

    blind, seeing, true = (form(model, x, y, EPSILON) for form in (textbook, margin_form, reference))

    assert blind["loss"].tolist() == [0, 0, 0, 0]
    assert np.isnan(blind["adm"]).all()
    assert told_apart(blind["adm"]) == told_apart(blind["loss"]) == 0
    for name in MEANINGS:
        # All have the gain times a 16th as log ratio: what is left of their order there is rounding.
        if name not in ("adm", "adm_by_clean", "adm_by_adversarial"):
            assert rank_correlation(seeing[name], true[name]) == pytest.approx(1), name
    np.testing.assert_allclose(seeing["adm"], 2.5, rtol=1e-5)


def test_a_short_study_has_every_figure_and_is_drawn(tmp_path: Path) -> None:
    found = flat.measure(2, Study(epochs=2, width=2, learning_rate=0.1))

    assert found["epochs"] == [1, 2]
    assert found["samples"] == 1437
    assert json.loads(json.dumps(found)) == found
    assert found["measures"].keys() == MEANINGS.keys()
    for name, forms in found["measures"].items():
        assert forms["margin_form"]["spearman"] == pytest.approx([1, 1], abs=1e-3), name
    flat.draw(found, tmp_path / "flat.png")
    with Image.open(tmp_path / "flat.png") as picture:
        assert picture.width > 800


@pytest.mark.parametrize(
    ("name", "plot", "value"),
    [
        ("recovery", "r.svg", "recovery"),
        ("flat", "flat.gif", "'.gif'"),
        ("flat", "none/flat.svg", "no folder none"),
    ],
)
def test_a_plot_that_cannot_be_is_refused_before_the_measuring(name: str, plot: str, value: str) -> None:
    with refuses(ConfigError, "--plot", value) as caught:
        run_bench(name, 1, Path(plot))

    assert plot in caught.value.problem


def test_an_unknown_benchmark_lists_the_known() -> None:
    with refuses(ConfigError, "name", "'fast'") as caught:
        run_bench("fast", 1)

    assert all(name in caught.value.fix for name in BENCHES)
