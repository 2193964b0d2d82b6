"""The command line. Commands import what they need themselves, so that `steppe --help` is quick."""

import json
import sys
from typing import Annotated, Any

import typer

from shared.errors import SteppeError

app = typer.Typer(
    name="steppe",
    help="Keeps the adversarial difficulty of every training sample known while a SAM training run goes on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

FOLDER_HELP = "The run's folder; default: the newest that is up below --root."
RunFolder = Annotated[str | None, typer.Argument(metavar="[RUN]", show_default=False, help=FOLDER_HELP)]
Root = Annotated[str, typer.Option("--root", help="Where runs are.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]

INTERRUPTED = 130


@app.command()
def run(
    config: Annotated[str, typer.Argument(help="A TOML file, such as deploy/configs/quickstart.toml.")],
    settings: Annotated[list[str], typer.Option("--set", help="Override: section.key=value. May be repeated.")] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Train with SAM while scorers keep every sample's difficulty fresh; leave a run folder."""
    from deploy.packages import check_packages

    check_packages()
    from deploy import driver, progress
    from deploy.config import RunConfig
    from shared.config import read_config

    resolved = read_config(RunConfig, config, settings)
    try:
        summary = driver.run(resolved)
    except KeyboardInterrupt:
        typer.echo("steppe: interrupted; everything that the run started is ended, its folder stays", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        _print_json(summary)
    else:
        progress.print_summary(summary)


@app.command()
def status(folder: RunFolder = None, root: Root = "runs", as_json: AsJson = False) -> None:
    """Coverage, ages, checkpoints and scorers of a running run."""
    client = _client(folder, root)
    stats, scorers = client.get("/v1/stats"), client.get("/v1/scorers")
    if as_json:
        _print_json(stats | {"scorers": scorers})
        return
    from deploy.progress import print_status

    print_status(stats, scorers)


@app.command(context_settings={"ignore_unknown_options": True})  # so that -1 is a number with a clear error
def scale(
    replicas: Annotated[int, typer.Argument(help="The wanted number of scorers; 0 lets scores age.")],
    folder: RunFolder = None,
    root: Root = "runs",
    as_json: AsJson = False,
) -> None:
    """Set the wanted number of scorers of a running run."""
    answer = _client(folder, root).patch("/v1/scorers", {"replicas": replicas})
    if as_json:
        _print_json(answer)
    else:
        typer.echo(f"{answer['wanted']} scorers wanted, {answer['alive']} alive")


@app.command()
def query(
    ids: Annotated[list[int], typer.Argument(help="Sample ids.")],
    measure: Annotated[str, typer.Option(help="adm, loss, margin, grad_norm or el2n.")] = "adm",
    folder: Annotated[str | None, typer.Option("--run", help=FOLDER_HELP)] = None,
    root: Root = "runs",
    as_json: AsJson = False,
) -> None:
    """The difficulty of samples, with how fresh it is."""
    answer = _client(folder, root).post("/v1/scores:query", {"ids": ids, "measure": measure})
    if as_json:
        _print_json(answer)
        return
    from rich.console import Console
    from rich.table import Table

    columns = ("sample_id", "value", "percentile", "status", "age_versions", "model_version")
    table = Table(*columns, title=f"{measure} ({answer['meaning']})")
    for row in zip(*(answer[name] for name in columns), strict=True):
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else "-" if v is None else str(v) for v in row))
    Console().print(table)


@app.command()
def down(folder: RunFolder = None, root: Root = "runs") -> None:
    """Stop a running run cleanly, and end what a killed one left behind."""
    from deploy.client import find_run
    from deploy.down import stop_run

    typer.echo(stop_run(find_run(folder, root)))


def main() -> None:
    """Entry point. A user's mistake ends in one line and exit code 1 (usage: 2), an interrupt in 130."""
    try:
        app()
    except SteppeError as error:
        typer.echo(f"steppe: {error}", err=True)
        sys.exit(1)


def _client(folder: str | None, root: str) -> Any:
    from deploy.client import RestClient, find_run

    return RestClient(find_run(folder, root))


def _print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content, indent=1))
