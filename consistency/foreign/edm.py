"""NVlabs EDM's networks as ours: SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM).

Their state-dict keys are ours behind `model.`, so the tensors tell everything: sides and depth are
in the names, widths in the shapes. Constructor arguments, where a file has them, must agree; what
they ask for and our networks do not do is refused by the argument's name.

Left out: `resample_filter`, constants in our code (their values are checked), and `map_augment`,
which reads training's augmentation labels and is given none when images are made.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from consistency.config import NetworkConfig, NoiseConfig
from consistency.foreign.fit import as_float32, listed, require_fit, shapes_of
from consistency.foreign.openai import Kind, named_classes
from consistency.networks.blocks import smooth_filter
from consistency.published import ModelDescription

PREFIX = "model."


@dataclass(frozen=True)
class Constructed:
    """A class by name, and the arguments it was constructed with."""

    name: str
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """All by name. ValueError for an argument that this class is not known to have."""
        known = _WRAPPER if self.name in _KINDS else _NETWORKS[self.name]
        if len(self.args) > len(known):
            raise ValueError(f"{self.name}: {len(self.args)} arguments, {len(known)} are known")
        named = dict(zip(known, self.args, strict=False)) | dict(self.kwargs)
        beyond = {*_NETWORKS["SongUNet"], *_NETWORKS["DhariwalUNet"]} if known is _WRAPPER else ()
        if unknown := sorted(named.keys() - {*known, *beyond}):
            raise ValueError(f"{self.name}: unknown arguments {listed(unknown)}")
        return named


# What wraps the network: the coefficients of EDM, and those of a consistency model (ECT).
_KINDS: dict[str, Kind] = {"EDMPrecond": "denoiser", "ECMPrecond": "consistency"}
_BOUNDARIES = {"EDMPrecond": 0.002, "ECMPrecond": 0.003}
_OTHERS = {  # known by name, and refused
    "VPPrecond": "the coefficients of variance-preserving diffusion",
    "VEPrecond": "the coefficients of variance-exploding diffusion",
    "iDDPMPrecond": "the coefficients and the discrete levels of iDDPM",
    "Precond": "EDM2's magnitude-preserving network",
    "UNet": "EDM2's magnitude-preserving network",
}

# Arguments in their order, as the classes take them.
_WRAPPER = (
    *("img_resolution", "img_channels", "label_dim", "use_fp16"),
    *("sigma_min", "sigma_max", "sigma_data", "model_type"),
)
_BODY = ("img_resolution", "in_channels", "out_channels", "label_dim", "augment_dim")
_DEPTH = ("model_channels", "channel_mult", "channel_mult_emb", "num_blocks", "attn_resolutions")
_SONG = ("embedding_type", "channel_mult_noise", "encoder_type", "decoder_type", "resample_filter")
_NETWORKS = {
    "SongUNet": (*_BODY, *_DEPTH, "dropout", "label_dropout", *_SONG),
    "DhariwalUNet": (*_BODY, *_DEPTH, "dropout", "label_dropout"),
}

# embedding_type, channel_mult_noise, encoder_type, decoder_type, resample_filter
_PUBLISHED = {
    "ddpmpp": ("positional", 1, "standard", "standard", (1, 1)),
    "ncsnpp": ("fourier", 2, "residual", "standard", (1, 3, 3, 1)),
}

_CONV = re.compile(r"enc\.(\d{1,5})x\1_conv\.weight")
_BLOCK = re.compile(r"enc\.(\d{1,5})x\1_block(\d{1,3})\.conv0\.weight")


def recognises(keys: Sequence[str]) -> bool:
    """Whether these are the keys of such a state dict, with or without `model.`."""
    bare = {key.removeprefix(PREFIX) for key in keys}
    return "map_layer0.weight" in bare and any(_CONV.fullmatch(key) for key in bare)


def is_edm2(keys: Sequence[str]) -> bool:
    """Whether these are the keys of EDM2's network, which has no equal here."""
    bare = {key.removeprefix("unet.") for key in keys}
    return {"emb_noise.weight", "out_gain"} <= bare


