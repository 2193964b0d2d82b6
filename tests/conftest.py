"""What all tests share: the environment of Ray, and generated examples that are the same in every run."""

import os

from hypothesis import HealthCheck, settings

os.environ["RAY_AUTH_MODE"] = "disabled"  # before any ray.init: local test clusters need no token file
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

settings.register_profile(
    "steppe", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steppe")
