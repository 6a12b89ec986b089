"""Random numbers that do not depend on how many workers share a batch, nor on what ran before.

Each optimiser step reseeds from (seed, images seen), draws for the whole global batch and keeps
this rank's rows. So resume needs no generator state, and one worker or three draw the same noise.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a stable function of `parts` (SHA-256), the same on every platform."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class BatchRandom:
    """The draws of one step: made for `total` samples, of which rows [start, stop) are kept."""

    generator: torch.Generator
    total: int
    start: int
    stop: int

    def normal(self, *shape: int) -> Tensor:
        """Standard normal [stop - start, *shape], float32."""
        device = self.generator.device
        full = torch.randn((self.total, *shape), generator=self.generator, device=device)
        return full[self.start : self.stop]

    def uniform(self) -> Tensor:
        """Uniform on [0, 1), float32 [stop - start]."""
        device = self.generator.device
        full = torch.rand(self.total, generator=self.generator, device=device)
        return full[self.start : self.stop]

    def row(self) -> Tensor:
        """Which rows of the global batch these are, int64 [stop - start]: draws nothing."""
        return torch.arange(self.start, self.stop, device=self.generator.device)

    def integers(self, high: int) -> Tensor:
        """Uniform on {0, ..., high - 1}, int64 [stop - start]."""
        device = self.generator.device
        full = torch.randint(high, (self.total,), generator=self.generator, device=device)
        return full[self.start : self.stop]

    def choice(self, probabilities: Tensor) -> Tensor:
        """Indices drawn with the given probabilities [m], int64 [stop - start]."""
        weights = probabilities.to(self.generator.device, torch.float32)
        full = torch.multinomial(weights, self.total, replacement=True, generator=self.generator)
        return full[self.start : self.stop]


def rank_rows(total: int, rank: int, world_size: int) -> tuple[int, int]:
    """Rows [start, stop) of a global batch that belong to `rank`; sizes differ by at most one."""
    return total * rank // world_size, total * (rank + 1) // world_size


# (start, stop, total) of the rows that a network is given now; None: they are the whole batch.
_rows: ContextVar[tuple[int, int, int] | None] = ContextVar("rows", default=None)


@contextmanager
def rows_of_batch(start: int, stop: int, total: int) -> Iterator[None]:
    """Within it, `batch_mask` draws for the whole batch, of which these rows are at work."""
    token = _rows.set((start, stop, total))
    try:
        yield
    finally:
        _rows.reset(token)


def batch_mask(rows: int, shape: tuple[int, ...], p: float, device: torch.device) -> Tensor:
    """bool [rows, *shape], True with probability p, from torch's own generator.

    Drawn for the whole batch, so it depends neither on how many workers share it nor on how they
    cut their shares. `rows` may be a multiple of the rows at work: copies, each with its own draws.
    """
    start, stop, total = _rows.get() or (0, rows, rows)
    copies = rows // (stop - start)
    assert copies * (stop - start) == rows, f"{rows} rows, of a batch cut into {stop - start}"
    full = torch.empty((copies, total, *shape), dtype=torch.bool, device=device).bernoulli_(p)
    return full[:, start:stop].reshape(rows, *shape)
