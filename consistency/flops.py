"""What a network costs: parameters, FLOPs of a pass, bytes kept for the backward pass.

Nothing is computed: the network is walked through on the meta device, whose tensors have shapes and
types but no data, so a network larger than this machine's memory takes a second or two.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from consistency.lpips import LPIPS, STAGES, WIDTHS
from consistency.published import ModelDescription, build_network

# Images of the walk: a prime that divides no weight's size, so that what it divides is per image.
BATCH = 10_007

# Keeps for the backward pass what a GPU's flash attention keeps.
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# What autocast takes in half precision, of what our networks call.
HALF = (torch.conv2d, torch.conv_transpose2d, F.linear, F.scaled_dot_product_attention)

Inputs = Callable[[int], tuple[Tensor, ...]]


@dataclass(frozen=True)
class PassCost:
    """Of one pass with gradients.

    forward   FLOPs per image, 2 per multiply-add, of convolutions and matrix products
    saved     bytes kept for the backward pass, per image
    kept      bytes kept whatever the batch: weights cast to half precision
    """

    parameters: int
    forward: int
    saved: int
    kept: int


@functools.cache
def network_cost(
    description: ModelDescription,
    *,
    dropout: float = 0.0,
    dropout_max_side: int | None = None,
    half: bool = False,
) -> PassCost:
    """The inner network F in train mode; `half`: under autocast to bf16 or fp16."""
    net = build_network(description, dropout, dropout_max_side, device="meta").train()

    def inputs(batch: int) -> tuple[Tensor, ...]:
        size = description.size
        x = torch.empty(batch, description.channels, size, size, device="meta")
        per_image = torch.empty(batch, device="meta")
        gap = (per_image,) if description.kind == "mean_flow" else ()
        return (x, per_image, per_image.long(), *gap)

    return pass_cost(net, inputs, half=half)


@functools.cache
def lpips_cost(size: int, channels: int) -> PassCost:
    """One comparison by LPIPS whose first image is trained through: `forward` is of both images."""
    weights: dict[str, Tensor] = {}
    before = 3
    for number, (places, width) in enumerate(zip(STAGES, WIDTHS, strict=True)):
        for place in places:
            weights[f"features.{place}.weight"] = torch.zeros(width, before, 3, 3)
            weights[f"features.{place}.bias"] = torch.zeros(width)
            before = width
        weights[f"lin{number}.model.1.weight"] = torch.zeros(1, width, 1, 1)

    def inputs(batch: int) -> tuple[Tensor, ...]:
        shape = (batch, channels, size, size)
        images = torch.empty(shape, device="meta", requires_grad=True)
        return images, torch.empty(shape, device="meta")

    return pass_cost(LPIPS(weights).to("meta"), inputs, half=False)


def pass_cost(net: nn.Module, inputs: Inputs, *, half: bool) -> PassCost:
    """What `net(*inputs(batch))` costs; everything on the meta device."""
    own = {p.untyped_storage()._cdata for p in [*net.parameters(), *net.buffers()]}
    saved: dict[int, Tensor] = {}  # by storage, whose id stays taken as long as a tensor holds it

    def keep(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    counter = FlopCounterMode(display=False, custom_mapping={FLASH: _attention_flops})
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=half, cache_enabled=False),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        counter,
        _AsOnCUDA(),
    ):
        net(*inputs(BATCH))
    sizes = [t.untyped_storage().nbytes() for key, t in saved.items() if key not in own]
    return PassCost(
        parameters=sum(p.numel() for p in net.parameters()),
        forward=counter.get_total_flops() // BATCH,
        saved=sum(size for size in sizes if size % BATCH == 0) // BATCH,
        kept=sum(size for size in sizes if size % BATCH != 0),
    )


class _AsOnCUDA(TorchFunctionMode):
    """Meta tensors know neither autocast nor fused attention. Here they behave as CUDA's: inside
    autocast (of the "cpu") products are taken in half precision and norms in fp32."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.is_autocast_enabled("cpu"):
            if func in HALF:
                args = [a.bfloat16() if isinstance(a, Tensor) else a for a in args]
            elif func is F.group_norm:
                args = (args[0].float(), *args[1:])
        if func is F.scaled_dot_product_attention:
            return FLASH(*args)[0]
        return func(*args, **(kwargs or {}))


def _attention_flops(
    q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]
