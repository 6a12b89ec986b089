"""The ADM U-Net of OpenAI's consistency models (Song et al. 2023) as ours, and back.

Their files are plain state dicts: `edm_*` (denoisers), `cd_*` and `ct_*` (consistency models) of
ImageNet-64 and LSUN-256. The network is our `adm` with 32 groups in every norm, but for

    names        input_blocks, middle_block, output_blocks are numbered through; see `parts`
    qkv          their rows run (q|k|v, head, width), ours (head, width, q|k|v)
    label_emb    [K, E], ours [E, K]
    noise label  1000 ln(sigma) / 4, which stays so: `c_noise: log_sigma_1000`

The width of the attention heads and the side of the images leave no trace in the tensors.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from torch import Tensor

from consistency.config import NetworkConfig, NoiseConfig
from consistency.foreign.fit import Shape, as_float32, require_fit, shapes_of
from consistency.published import ModelDescription

Kind = Literal["denoiser", "consistency"]

HEAD_CHANNELS = 64  # of all published files
BOUNDARY = 0.002
_SIZES = {(1000, 4): 64, (0, 6): 256}  # published: (classes, resolutions) -> side

# The second of two noise levels, as published (indices of their grids, here as sigma).
_MID_SIGMAS = {
    "cd_imagenet64": 1.382,
    "ct_imagenet64": 1.913,
    "cd_bedroom256_lpips": 4.366,
    "cd_bedroom256_l2": 3.520,
    "ct_bedroom256": 3.991,
    "ct_cat256": 5.249,
}

# Ours -> theirs, within a residual block and within its attention.
_RESIDUAL = {
    "norm0": "in_layers.0",
    "conv0": "in_layers.2",
    "affine": "emb_layers.1",
    "norm1": "out_layers.0",
    "conv1": "out_layers.3",
    "skip": "skip_connection",
}
_ATTENTION = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}


def recognises(keys: Sequence[str]) -> bool:
    """Whether these are the keys of such a state dict."""
    return {"input_blocks.0.0.weight", "time_embed.0.weight"} <= set(keys)


def kind_of(name: str) -> Kind | None:
    """What the published files of such a name are: `edm_*`, `cd_*`, `ct_*`."""
    if name.startswith("edm_"):
        return "denoiser"
    return "consistency" if name.startswith(("cd_", "ct_")) else None


def mid_sigma_of(name: str) -> float:
    """The second noise level that a published file of this name was sampled with, else iCT's."""
    known = (sigma for start, sigma in _MID_SIGMAS.items() if name.startswith(start))
    return next(known, ModelDescription.mid_sigma)


def from_openai(
    tensors: Mapping[str, Tensor],
    *,
    kind: Kind,
    size: int | None = None,
    head_channels: int = HEAD_CHANNELS,
    class_names: Sequence[str] | None = None,
) -> tuple[ModelDescription, dict[str, Tensor]]:
    """The model that a state dict stands for, and its weights in fp32.

    size: side of the images, None for the published layouts. class_names: "0" .. "K-1" unless
    given. Raises ValueError for what is no such network, listing the tensors that do not fit.
    """
    description = _describe(tensors, kind, size, head_channels, class_names)
    names = parts(description)
    ours = shapes_of(description)
    expected = {names[key]: _their_shape(key, shape) for key, shape in ours.items()}
    require_fit(tensors, expected)
    weights = {key: as_float32(_to_ours(key, tensors[names[key]])) for key in ours}
    return description, weights


