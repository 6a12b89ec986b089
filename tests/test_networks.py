"""Which network a description stands for: public layouts and counts, initial weights, refusals."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from consistency.config import NetworkConfig, check_network
from consistency.networks import UNet, build
from consistency.networks.blocks import Block, GroupNorm, ResidualInput

LAYOUTS = json.loads((Path(__file__).parent / "assets" / "unet_layouts.json").read_text())
ARCHITECTURES = ("ddpmpp", "ncsnpp", "adm")
SMALL: dict[str, Any] = {"channels": 32, "channel_mult": (1, 2), "num_blocks": 1, "attention": (8,)}
TINY: dict[str, Any] = {"channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attention": (4,)}
IMAGENET64 = NetworkConfig(
    architecture="adm",
    channels=192,
    channel_mult=(1, 2, 3, 4),
    num_blocks=3,
    attention=(32, 16, 8),
    class_conditional=True,
)
LSUN256 = NetworkConfig(
    architecture="adm",
    channels=256,
    channel_mult=(1, 1, 2, 2, 4, 4),
    num_blocks=2,
    attention=(32, 16, 8),
    adagn="shift",
)


def on_meta(network: NetworkConfig, size: int, num_classes: int = 0) -> UNet:
    with torch.device("meta"):
        return build(network, size=size, image_channels=3, num_classes=num_classes)


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


# --- layouts and counts


@pytest.mark.parametrize(
    ("name", "network", "size", "num_classes"),
    [
        ("ddpmpp_small", NetworkConfig(architecture="ddpmpp", **SMALL), 16, 10),
        ("ncsnpp_small", NetworkConfig(architecture="ncsnpp", **SMALL), 16, 0),
        ("adm_small", NetworkConfig(architecture="adm", **SMALL), 16, 10),
        ("ddpmpp_cifar10", NetworkConfig(), 32, 0),
        ("adm_imagenet64", IMAGENET64, 64, 1000),
    ],
)
def test_keys_shapes_and_counts_equal_the_public_networks(
    name: str, network: NetworkConfig, size: int, num_classes: int
) -> None:
    """Without the buffers `resample_filter`, which are constants in the code here."""
    net = on_meta(network, size, num_classes)
    state = net.state_dict()
    lines = sorted(f"{k} {'x'.join(map(str, v.shape))}" for k, v in state.items())
    assert ("map_noise.freqs" in state) == (network.architecture == "ncsnpp")
    assert count(net) == LAYOUTS[name]["parameters"]
    assert len(lines) == LAYOUTS[name]["tensors"]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == LAYOUTS[name]["digest"]


def test_the_published_sizes() -> None:
    assert count(on_meta(NetworkConfig(), 32)) == 55_732_739
    assert count(on_meta(IMAGENET64, 64, 1000)) == 295_899_267
    # OpenAI's LSUN-256 network is this one by other names: ADM, with its embedding added.
    assert count(on_meta(LSUN256, 256)) == LAYOUTS["openai_lsun256"]["parameters"] == 526_304_771
    shift = NetworkConfig(architecture="adm", adagn="shift", head_channels=16, **SMALL)
    assert count(on_meta(shift, 16)) == LAYOUTS["openai_small_shift"]["parameters"]


def test_ncsnpp_for_cifar10_is_ddpmpp_and_what_ncsnpp_adds() -> None:
    added = 512 * (256 - 128)  # map_layer0 reads twice the width
    added += 256 * 3 * 9 + 256  # the image into 16x16, its 3 channels to 256
    added += 256 * 256 * 9 + 256  # and on into 8x8
    net = on_meta(NetworkConfig(architecture="ncsnpp"), 32)
    assert count(net) == 55_732_739 + added


def test_a_half_million_adm() -> None:
    network = NetworkConfig(
        architecture="adm", channels=24, channel_mult=(1, 2), num_blocks=1, attention=(8,)
    )
    assert 400_000 < count(build(network, size=16, image_channels=1, num_classes=10)) < 600_000


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("adagn", ["scale_shift", "double_norm"])
def test_scale_and_shift_double_every_affine_layer_and_nothing_else(
    architecture: Any, adagn: Any
) -> None:
    shifted, scaled = (
        on_meta(NetworkConfig(architecture=architecture, adagn=adagn, **TINY), 8).state_dict()
        for adagn in ("shift", adagn)
    )
    assert shifted.keys() == scaled.keys()
    for key, value in scaled.items():
        factor = 2 if ".affine." in key else 1
        assert value.shape[0] == factor * shifted[key].shape[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_network_on_meta_has_no_memory_and_runs_for_its_shapes(architecture: Any) -> None:
    with torch.device("meta"):
        net = build(
            NetworkConfig(architecture=architecture, **TINY),
            size=8,
            image_channels=3,
            num_classes=2,
            gap=True,
            generator=torch.Generator("cpu"),
        )
        t = torch.empty(5)
        out = net(torch.empty(5, 3, 8, 8), t, torch.empty(5, dtype=torch.long), t)
    assert all(tensor.is_meta for tensor in (*net.parameters(), *net.buffers(), out))
    assert out.shape == (5, 3, 8, 8)


def test_the_device_asked_for_wins_over_the_default_one() -> None:
    arguments: dict[str, Any] = {"size": 8, "image_channels": 1, "num_classes": 0}
    with torch.device("meta"):
        net = build(NetworkConfig(architecture="ncsnpp", **TINY), **arguments, device="cpu")
    assert {t.device.type for t in net.state_dict().values()} == {"cpu"}
    net = build(NetworkConfig(architecture="adm", **TINY), **arguments, device="meta")
    assert {t.device.type for t in net.state_dict().values()} == {"meta"}


# --- initial weights


def fresh(architecture: Any, seed: int = 0, **changes: Any) -> UNet:
    return build(
        NetworkConfig(architecture=architecture, **{**TINY, **changes}),
        size=8,
        image_channels=1,
        num_classes=3,
        generator=torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_generator_alone_decides_the_initial_weights(architecture: Any) -> None:
    before = torch.get_rng_state()
    states = [fresh(architecture, seed).state_dict() for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = (torch.cat([v.flatten() for v in s.values()]) for s in states)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def inside(values: torch.Tensor, bound: float) -> bool:
    """Uniform in +-bound, as far as the largest of many values can tell."""
    return bound * 0.9 < float(values.detach().abs().max()) <= bound


@pytest.mark.parametrize("architecture", ["ddpmpp", "ncsnpp"])
def test_ddpmpp_and_ncsnpp_start_as_published(architecture: str) -> None:
    net = fresh(architecture, channels=16)
    state = net.state_dict()
    assert all(not v.any() for k, v in state.items() if k.endswith(".bias") and "norm" not in k)
    for block in (layer for layer in net.modules() if isinstance(layer, Block)):
        fans = 9 * (block.c_in + block.c_out)
        assert inside(block.conv0.weight, math.sqrt(6 / fans))
        assert inside(block.conv1.weight, 1e-5 * math.sqrt(6 / (18 * block.c_out)))
        assert inside(block.affine.weight, math.sqrt(6 / (64 + block.c_out)))
        if block.heads:
            assert inside(block.qkv.weight, math.sqrt(0.2 * 6 / (4 * block.c_out)))
            assert inside(block.proj.weight, 1e-5 * math.sqrt(6 / (2 * block.c_out)))
    assert inside(state["dec.8x8_aux_conv.weight"], 1e-5 * math.sqrt(6 / (9 * 17)))


def test_adm_starts_as_published() -> None:
    net = fresh("adm", channels=16)
    state = net.state_dict()
    for block in (layer for layer in net.modules() if isinstance(layer, Block)):
        for layer, fan_in in ((block.conv0, 9 * block.c_in), (block.affine, 64)):
            assert inside(layer.weight, fan_in**-0.5)
            assert layer.bias is not None
            assert 0 < layer.bias.abs().max() <= fan_in**-0.5
        if block.heads:
            assert inside(block.qkv.weight, block.c_out**-0.5)
    last = [k for k in state if k.split(".")[-2] in ("conv1", "proj", "out_conv")]
    assert len(last) == 2 * (10 + 4 + 1)  # 10 blocks, 4 with attention, the output
    assert all(not state[k].any() for k in last)
    assert state["map_label.weight"].std().item() == pytest.approx(1, abs=0.2)  # 64 x 3 values


def test_fourier_frequencies_have_the_scale_asked_for_and_stay() -> None:
    wide, narrow = (
        fresh("ncsnpp", channels=128, fourier_scale=scale).map_noise.freqs for scale in (16, 0.02)
    )
    assert isinstance(wide, torch.Tensor)
    assert isinstance(narrow, torch.Tensor)
    assert wide.std().item() == pytest.approx(16, rel=0.2)  # 128 values
    torch.testing.assert_close(wide / 16, narrow / 0.02)
    net = fresh("ncsnpp")
    assert "map_noise.freqs" in net.state_dict()
    assert "map_noise.freqs" not in dict(net.named_parameters())


# --- what a description decides, and refuses


def test_adm_attends_in_every_block_of_its_resolutions_and_ddpmpp_in_the_decoders_last() -> None:
    network: dict[str, Any] = {**TINY, "num_blocks": 2, "attention": (8,)}
    for architecture in ARCHITECTURES:
        net = on_meta(NetworkConfig(architecture=architecture, **network), 8)
        attend = {k for k, m in net.named_modules() if isinstance(m, Block) and m.heads}
        expected = {"enc.8x8_block0", "enc.8x8_block1", "dec.4x4_in0", "dec.8x8_block2"}
        if architecture == "adm":
            expected |= {"dec.8x8_block0", "dec.8x8_block1"}
        assert attend == expected


@pytest.mark.parametrize(
    ("change", "width", "heads"),
    [
        ({}, 256, 1),
        ({"architecture": "ncsnpp"}, 256, 1),
        ({"architecture": "adm"}, 768, 12),
        ({"architecture": "adm"}, 32, 1),  # narrower than a head
        ({"architecture": "adm"}, 96, 1),
        ({"head_channels": 64}, 256, 4),
        ({"head_channels": 64}, 32, 1),
        ({"architecture": "adm", "head_channels": 48}, 96, 2),
    ],
)
def test_heads_are_counted(change: dict[str, Any], width: int, heads: int) -> None:
    assert NetworkConfig(**change).heads(width) == heads


def test_the_networks_norms_and_inputs_are_where_the_papers_have_them() -> None:
    eps = {"ddpmpp": 1e-6, "ncsnpp": 1e-6, "adm": 1e-5}
    for architecture in ARCHITECTURES:
        net = on_meta(NetworkConfig(architecture=architecture, **TINY), 8)
        norms = [m for m in net.modules() if isinstance(m, nn.GroupNorm)]
        assert all(isinstance(norm, GroupNorm) for norm in norms)
        assert {norm.eps for norm in norms} == {eps[architecture]}
        inputs = [k for k, m in net.named_modules() if isinstance(m, ResidualInput)]
        assert inputs == (["enc.4x4_aux_residual"] if architecture == "ncsnpp" else [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 9}, r"channel_mult: \[1, 2\] halves the image 1 times, but 9 pixels"),
        ({"size": 0}, "channel_mult: .* 0 pixels are not divisible by 2"),
        ({"channel_mult": ()}, r"channel_mult: \[\] needs at least one level"),
        ({"channel_mult": (1, 0)}, r"channel_mult: \[1, 0\] needs at least one level, each >= 1"),
        ({"image_channels": 0}, "image_channels:"),
        ({"num_classes": -1}, "num_classes:"),
        ({"channels": 2}, "channels: 2 must be even and >= 4"),
        ({"channels": 9}, "channels: 9 must be even and >= 4"),
        ({"channels": 136}, "channels: 136 makes a layer of 136 channels"),
        ({"num_blocks": 0}, "num_blocks:"),
        ({"dropout": 1.0}, "dropout:"),
        ({"dropout_max_side": 0}, "dropout_max_side:"),
        ({"attention": (4, 16)}, r"attention: \[16\] is never reached, only \[8, 4\] are"),
        ({"head_channels": 12}, "head_channels: 12 does not divide the 16 channels"),
        # Without `attention` there is still the lowest level's.
        ({"head_channels": 12, "attention": ()}, "head_channels: 12 does not divide the 16"),
    ],
)
@pytest.mark.parametrize("architecture", ["ddpmpp", "adm"])
def test_impossible_networks_are_refused_by_name(
    architecture: Any, change: dict[str, Any], message: str
) -> None:
    described = {k: v for k, v in change.items() if k in NetworkConfig.__dataclass_fields__}
    built = {k: v for k, v in change.items() if k not in described}
    with pytest.raises(ValueError, match=f"^{message}"):
        build(
            NetworkConfig(architecture=architecture, **{**TINY, **described}),
            **{"size": 8, "image_channels": 1, "num_classes": 3, **built},
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 14}, "channels: 14 makes a layer of 14 channels.* 3 groups"),
        # 36 and 72 divide, a concatenation of two 72 in the decoder does not.
        ({"channels": 36, "channel_mult": (1, 2)}, "channels: 36 makes a layer of 144 channels"),
        ({"channels": 7}, "channels: 7 must be even"),
        ({"channel_mult": (1, -1)}, "channel_mult: "),
        ({"num_blocks": 0}, "num_blocks: 0 must be >= 1"),
        ({"attention": (16, 0)}, r"attention: \[16, 0\] must hold sides in pixels"),
        ({"fourier_scale": 0.0}, "fourier_scale: 0.0 must be > 0"),
        ({"head_channels": 0}, "head_channels: 0 must be >= 1"),
    ],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_description_is_checked_without_building(
    architecture: Any, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        NetworkConfig(architecture=architecture, **change)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("channel_mult", [(1,), (1, 2), (2, 1, 3)])
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_the_widths_checked_are_the_widths_built(
    architecture: Any, channel_mult: tuple[int, ...], num_blocks: int
) -> None:
    network = NetworkConfig(
        architecture=architecture,
        channels=32,
        channel_mult=channel_mult,
        num_blocks=num_blocks,
        attention=(),
    )
    net = on_meta(network, 8)
    assert network._widths() == {m.num_channels for m in net.modules() if isinstance(m, GroupNorm)}


def test_a_network_is_held_against_a_size_without_torch() -> None:
    network = NetworkConfig(channel_mult=(1, 2, 2), attention=(8, 16))
    check_network(network, 32)
    with pytest.raises(ValueError, match=r"^channel_mult: .* 2 times, but 30 pixels .* by 4"):
        check_network(network, 30)
    with pytest.raises(ValueError, match=r"^attention: \[8\] is never reached, only \[64, 32, 16"):
        check_network(network, 64)
    # The widths of heads are held against the levels that attend at this size, and the lowest.
    network = NetworkConfig(channel_mult=(1, 3, 2), attention=(16,), head_channels=256)
    with pytest.raises(ValueError, match=r"^head_channels: 256 does not divide the 384 channels"):
        check_network(network, 32)
    check_network(network, 64)  # 16 pixels are the lowest level here, of 256 channels
