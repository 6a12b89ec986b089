"""The U-Net: the layout of public weights, the block's formulas restated plainly, its contract."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from consistency.config import NetworkConfig, check_network
from consistency.networks.unet import Block, UNet

LAYOUTS = json.loads((Path(__file__).parent / "assets" / "unet_layouts.json").read_text())
TINY: dict[str, Any] = {
    "size": 8,
    "image_channels": 1,
    "num_classes": 3,
    "channels": 8,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attention": (4,),
}


def perturbed(seed: int = 0, **changes: Any) -> UNet:
    """A tiny network none of whose weights are (nearly) zero."""
    generator = torch.Generator().manual_seed(seed)
    net = UNet(**{**TINY, **changes}, generator=generator)
    shake(net, generator)
    return net


def shake(module: torch.nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)


def inputs(batch: int = 4, channels: int = 1, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, size, size, generator=generator)
    return x, torch.linspace(-1.5, 1.1, batch), torch.arange(batch) % 3


# --- layout


def test_keys_and_shapes_equal_the_small_public_network() -> None:
    net = UNet(
        size=16,
        image_channels=3,
        num_classes=10,
        channels=32,
        channel_mult=(1, 2),
        num_blocks=1,
        attention=(8,),
    )
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == LAYOUTS["small"]["keys"]
    assert sum(p.numel() for p in net.parameters()) == LAYOUTS["small"]["parameters"]


def test_keys_and_shapes_equal_the_published_cifar10_network() -> None:
    net = UNet(
        size=32,
        image_channels=3,
        num_classes=0,
        channels=128,
        channel_mult=(2, 2, 2),
        num_blocks=4,
        attention=(16,),
    )
    state = net.state_dict()
    lines = sorted(f"{k} {'x'.join(map(str, v.shape))}" for k, v in state.items())
    assert sum(p.numel() for p in net.parameters()) == 55_732_739
    assert len(lines) == LAYOUTS["cifar10"]["tensors"]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == LAYOUTS["cifar10"]["digest"]


# --- the formulas, restated with loops and einsum


def plain_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    groups = min(32, x.shape[1] // 4)
    g = x.reshape(x.shape[0], groups, -1)
    variance = ((g - g.mean(2, keepdim=True)) ** 2).mean(2, keepdim=True)
    y = ((g - g.mean(2, keepdim=True)) / (variance + 1e-6).sqrt()).reshape(x.shape)
    return y * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def plain_conv(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """Same-size convolution as a sum over the kernel's taps."""
    weight = state[f"{name}.weight"]
    pad = weight.shape[-1] // 2
    side = x.shape[-1]
    padded = x.new_zeros(*x.shape[:2], side + 2 * pad, side + 2 * pad)
    padded[:, :, pad : pad + side, pad : pad + side] = x
    out = state[f"{name}.bias"][None, :, None, None].repeat(x.shape[0], 1, side, side)
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            window = padded[:, :, i : i + side, j : j + side]
            out = out + torch.einsum("oc,bchw->bohw", weight[:, :, i, j], window)
    return out


def plain_silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def plain_resample(x: Tensor, resample: int) -> Tensor:
    if resample < 0:
        return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3) if resample else x


