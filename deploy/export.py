"""What a run found out, as a file or on the terminal; from the run's folder alone, while it goes on or long after.

An export is a table and the facts that belong beside it; a format is a function of one.
"""

import dataclasses
import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from services.suspects import estimate, quality, suspects
from shared import open_run
from shared.catalogue import Run
from shared.errors import ConfigError, StoreCorrupt, StoreError, StoreMismatch
from shared.run_scores import RunScores
from shared.schema import arrow_file
from shared.storage import Folder, local_path

if TYPE_CHECKING:
    from rich.console import Console

SHOWN_ROWS = 20  # on a terminal, unless told
HEADERS = {"sample_id": "id", "model_version": "version", "clean_label": "clean"}  # so that a table fits 80 columns


@dataclasses.dataclass(frozen=True)
class Export:
    """`table` is what `name` says; `facts` tell of the whole, also where the table is cut."""

    name: str
    table: pa.Table
    facts: dict[str, Any]


def export(run: Run, *, only_suspects: bool, form: str | None, out: str | None, limit: int | None) -> None:
    """Send the samples of `run` with their scores, or the suspects among them, to `out`, or to stdout.

    Args:
        form: table, csv, json, arrow or parquet; None takes what the name of `out` ends in, and a table on stdout.
        limit: at most so many rows; None is all, of a table the first SHOWN_ROWS.

    Raises: ConfigError for a format and a file that do not go together, and for a file that cannot be written;
        StoreError when nothing is scored; RunError when the run's samples cannot be read.
    """
    form = choose_format(form, out)
    make, show = (export_suspects, print_suspects) if only_suspects else (export_scores, print_scores)
    if form == "table":
        show(make(run, limit or SHOWN_ROWS))
        return
    exported = make(run, limit)
    data = FORMATS[form](exported)
    if out is None:
        print(bytes(data).decode(), end="")
    else:
        write_file(out, data)
        print(f"wrote {exported.table.num_rows} {exported.name} to {out}")


def choose_format(form: str | None, out: str | None) -> str:
    """The format, and whether it can go where it is asked to. Raises ConfigError."""
    if form is None:
        form = "table" if out is None else Path(out).suffix.removeprefix(".")
        if out is not None and form not in FORMATS:
            raise ConfigError(
                f"--out {out} does not say which format", fix=f"add --format {' or '.join(FORMATS)}", key="--format"
            )
    if form not in ("table", *FORMATS):
        raise ConfigError(f"no format {form!r}", fix=f"choose one of table, {', '.join(FORMATS)}", key="--format")
    if form == "table" and out is not None:
        raise ConfigError(
            f"--format table is for the terminal, not for the file {out}",
            fix=f"choose one of {', '.join(FORMATS)}",
            key="--format",
        )
    if form in BINARY and out is None:
        raise ConfigError(f"--format {form} is not text", fix="add --out FILE", key="--out")
    return form


def export_scores(run: Run, limit: int | None = None) -> Export:
    """All samples in order of their ids, what is known of each and its latest scores. Raises as `export`."""
    opened = _scores(run)
    table = opened.to_arrow()
    facts = {
        "run": run.description["run_id"],
        "store_version": opened.scores.version,
        "scored": table.num_rows - table.column("model_version").null_count,
        "found": run.num_samples,
    }
    return Export("scores", table.slice(0, limit), facts)


def export_suspects(run: Run, limit: int | None = None) -> Export:
    """The samples that look mislabelled, at most `limit` of them. Raises as `export`."""
    reader, samples = _scores(run).scores, run.samples()
    found = suspects(reader, samples)
    facts = {
        "run": run.description["run_id"],
        "store_version": reader.version,
        "measure": "loss",
        "meaning": "another class is predicted and the label is less likely than chance; "
        "highest percentile of the loss within its model_version first",
        "scored": reader.table().num_rows,
        "found": found.num_rows,
        "share": estimate(reader, samples),
        "quality": quality(reader, samples),
    }
    return Export("suspects", found.slice(0, limit), facts)


