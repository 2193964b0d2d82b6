"""What a person sees of a run: a live line on a terminal, else one line per interval; at the end a summary."""

import logging
import math
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

LIVE_INTERVAL_S = 0.25
ABOUT_SCORES = (
    "scores",
    "draws fresh / stale / unscored",
    "age of drawn scores",
    "fidelity",
    "weights to first score",
    "quarantined rows",
)


class Display:
    """Shows `describe()` at intervals from a thread of its own; None from it shows nothing yet.

    `describe` returns step, steps, loss, accuracy, fresh (share), median_age (versions), samples_per_second; values
    that are not known are None.
    """

    def __init__(self, describe: Callable[[], Mapping[str, Any] | None], interval_s: float) -> None:
        self._describe = describe
        # Progress goes to stderr, so that stdout carries results alone.
        self._console = Console(stderr=True)
        self._live = self._console.is_terminal
        self._interval_s = LIVE_INTERVAL_S if self._live else interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._show, name="display", daemon=True)

    def say(self, text: str) -> None:
        """One line, above the live one, and in the log."""
        logger.info(text)
        self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> "Display":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _show(self) -> None:
        if self._live:
            self._show_live()
        else:
            while not self._stop.wait(self._interval_s):
                if state := self._describe():
                    self._print(f"step {state['step']}/{state['steps']}  {_facts(state)}")

    def _show_live(self) -> None:
        columns = (
            BarColumn(20),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task("training", total=None, facts="", visible=False)
            while not self._stop.wait(self._interval_s):
                if state := self._describe():
                    total, step = state["steps"], state["step"]
                    progress.update(task, total=total, completed=step, facts=_facts(state), visible=True)


def _facts(state: Mapping[str, Any]) -> str:
    return (
        f"loss {number(state['loss'], '.3f')}  accuracy {number(state['accuracy'], '.3f')}  "
        f"fresh {number(state['fresh'], '.0%')}  median age {number(state['median_age'], '.0f')} versions  "
        f"scored {number(state['samples_per_second'], ',.0f')}/s"
    )


def number(value: float | None, form: str) -> str:
    """`value` in that form; a dash for what is not known."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def print_summary(summary: Mapping[str, Any]) -> None:
    """The summary as people read it, on stdout."""
    shares = " / ".join(f"{summary[f'draws_{kind}']:.1%}" for kind in ("fresh", "stale", "unscored"))
    overhead = sum(summary[f"trainer_seconds_in_{part}"] for part in ("publish", "sampler", "save"))
    scoring = summary["trainer_seconds_in_scoring"]
    share = overhead / summary["trainer_seconds_total"] if summary["trainer_seconds_total"] else 0.0
    rows = {
        "test accuracy": number(summary["test_accuracy"], ".4f"),
        "steps": f"{summary['steps']} in {summary['trainer_seconds_total']:.1f} s (run {summary['seconds']:.1f} s)",
        "checkpoints": f"{summary['model_versions_published']} published, {summary['model_versions_scored']} scored",
        "scores": f"{summary['scored_rows']} rows, coverage {summary['coverage']:.1%}, "
        f"{number(summary['scorer_samples_per_second'], ',.0f')} samples/s",
        "draws fresh / stale / unscored": f"{shares} (stale beyond {summary['staleness_bound']} versions)",
        "age of drawn scores": f"median {number(summary['age_versions_p50'], '.0f')}, "
        f"95 % {number(summary['age_versions_p95'], '.0f')} versions",
        "fidelity": f"mean {number(summary['fidelity_mean'], '.3f')}, least {number(summary['fidelity_min'], '.3f')} "
        f"of {summary['audits']} audits",
        "trainer time in steppe": f"{overhead:.3f} s ({share:.2%})"
        + (f", and {scoring:.1f} s scoring" if scoring else ""),
        "weights to first score": f"median {number(summary['seconds_to_first_score_p50'], '.2f')} s, "
        f"95 % {number(summary['seconds_to_first_score_p95'], '.2f')} s",
        "quarantined rows": str(summary["quarantined_rows"]),
        "run folder": summary["run_folder"],
    }
    unscored = () if summary["scored_rows"] else ABOUT_SCORES
    print_facts({name: text for name, text in rows.items() if name not in unscored})


def print_status(stats: Mapping[str, Any], scorers: Mapping[str, Any]) -> None:
    """A running run as people read it, on stdout."""
    print_facts(status_facts(stats, scorers))


def status_facts(stats: Mapping[str, Any], scorers: Mapping[str, Any]) -> dict[str, str]:
    """A running run as people read it, name by value."""
    counts = stats["status"]
    rate = number(scorers["samples_per_second"], ",.0f")
    training = stats["training"]
    rows = {
        "run": stats["run_id"],
        "newest checkpoint": f"version {stats['newest_model_version']}, step {stats['newest_step']}",
        "last epoch": f"{training['epoch'] + 1}, step {training['step']}/{training['steps']}, "
        f"loss {training['loss']:.3f}, accuracy {number(training['accuracy'], '.4f')}"
        if training
        else "-",
        "scores": f"{stats['scored_rows']} rows, coverage {stats['coverage']:.1%}, {rate} samples/s",
        "fresh / stale / unscored": f"{counts['fresh']} / {counts['stale']} / {counts['unscored']} "
        f"(stale beyond {stats['staleness_bound']} versions)",
        "fidelity": number((stats["fidelity"] or {}).get("latest"), ".3f"),
        "age of scores": f"median {number(stats['age_versions_p50'], '.0f')}, "
        f"95 % {number(stats['age_versions_p95'], '.0f')} versions",
        "scorers": f"{scorers['alive']} alive, {scorers['wanted']} wanted",
        "quarantined rows": str(stats.get("quarantined_rows", "-")),
    }
    if reason := (scorers.get("autoscaler") or {}).get("reason"):
        rows["autoscaler"] = reason
    for name in ("waiting", "trouble"):
        if scorers.get(name):
            rows[name] = scorers[name]
    return rows


def print_facts(rows: Mapping[str, str]) -> None:
    width = max(map(len, rows)) + 2
    for name, value in rows.items():
        sys.stdout.write(f"{name:<{width}}{value}\n")