def plain_block(
    x: Tensor, emb: Tensor, state: dict[str, Tensor], resample: int, heads: int = 1
) -> Tensor:
    shift = torch.einsum("be,oe->bo", emb, state["affine.weight"]) + state["affine.bias"]
    h = plain_resample(plain_silu(plain_norm(x, state, "norm0")), resample)
    h = plain_conv(h, state, "conv0") + shift[:, :, None, None]
    h = plain_conv(plain_silu(plain_norm(h, state, "norm1")), state, "conv1")
    x = plain_resample(x, resample)
    x = (plain_conv(x, state, "skip") if "skip.weight" in state else x) + h
    x = x / math.sqrt(2)
    if "qkv.weight" in state:
        b, c, s, _ = x.shape
        qkv = plain_conv(plain_norm(x, state, "norm2"), state, "qkv")
        qkv = qkv.reshape(b, heads, c // heads, 3, s * s)  # q, k, v innermost
        q, k, v = qkv[:, :, :, 0], qkv[:, :, :, 1], qkv[:, :, :, 2]
        scores = torch.einsum("bncq,bnck->bnqk", q, k) / math.sqrt(c // heads)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        a = torch.einsum("bnqk,bnck->bncq", weights, v).reshape(b, c, s, s)
        x = (x + plain_conv(a, state, "proj")) / math.sqrt(2)
    return x


@pytest.mark.parametrize(
    ("c_in", "c_out", "attend", "resample"),
    [(8, 8, False, 0), (24, 16, False, 0), (8, 16, True, 0), (8, 8, False, -1), (8, 8, True, 1)],
)
def test_a_block_equals_its_formulas_written_out(
    c_in: int, c_out: int, attend: bool, resample: int
) -> None:
    generator = torch.Generator().manual_seed(2)
    block = Block(c_in, c_out, 32, attend, resample, 0.0, generator).double()
    shake(block, generator)
    x = torch.randn(3, c_in, 4, 4, generator=generator, dtype=torch.double)
    emb = torch.randn(3, 32, generator=generator, dtype=torch.double)
    expected = plain_block(x, emb, dict(block.state_dict()), resample)
    with torch.no_grad():
        torch.testing.assert_close(block(x, block.affine(emb)), expected)


def test_the_whole_network_equals_its_blocks_written_out() -> None:
    net = perturbed().double()
    x, c_noise, labels = inputs()
    x = x.double()
    state = net.state_dict()

    half = TINY["channels"] // 2
    angles = c_noise.double()[:, None] * 10_000.0 ** (-torch.arange(half).double() / (half - 1))
    emb = torch.cat([angles.sin(), angles.cos()], 1)
    one_hot = torch.eye(3, dtype=torch.double)[labels] * math.sqrt(3)
    emb = emb + one_hot @ state["map_label.weight"].t() + state["map_label.bias"]
    for name in ("map_layer0", "map_layer1"):
        emb = plain_silu(emb @ state[f"{name}.weight"].t() + state[f"{name}.bias"])

    def sub(prefix: str) -> dict[str, Tensor]:
        start = prefix + "."
        return {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}

    h = plain_conv(x, sub("enc"), "8x8_conv")
    skips = [h]
    for name, resample in (("8x8_block0", 0), ("4x4_down", -1), ("4x4_block0", 0)):
        h = plain_block(h, emb, sub(f"enc.{name}"), resample)
        skips.append(h)
    h = plain_block(h, emb, sub("dec.4x4_in0"), 0)
    h = plain_block(h, emb, sub("dec.4x4_in1"), 0)
    for name in ("4x4_block0", "4x4_block1", "8x8_up", "8x8_block0", "8x8_block1"):
        if name == "8x8_up":
            h = plain_block(h, emb, sub(f"dec.{name}"), +1)
        else:
            h = plain_block(torch.cat([h, skips.pop()], 1), emb, sub(f"dec.{name}"), 0)
    h = plain_silu(plain_norm(h, sub("dec"), "8x8_aux_norm"))
    expected = plain_conv(h, sub("dec"), "8x8_aux_conv")

    # The embedding is computed in fp32 whatever the rest is: let the linear layers take fp32 here.
    for layer in (net.map_label, net.map_layer0, net.map_layer1):
        layer.float()
    for block in net.modules():
        if isinstance(block, Block):
            block.affine.float()
    with torch.no_grad():
        torch.testing.assert_close(net(x, c_noise, labels), expected, rtol=1e-4, atol=1e-5)


# --- the contract


@pytest.mark.parametrize(("size", "image_channels"), [(8, 1), (12, 3)])
def test_the_output_has_the_shape_of_the_input(size: int, image_channels: int) -> None:
    net = perturbed(size=size, image_channels=image_channels, attention=(size // 2,))
    x, c_noise, labels = inputs(2, image_channels, size)
    assert net(x, c_noise, labels).shape == x.shape


def test_a_fresh_network_outputs_nearly_zero() -> None:
    net = UNet(**TINY, generator=torch.Generator().manual_seed(0))
    assert net(*inputs()).abs().max() < 1e-2


def test_the_generator_alone_decides_the_initial_weights() -> None:
    before = torch.get_rng_state()
    nets = [UNet(**TINY, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = (torch.cat([p.flatten() for p in n.parameters()]) for n in nets)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_the_null_label_equals_no_label_and_a_class_changes_the_output() -> None:
    net = perturbed()
    x, c_noise, labels = inputs()
    none = net(x, c_noise)
    assert torch.equal(none, net(x, c_noise, torch.full_like(labels, -1)))
    per_class = [net(x, c_noise, torch.full_like(labels, k)) for k in range(3)]
    for k, out in enumerate(per_class):
        assert (out - none).abs().max() > 1e-3
        assert (out - per_class[(k + 1) % 3]).abs().max() > 1e-3


def test_a_label_beyond_the_classes_is_refused() -> None:
    x, c_noise, labels = inputs()
    with pytest.raises(IndexError):
        perturbed()(x, c_noise, labels + 1)


def test_an_unconditional_network_ignores_labels() -> None:
    net = perturbed(num_classes=0)
    x, c_noise, labels = inputs()
    assert "map_label.weight" not in net.state_dict()
    assert torch.equal(net(x, c_noise), net(x, c_noise, labels))


def test_each_image_is_treated_alone() -> None:
    net = perturbed()
    x, c_noise, labels = inputs()
    together = net(x, c_noise, labels)
    for i in range(len(x)):
        one = slice(i, i + 1)
        alone = net(x[one], c_noise[one], labels[one])
        torch.testing.assert_close(alone, together[one], rtol=1e-4, atol=1e-5)


def test_memory_format_does_not_change_the_result() -> None:
    net = perturbed()
    x, c_noise, labels = inputs()
    expected = net(x, c_noise, labels)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    got = net(x.contiguous(memory_format=torch.channels_last), c_noise, labels)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_train_mode_only_and_follows_the_generator() -> None:
    net = perturbed(dropout=0.5)
    args = inputs()
    plain = perturbed(dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = net.train()(*args)
        second = net(*args)
        torch.manual_seed(0)
        again = net(*args)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(net.eval()(*args), plain(*args))


def test_close_noise_levels_stay_apart_under_bf16_autocast() -> None:
    """0.25 ln sigma in bf16 near 1.1 has a spacing of 1/128: these four would be one value."""
    net = perturbed()
    x = inputs(1)[0].expand(4, -1, -1, -1)
    c_noise = 1.0925 + 1e-3 * torch.arange(4)
    assert len(c_noise.bfloat16().unique()) == 1
    seen: list[Tensor] = []
    for module in net.modules():
        if isinstance(module, Block):
            module.affine.register_forward_hook(lambda *a: seen.append(a[2]))
    exact = net(x, c_noise)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(x, c_noise)
    assert torch.isfinite(rough).all()
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()
    half = len(seen) // 2
    assert half == 10
    for shift_exact, shift_rough in zip(seen[:half], seen[half:], strict=True):
        assert shift_rough.dtype == torch.float32
        assert torch.equal(shift_rough, shift_exact)
        assert (shift_rough[1:] != shift_rough[:-1]).any(dim=1).all()


def test_the_gradient_reaches_every_parameter_and_the_input() -> None:
    net = perturbed()
    x, c_noise, labels = inputs()
    x.requires_grad_()
    net(x, c_noise, labels).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    silent = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_without_labels_every_parameter_still_has_a_gradient() -> None:
    """Distributed training waits for every parameter of the first step."""
    net = perturbed()
    x, c_noise, _ = inputs()
    net(x, c_noise).sum().backward()
    assert [k for k, p in net.named_parameters() if p.grad is None] == []


def test_the_gradient_agrees_with_finite_differences() -> None:
    block = Block(8, 16, 8, True, 0, 0.0, torch.Generator().manual_seed(3)).double()
    shake(block, torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 8, 2, 2, generator=generator, dtype=torch.double, requires_grad=True)
    shift = torch.randn(1, 16, generator=generator, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x, shift))


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
        ({"attention": (4, 16)}, r"attention: \[16\] is never reached, only \[8, 4\] are"),
    ],
)
def test_impossible_networks_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        UNet(**{**TINY, **change})


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
    ],
)
def test_a_description_is_checked_without_building(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        NetworkConfig(**change)


@pytest.mark.parametrize("channel_mult", [(1,), (1, 2), (2, 1, 3)])
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_the_widths_checked_are_the_widths_built(
    channel_mult: tuple[int, ...], num_blocks: int
) -> None:
    network = NetworkConfig(
        channels=32, channel_mult=channel_mult, num_blocks=num_blocks, attention=()
    )
    net = UNet(
        size=8,
        image_channels=1,
        num_classes=0,
        channels=32,
        channel_mult=channel_mult,
        num_blocks=num_blocks,
        attention=(),
    )
    built = {layer.num_channels for layer in net.modules() if isinstance(layer, torch.nn.GroupNorm)}
    assert network._widths() == built


def test_a_network_is_held_against_a_size_without_torch() -> None:
    network = NetworkConfig(channel_mult=(1, 2, 2), attention=(8, 16))
    check_network(network, 32)
    with pytest.raises(ValueError, match=r"^channel_mult: .* 2 times, but 30 pixels .* by 4"):
        check_network(network, 30)
    with pytest.raises(ValueError, match=r"^attention: \[8\] is never reached, only \[64, 32, 16"):
        check_network(network, 64)


def test_an_image_of_another_shape_is_refused() -> None:
    _, c_noise, labels = inputs()
    with pytest.raises(ValueError, match=r"expected \[B, 1, 8, 8\], got \[4, 3, 8, 8\]"):
        perturbed()(torch.zeros(4, 3, 8, 8), c_noise, labels)
