"""`steppe top`: a running run, looked at again and again until it ends."""

import time
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deploy.client import client_of, scorers
from deploy.progress import status_facts
from services.client import Client
from shared.catalogue import Run, RunState
from shared.errors import ServiceError

EVENTS_SHOWN = 8


def watch(run: Run, interval_s: float, count: int | None) -> None:
    """Show status, scorers and the last events every `interval_s`, `count` times or until the run ends.

    On a terminal the picture stays in place, elsewhere each follows the one before.
    """
    console = Console()
    client = client_of(run)
    with Live(console=console, auto_refresh=False) if console.is_terminal else _Lines(console) as screen:
        shown = 0
        while True:
            try:
                picture: RenderableType = _picture(client)
            except ServiceError as error:
                if run.state() not in (RunState.RUNNING, RunState.SERVED):
                    break
                picture = Text(f"{error.problem}; asking again", style="yellow")
            screen.update(picture, refresh=True)
            shown += 1
            if shown == count:
                return
            time.sleep(interval_s)
    console.print(f"{run.path}: {run.state()}")


class _Lines:
    """Stands in for rich.Live where output is not a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *exc: object) -> None: ...

    def update(self, picture: Any, *, refresh: bool) -> None:
        self._console.print(time.strftime("%H:%M:%S"))
        self._console.print(picture)


def _picture(client: Client) -> Group:
    stats, fleet_now = client.stats(), scorers(client)
    events = client.get("/v1/events", limit=EVENTS_SHOWN)
    facts = Table.grid(padding=(0, 2))
    for name, value in status_facts(stats, fleet_now).items():
        facts.add_row(Text(name, style="bold"), value)
    fleet = Table("scorer", "pid", "samples scored", "model version", box=None)
    for one in fleet_now["scorers"]:
        fleet.add_row(one["scorer_id"], str(one["pid"]), f"{one['scored']:,}", str(one["model_version"]))
    happened = Table.grid(padding=(0, 2))
    for event in events["events"]:
        rest = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in event.items()
            if key not in ("time", "event")
        )
        happened.add_row(event["time"][11:19], event["event"], rest)
    return Group(facts, Text(), fleet, Text(), happened)
