"""The CLI's side of REST: finds a run, and bears that one has no scorers."""

from typing import Any

from services.client import Client
from shared.catalogue import Run, newest_run
from shared.errors import ServiceError


def find_run(folder: str | None, root: str) -> Run:
    """The run in `folder`; or below `root` the newest that is up, else the newest."""
    return Run(folder) if folder is not None else newest_run(root)


def client_of(run: Run) -> Client:
    """Of a run that is up; it says at once what goes wrong."""
    return Client.of_run(run, retries=0)


def scorers(client: Client) -> dict[str, Any]:
    """/v1/scorers; where there are none to ask for, why, as `trouble`."""
    try:
        return client.scorers()
    except ServiceError as error:
        none = {"wanted": 0, "alive": 0, "scorers": [], "samples_per_second": None}
        return none | {"trouble": str(error)}
