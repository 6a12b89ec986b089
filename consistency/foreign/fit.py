"""Whether tensors of a foreign layout are exactly those that a network of ours needs."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from consistency.published import ModelDescription, build_network

Shape = tuple[int, ...]

LISTED = 20  # names in one message


def shapes_of(description: ModelDescription) -> dict[str, Shape]:
    """Every key of our network's state dict and its shape; no memory is taken for weights."""
    net = build_network(description, device="meta")
    return {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}


def require_fit(found: Mapping[str, Tensor], expected: Mapping[str, Shape]) -> None:
    """One ValueError that lists every misfit, LISTED at most."""
    if wrong := misfits(found, expected):
        raise ValueError(f"tensors that do not fit: {listed(wrong, '; ')}")


def misfits(found: Mapping[str, Tensor], expected: Mapping[str, Shape]) -> list[str]:
    """Every missing, unknown and misshapen tensor, sorted.

    Integers and values that are not finite are as wrong as a wrong shape.
    """
    wrong = [f"{key} {list(expected[key])} is missing" for key in expected.keys() - found.keys()]
    wrong += [
        f"{key} {list(found[key].shape)} is unknown" for key in found.keys() - expected.keys()
    ]
    for key in found.keys() & expected.keys():
        tensor = found[key]
        if tuple(tensor.shape) != expected[key]:
            wrong.append(f"{key} is {list(tensor.shape)} instead of {list(expected[key])}")
        elif not tensor.is_floating_point():
            wrong.append(f"{key} is {_dtype(tensor)} instead of float")
        elif not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            wrong.append(f"{key} has values that are not finite")
    return sorted(wrong)


def listed(names: Sequence[str], separator: str = ", ") -> str:
    """The first LISTED names, and how many more there are."""
    more = f"{separator}and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return separator.join(names[:LISTED]) + more


def as_float32(tensor: Tensor) -> Tensor:
    """Half-precision files hold rounded weights; ours are fp32 masters."""
    return tensor.to(torch.float32).contiguous()


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
