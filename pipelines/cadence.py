"""When training logs, saves and stops. Wall time decides, so no result may depend on it."""

import contextlib
import threading
import time
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

from infra import storage
from infra.errors import UserError

LOG_EVERY_SECONDS = 2.0
NOTICE_EVERY_SECONDS = 1.0


class Due(IntEnum):
    """What is to be done after a step."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


class Clock:
    """Of one stage in this process."""

    def __init__(self, checkpoint_every_seconds: float, images: int, before: float) -> None:
        now = time.monotonic()
        self.every = checkpoint_every_seconds
        self.before = before  # seconds of earlier attempts
        self.started = self.last_log = self.last_checkpoint = now
        self.first_images = self.last_images = images
        self.losses: list[Any] = []

    def log_due(self, last: bool) -> bool:
        return last or time.monotonic() - self.last_log >= LOG_EVERY_SECONDS

    def point(self, log: Any) -> dict[str, float]:
        """One line of the curve: means since the last one (of rank 0's share)."""
        import torch

        now = time.monotonic()
        rate = (log.images - self.last_images) / max(now - self.last_log, 1e-9)
        loss = torch.stack(self.losses).mean().item()
        self.last_log, self.last_images, self.losses = now, log.images, []
        return {
            "images": log.images,
            "loss": loss,
            "images_per_second": round(rate, 2),
            "gradient_norm": log.gradient_norm.item(),
            "lr": log.lr,
            "seconds": round(self.train_seconds, 3),
            **log.metrics,
        }

    def checkpoint_due(self) -> bool:
        return time.monotonic() - self.last_checkpoint >= self.every

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training: rates and training seconds leave it out."""
        begun = time.monotonic()
        yield
        lost = time.monotonic() - begun
        self.started += lost
        self.last_log += lost

    def checkpointed(self) -> None:
        self.last_checkpoint = time.monotonic()

    @property
    def train_seconds(self) -> float:
        return self.before + self.own_seconds

    @property
    def own_seconds(self) -> float:
        """Of this attempt."""
        return time.monotonic() - self.started


class Notice:
    """Looks for the file that asks this run to stop, beside the training: a look at a bucket takes
    longer than a step."""

    def __init__(self, url: str | None) -> None:
        self._url, self._over = url, threading.Event()
        self.given = False

    def __enter__(self) -> "Notice":
        self._once()
        if self._url is not None:
            threading.Thread(target=self._look, name="notice", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()

    def _look(self) -> None:
        while not self.given and not self._over.wait(NOTICE_EVERY_SECONDS):
            self._once()

    def _once(self) -> None:
        if self._url is not None:
            with contextlib.suppress(OSError, UserError):  # a store that is away says nothing
                self.given = storage.exists(self._url)