def to_openai(description: ModelDescription, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of theirs with these weights. Raises ValueError for another network.

    What OpenAI's network computes from it is ours under `c_noise: log_sigma_1000`.
    """
    network = description.network
    if network.architecture != "adm" or network.groups != 32:
        raise ValueError("network: only an adm with 32 groups has OpenAI's layout")
    if network.adagn == "double_norm":
        raise ValueError("adagn: double_norm has no equal in OpenAI's layout")
    require_fit(weights, shapes_of(description))
    names = parts(description)
    return {names[key]: _to_theirs(key, tensor).contiguous() for key, tensor in weights.items()}


def parts(description: ModelDescription) -> dict[str, str]:
    """Our key -> their key, for every tensor that a network of ours can have."""
    pairs = {
        "map_layer0": "time_embed.0",
        "map_layer1": "time_embed.2",
        "out_norm": "out.0",
        "out_conv": "out.2",
        f"enc.{description.size}x{description.size}_conv": "input_blocks.0.0",
    }
    for block, residual, attention in _blocks(description):
        pairs |= {f"{block}.{mine}": f"{residual}.{their}" for mine, their in _RESIDUAL.items()}
        pairs |= {f"{block}.{mine}": f"{attention}.{their}" for mine, their in _ATTENTION.items()}
    names = {
        f"{mine}.{what}": f"{their}.{what}"
        for mine, their in pairs.items()
        for what in ("weight", "bias")
    }
    return names | {"map_label.weight": "label_emb.weight"}


def _blocks(description: ModelDescription) -> Iterator[tuple[str, str, str]]:
    """(our block, their residual block, their attention block), encoder to decoder."""
    network, size = description.network, description.size
    sides = [size >> level for level in range(len(network.channel_mult))]
    number = 1
    for side in sides:
        kinds = [f"block{i}" for i in range(network.num_blocks)]
        for kind in kinds if side == size else ["down", *kinds]:
            yield f"enc.{side}x{side}_{kind}", *_within(f"input_blocks.{number}", 0, 1)
            number += 1
    lowest = f"{sides[-1]}x{sides[-1]}"
    yield f"dec.{lowest}_in0", *_within("middle_block", 0, 1)
    yield f"dec.{lowest}_in1", *_within("middle_block", 2, 3)
    number = 0
    for side in reversed(sides):
        for i in range(network.num_blocks + 1):
            at = f"output_blocks.{number}"
            yield f"dec.{side}x{side}_block{i}", *_within(at, 0, 1)
            number += 1
        if side != size:  # theirs ends a level with the doubling that begins our next one
            place = 2 if side in network.attention else 1
            yield f"dec.{2 * side}x{2 * side}_up", *_within(at, place, place + 1)


def _within(sequence: str, residual: int, attention: int) -> tuple[str, str]:
    return f"{sequence}.{residual}", f"{sequence}.{attention}"


def _describe(
    tensors: Mapping[str, Tensor],
    kind: Kind,
    size: int | None,
    head_channels: int,
    class_names: Sequence[str] | None,
) -> ModelDescription:
    """Read off the numbers and shapes of the tensors."""
    channels, image_channels = _shape(tensors, "input_blocks.0.0.weight", 4)[:2]
    classes = _shape(tensors, "label_emb.weight", 2)[0] if "label_emb.weight" in tensors else 0
    num_blocks, levels = _depth(tensors)
    if size is None:
        size = _SIZES.get((classes, levels))
    if size is None:
        raise ValueError("size: the tensors do not tell the side of the images; give --size")
    firsts = [1 + level * (num_blocks + 1) for level in range(levels)]
    widths = [_shape(tensors, f"input_blocks.{n}.0.in_layers.2.weight", 4)[0] for n in firsts]
    attends = [f"input_blocks.{n}.1.qkv.weight" in tensors for n in firsts]
    affine = _shape(tensors, "input_blocks.1.0.emb_layers.1.weight", 2)[0]
    if any(width % channels for width in widths):
        raise ValueError(f"channel_mult: widths {widths} are no multiples of {channels} channels")
    return ModelDescription(
        kind=kind,
        network=NetworkConfig(
            architecture="adm",
            channels=channels,
            channel_mult=tuple(width // channels for width in widths),
            num_blocks=num_blocks,
            attention=tuple(size >> level for level in range(levels) if attends[level]),
            class_conditional=classes > 0,
            adagn="shift" if affine == widths[0] else "scale_shift",
            head_channels=head_channels,
            groups=32,
        ),
        noise=NoiseConfig(c_noise="log_sigma_1000"),
        size=size,
        channels=image_channels,
        class_names=named_classes(classes, class_names),
        boundary=BOUNDARY,
    )


def named_classes(count: int, names: Sequence[str] | None) -> tuple[str, ...]:
    """The names given, or numbers; ValueError where there are more or fewer than classes."""
    if names is not None and len(names) != count:
        raise ValueError(f"classes: {len(names)} names for a model of {count} classes")
    return tuple(map(str, range(count))) if names is None else tuple(names)


def _depth(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """(blocks per level, levels): only the doubling blocks show where levels end."""
    found = re.compile(r"output_blocks\.(\d{1,3})\.(\d)\.in_layers\.2\.weight").fullmatch
    places = [tuple(map(int, match.groups())) for key in tensors if (match := found(key))]
    doubling = sorted(number for number, place in places if place > 0)
    count = len({number for number, _ in places})
    num_blocks = doubling[0] if doubling else count - 1
    if num_blocks < 1:
        raise ValueError("output_blocks: too few, or none with a residual block that doubles")
    return num_blocks, len(doubling) + 1


def _shape(tensors: Mapping[str, Tensor], key: str, dimensions: int) -> Shape:
    """ValueError naming the tensor that is missing, empty or of other dimensions."""
    if key not in tensors:
        raise ValueError(f"tensors that do not fit: {key} is missing")
    shape = tuple(tensors[key].shape)
    if len(shape) != dimensions or 0 in shape:
        raise ValueError(f"tensors that do not fit: {key} is {list(shape)}")
    return shape


def _their_shape(key: str, shape: Shape) -> Shape:
    return shape[::-1] if key == "map_label.weight" else shape


def _to_ours(key: str, tensor: Tensor) -> Tensor:
    if key == "map_label.weight":
        return tensor.t()
    if ".qkv." in key:  # (q|k|v, head and width) -> (head and width, q|k|v)
        return tensor.reshape(3, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
    return tensor


def _to_theirs(key: str, tensor: Tensor) -> Tensor:
    if key == "map_label.weight":
        return tensor.t()
    if ".qkv." in key:
        return tensor.reshape(-1, 3, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
    return tensor
