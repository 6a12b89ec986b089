"""What a person sees while a graph runs: a live table on a terminal, else a line now and then.

Training stages write `progress.json` beside their checkpoints; this reads it, so another terminal
(`cmforge status`) sees the same.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from infra import storage
from pipelines.dag import Planned, home_at
from pipelines.execution import Event
from pipelines.sweep_table import SweepView

LINE_EVERY_SECONDS = 30.0
_MARKS = {
    "waiting": "·",
    "cached": "✓",
    "running": "▶",
    "done": "✓",
    "failed": "✗",
    "skipped": "–",
    "stopped": "·",
}


@dataclass
class Row:
    """One stage as shown."""

    step: str
    work: str
    state: str = "waiting"
    detail: str = ""
    seconds: float = 0.0
    started: float = 0.0


class Progress:
    """Follows the events of one run. Use as a context manager."""

    def __init__(
        self, lines: Sequence[Planned], workspace: str, sweep: SweepView | None = None
    ) -> None:
        self.sweep = sweep
        self.rows = {
            line.step.name: Row(
                line.step.name,
                storage.join(home_at(workspace, line.step.name, line.fingerprint), "work"),
            )
            for line in lines
        }
        self.width = max(10, *map(len, self.rows))
        self.live: Any = None
        self.last_line = time.monotonic()

    def __enter__(self) -> "Progress":
        if sys.stdout.isatty():
            from rich.live import Live

            self.live = Live(refresh_per_second=4, transient=False)
            self.live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.live is not None:
            self.live.update(self.table())
            self.live.__exit__(*exception)

    def show(self, event: Event | None) -> None:
        """Take in what happened (None: nothing but time)."""
        if event is not None:
            row = self.rows[event.step]
            row.state = {"started": "running", "retry": "running"}.get(event.kind, event.kind)
            row.detail, row.seconds = event.detail, event.seconds
            if event.kind in ("started", "retry"):
                row.started = time.monotonic()
        if self.live is None and self.sweep is not None:
            for line in self.sweep.news():
                print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
        if self.live is not None:
            self.live.update(self.table())
        elif event is not None:
            self._print(self.rows[event.step], event.kind)
        elif time.monotonic() - self.last_line > LINE_EVERY_SECONDS:
            for row in self.rows.values():
                if row.state == "running":
                    self._print(row, "running")

    def _print(self, row: Row, what: str) -> None:
        self.last_line = time.monotonic()
        seconds = f" {row.seconds:.1f} s" if row.state in ("done", "cached") else ""
        watched = what in ("started", "running")
        detail = progress_line(row.work) if watched else row.detail
        text = f"{time.strftime('%H:%M:%S')} {row.step:<{self.width}} {what}{seconds}"
        print(f"{text}  {detail}".rstrip(), flush=True)

    def table(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for row in self.rows.values():
            running = row.state == "running"
            elapsed = time.monotonic() - row.started if running else row.seconds
            shown = "" if row.state == "waiting" else f"{elapsed:.0f} s"
            style = {"running": "bold", "failed": "red", "waiting": "dim", "cached": "dim"}
            table.add_row(
                _MARKS[row.state],
                row.step,
                row.state,
                shown,
                (progress_line(row.work) if running else "") or row.detail,
                style=style.get(row.state, ""),
            )
        if self.sweep is None:
            return table
        return Group(table, "", self.sweep.table())


def progress_line(work: str) -> str:
    """`43 %  812 img/s  loss 0.113  ETA 0:31`, what a sweep says, or "" where nothing is said."""
    try:
        now = json.loads(storage.read_bytes(storage.join(work, "progress.json")))
        if "said" in now:  # of a step that does not count images
            return str(now["said"])
        total, images, rate = now["total"], now["images"], now["images_per_second"]
        left = _clock(max(0.0, total - images) / rate) if rate > 0 else "?"
        loss = f"loss {now['loss']:.4g}  " if "loss" in now else ""  # of training stages
        return f"{100 * min(1, images / total):.0f} %  {rate:.0f} img/s  {loss}ETA {left}"
    except Exception:  # a line that cannot be read or understood must not stop a run
        return ""


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
