"""Are the packages that Python finds ours? A user's folder may hold a `trainer.py` or a `shared/` of its own."""

import importlib.util
from pathlib import Path

from shared.errors import ConfigError

PACKAGES = ("deploy", "scorer", "services", "shared", "trainer")


def check_packages() -> Path:
    """The folder that holds all five packages. Raises ConfigError naming the stranger when one is not ours."""
    own = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        found = spec.origin if spec and spec.origin else f"a folder {name}/"
        if Path(found).resolve().parent != own / name:
            raise ConfigError(
                f"`import {name}` finds {found} instead of steppe's {own / name}; "
                "start steppe from another folder, or rename yours"
            )
    return own
