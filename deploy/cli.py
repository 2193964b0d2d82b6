"""The command line. Commands import what they need themselves, so that `steppe --help` is quick."""

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy import config_cli, store_cli
from shared.errors import SteppeError

app = typer.Typer(
    name="steppe",
    help="Keeps the adversarial difficulty of every training sample known while a SAM training run goes on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

FOLDER_HELP = "The run's folder; default: below --root the newest that is up, else the newest."
RunFolder = Annotated[str | None, typer.Argument(metavar="[RUN]", show_default=False, help=FOLDER_HELP)]
Address = Annotated[
    str,
    typer.Option(
        "--address", help="The Ray cluster: local (one of the run's own), auto (on one of its hosts), or HOST:PORT."
    ),
]
Root = Annotated[str, typer.Option("--root", help="Where runs are.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]

INTERRUPTED = 130


@app.command()
def run(
    context: typer.Context,
    config: Annotated[
        str | None,
        typer.Argument(
            show_default=False,
            help="A TOML file, such as deploy/configs/quickstart.toml; to resume also a run's folder.",
        ),
    ] = None,
    settings: Annotated[list[str], typer.Option("--set", help="Override: section.key=value. May be repeated.")] = [],  # noqa: B006
    replay: Annotated[
        str | None,
        typer.Option(
            "--replay",
            metavar="RUN",
            help="Train on exactly the draws of that run again, without scorers; by its own settings without a CONFIG.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the unfinished run: run.folder, else the newest of run.root.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure briefly what would start, how long it takes, what does not fit.")
    ] = False,
    address: Address = "local",
    as_json: AsJson = False,
) -> None:
    """Train with SAM while scorers keep every sample's difficulty fresh; leave a run folder."""
    from deploy.packages import check_packages

    check_packages()
    from deploy.config import RunConfig
    from deploy.resume import settings_to_replay
    from shared.config import make_config, read_config

    if config is None and (replay is None or resume):
        context.fail("Missing argument 'config'.")
    if replay is not None:
        settings = [*settings, f"run.replay={replay}", "scoring.mode=off"]

    def read() -> RunConfig:
        if config is None:
            return make_config(RunConfig, settings_to_replay(str(replay)), settings)
        return read_config(RunConfig, config, settings)

    if dry_run:
        from deploy.plan import plan, print_plan

        planned = plan(read())
        if as_json:
            _print_json(planned)
        else:
            print_plan(planned)
        return
    from deploy import driver, progress
    from deploy.interrupts import exit_at_once_on_signals
    from deploy.resume import find_resumable

    exit_at_once_on_signals()
    unfinished = None
    if resume:
        found = find_resumable(str(config), settings)
        unfinished, resolved = found.run, found.config
    else:
        resolved = read()
    try:
        summary = driver.run(resolved, unfinished, address)
    except KeyboardInterrupt:
        typer.echo("steppe: interrupted; everything that the run started is ended; --resume goes on with it", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        _print_json(summary)
    else:
        progress.print_summary(summary)


@app.command()
def submit(
    config: Annotated[str, typer.Argument(help="A TOML file; it is read and checked here.")],
    address: Annotated[str, typer.Option("--address", help="The cluster's dashboard, such as http://HEAD:8265.")],
    settings: Annotated[list[str], typer.Option("--set", help="Override: section.key=value. May be repeated.")] = [],  # noqa: B006
    working_dir: Annotated[
        str | None, typer.Option("--working-dir", metavar="FOLDER", help="Sent along, such as your own modules.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in run.folder.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job to its end.")] = True,
    as_json: AsJson = False,
) -> None:
    """Run on a Ray cluster, as a job: follow its log and end with its exit code. Ctrl-C asks whether it is to stop."""
    import dataclasses

    from deploy.packages import check_packages

    check_packages()
    from deploy.submit import submit as submit_job

    log = sys.stderr if as_json else sys.stdout
    job = submit_job(config, settings, address, working_dir=working_dir, resume=resume, wait=wait, log=log)
    if as_json:
        _print_json(dataclasses.asdict(job))
    else:
        typer.echo(f"{job.submission_id} {job.status.lower()}")
    if job.exit_code:
        raise typer.Exit(job.exit_code)


@app.command()
def score(
    config: Annotated[
        str, typer.Argument(help="A TOML file; of its run.folder, where one is there, the run is gone on with.")
    ],
    settings: Annotated[list[str], typer.Option("--set", help="Override: section.key=value. May be repeated.")] = [],  # noqa: B006
    address: Address = "local",
) -> None:
    """Score for a training of your own, until Ctrl-C: scorers follow the checkpoints that it publishes."""
    from deploy.packages import check_packages

    check_packages()
    from deploy.score import score_until_stopped

    score_until_stopped(config, tuple(settings), address)


@app.command()
def status(folder: RunFolder = None, root: Root = "runs", as_json: AsJson = False) -> None:
    """Coverage, ages, checkpoints and scorers of a running run."""
    from deploy.client import scorers

    client = _client(folder, root)
    stats, fleet = client.stats(), scorers(client)
    if as_json:
        _print_json(stats | {"scorers": fleet})
        return
    from deploy.progress import print_status

    print_status(stats, fleet)


@app.command(context_settings={"ignore_unknown_options": True})  # so that -1 is a number with a clear error
def scale(
    replicas: Annotated[int, typer.Argument(help="The wanted number of scorers; 0 lets scores age.")],
    folder: RunFolder = None,
    root: Root = "runs",
    as_json: AsJson = False,
) -> None:
    """Set the wanted number of scorers of a running run; that ends autoscaling until this attempt ends."""
    answer = _client(folder, root).scale(replicas)
    if as_json:
        _print_json(answer)
    else:
        typer.echo(f"{answer['wanted']} scorers wanted, {answer['alive']} alive")
        if reason := answer["autoscaler"]["reason"]:
            typer.echo(reason)


@app.command(context_settings={"ignore_unknown_options": True})
def query(
    ids: Annotated[list[int], typer.Argument(help="Sample ids.")],
    measure: Annotated[str, typer.Option(help="adm, loss, margin, grad_norm ...; a wrong one lists all.")] = "adm",
    max_age_versions: Annotated[int | None, typer.Option(min=0, help="Refuse scores of older checkpoints.")] = None,
    max_age_s: Annotated[float | None, typer.Option(min=0, help="Refuse scores of more seconds ago.")] = None,
    folder: Annotated[str | None, typer.Option("--run", help=FOLDER_HELP)] = None,
    root: Root = "runs",
    as_json: AsJson = False,
) -> None:
    """The difficulty of samples, with how fresh it is."""
    asked = {"ids": ids, "measure": measure, "max_age_versions": max_age_versions, "max_age_s": max_age_s}
    answer = _client(folder, root).post("/v1/scores:query", asked)
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
def top(
    folder: RunFolder = None,
    root: Root = "runs",
    interval_s: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between two looks.")] = 1.0,
    count: Annotated[
        int | None, typer.Option("--count", min=1, help="Look so many times; default: to the end.")
    ] = None,
) -> None:
    """Watch a running run: progress, freshness, scorers and what happened last."""
    from deploy.client import find_run
    from deploy.top import watch

    watch(find_run(folder, root), interval_s, count)


@app.command()
def serve(
    folder: RunFolder = None,
    root: Root = "runs",
    host: Annotated[str, typer.Option(help="Off loopback everything needs the run's token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 7471,
    cors: Annotated[
        list[str], typer.Option("--cors", metavar="ORIGIN", help="A web page's origin that may ask. May be repeated.")
    ] = [],  # noqa: B006
) -> None:
    """Answer questions about a run's scores over REST, without Ray; of a finished run too."""
    from deploy.client import find_run
    from deploy.serve import serve as serve_run

    serve_run(find_run(folder, root), host, port, cors)


@app.command()
def runs(root: Root = "runs", as_json: AsJson = False) -> None:
    """The runs below --root, the newest first: running, finished, interrupted or killed."""
    from deploy.runs import list_runs, print_runs

    found = list_runs(root)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        print_runs(found)


@app.command()
def export(
    folder: RunFolder = None,
    suspects: Annotated[bool, typer.Option("--suspects", help="The samples that look mislabelled.")] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many rows; default: all, but 20 in a table.")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", help="table, csv, json, arrow or parquet; default: what FILE ends in, else table."),
    ] = None,
    out: Annotated[str | None, typer.Option("--out", metavar="FILE", help="Replaced whole; default: stdout.")] = None,
    root: Root = "runs",
) -> None:
    """All samples with their scores, or the suspects among them, from the run's folder alone."""
    from deploy.client import find_run
    from deploy.export import export as export_run

    export_run(find_run(folder, root), only_suspects=suspects, form=form, out=out, limit=limit)


@app.command()
def doctor(
    root: Root = "runs",
    host: Annotated[str, typer.Option(help="Where the REST service would listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where the REST service would listen.")] = 7471,
    as_json: AsJson = False,
) -> None:
    """Look for what would keep a run from working on this machine. Exit code 1 when something would."""
    import dataclasses

    from deploy.doctor import examine, print_findings

    findings = examine(root, host, port)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        print_findings(findings)
    if any(finding.status == "problem" for finding in findings):
        raise typer.Exit(1)


@app.command()
def compare(
    config: Annotated[str, typer.Argument(help="A TOML file, such as deploy/configs/compare/small.toml.")],
    settings: Annotated[list[str], typer.Option("--set", help="Override: section.key=value. May be repeated.")] = [],  # noqa: B006
    folder: Annotated[
        str | None, typer.Option("--folder", help="Where it is kept; default: comparisons/NAME. It is gone on with.")
    ] = None,
    cores: Annotated[int | None, typer.Option("--cores", min=1, help="Cores to use; default: all.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Train nothing; report what is finished so far.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train methods x data sets x seeds, settings searched on a validation split; say what differs, and how surely."""
    import os
    import shlex

    from deploy.packages import check_packages

    check_packages()
    from deploy.compare.compare import compare as run_comparison
    from deploy.compare.compare import report_only
    from deploy.compare.config import CompareConfig
    from deploy.compare.report import to_text
    from deploy.interrupts import exit_at_once_on_signals
    from shared.config import read_config

    exit_at_once_on_signals()
    resolved = read_config(CompareConfig, config, settings)
    place = Path(folder or f"comparisons/{resolved.name}").absolute()
    command = shlex.join(["steppe", "compare", config, *(f"--set={setting}" for setting in settings)])
    usable = cores or len(os.sched_getaffinity(0))
    try:
        if report:
            found = report_only(resolved, place, command)
        else:
            found = run_comparison(resolved, place, command, usable, lambda text: typer.echo(text, err=True))
    except KeyboardInterrupt:
        typer.echo(f"steppe: interrupted; what is finished is kept in {place}, the same command goes on", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        _print_json(found)
    else:
        typer.echo(to_text(found))
        typer.echo(f"kept in {place}: report.md, results.json, plots")


@app.command()
def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="recovery: kill -9 of the only scorer to rows of its successor. "
            "flat: what still tells samples apart when all losses have become small. "
            "store: commits, refreshes, folds and memory of the score store, beside the disk and other stores. "
            "store-crash: kill -9 of its writer at random instants. store-load: readers beside writer and compactions. "
            "rest: the REST service under load, beside bare Starlette (needs wrk). "
            "scorers: one and two scorers beside the same loop without Ray. "
            "controller: what it carries from simulated scorers, beside what its store takes in. "
            "ranks: training in two workers beside one, at the same global batch. "
            "sampler: what a batch of draws costs, up to 50 million samples."
        ),
    ],
    repeats: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default="recovery 20, flat 12, store 200, store-crash 1000, store-load 60, rest 5, scorers 7, "
            "controller 5, ranks 5, sampler 5",
            help="How often to measure; flat: along one training; store-load: seconds; ranks: seeds.",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="flat: draw it too, .png, .svg or .pdf.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure on this machine; figures are for this machine and this moment."""
    from deploy.bench import find_bench, run_bench

    found = run_bench(name, repeats, plot)
    if as_json:
        _print_json(found)
    else:
        find_bench(name).show(found)


@app.command()
def down(folder: RunFolder = None, root: Root = "runs") -> None:
    """Stop a running run cleanly, and end what a killed one left behind."""
    from deploy.client import find_run
    from deploy.down import stop_run

    typer.echo(stop_run(find_run(folder, root)))


app.add_typer(config_cli.app)
app.add_typer(store_cli.app)


def main() -> None:
    """Entry point. A user's mistake ends in one line and exit code 1 (usage: 2), an interrupt in 130."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a script has it for what it starts with &
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        app()
    except SteppeError as error:
        typer.echo(f"steppe: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("steppe: interrupted", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # such as `steppe query ... | head`
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:  # such as a full disk; what failed is the user's machine
        where = f": {error.filename}" if error.filename else ""
        typer.echo(f"steppe: {error.strerror or error}{where}", err=True)
        sys.exit(1)


def _client(folder: str | None, root: str) -> Any:
    from deploy.client import client_of, find_run

    return client_of(find_run(folder, root))


def _print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content, indent=1))
