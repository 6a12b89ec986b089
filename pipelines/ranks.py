"""A worker among the others of its stage, and what all of them hear or agree on."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import torch

Said = TypeVar("Said")


class Worker(Protocol):
    """Who trains: its place among the workers, and whom it tells."""

    rank: int
    world_size: int
    device: "torch.device"

    def tell(self, report: Mapping[str, Any]) -> None:
        """Report of a trial to its sweep; all ranks call it."""
        ...


def said_by_first(mine: Said, me: Worker) -> Said:
    """What rank 0 says, on all ranks: a number goes by the device, anything else is pickled."""
    if me.world_size == 1:
        return mine
    import torch
    import torch.distributed as dist

    if isinstance(mine, int):
        number = torch.tensor([mine], device=me.device)
        dist.broadcast(number, src=0)
        return int(number.item())  # type: ignore[return-value]
    said = [mine]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def unanimous(mine: bool, world_size: int, device: Any) -> bool:
    """Whether every rank says yes; the same on all of them."""
    if world_size == 1:
        return mine
    import torch
    import torch.distributed as dist

    flag = torch.tensor([float(mine)], device=device)
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag.item())
