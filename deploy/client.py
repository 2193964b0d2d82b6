"""The CLI's side of REST: finds a run's service and asks it."""

from typing import Any

import httpx2

from shared.catalogue import Run, RunState, newest_run
from shared.errors import RunError, ServiceError

TIMEOUT_S = 10.0
_SERVE = "to ask for its scores: steppe serve {run}"
_WHAT_TO_DO = {
    RunState.FINISHED: "it is finished, its results are in its summary.json; " + _SERVE,
    RunState.INTERRUPTED: "it was interrupted; to go on: steppe run {run} --resume; " + _SERVE,
    RunState.KILLED: "it was killed; to go on: steppe run {run} --resume; to end what it left: steppe down {run}",
}


def find_run(folder: str | None, root: str) -> Run:
    """The run in `folder`; or below `root` the newest that is up, else the newest."""
    return Run(folder) if folder else newest_run(root)


class RestClient:
    """Requests to one running run, with its token. Raises RunError when it is not up, ServiceError for a refusal."""

    def __init__(self, run: Run) -> None:
        runtime, state = run.runtime(), run.state()
        if not runtime or state not in (RunState.RUNNING, RunState.SERVED):
            raise RunError(f"run {run.path} is not up: {_WHAT_TO_DO[state].format(run=run.path)}")
        if "url" not in runtime:
            raise RunError(f"run {run.path} is starting and does not answer yet; try again in a few seconds")
        token = run.token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx2.Client(base_url=runtime["url"], headers=headers, timeout=TIMEOUT_S, trust_env=False)

    def scorers(self) -> dict[str, Any]:
        """/v1/scorers; where there are none to ask for, why, as `trouble`."""
        try:
            return self.get("/v1/scorers")
        except ServiceError as error:
            none = {"wanted": 0, "alive": 0, "scorers": [], "samples_per_second": None}
            return none | {"trouble": str(error)}

    def get(self, path: str) -> dict[str, Any]:
        return self._request("GET", path)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._request("POST", path, body)

    def patch(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._request("PATCH", path, body)

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            answer = self._client.request(method, path, json=body)
            content: dict[str, Any] = answer.json()
        except (httpx2.HTTPError, ValueError) as error:
            raise ServiceError(f"{self._client.base_url} does not answer: {error}") from error
        if answer.is_error:
            raise ServiceError(content.get("detail", str(answer)))
        return content
