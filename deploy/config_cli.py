"""The commands about configurations: what one resolves to, whether it is right, and a first one to change."""

import json
from pathlib import Path
from typing import Annotated

import typer

from shared.errors import ConfigError, DatasetMissing, SteppeError

app = typer.Typer(
    name="config",
    help="Show, check and start configurations.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

TEMPLATES = Path(__file__).parent / "configs"

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="A TOML file.")]
Settings = Annotated[list[str], typer.Option("--set", help="Override: section.key=value. May be repeated.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


@app.command()
def show(config: ConfigFile, settings: Settings = [], as_json: AsJson = False) -> None:  # noqa: B006
    """The configuration with every default, as TOML that can be read again; settings without a value are left out."""
    import tomli_w

    from deploy.config import RunConfig
    from shared.config import read_config

    resolved = read_config(RunConfig, config, settings)
    if as_json:
        typer.echo(json.dumps(resolved.model_dump(mode="json"), indent=1))
    else:
        typer.echo(tomli_w.dumps(resolved.model_dump(mode="json", exclude_none=True)), nl=False)


@app.command()
def validate(config: ConfigFile, settings: Settings = []) -> None:  # noqa: B006
    """Whether a run could be made of it: keys and values, the data set, and what of the training must fit it."""
    from deploy.config import RunConfig
    from deploy.plan import check_batches
    from shared.config import read_config
    from shared.datasets import local_dataset

    resolved = read_config(RunConfig, config, settings)
    try:
        check_batches(resolved, len(local_dataset(resolved.data).train))
    except SteppeError as error:
        if not (isinstance(error, DatasetMissing) and resolved.data.download):
            error.problem = f"{config} is not valid\n{error.problem}"
            raise
        typer.echo(f"{error.problem}; what must fit the data was not checked", err=True)
    typer.echo(f"{config} is valid")


@app.command()
def init(
    path: Annotated[str, typer.Argument(metavar="[PATH]", help="The new file.")] = "./steppe.toml",
    template: Annotated[str, typer.Option("--template", help="Which shipped configuration.")] = "quickstart",
) -> None:
    """Copy a shipped configuration to PATH, to be changed there."""
    known = {file.stem: file for file in sorted(TEMPLATES.glob("*.toml"))}
    if template not in known:
        raise ConfigError(f"no template {template!r}", fix=f"choose one of {', '.join(known)}", key="--template")
    content = known[template].read_bytes()
    try:
        with open(path, "xb") as file:
            file.write(content)
    except FileExistsError:
        raise ConfigError(f"{path} is there already", fix="name another file, or remove it first", key=path) from None
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}", fix="name a file in a folder that you may write to", key=path
        ) from error
    typer.echo(f"wrote {path}; start it with: steppe run {path}")
