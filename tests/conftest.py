"""What all tests share: score rows made by hand, and the environment of Ray."""

import os

os.environ["RAY_AUTH_MODE"] = "disabled"  # before any ray.init: local test clusters need no token file
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
