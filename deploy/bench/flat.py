"""`steppe bench flat`: what still tells samples apart when all losses have become small, late in a SAM training.

A small network is trained far beyond the last error, and on the way all training samples are measured three times with
the same weights: by textbook float32 code, in the margin form that the scorers use (float32 network, `scorer.adm`), and
in float64 as the reference. For every measure and form two figures say what is left of it: the share of samples that
it still tells apart, and the rank correlation with the reference.

The learning rate is ten times the quickstart's and there is no weight decay: that brings margins beyond 20 in minutes.
The figures belong to this network and these images; what carries over is at which margins float32 fails.

Shapes: N samples (one batch), K classes, C, H, W of an image.
"""

import copy
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor, nn

from scorer.adm import score_batch
from scorer.attacks import Fgsm
from shared.config import DataConfig, ModelConfig
from shared.datasets import load_dataset
from shared.errors import TrainingDiverged
from shared.measures import MEASURES
from shared.models import build_model
from trainer.sam import SAM, sam_step

Floats = npt.NDArray[Any]
Values = dict[str, Floats]  # by the name of the measure, one value per sample
Loss = Callable[[Tensor, Tensor], Tensor]

FORMS = ("textbook", "margin_form")
# All but those over batches and data sets, which are the gap in other units and rank like it within one version, and
# instability, which compares versions.
MEANINGS = {
    "adm": "(l'-l) / (l'+l)",
    "adm_by_clean": "(l'-l) / l",
    "adm_by_adversarial": "(l'-l) / l'",
    "gap": "l' - l",
    "loss": "l",
    "confidence": "1 - p_y",
    "el2n": "||p - onehot||",
    "grad_norm": "||dl/dx||",
    "margin": "lse(z_j) - z_y",
    "robust_margin": "margin under attack",
}


@dataclasses.dataclass(frozen=True)
class Study:
    """The training: constant learning rate, momentum 0.9, digits, small_cnn. `epsilon` of FGSM is in pixel units."""

    epochs: int = 512
    width: int = 16
    learning_rate: float = 1.0
    rho: float = 0.05
    batch_size: int = 64
    epsilon: float = 1 / 16
    seed: int = 0


def measure(points: int, study: Study = Study()) -> dict[str, Any]:
    """Train on one thread, and measure after `points` epochs at equal ratios, the last among them.

    Margins are negative where confident and right. Raises TrainingDiverged when a margin is not finite.
    """
    torch.set_num_threads(1)
    began = time.perf_counter()
    course: dict[str, list[float]] = {
        "epochs": [],
        "median_margin": [],
        "median_loss": [],
        "largest_loss": [],
        "median_grad_norm": [],
        "largest_grad_norm": [],
        "train_accuracy": [],
    }
    measures: dict[str, dict[str, dict[str, list[float]]]] = {
        name: {form: {"told_apart": [], "spearman": []} for form in FORMS} for name in MEANINGS
    }
    for epoch, model, x_NCHW, y_N in _training(study, _epochs_to_measure(study.epochs, points)):
        true = reference(model, x_NCHW, y_N, study.epsilon)
        if not np.isfinite(true["margin"]).all():
            raise TrainingDiverged(
                f"margins are not finite after epoch {epoch} at learning_rate {study.learning_rate}",
                fix="lower Study.learning_rate",
                key="learning_rate",
            )
        of_form = {
            "textbook": textbook(model, x_NCHW, y_N, study.epsilon),
            "margin_form": margin_form(model, x_NCHW, y_N, study.epsilon),
        }
        for name, forms in measures.items():
            for form, figures in forms.items():
                figures["told_apart"].append(round(told_apart(of_form[form][name]), 6))
                figures["spearman"].append(round(rank_correlation(of_form[form][name], true[name]), 6))
        course["epochs"].append(epoch)
        for name in ("margin", "loss", "grad_norm"):
            course[f"median_{name}"].append(float(np.median(true[name])))
        for name in ("loss", "grad_norm"):
            course[f"largest_{name}"].append(float(true[name].max()))
        with torch.no_grad():
            course["train_accuracy"].append(float((model(x_NCHW).argmax(1) == y_N).double().mean()))
        sys.stderr.write(
            f"epoch {epoch:>4}: median margin {course['median_margin'][-1]:6.1f}, rank correlation of ADM "
            f"{measures['adm']['textbook']['spearman'][-1]:.3f} textbook, "
            f"{measures['adm']['margin_form']['spearman'][-1]:.3f} margin form, {time.perf_counter() - began:.0f} s\n"
        )
    return {
        "what": "share of samples told apart, and rank correlation with float64, along a long SAM training",
        "samples": len(y_N),
        "settings": dataclasses.asdict(study),
        "seconds": round(time.perf_counter() - began, 1),
        **course,
        "measures": measures,
    }