def kind_of(wrapper: Constructed | None) -> Kind | None:
    """What a wrapped network is; None where nothing wraps it."""
    return None if wrapper is None else _KINDS.get(wrapper.name)


def refuse_others(constructed: Constructed) -> None:
    """ValueError for a class that is known and different, or not known."""
    name = constructed.name
    if name in _OTHERS:
        raise ValueError(f"{name}: {_OTHERS[name]}; none of our networks computes that")
    if name not in _KINDS and name not in _NETWORKS:
        known = ", ".join([*_KINDS, *_NETWORKS])
        raise ValueError(f"{name}: unknown; what can be imported is {known}")


def from_edm(
    tensors: Mapping[str, Tensor],
    *,
    kind: Kind,
    wrapper: Constructed | None = None,
    network: Constructed | None = None,
    class_names: Sequence[str] | None = None,
) -> tuple[ModelDescription, dict[str, Tensor]]:
    """The model that the tensors stand for, and its weights in fp32.

    wrapper, network: how the preconditioner and the network within it were constructed, where the
    file says so. Raises ValueError for what our networks do not do, by the argument's name, and
    lists the tensors that do not fit.
    """
    bare = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    for constructed in (wrapper, network):
        if constructed is not None:
            refuse_others(constructed)
    inner = {} if network is None else network.arguments()
    outer = {} if wrapper is None else wrapper.arguments()
    architecture = _architecture(bare, network, inner)
    _check_filters(bare, smooth=architecture == "ncsnpp")
    config, size, channels = _describe(bare, architecture)
    classes = _dimension(bare, "map_label.weight", 1) if "map_label.weight" in bare else 0
    _check_arguments({**outer, **inner}, config, size, channels, classes)
    described = ModelDescription(
        kind=kind,
        network=config,
        noise=_noise(wrapper, outer),
        size=size,
        channels=channels,
        class_names=named_classes(classes, class_names),
        boundary=_boundary(wrapper, outer),
    )
    expected = shapes_of(described)
    kept = {key: tensor for key, tensor in bare.items() if not _left_out(key)}
    require_fit(kept, expected)
    return described, {key: as_float32(kept[key]) for key in expected}


def _left_out(key: str) -> bool:
    return key == "map_augment.weight" or key.endswith(".resample_filter")


def _architecture(
    bare: Mapping[str, Tensor], network: Constructed | None, inner: Mapping[str, Any]
) -> Literal["ddpmpp", "ncsnpp", "adm"]:
    """By the class and its arguments where they are known, else by the tensors."""
    if network is not None:
        song = network.name == "SongUNet"
    else:
        song = any(key.endswith("_aux_norm.weight") for key in bare)
    if not song:
        return "adm"
    architecture: Literal["ddpmpp", "ncsnpp"] = "ncsnpp" if "map_noise.freqs" in bare else "ddpmpp"
    defaults = dict(zip(_SONG, _PUBLISHED["ddpmpp"], strict=True))
    asked = defaults | {name: _plain(inner[name]) for name in _SONG if name in inner}
    if network is None:  # the rest shows in the shapes and in the filters
        residual = any(key.endswith("_aux_residual.weight") for key in bare)
        asked = dict(zip(_SONG, _PUBLISHED[architecture], strict=True))
        asked["encoder_type"] = "residual" if residual else "standard"
    for name, wanted in zip(_SONG, _PUBLISHED[architecture], strict=True):
        if asked[name] != wanted:
            raise ValueError(
                f"{name}: {str(asked[name])[:100]} beside {asked['embedding_type']} embedding; our "
                f"{architecture} has {wanted}"
            )
    return architecture


