"""The commands about a run's score store: whether it is whole, what it holds, and folding it by hand."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Annotated

import typer

app = typer.Typer(
    name="store",
    help="Examine and fold a run's score store.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

RunFolder = Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run folder; default: the newest run.")]
Root = Annotated[str, typer.Option(help="Where to look for the newest run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


@app.command()
def verify(folder: RunFolder = None, root: Root = "runs", as_json: AsJson = False) -> None:
    """Check every byte against its checksum. Exit code 1 when something is wrong. May be done while the run is up."""
    from deploy.client import find_run
    from shared import store_check

    run = find_run(folder, root)
    with _progress(as_json) as progress:
        problems = store_check.verify(run.scores_uri, progress)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(problem) for problem in problems], indent=1))
    else:
        for problem in problems:
            typer.echo(problem.problem)
        typer.echo(
            f"{run.scores_uri}: files that are damaged: {len(problems)}" if problems else f"{run.scores_uri} is whole"
        )
    if problems:
        raise typer.Exit(1)


@app.command()
def compact(folder: RunFolder = None, root: Root = "runs", as_json: AsJson = False) -> None:
    """Fold all fragments into one snapshot, and remove what nobody needs. A run that is up does so by itself."""
    from deploy.client import find_run
    from services.config import ControllerConfig
    from shared import store_check
    from shared.score_store import ScoreWriter

    run = find_run(folder, root)
    before = store_check.stats(run.scores_uri)
    retention = ControllerConfig.model_validate(run.description["config"].get("controller", {})).retention
    scoring_id = run.description["scoring_id"]
    with (
        run.locked(),
        ScoreWriter(run.scores_uri, run.num_samples, scoring_id=scoring_id, retention=retention) as writer,
    ):
        writer.compact()
    after = store_check.stats(run.scores_uri)
    if as_json:
        typer.echo(json.dumps({"before": before, "after": after}, indent=1))
    else:
        typer.echo(
            f"{run.scores_uri}: {before['fragments']} fragments folded; "
            f"{_size(before['bytes'])} before, {_size(after['bytes'])} now, "
            f"{_size(after['bytes_unneeded'])} of them to be removed when no reader can need them"
        )


@app.command()
def stats(folder: RunFolder = None, root: Root = "runs", as_json: AsJson = False) -> None:
    """Versions, rows and bytes."""
    from deploy.client import find_run
    from shared import store_check

    found = store_check.stats(find_run(folder, root).scores_uri)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        shown = _size(value) if name.startswith("bytes") else f"{value:,}" if isinstance(value, int) else value
        typer.echo(f"{name.replace('_', ' '):18}  {shown}")


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("verifying")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
