"""A sweep's trials as text: live while it runs, or as they stand."""

import contextlib
import math
import time
from collections.abc import Sequence
from typing import Any

from infra.errors import UserError
from pipelines.ledger import Ledger
from pipelines.sweep import SweepConfig
from pipelines.sweep_summary import RUNNING, Reading, Trial

POLL_SECONDS = 2.0


class SweepView:
    """Follows a ledger from another process than the one that writes it."""

    def __init__(self, ledger: Ledger, sweep: SweepConfig) -> None:
        self._ledger, self._sweep = ledger, sweep
        self._trials: list[Trial] = []
        self._last = -math.inf
        self._told = {t.number for t in self._current() if t.state != RUNNING}
        self._last = -math.inf  # what comes from now on is news at once

    def news(self) -> list[str]:
        """A line for each trial that ended since the last call."""
        lines = []
        for trial in self._current():
            if trial.state != RUNNING and trial.number not in self._told:
                self._told.add(trial.number)
                lines.append(one_line(trial, self._sweep))
        return lines

    def table(self) -> Any:
        """For a terminal that is drawn again and again."""
        from rich.table import Table

        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for head in HEADS:
            table.add_column(head)
        for row in _rows(self._current(), self._sweep):
            table.add_row(*row)
        return table

    def _current(self) -> list[Trial]:
        if time.monotonic() - self._last >= POLL_SECONDS:
            self._last = time.monotonic()
            with contextlib.suppress(OSError, ValueError, UserError):  # not worth failing for
                self._trials = self._ledger.trials()
        return self._trials


HEADS = ("trial", "state", "k/K", "1 step", "2 steps", "EMA", "settings")


def lines(trials: Sequence[Trial], sweep: SweepConfig) -> list[str]:
    """The table as plain text."""
    rows = [HEADS, *_rows(trials, sweep)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADS) - 1)]
    return [
        "  ".join(
            [*(text.ljust(w) for text, w in zip(row, widths, strict=False)), row[-1]]
        ).rstrip()
        for row in rows
    ]


def one_line(trial: Trial, sweep: SweepConfig) -> str:
    """What a log says of a trial that ended."""
    number, state, fraction, one, two, _, settings = _row(trial, sweep)
    found = trial.reason if trial.reason else f"{one} in one step, {two} in two"
    return f"trial {number} {state} at k/K {fraction}: {found}  {settings}"


def _rows(trials: Sequence[Trial], sweep: SweepConfig) -> list[tuple[str, ...]]:
    return [_row(trial, sweep) for trial in trials]


def _row(trial: Trial, sweep: SweepConfig) -> tuple[str, ...]:
    last = trial.probes[-1] if trial.probes else None
    lows: dict[int, Reading | None] = {n: last.lowest(n) if last else None for n in (1, 2)}
    judged = lows[sweep.steps]
    prefix = f"{sweep.stage}."
    settings = " ".join(text.removeprefix(prefix) for text in trial.settings)
    return (
        str(trial.number),
        trial.state,
        f"{trial.fraction:.2f}",
        *("-" if low is None else f"{low.value:.4g}" for low in lows.values()),
        judged.ema if judged else "-",
        settings or "as the recipe has it",
    )
