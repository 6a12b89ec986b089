"""UNet2DModel and our adm network: the same outputs, the same bits there and back."""

from dataclasses import replace

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, UNet2DModel

from consistency.config import NoiseConfig
from consistency.foreign.diffusers import from_diffusers, to_diffusers
from consistency.foreign.diffusers_config import Inexpressible, unet_config
from consistency.foreign.diffusers_levels import Levels, fitting
from consistency.published import build
from tests.every_kind import shaken
from tests.foreign_models import EVERY, described, weights_of

SIZES = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attention_head_dim": 16,
    "attn_norm_num_groups": 32,
    "resnet_time_scale_shift": "scale_shift",
    "num_class_embeds": 10,
}
VARIANTS = {
    "conditional": {},
    "unconditional": {"num_class_embeds": None},
    "shift": {"resnet_time_scale_shift": "default"},
    "groups of 8": {"norm_num_groups": 8, "attn_norm_num_groups": 8},
    "gray": {"in_channels": 1, "out_channels": 1},
    "one head": {"attention_head_dim": None, "block_out_channels": (32, 64, 96)},
    "two layers": {
        "layers_per_block": 2,
        "block_out_channels": (32, 64),
        "down_block_types": SIZES["down_block_types"][:2],
        "up_block_types": SIZES["up_block_types"][1:],
    },
}


def theirs(seed=0, scheduler=None, **changes):
    net = UNet2DModel(**{**SIZES, **changes}).eval()
    net.load_state_dict(shaken(net.state_dict(), seed))
    return net, CMStochasticIterativeScheduler(**(scheduler or {}))


