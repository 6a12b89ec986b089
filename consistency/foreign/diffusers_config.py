"""The configurations of UNet2DModel and CMStochasticIterativeScheduler, and our description.

diffusers' scheduler tells the network 1000 ln(sigma) / 4, our `c_noise: log_sigma_1000`, and scales
by c_in, c_skip and c_out of Appendix C, Song et al. 2023, with sigma_min where f is the identity.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from consistency import networks
from consistency.config import NetworkConfig, NoiseConfig, check_network, norm_groups
from consistency.foreign.checks import check_bounds
from consistency.foreign.diffusers_levels import Levels, fitting
from consistency.published import ModelDescription, build_network

Json = dict[str, Any]

# Blocks of a level, down and up: without attention, and with.
PLAIN = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
ATTENDING = ("AttnDownBlock2D", "AttnUpBlock2D")

# The values that a consistency model has there, and that we do.
FIXED: Json = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "add_attention": True,
    "class_embed_type": None,
}
# What UNet2DModel takes for a key that is left out.
UNET: Json = {
    **FIXED,
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "time_embedding_dim": None,
    "down_block_types": ["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
    "up_block_types": ["AttnUpBlock2D"] * 3 + ["UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "downsample_padding": 1,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "resnet_time_scale_shift": "default",
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
SCHEDULER: Json = {
    "num_train_timesteps": 40,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "s_noise": 1.0,
    "rho": 7.0,
    "clip_denoised": True,
}


class Inexpressible(ValueError):
    """A model that diffusers' own classes cannot hold; the text says why."""


# --- ours to theirs ---------------------------------------------------------------------------


