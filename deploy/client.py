"""The CLI's side of REST: finds a run's service and asks it."""

from typing import Any

import httpx2

from shared.catalogue import Run, newest_run
from shared.errors import RunError, ServiceError

TIMEOUT_S = 10.0


def find_run(folder: str | None, root: str) -> Run:
    """The run in `folder`; or below `root` the newest that is up, else the newest."""
    return Run(folder) if folder else newest_run(root)


class RestClient:
    """Requests to one running run, with its token. Raises RunError when it is not up, ServiceError for a refusal."""

    def __init__(self, run: Run) -> None:
        runtime = run.read("runtime.json")
        if runtime is None:
            summary = run.path / "summary.json"
            left = f"its results are in {summary}" if summary.exists() else "it was interrupted and left no summary"
            raise RunError(f"run {run.path} is not up; {left}, its scores in {run.scores_uri}")
        token = run.token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx2.Client(base_url=runtime["url"], headers=headers, timeout=TIMEOUT_S, trust_env=False)

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