def plain(config):
    """As its JSON file says it."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dict(config).items()}


def known(config):
    return {k: v for k, v in plain(config).items() if not k.startswith("_")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_network_is_the_same_function(variant):
    net, scheduler = theirs(**VARIANTS[variant])
    description, weights = from_diffusers(net.config, scheduler.config, net.state_dict())
    f = build(description, weights).function
    labels = torch.tensor([0, 9, 3]) if description.num_classes else None
    generator = torch.Generator().manual_seed(1)
    for sigma in (80.0, 75.3, 20.0, 0.8, 0.01, 0.002):
        x = sigma * torch.randn(3, description.channels, 16, 16, generator=generator)
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition(torch.tensor(sigma))
        with torch.no_grad():
            time = torch.tensor(scheduler.sigma_to_t(sigma))
            raw = net(x / (sigma**2 + 0.25) ** 0.5, time, class_labels=labels).sample
            torch.testing.assert_close(
                f(x, torch.full((3,), sigma), labels), c_out * raw + c_skip * x, atol=1e-4, rtol=0
            )


@pytest.mark.parametrize(
    ("variant", "levels"), [*((name, 40) for name in VARIANTS), ("gray", 201), ("gray", 18)]
)
def test_export_of_an_import_is_what_was_imported(variant, levels):
    net, scheduler = theirs(
        **VARIANTS[variant],
        scheduler={"num_train_timesteps": levels, "sigma_max": 40.0, "rho": 6.0},
    )
    unet, schedule, tensors = to_diffusers(
        *from_diffusers(plain(net.config), plain(scheduler.config), net.state_dict())
    )
    assert unet == known(net.config)
    assert schedule == known(scheduler.config)
    assert set(tensors) == set(net.state_dict())
    assert all(torch.equal(tensors[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("name", ["adm-native", "adm-native-shift"])
def test_import_of_an_export_is_what_was_exported(name):
    description = replace(EVERY[name](), class_names=("0", "1", "2"))
    weights = weights_of(description)
    back, same = from_diffusers(*to_diffusers(description, weights))
    assert replace(back, mid_sigma=description.mid_sigma) == description
    assert all(torch.equal(same[key], value) for key, value in weights.items())
    assert set(same) == set(weights)


def test_half_precision_is_taken_as_it_is():
    net, scheduler = theirs()
    tensors = {name: value.half() for name, value in net.state_dict().items()}
    _, weights = from_diffusers(net.config, scheduler.config, tensors)
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_all_that_is_wrong_is_named_at_once():
    net, scheduler = theirs()
    tensors = dict(net.state_dict())
    tensors["colour"] = tensors.pop("conv_in.bias")
    tensors["conv_out.bias"] = torch.zeros(4)
    tensors["conv_in.weight"] = tensors["conv_in.weight"].to(torch.int64)
    with pytest.raises(ValueError, match="no consistency model") as caught:
        from_diffusers(net.config, scheduler.config, tensors)
    for part in (
        "colour [32] is unknown",
        "conv_in.bias [32] is missing",
        "conv_out.bias is [4] instead of [3]",
        "conv_in.weight is int64 instead of float",
    ):
        assert part in str(caught.value)

    config = {**net.config, "act_fn": "relu", "freq_shift": 1, "bogus": 3, "attention_head_dim": 0}
    schedule = {**scheduler.config, "s_noise": 1.1, "sigma_max": float("nan"), "rho": "7"}
    with pytest.raises(ValueError, match="no consistency model") as caught:
        from_diffusers(config, schedule, net.state_dict())
    for part in ("act_fn", "freq_shift", "bogus", "attention_head_dim", "s_noise", "rho", "max"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"downsample_type": "conv"},
        {"attn_norm_num_groups": None},
        {"down_block_types": ["DownBlock2D"] * 3},
        {"up_block_types": list(SIZES["down_block_types"])},
        {"block_out_channels": [32, 48, 64]},
        {"block_out_channels": []},
        {"block_out_channels": [32, "64", 64]},
        {"sample_size": None},
        {"sample_size": 10},
        {"sample_size": True},
        {"sample_size": 1 << 30},
        {"layers_per_block": 10**9},
        {"norm_num_groups": 5},
        {"attention_head_dim": 24},
        {"num_class_embeds": 10**12},
        {"class_embed_type": "timestep"},
        {"add_attention": 1},
        {"out_channels": 6},
        {"resnet_time_scale_shift": ["default"]},
        {"time_embedding_dim": 64},
    ],
    ids=str,
)
def test_what_we_do_not_do_is_refused(change):
    net, scheduler = theirs()
    with pytest.raises(ValueError, match="no consistency model"):
        from_diffusers({**plain(net.config), **change}, scheduler.config, net.state_dict())


@pytest.mark.parametrize(
    ("description", "why"),
    [
        (described("ddpmpp"), "no ddpmpp network"),
        (EVERY["adm"](), "c_noise log_sigma"),
        (EVERY["adm-native"](kind="denoiser"), "denoiser"),
        (EVERY["adm-native"](groups=None, channels=48), "several numbers of groups"),
        (EVERY["adm-native"](adagn="double_norm"), "double_norm"),
        (EVERY["adm-native"](channel_mult=(2, 2)), "channel_mult from 2"),
        (EVERY["adm-native"](lowest_sigma=0.5), "lowest_sigma"),
    ],
)
def test_what_unet2dmodel_cannot_hold_is_said(description, why):
    with pytest.raises(Inexpressible, match=why):
        unet_config(description)


# --- levels -----------------------------------------------------------------------------------


def test_levels_are_the_schedulers():
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40)
    scheduler.set_timesteps(timesteps=[22, 0])
    levels = Levels(40, 0.002, 80.0, 7.0)
    assert [levels.sigma(0), levels.sigma(22)] == pytest.approx(scheduler.sigmas[:2].tolist())
    assert levels.nearest([80.0, levels.sigma(22)]) == [22, 0]
    assert levels.middle == levels.sigma(22)


@pytest.mark.parametrize("count", [2, 3, 18, 40, 201, 2521])
def test_a_grid_is_found_again_from_its_middle(count):
    levels = Levels(count, 0.002, 80.0, 7.0)
    assert fitting(levels.middle, 0.002, 80.0, 7.0) == levels


@pytest.mark.parametrize("boundary", [0.002, 0.0])
def test_our_own_levels_are_on_a_fine_grid(boundary):
    description = described("adm", boundary=boundary, noise=NoiseConfig())
    levels = fitting(description.mid_sigma, boundary, 80.0, 7.0)
    for steps in (1, 2, 4, 8):
        wanted = description.sigmas(steps)
        found = [levels.sigma(index) for index in reversed(levels.nearest(wanted))]
        exact = boundary > 0 and steps > 2
        assert found == pytest.approx(
            wanted, rel=1e-9 if exact else 1e-6 if boundary or steps < 3 else 1e-4
        )
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=levels.count, sigma_min=boundary)
    scheduler.set_timesteps(num_inference_steps=4)
    if boundary > 0:
        assert scheduler.sigmas[:-1].tolist() == pytest.approx(description.sigmas(4), rel=1e-6)


def test_no_level_lies_below_the_lowest_that_was_trained():
    levels = fitting(1.0, 0.0, 80.0, 7.0)
    for index in levels.nearest([80.0, 5.0, 1.0], lowest=1.0):
        assert levels.sigma(index) >= 1.0
