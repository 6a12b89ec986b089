"""How often in a row a stage's workers began at the same place.

Nodes come and go for days: as long as each life of the workers gets further than the one before,
there is no end to how often they are started again. What dies at the same place over and over does
so for a reason of its own.
"""

import json
from dataclasses import asdict, dataclass, replace

from infra import storage

FILE = "restarts.json"


@dataclass(frozen=True)
class Lives:
    """`place`: the checkpoint they begin with. `reason`: what one said before it died, if it could;
    `mistake`: whether that is the user's to mend."""

    place: str | None
    count: int = 1
    reason: str | None = None
    mistake: bool = False

    def verdict(self, max_failures: int) -> str | None:
        """Why they are not to be started again; None while they are."""
        if self.mistake or self.count <= max_failures + 1:
            return self.reason if self.mistake else None
        said = self.reason or "nothing: killed, or out of memory"
        where = "the start" if self.place is None else f"checkpoint {self.place}"
        times = self.count - 1
        return f"workers died {times} times in a row at {where}; the last one said: {said}"


def forget(work: str) -> None:
    """A new attempt counts anew: whoever runs it again may have mended the reason."""
    storage.remove_tree(storage.join(work, FILE))


def begin(work: str, place: str | None) -> Lives:
    """Count a start; by rank 0, before anything that may fail."""
    before = _read(work)
    if before is None or before.place != place:
        lives = Lives(place)
    else:
        lives = replace(before, count=before.count + 1)
    _write(work, lives)
    return lives


def because(work: str, reason: str, *, mistake: bool) -> None:
    """Keep what a worker died of."""
    lives = _read(work)
    if lives is not None:
        _write(work, replace(lives, reason=reason, mistake=mistake))


def _read(work: str) -> Lives | None:
    try:
        return Lives(**json.loads(storage.read_bytes(storage.join(work, FILE))))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _write(work: str, lives: Lives) -> None:
    storage.write_bytes(storage.join(work, FILE), json.dumps(asdict(lives)).encode())
