"""Forward-mode derivatives of a network, as sCM and MeanFlow need them."""

from collections.abc import Callable, Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@torch.no_grad()
def directional_derivative(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """(function(*inputs), its derivative along `tangents`), neither with a graph.

    Give it the module inside DDP, whose hooks know no forward mode. Attention runs on the MATH
    kernel, the only one with a forward derivative; autocast is off, since the tangents of nearly
    cancelling terms need fp32.
    """
    autocast_off = torch.autocast(inputs[0].device.type, enabled=False)
    with autocast_off, sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        duals: list[Tensor] = [
            forward_ad.make_dual(x, v)  # type: ignore[no-untyped-call]
            for x, v in zip(inputs, tangents, strict=True)
        ]
        output, derivative = forward_ad.unpack_dual(function(*duals))  # type: ignore[no-untyped-call]
    assert derivative is not None, "the function does not depend on its inputs"
    return output, derivative
