"""The runs below a folder, and what became of each."""

from typing import Any

from rich.console import Console
from rich.table import Column, Table

from shared.catalogue import Run, all_runs
from shared.errors import SteppeError
from shared.events import last_events

KEPT_FACTS = ("steps", "test_accuracy", "coverage", "attempts")


def list_runs(root: str) -> list[dict[str, Any]]:
    """The newest first: folder, state, creation, last step, and of a finished one what came of it."""
    return [_describe(run) for run in reversed(all_runs(root))]


def print_runs(runs: list[dict[str, Any]]) -> None:
    table = Table(Column("run", no_wrap=True), "state", "created", "step", "accuracy", "attempts", box=None)
    for run in runs:
        accuracy = "-" if run["test_accuracy"] is None else f"{run['test_accuracy']:.4f}"
        step, tries = ("-" if run[key] is None else str(run[key]) for key in ("steps", "attempts"))
        table.add_row(run["run_id"], run["state"], run["created_at"][5:16].replace("T", " "), step, accuracy, tries)
    Console().print(table)


def _describe(run: Run) -> dict[str, Any]:
    about = {key: run.description[key] for key in ("run_id", "created_at", "num_samples")}
    try:
        state, summary = str(run.state()), run.read("summary.json") or {}
    except SteppeError as error:  # a damaged file of one hides no other
        state, summary = f"damaged: {error}", {}
    steps = [event["step"] for event in last_events(run.path, 1000) if "step" in event]
    facts = {"steps": steps[-1] if steps else None} | {key: summary[key] for key in KEPT_FACTS if key in summary}
    return {"folder": str(run.path), "state": state} | about | dict.fromkeys(KEPT_FACTS) | facts