def unet_config(description: ModelDescription) -> Json:
    """The UNet2DModel that a consistency model is. Raises `Inexpressible`."""
    network, size = description.network, description.size
    why = [
        text
        for holds, text in (
            (description.kind == "consistency", f"{description.kind} model"),
            (network.architecture == "adm", f"{network.architecture} network"),
            (network.adagn != "double_norm", "double_norm"),
            (description.noise.c_noise == "log_sigma_1000", f"c_noise {description.noise.c_noise}"),
            (network.channel_mult[0] == 1, f"channel_mult from {network.channel_mult[0]}"),
            (description.lowest_sigma == 0, "lowest_sigma"),
        )
        if not holds
    ]
    groups = {groups for _, groups in norms(description)}
    heads = {width // network.heads(width) for width in _attending(network, size)}
    several = any(network.heads(width) > 1 for width in _attending(network, size))
    if len(groups) > 1:
        why.append(f"several numbers of groups ({', '.join(map(str, sorted(groups)))})")
    if len(heads) > 1 and several:
        why.append(f"several widths of heads ({', '.join(map(str, sorted(heads)))})")
    if why:
        raise Inexpressible(f"UNet2DModel has no {', no '.join(why)}")
    sides = [size >> level for level in range(len(network.channel_mult))]
    kinds = [ATTENDING if side in network.attention else PLAIN for side in sides]
    return {
        **UNET,
        **FIXED,
        "sample_size": size,
        "in_channels": description.channels,
        "out_channels": description.channels,
        "down_block_types": [down for down, _ in kinds],
        "up_block_types": [up for _, up in reversed(kinds)],
        "block_out_channels": [network.channels * mult for mult in network.channel_mult],
        "layers_per_block": network.num_blocks,
        "attention_head_dim": heads.pop() if len(heads) == 1 else None,
        "norm_num_groups": min(groups),
        "attn_norm_num_groups": min(groups),
        "resnet_time_scale_shift": "default" if network.adagn == "shift" else "scale_shift",
        "num_class_embeds": description.num_classes or None,
    }


def scheduler_config(description: ModelDescription) -> Json:
    """The scheduler of any consistency model, whatever its network."""
    levels = levels_of(description)
    return {
        **SCHEDULER,
        "num_train_timesteps": levels.count,
        "sigma_min": levels.sigma_min,
        "sigma_max": levels.sigma_max,
        "sigma_data": description.noise.sigma_data,
        "rho": levels.rho,
    }


def levels_of(description: ModelDescription) -> Levels:
    """The scheduler's noise levels: those that hold the model's second one best."""
    noise = description.noise
    second = max(description.mid_sigma, description.lowest_sigma)
    return fitting(second, description.boundary, noise.sigma_max, noise.rho)


def norms(description: ModelDescription) -> set[tuple[int, int]]:
    """Channels and groups of every group norm of the network."""
    network = empty_network(description)
    found = [m for m in network.modules() if isinstance(m, torch.nn.GroupNorm)]
    return {(norm.num_channels, norm.num_groups) for norm in found}


def empty_network(description: ModelDescription) -> networks.UNet:
    """The network without memory for its weights."""
    net = build_network(description, device="meta")
    assert isinstance(net, networks.UNet)
    return net


def _attending(network: NetworkConfig, size: int) -> list[int]:
    """Channels of every level with attention; the lowest always has one, in its middle."""
    last = len(network.channel_mult) - 1
    return [
        network.channels * mult
        for level, mult in enumerate(network.channel_mult)
        if size >> level in network.attention or level == last
    ]


# --- theirs to ours ---------------------------------------------------------------------------


def description_of(
    unet: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> tuple[ModelDescription | None, list[str]]:
    """The model that two configurations stand for (None where there is none), and what is wrong."""
    wrong: list[str] = []
    unet = _filled("unet", unet, UNET, wrong)
    scheduler = _filled("scheduler", scheduler, SCHEDULER, wrong)
    wrong += [
        f"unet {key}: {unet[key]!r}, not {value!r}"
        for key, value in FIXED.items()
        if unet[key] != value or isinstance(unet[key], bool) != isinstance(value, bool)
    ]
    _check_scheduler(scheduler, wrong)
    size = unet["sample_size"]
    if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1]:
        unet["sample_size"] = size[0]
    for key in ("num_class_embeds", "attention_head_dim"):
        if unet[key] is not None:
            _check_whole(unet, key, wrong)
    for key in ("sample_size", "in_channels", "layers_per_block", "norm_num_groups"):
        _check_whole(unet, key, wrong)
    if unet["out_channels"] != unet["in_channels"]:
        wrong.append(f"unet out_channels: {unet['out_channels']!r}, not in_channels")
    style = unet["resnet_time_scale_shift"]
    if style not in ("scale_shift", "default"):
        wrong.append(f"unet resnet_time_scale_shift: {style!r}, not 'scale_shift' or 'default'")
    # Left out under scale_shift, the attention in the middle has no norm.
    groups = unet["norm_num_groups"]
    if unet["attn_norm_num_groups"] not in (
        (groups,) if style == "scale_shift" else (groups, None)
    ):
        wrong.append(f"unet attn_norm_num_groups: {unet['attn_norm_num_groups']!r}, not {groups!r}")
    _check_levels(unet, wrong)
    if wrong:
        return None, wrong
    try:
        return _description(unet, scheduler), []
    except ValueError as error:
        return None, [str(error)]


def _filled(name: str, config: Mapping[str, Any], defaults: Json, wrong: list[str]) -> Json:
    """All keys of a configuration; diffusers' own notes in it begin with an underscore."""
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    wrong += [f"{name} {key}: unknown" for key in sorted(set(given) - set(defaults))]
    return {**defaults, **given}


def _check_scheduler(scheduler: Json, wrong: list[str]) -> None:
    for key in ("sigma_min", "sigma_max", "sigma_data", "rho"):
        value = scheduler[key]
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            wrong.append(f"scheduler {key}: {value!r} is not a number of at least 0")
    for key, value in (("s_noise", 1), ("clip_denoised", True)):
        if scheduler[key] != value:
            wrong.append(f"scheduler {key}: {scheduler[key]!r}, not {value!r}")
    count = scheduler["num_train_timesteps"]
    if type(count) is not int or not 2 <= count <= 1_000_000:
        wrong.append(f"scheduler num_train_timesteps: {count!r} is not 2 to 1,000,000")


def _check_whole(unet: Json, key: str, wrong: list[str]) -> None:
    if type(unet[key]) is not int or unet[key] < 1:
        wrong.append(f"unet {key}: {unet[key]!r} is not a whole number of at least 1")


def _check_levels(unet: Json, wrong: list[str]) -> None:
    """The three lists that have an entry for each resolution."""
    widths, downs, ups = (
        list(unet[key]) if isinstance(unet[key], list | tuple) else []
        for key in ("block_out_channels", "down_block_types", "up_block_types")
    )
    if not widths or any(type(w) is not int or w < 1 or w % widths[0] for w in widths):
        wrong.append(f"unet block_out_channels: {unet['block_out_channels']!r} are no multiples")
    elif unet["time_embedding_dim"] not in (None, 4 * widths[0]):
        wrong.append(
            f"unet time_embedding_dim: {unet['time_embedding_dim']!r}, not {4 * widths[0]}"
        )
    mirrored = {down: up for down, up in (PLAIN, ATTENDING)}
    for down in downs:
        if not isinstance(down, str) or down not in mirrored:
            wrong.append(f"unet down_block_types: {down!r}, not {PLAIN[0]} or {ATTENDING[0]}")
    if len(downs) != len(widths):
        wrong.append(f"unet down_block_types: {len(downs)} for {len(widths)} block_out_channels")
    elif ups != [mirrored.get(str(down)) for down in reversed(downs)]:
        wrong.append(f"unet up_block_types: {ups} do not mirror down_block_types")


def _description(unet: Json, scheduler: Json) -> ModelDescription:
    """Of configurations that passed; in our words nothing where theirs is our default."""
    size, channels, groups = unet["sample_size"], unet["in_channels"], unet["norm_num_groups"]
    classes, widths = unet["num_class_embeds"] or 0, list(unet["block_out_channels"])
    layers, head = unet["layers_per_block"], unet["attention_head_dim"]
    check_bounds(size=size, channels=channels, classes=classes, widths=widths, num_blocks=layers)
    network = NetworkConfig(
        architecture="adm",
        channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        num_blocks=layers,
        attention=tuple(
            size >> level
            for level, down in enumerate(unet["down_block_types"])
            if down == ATTENDING[0]
        ),
        class_conditional=classes > 0,
        adagn="shift" if unet["resnet_time_scale_shift"] == "default" else None,
        groups=groups,
    )
    attending = _attending(network, size)
    if head is not None and any(width % head for width in attending):
        raise ValueError(f"unet attention_head_dim: {head} does not divide {attending} channels")
    asked = replace(network, head_channels=head or max(attending))
    if any(network.heads(width) != asked.heads(width) for width in attending):
        network = asked
    check_network(network, size)
    low, high, rho = (float(scheduler[key]) for key in ("sigma_min", "sigma_max", "rho"))
    noise = NoiseConfig(
        sigma_min=low or NoiseConfig().sigma_min,  # identity at 0: the grid cannot begin there
        sigma_max=high,
        sigma_data=float(scheduler["sigma_data"]),
        rho=rho,
        c_noise="log_sigma_1000",
    )
    description = ModelDescription(
        kind="consistency",
        network=network,
        noise=noise,
        size=size,
        channels=channels,
        class_names=tuple(map(str, range(classes))),
        boundary=low,
        mid_sigma=Levels(scheduler["num_train_timesteps"], low, high, rho).middle,
    )
    if all(norm_groups(width) == groups for width, _ in norms(description)):
        return replace(description, network=replace(network, groups=None))
    return description
