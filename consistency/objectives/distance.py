"""The distance d of a consistency loss, as a frozen value."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from consistency import distances


@dataclass(frozen=True)
class Distance:
    """d(a, b): [b, C, H, W] each -> float32 [b]. huber_c None is 0.00054 sqrt(dim) (iCT)."""

    kind: Literal["l1", "squared_l2", "pseudo_huber", "lpips"]
    huber_c: float | None = None
    lpips: nn.Module | None = field(default=None, compare=False)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        if self.kind == "l1":
            return distances.l1(a, b)
        if self.kind == "squared_l2":
            return distances.squared_l2(a, b)
        if self.kind == "lpips":
            assert self.lpips is not None, "distance lpips was asked for without its network"
            distance: Tensor = self.lpips(a, b)
            return distance
        c = distances.huber_c(a.shape[1:]) if self.huber_c is None else self.huber_c
        return distances.pseudo_huber(a, b, c)