def print_scores(exported: Export) -> None:
    """The first samples as people read them, on stdout."""
    facts = exported.facts
    console = _print_table(exported, ["sample_id", "key", "label", "predicted", "loss", "adm", "model_version"])
    said = [f"{facts['scored']} of {facts['found']} samples are scored, at store version {facts['store_version']}"]
    if exported.table.num_rows < facts["found"]:
        said.append(f"shown: the first {exported.table.num_rows}; more with --limit, all of them with --out FILE")
    for line in said:
        console.print(line, markup=False, soft_wrap=True)


def print_suspects(exported: Export) -> None:
    """The suspects as people read them, on stdout."""
    facts = exported.facts
    names = ["sample_id", "key", "label", "predicted", "loss", "percentile", "adm", "model_version"]
    names += ["clean_label"] * ("clean_label" in exported.table.column_names)
    console = _print_table(exported, names)
    said = [
        f"{facts['found']} of {facts['scored']} scored samples look mislabelled ({facts['share']:.1%}), by loss at "
        f"store version {facts['store_version']}"
    ]
    if exported.table.num_rows < facts["found"]:
        said.append(f"shown: the {exported.table.num_rows} most suspicious; more with --limit")
    if facts["quality"]:
        said.append(_quality_line(facts["quality"]))
    for line in said:
        console.print(line, markup=False, soft_wrap=True)


def _print_table(exported: Export, names: Sequence[str]) -> "Console":
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console, table = Console(highlight=False), Table(box=None)
    for name in names:
        table.add_column(HEADERS.get(name, name), overflow="fold", justify="left" if name == "key" else "right")
    for row in exported.table.select(names).to_pylist():
        table.add_row(*(_shown(value) if name != "key" else escape(str(value)) for name, value in row.items()))
    if table.row_count:
        console.print(table)
    return console


def write_file(out: str, data: "bytes | pa.Buffer") -> None:
    """Write `out` whole, or leave what was there. Raises ConfigError when it cannot be written."""
    path = local_path(out)
    if path.exists() and not path.is_file():
        raise ConfigError(f"--out {out} is there and no file", fix="name a file", key="--out")
    if not path.parent.is_dir():
        raise ConfigError(
            f"--out {out}: there is no folder {path.parent}", fix="make it first, or name another", key="--out"
        )
    try:
        Folder(path.parent).put(path.name, data)
    except OSError as error:
        raise ConfigError(
            f"cannot write {out}: {error.strerror}",
            fix="name a file in a folder that you may write to and that has space",
            key="--out",
        ) from error


def _scores(run: Run) -> RunScores:
    try:
        opened = open_run(run.path)
    except (StoreCorrupt, StoreMismatch):
        raise
    except StoreError:
        opened = None
    if opened is None or not opened.scores.version:
        raise StoreError(
            f"run {run.path} has no scores yet",
            fix=f"see how far it is: steppe status {run.path}",
            key=str(run.scores_uri),
        )
    return opened


def _csv(exported: Export) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pa.csv.write_csv(exported.table, sink, pa.csv.WriteOptions(quoting_style="needed"))
    return sink.getvalue()


def _json(exported: Export) -> bytes:
    content = exported.facts | {exported.name: exported.table.to_pylist()}
    return (json.dumps(content, indent=1, default=datetime.datetime.isoformat) + "\n").encode()


def _arrow(exported: Export) -> pa.Buffer:
    """An Arrow IPC file; its schema's metadata has the facts as JSON under `steppe`."""
    return arrow_file(_with_facts(exported))


def _parquet(exported: Export) -> pa.Buffer:
    """With the same metadata as the Arrow file."""
    sink = pa.BufferOutputStream()
    pq.write_table(_with_facts(exported), sink)
    return sink.getvalue()


def _with_facts(exported: Export) -> pa.Table:
    return exported.table.replace_schema_metadata({"steppe": json.dumps(exported.facts)})


FORMATS: dict[str, Callable[[Export], "bytes | pa.Buffer"]] = {
    "csv": _csv,
    "json": _json,
    "arrow": _arrow,
    "parquet": _parquet,
}
BINARY = ("arrow", "parquet")


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _quality_line(found: dict[str, Any]) -> str:
    precision, recall, auc = (_shown(found[name]) for name in ("precision", "recall", "auc"))
    return (
        f"against the {found['known']} clean labels that are known, {found['mislabelled']} of them different: "
        f"precision {precision}, recall {recall}, AUC of the ranking {auc}"
    )