def _describe(
    bare: Mapping[str, Tensor], architecture: Literal["ddpmpp", "ncsnpp", "adm"]
) -> tuple[NetworkConfig, int, int]:
    """(the network, side of its images, their channels), read off names and shapes."""
    sizes = [int(match[1]) for key in bare if (match := _CONV.fullmatch(key))]
    if len(sizes) != 1:
        raise ValueError("tensors that do not fit: enc.{S}x{S}_conv.weight is missing")
    size = sizes[0]
    blocks = [match.groups() for key in bare if (match := _BLOCK.fullmatch(key))]
    sides = sorted({int(side) for side, _ in blocks}, reverse=True)
    channels = _dimension(bare, f"enc.{size}x{size}_conv.weight", 0)
    widths = [_dimension(bare, f"enc.{s}x{s}_block0.conv0.weight", 0) for s in sides]
    if not sides or channels == 0 or any(width % channels for width in widths):
        raise ValueError(f"channel_mult: widths {widths} are no multiples of {channels} channels")
    config = NetworkConfig(
        architecture=architecture,
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        num_blocks=sum(int(side) == size for side, _ in blocks),
        attention=tuple(s for s in sides if f"enc.{s}x{s}_block0.qkv.weight" in bare),
        class_conditional="map_label.weight" in bare,
    )
    return config, size, _dimension(bare, f"enc.{size}x{size}_conv.weight", 1)


def _check_filters(bare: Mapping[str, Tensor], *, smooth: bool) -> None:
    """Resampling filters are constants in our code: theirs must be the same ones."""
    ours = smooth_filter() if smooth else torch.full((2, 2), 0.25)
    for key, tensor in bare.items():
        if key.endswith(".resample_filter") and not tensor.is_meta:
            taps = tensor.float()
            if taps.numel() != ours.numel() or not torch.allclose(taps.view_as(ours), ours):
                asked = "[1, 3, 3, 1]" if smooth else "[1, 1]"
                raise ValueError(f"resample_filter: {key} is not that of {asked}")


def _check_arguments(
    given: Mapping[str, Any], config: NetworkConfig, size: int, channels: int, classes: int
) -> None:
    """Arguments and tensors of one file must tell the same. Those of training are passed over."""
    told = {
        "img_resolution": size,
        "img_channels": channels,
        "in_channels": channels,
        "out_channels": channels,
        "label_dim": classes,
        "model_channels": config.channels,
        "channel_mult": config.channel_mult,
        "channel_mult_emb": 4,
        "num_blocks": config.num_blocks,
    }
    for name, value in told.items():
        if name in given and _plain(given[name]) != value:
            asked = repr(given[name])[:100]
            raise ValueError(f"{name}: {asked}, but the network here has {value!r}")


def _noise(wrapper: Constructed | None, outer: Mapping[str, Any]) -> NoiseConfig:
    """EDM's levels, cut to those that the wrapper supports."""
    usual = NoiseConfig()
    return NoiseConfig(
        sigma_min=max(usual.sigma_min, _boundary(wrapper, outer)),
        sigma_max=min(usual.sigma_max, _number(outer, "sigma_max", usual.sigma_max)),
        sigma_data=_number(outer, "sigma_data", usual.sigma_data),
    )


def _boundary(wrapper: Constructed | None, outer: Mapping[str, Any]) -> float:
    default = _BOUNDARIES["EDMPrecond" if wrapper is None else wrapper.name]
    return _number(outer, "sigma_min", default) or default  # EDM's 0 means that all are supported


def _number(given: Mapping[str, Any], name: str, default: float) -> float:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ValueError(f"{name}: {value!r} is not a noise level")
    return float(value)


def _dimension(bare: Mapping[str, Tensor], key: str, dimension: int) -> int:
    if key not in bare or bare[key].ndim <= dimension:
        raise ValueError(f"tensors that do not fit: {key} is missing, or has too few dimensions")
    return int(bare[key].shape[dimension])


def _plain(value: Any) -> Any:
    """Lists of arguments as tuples."""
    return tuple(value) if isinstance(value, list | tuple) else value
