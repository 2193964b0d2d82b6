"""Are the packages that Python finds ours? A user's folder may hold a `trainer.py` or a `shared/` of its own."""

import importlib
from pathlib import Path

from shared.errors import ConfigError

PACKAGES = ("deploy", "scorer", "services", "shared", "trainer")


def check_packages() -> Path:
    """The folder that holds all five packages. Raises ConfigError naming the stranger when one is not ours."""
    own = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        found = importlib.import_module(name).__file__
        if found is None or Path(found).resolve().parent != own / name:
            raise ConfigError(
                f"`import {name}` finds {found or 'a folder'} instead of steppe's {own / name}; "
                "start steppe from another folder, or rename yours"
            )
    return own
