"""diffusers' consistency models (UNet2DModel and its scheduler) and our `adm` network: one thing.

    theirs                              ours
    to_q, to_k, to_v, each [C, C]       qkv [3C, C, 1, 1], rows (head, width, qkv)
    to_out.0 [C, C]                     proj [C, C, 1, 1]
    class_embedding [K, E]              map_label [E, K]
    a level ends with its resampling    a level begins with it

Only configurations and tensors: `pipelines/diffusers_folder.py` has the files.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consistency.foreign import diffusers_config
from consistency.foreign.fit import as_float32, listed, misfits
from consistency.networks.blocks import Block
from consistency.published import ModelDescription

BLOCK = {
    "norm0": "norm1",
    "conv0": "conv1",
    "affine": "time_emb_proj",
    "norm1": "norm2",
    "conv1": "conv2",
    "skip": "conv_shortcut",
}


def from_diffusers(
    unet_config: Mapping[str, Any],
    scheduler_config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> tuple[ModelDescription, dict[str, Tensor]]:
    """A consistency model of diffusers as ours, in float32; its classes are called "0", "1", ...

    Left behind, as they change no image: `dropout`, `downsample_padding`. `num_train_timesteps`
    lives on in `mid_sigma`, see `Levels.middle`. Raises one ValueError that names every key, value,
    tensor or shape that is not as it must be.
    """
    description, wrong = diffusers_config.description_of(unet_config, scheduler_config)
    if description is not None:
        layout = _layout(description)
        shapes = {name: tuple(s) for piece in layout for name, s in piece.theirs.items()}
        wrong += misfits(tensors, shapes)
    if description is None or wrong:
        raise ValueError(f"no consistency model that we can read: {listed(wrong, '; ')}")
    return description, {
        piece.ours: piece.join([as_float32(tensors[name]) for name in piece.theirs]).contiguous()
        for piece in layout
    }


def to_diffusers(
    description: ModelDescription, weights: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """unet config, scheduler config and tensors. Raises `diffusers_config.Inexpressible`."""
    unet = diffusers_config.unet_config(description)
    tensors: dict[str, Tensor] = {}
    for piece in _layout(description):
        parts = piece.split(weights[piece.ours])
        tensors.update((n, p.contiguous()) for n, p in zip(piece.theirs, parts, strict=True))
    return unet, diffusers_config.scheduler_config(description), tensors


@dataclass(frozen=True)
class Piece:
    """One tensor of ours, and the ones of theirs that it is made of."""

    ours: str
    theirs: Mapping[str, Sequence[int]]  # name -> shape
    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]


def _layout(description: ModelDescription) -> list[Piece]:
    """Every tensor of the network."""
    network = diffusers_config.empty_network(description)
    top = f"{network.size}x{network.size}"
    names = {
        f"enc.{top}_conv": "conv_in",
        "map_layer0": "time_embedding.linear_1",
        "map_layer1": "time_embedding.linear_2",
        "map_label": "class_embedding",
        "out_norm": "conv_norm_out",
        "out_conv": "conv_out",
    }
    for ours, (block, attention) in _blocks(description).items():
        names |= {f"{ours}.{inner}": f"{block}.{outer}" for inner, outer in BLOCK.items()}
        names |= {
            f"{ours}.norm2": f"{attention}.group_norm",
            f"{ours}.proj": f"{attention}.to_out.0",
        }
        names |= {f"{ours}.qkv": attention}
    pieces = []
    for name, value in network.state_dict().items():
        layer, parameter = name.rsplit(".", 1)
        shape = tuple(value.shape)
        if layer.endswith(".qkv"):
            pieces.append(_qkv(name, names[layer], parameter, shape))
        elif layer == "map_label":
            theirs = {f"{names[layer]}.{parameter}": shape[::-1]}
            pieces.append(Piece(name, theirs, lambda parts: parts[0].t(), lambda own: [own.t()]))
        else:
            linear = layer.endswith(".proj") and parameter == "weight"
            theirs = {f"{names[layer]}.{parameter}": shape[:2] if linear else shape}
            pieces.append(_same(name, theirs, shape))
    return pieces


def _same(name: str, theirs: Mapping[str, Sequence[int]], shape: Sequence[int]) -> Piece:
    """The same numbers in the same order; a 1x1 convolution is a linear map there."""
    (other,) = theirs.values()
    return Piece(
        name, theirs, lambda parts: parts[0].view(*shape), lambda own: [own.reshape(*other)]
    )


def _qkv(name: str, attention: str, parameter: str, shape: Sequence[int]) -> Piece:
    """q, k, v row by row: ours are interleaved."""
    channels = shape[0] // 3
    single = (channels, channels)[: 2 if parameter == "weight" else 1]
    return Piece(
        name,
        {f"{attention}.to_{letter}.{parameter}": single for letter in "qkv"},
        lambda parts: torch.stack(list(parts), dim=1).view(*shape),
        lambda own: [own[i::3].reshape(*single) for i in range(3)],
    )


def _blocks(description: ModelDescription) -> dict[str, tuple[str, str]]:
    """Our residual blocks: theirs, and the attention that follows it there."""
    network, size = diffusers_config.empty_network(description), description.size
    last = len(description.network.channel_mult) - 1
    found = {}
    for half, layers in (("enc", network.enc), ("dec", network.dec)):
        for name, layer in layers.items():
            if not isinstance(layer, Block):
                continue
            side, part = name.split("x")[0], name.split("_")[1]
            level = (size // int(side)).bit_length() - 1
            place = f"down_blocks.{level}" if half == "enc" else f"up_blocks.{last - level}"
            if part in ("in0", "in1"):
                at = f"mid_block.resnets.{part[2]}", "mid_block.attentions.0"
            elif part == "down":
                at = f"down_blocks.{level - 1}.downsamplers.0", ""
            elif part == "up":
                at = f"up_blocks.{last - level - 1}.upsamplers.0", ""
            else:
                index = part.removeprefix("block")
                at = f"{place}.resnets.{index}", f"{place}.attentions.{index}"
            found[f"{half}.{name}"] = at
    return found
