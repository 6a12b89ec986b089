"""Environment Ray reads once, when it is first imported; so this must be called before that."""

import os
import secrets
import sys

# Read where Train's `fit` is called. Measured reasons: reports wait for a poll (2 s by default);
# a worker group may wait for others' CPUs; printing twice, changing directory and a preemption
# watcher help nobody here.
TASKS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


def prepare(address: str) -> None:
    """Set what a driver needs; a local Ray of our own gets a token never written to disk."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == "local":
        assert "ray" not in sys.modules, "Ray has read its environment already"
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