def told_apart(value_N: Floats) -> float:
    """The share of samples whose value is finite and no other sample's."""
    finite = value_N[np.isfinite(value_N)]
    _, counts = np.unique(finite, return_counts=True)
    return float((counts == 1).sum() / len(value_N))


def rank_correlation(value_N: Floats, reference_N: Floats) -> float:
    """Spearman's; equal values share their mean rank, infinities too. No order at all is 0.

    A value that is not a number takes the mean of all ranks: it says nothing about its sample.
    """
    number_N = ~np.isnan(value_N)
    rank_N = np.zeros(len(value_N))  # less their mean
    rank_N[number_N] = rankdata(value_N[number_N]) - (number_N.sum() + 1) / 2
    true_N = rankdata(reference_N) - (len(reference_N) + 1) / 2
    scale = np.linalg.norm(rank_N) * np.linalg.norm(true_N)
    return float(rank_N @ true_N / scale) if scale else 0.0


def textbook(model: nn.Module, x_NCHW: Tensor, y_N: Tensor, epsilon: float) -> Values:
    """As the definitions are usually typed in: cross-entropy, its gradient, softmax, in the model's own precision."""
    logits_NK, grad_NCHW, attacked_NK = _attacked(model, x_NCHW, y_N, epsilon, _cross_entropy)
    loss_N, attacked_loss_N = _cross_entropy(logits_NK, y_N), _cross_entropy(attacked_NK, y_N)
    gap_N = attacked_loss_N - loss_N
    p_NK = logits_NK.softmax(1)
    return _arrays(
        {
            "adm": gap_N / (attacked_loss_N + loss_N),
            "adm_by_clean": gap_N / loss_N,
            "adm_by_adversarial": gap_N / attacked_loss_N,
            "gap": gap_N,
            "loss": loss_N,
            "confidence": 1 - p_NK.gather(1, y_N[:, None])[:, 0],
            "el2n": (p_NK - F.one_hot(y_N, p_NK.shape[1])).norm(dim=1),
            "grad_norm": grad_NCHW.flatten(1).norm(dim=1),
            "margin": _float_margin(logits_NK, y_N),
            "robust_margin": _float_margin(attacked_NK, y_N),
        }
    )


def margin_form(model: nn.Module, x_NCHW: Tensor, y_N: Tensor, epsilon: float) -> Values:
    """As steppe ranks: the measures of a scorer's rows, which are float32."""
    rows = {name: column.numpy() for name, column in score_batch(model, x_NCHW, y_N, Fgsm(epsilon)).items()}
    return {name: MEASURES[name].rank(rows) for name in MEANINGS}


def reference(model: nn.Module, x_NCHW: Tensor, y_N: Tensor, epsilon: float) -> Values:
    """The definitions in float64, the attack on the loss itself; from the odds of the other classes, so never 0."""
    model = copy.deepcopy(model).double()
    logits_NK, grad_NCHW, attacked_NK = _attacked(model, x_NCHW.double(), y_N, epsilon, _loss_from_odds)
    odds_NK, attacked_odds_NK = _odds(logits_NK, y_N), _odds(attacked_NK, y_N)
    loss_N, attacked_loss_N = _loss_from_odds(logits_NK, y_N), _loss_from_odds(attacked_NK, y_N)
    p_NK = odds_NK / (1 + odds_NK.sum(1, keepdim=True))  # 0 at y
    wrong_N = p_NK.sum(1)
    return _arrays(
        {
            "adm": (attacked_loss_N / loss_N).log(),  # (l'-l) / (l'+l) is tanh of its half, and saturates
            "adm_by_clean": (attacked_loss_N - loss_N) / loss_N,
            "adm_by_adversarial": (attacked_loss_N / loss_N).log(),
            "gap": attacked_loss_N - loss_N,
            "loss": loss_N,
            "confidence": wrong_N,
            "el2n": (p_NK.square().sum(1) + wrong_N.square()).sqrt(),
            "grad_norm": grad_NCHW.flatten(1).norm(dim=1),
            "margin": odds_NK.sum(1).log(),
            "robust_margin": attacked_odds_NK.sum(1).log(),
        }
    )


