"""What a sweep has tried, where a crash cannot reach it: a small file per trial, and its state.

A trial is written down before it starts, put if absent: so it is neither lost nor doubled, whoever
is killed when. Its state is rewritten as it goes; what a kill takes of that, the trial says again.
"""

import json
import re

from infra import storage
from infra.errors import UserError
from pipelines.artifacts import from_json, to_json
from pipelines.sweep_summary import Trial


class Ledger:
    """The trials of one sweep below `home`."""

    def __init__(self, home: str) -> None:
        self.home = home

    def trials(self) -> list[Trial]:
        """By number, each as last heard of."""
        names = set(storage.list_dir(self.home))
        numbers = [match[1] for name in names if (match := re.fullmatch(r"(\d{4,})\.json", name))]
        found = []
        for number in sorted(numbers, key=int):
            state = f"{number}.state.json"
            found.append(self._read(state if state in names else f"{number}.json"))
        return found

    def begin(self, trial: Trial) -> Trial:
        """Write a new trial down; returns the one that has its number now."""
        name = f"{trial.number:04}.json"
        data = json.dumps(to_json(trial), indent=1).encode()
        storage.put_if_absent(storage.join(self.home, name), data)
        return self._read(name)

    def update(self, trial: Trial) -> None:
        """How a trial goes."""
        url = storage.join(self.home, f"{trial.number:04}.state.json")
        storage.write_bytes(url, json.dumps(to_json(trial)).encode())

    def seconds(self) -> float:
        """Wall clock spent so far, over all attempts."""
        url = storage.join(self.home, "clock.json")
        if not storage.exists(url):
            return 0.0
        return float(json.loads(storage.read_bytes(url))["seconds"])

    def spend(self, seconds: float) -> None:
        data = json.dumps({"seconds": round(seconds, 3)}).encode()
        storage.write_bytes(storage.join(self.home, "clock.json"), data)

    def _read(self, name: str) -> Trial:
        url = storage.join(self.home, name)
        try:
            found: Trial = from_json(Trial, json.loads(storage.read_bytes(url)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{url}: is no record of a trial ({error}); remove {self.home} to search anew (the "
                f"trials themselves are kept)"
            ) from error
        return found
