"""One dropout mask for both passes of a pair (Sec. 3.4, Song & Dhariwal 2023)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class _Rewind:
    """Puts the default generator of `device` back to where it was at construction."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = self._get()
        self.after: Tensor | None = None

    def _get(self) -> Tensor:
        if self.device.type == "cuda":
            return torch.cuda.get_rng_state(self.device)
        return torch.get_rng_state()

    def _set(self, state: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)

    def __call__(self) -> None:
        if self.after is None:
            self.after = self._get()
        self._set(self.before)

    def finish(self) -> None:
        if self.after is not None:
            self._set(self.after)


@contextmanager
def same_dropout(device: torch.device) -> Iterator[_Rewind]:
    """`rewind()` between the two passes gives both the same masks.

    Dropout draws from the default generator *of the tensor's device*; afterwards that generator
    stands where the first pass left it.
    """
    rewind = _Rewind(device)
    yield rewind
    rewind.finish()