def draw(found: Mapping[str, Any], path: Path) -> None:
    """One panel per measure: colour says which figure, a broad line margin form, a thin dashed one textbook."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 5, sharex=True, sharey=True).ravel()
    broad = {"told_apart": 3.0, "spearman": 8.0}  # where both are 1 the one shows on the other
    for panel, (name, forms) in zip(panels, found["measures"].items(), strict=True):
        panel.axhline(0, color="0.8", linewidth=0.8)
        for key, colour, words in (
            ("spearman", "tab:blue", "rank correlation with float64"),
            ("told_apart", "tab:red", "share told apart"),
        ):
            x, label = found["epochs"], f"{words}, margin form"
            panel.plot(x, forms["margin_form"][key], color=colour, alpha=0.35, linewidth=broad[key], label=label)
            label = f"{words}, textbook float32"
            panel.plot(x, forms["textbook"][key], "--", color=colour, marker=".", linewidth=1.2, label=label)
        panel.set(xscale="log", ylim=(-0.35, 1.08))
        panel.set_title(f"{name.replace('_', ' ')}:  {MEANINGS[name]}", fontsize=10)
    for panel in panels[-5:]:
        panel.set_xlabel("epoch, and median margin then")
        panel.set_xticks(found["epochs"], _tick_labels(found), fontsize=8)
        panel.minorticks_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


def show(found: Mapping[str, Any]) -> None:
    """The last epoch's figures as a table."""
    from rich.console import Console
    from rich.table import Table

    title = (
        f"{found['samples']} samples after epoch {found['epochs'][-1]}: "
        f"median margin {found['median_margin'][-1]:.1f}, largest loss {found['largest_loss'][-1]:.1g}"
    )
    table = Table("measure", title=title, caption=f"{found['seconds']} s; rank correlation is with float64")
    for heading in ("told apart:\ntextbook", "\nmargin form", "rank correl.:\ntextbook", "\nmargin form"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, forms in found["measures"].items():
        shares = (f"{100 * forms[form]['told_apart'][-1]:.1f} %" for form in FORMS)
        table.add_row(name, *shares, *(f"{forms[form]['spearman'][-1]:.4f}" for form in FORMS))
    Console().print(table)


def _training(study: Study, epochs: list[int]) -> Iterator[tuple[int, nn.Module, Tensor, Tensor]]:
    """After each of `epochs`: the epoch, the model in eval mode, and all training samples."""
    torch.manual_seed(study.seed)
    dataset = load_dataset(DataConfig(name="digits"))
    model = build_model(ModelConfig(name="small_cnn", width=study.width), dataset)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=study.rho, lr=study.learning_rate, momentum=0.9)
    x_NCHW, y_N = dataset.train.batch(np.arange(len(dataset.train)))
    for epoch in range(1, epochs[-1] + 1):
        model.train()
        order_N = torch.randperm(len(y_N))
        for start in range(0, len(y_N), study.batch_size):
            ids = order_N[start : start + study.batch_size]
            sam_step(model, optimizer, F.cross_entropy, x_NCHW[ids], y_N[ids])
        if epoch in epochs:
            yield epoch, model.eval(), x_NCHW, y_N


def _epochs_to_measure(epochs: int, points: int) -> list[int]:
    """From 1 to `epochs` at equal ratios, as whole numbers; one point is the last epoch."""
    return sorted({round(float(epoch)) for epoch in np.geomspace(epochs, 1, points)})


def _attacked(
    model: nn.Module, x_NCHW: Tensor, y_N: Tensor, epsilon: float, loss: Loss
) -> tuple[Tensor, Tensor, Tensor]:
    """FGSM on `loss`: the clean logits, the gradient to the input, the logits at x'."""
    leaf_NCHW = x_NCHW.detach().clone().requires_grad_()
    logits_NK = model(leaf_NCHW)
    (grad_NCHW,) = torch.autograd.grad(loss(logits_NK, y_N).sum(), leaf_NCHW)
    with torch.no_grad():
        attacked_NK = model((x_NCHW + epsilon * grad_NCHW.sign()).clamp(0, 1))
    return logits_NK.detach(), grad_NCHW, attacked_NK


def _cross_entropy(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_NK, y_N, reduction="none")


def _odds(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """p_j / p_y = exp(z_j - z_y), and 0 at y itself."""
    label_N1 = y_N[:, None]
    return (logits_NK - logits_NK.gather(1, label_N1)).scatter(1, label_N1, float("-inf")).exp()


def _loss_from_odds(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """l = -ln p_y = ln(1 + the sum of the odds)."""
    return _odds(logits_NK, y_N).sum(1).log1p()


def _float_margin(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    label_N1 = y_N[:, None]
    others_NK = logits_NK.scatter(1, label_N1, float("-inf"))
    return others_NK.logsumexp(1) - logits_NK.gather(1, label_N1)[:, 0]


def _arrays(values: Mapping[str, Tensor]) -> Values:
    return {name: value_N.numpy() for name, value_N in values.items()}


def _tick_labels(found: Mapping[str, Any]) -> list[str]:
    """Every other epoch with its median margin below, counted from the last."""
    last = len(found["epochs"]) - 1
    pairs = zip(found["epochs"], found["median_margin"], strict=True)
    return [f"{epoch}\n{m:.0f}" if (last - i) % 2 == 0 else "" for i, (epoch, m) in enumerate(pairs)]
