"""The three networks and the block restated with loops and einsum, and held against the code."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from consistency.config import NetworkConfig
from consistency.networks import UNet, build
from consistency.networks.blocks import (
    SQRT_HALF,
    Block,
    GroupNorm,
    Init,
    ResidualInput,
    Style,
    double,
    drop,
    halve,
    pixel_norm,
    smooth_filter,
)

ARCHITECTURES = ("ddpmpp", "ncsnpp", "adm")
ADAGN = ("shift", "scale_shift", "double_norm")
State = dict[str, Tensor]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def shake(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)


def sub(state: State, prefix: str) -> State:
    start = prefix + "."
    return {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}


# --- the formulas, restated


def plain_norm(x: Tensor, state: State, name: str, eps: float) -> Tensor:
    groups = min(32, x.shape[1] // 4)
    g = x.reshape(x.shape[0], groups, -1)
    variance = ((g - g.mean(2, keepdim=True)) ** 2).mean(2, keepdim=True)
    y = ((g - g.mean(2, keepdim=True)) / (variance + eps).sqrt()).reshape(x.shape)
    return y * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def surrounded(x: Tensor, pad: int) -> Tensor:
    side = x.shape[-1]
    padded = x.new_zeros(*x.shape[:2], side + 2 * pad, side + 2 * pad)
    padded[:, :, pad : pad + side, pad : pad + side] = x
    return padded


def plain_conv(x: Tensor, state: State, name: str, pad: int | None = None) -> Tensor:
    """Convolution as a sum over the kernel's taps; same-size unless `pad` is given."""
    weight = state[f"{name}.weight"]
    kernel = weight.shape[-1]
    padded = surrounded(x, kernel // 2 if pad is None else pad)
    side = padded.shape[-1] - kernel + 1
    out = state[f"{name}.bias"][None, :, None, None].repeat(x.shape[0], 1, side, side)
    for i in range(kernel):
        for j in range(kernel):
            window = padded[:, :, i : i + side, j : j + side]
            out = out + torch.einsum("oc,bchw->bohw", weight[:, :, i, j], window)
    return out


def plain_silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def fir_down(padded: Tensor, taps: tuple[float, ...]) -> Tensor:
    """Every second place of the filter's correlation with an image that is padded already."""
    side = (padded.shape[-1] - len(taps)) // 2 + 1
    ends = [slice(a, a + 2 * side - 1, 2) for a in range(len(taps))]
    return sum(
        (
            p * q * padded[..., ends[i], ends[j]]
            for i, p in enumerate(taps)
            for j, q in enumerate(taps)
        ),
        start=torch.zeros(()),
    )


def fir_up(x: Tensor, taps: tuple[float, ...]) -> Tensor:
    """The transpose: every pixel strewn into the output, two apart, and the border cut off."""
    side, reach = x.shape[-1], len(taps)
    out = x.new_zeros(*x.shape[:2], 2 * side + reach - 2, 2 * side + reach - 2)
    for i, p in enumerate(taps):
        for j, q in enumerate(taps):
            out[..., i : i + 2 * side - 1 : 2, j : j + 2 * side - 1 : 2] += p * q * x
    cut = (reach - 2) // 2
    return out[..., cut : cut + 2 * side, cut : cut + 2 * side]


def plain_resample(x: Tensor, resample: int, smooth: bool) -> Tensor:
    taps = (1.0, 3.0, 3.0, 1.0) if smooth else (1.0, 1.0)
    if resample < 0:
        taps = tuple(tap / sum(taps) for tap in taps)
        return fir_down(surrounded(x, len(taps) // 2 - 1), taps)
    if resample > 0:
        return fir_up(x, tuple(2 * tap / sum(taps) for tap in taps))
    return x


def plain_block(
    x: Tensor, emb: Tensor, state: State, resample: int, how: Style, heads: int
) -> Tensor:
    params = torch.einsum("be,oe->bo", emb, state["affine.weight"]) + state["affine.bias"]
    params = params[:, :, None, None]
    h = plain_resample(plain_silu(plain_norm(x, state, "norm0", how.eps)), resample, how.smooth)
    h = plain_conv(h, state, "conv0")
    c = h.shape[1]
    if how.adagn == "shift":
        h = plain_norm(h + params, state, "norm1", how.eps)
    else:
        scale, shift = 1 + params[:, :c], params[:, c:]
        if how.adagn == "double_norm":
            scale = scale / ((scale**2).sum(1, keepdim=True) / c + 1e-8).sqrt()
            shift = shift / ((shift**2).sum(1, keepdim=True) / c + 1e-8).sqrt()
        h = plain_norm(h, state, "norm1", how.eps) * scale + shift
    h = plain_conv(plain_silu(h), state, "conv1")
    x = plain_resample(x, resample, how.smooth)
    x = (plain_conv(x, state, "skip") if "skip.weight" in state else x) + h
    x = x * how.skip_scale
    if "qkv.weight" in state:
        b, c, s, _ = x.shape
        qkv = plain_conv(plain_norm(x, state, "norm2", how.eps), state, "qkv")
        qkv = qkv.reshape(b, heads, c // heads, 3, s * s)  # q, k, v innermost
        q, k, v = qkv[:, :, :, 0], qkv[:, :, :, 1], qkv[:, :, :, 2]
        scores = torch.einsum("bncq,bnck->bnqk", q, k) / math.sqrt(c // heads)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        a = torch.einsum("bnqk,bnck->bncq", weights, v).reshape(b, c, s, s)
        x = (x + plain_conv(a, state, "proj")) * how.skip_scale
    return x


def plain_embedding(
    net: UNet, state: State, c_noise: Tensor, labels: Tensor, gap: Tensor | None
) -> Tensor:
    song, m, k = net.network.architecture != "adm", net.network.channels, net.num_classes

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].t() + state[f"{name}.bias"]

    def waves(t: Tensor) -> Tensor:
        steps = torch.arange(m // 2).double()
        freqs = 10_000 ** -(steps / (m / 2 - 1) if song else steps / (m / 2))
        if net.network.architecture == "ncsnpp":
            freqs = 2 * math.pi * state["map_noise.freqs"]
        angles = t[:, None] * freqs
        return torch.cat([angles.sin(), angles.cos()] if song else [angles.cos(), angles.sin()], 1)

    one_hot = torch.eye(k + 1, dtype=torch.double)[labels][:, :k]  # -1: nothing
    emb = waves(c_noise)
    if gap is not None:
        emb = emb + linear(waves(gap), "map_gap")
    if song:
        emb = emb + linear(one_hot * math.sqrt(k), "map_label")
    emb = linear(plain_silu(linear(emb, "map_layer0")), "map_layer1")
    return plain_silu(emb if song else emb + one_hot @ state["map_label.weight"].t())


def plain_network(
    net: UNet, how: Style, x: Tensor, c_noise: Tensor, labels: Tensor, gap: Tensor | None
) -> Tensor:
    """Three resolutions (8, 4, 2) of one block each, by name."""
    state: State = net.state_dict()
    emb = plain_embedding(net, state, c_noise, labels, gap)

    def block(h: Tensor, name: str, resample: int = 0) -> Tensor:
        part = sub(state, name)
        heads = net.network.heads(part["conv1.weight"].shape[0])
        return plain_block(h, emb, part, resample, how, heads)

    h, aux = plain_conv(x, state, "enc.8x8_conv"), x
    skips = [h]
    for side in (8, 4, 2):
        if side < 8:
            h = block(h, f"enc.{side}x{side}_down", -1)
            if net.network.architecture == "ncsnpp":
                # One filter without a border in between: the 3x3 first, 2 pixels beyond the image.
                part = sub(state, f"enc.{side}x{side}_aux_residual")
                bias = {"r.weight": part["weight"], "r.bias": torch.zeros_like(part["bias"])}
                wide = plain_conv(aux, bias, "r", pad=2)
                residual = fir_down(wide, (1 / 8, 3 / 8, 3 / 8, 1 / 8))
                h = aux = (h + residual + part["bias"][:, None, None]) / math.sqrt(2)
            skips.append(h)
        h = block(h, f"enc.{side}x{side}_block0")
        skips.append(h)
    for side in (2, 4, 8):
        if side == 2:
            h = block(block(h, "dec.2x2_in0"), "dec.2x2_in1")
        else:
            h = block(h, f"dec.{side}x{side}_up", +1)
        for i in range(2):
            h = block(torch.cat([h, skips.pop()], 1), f"dec.{side}x{side}_block{i}")
    names = ("out_norm", "out_conv")
    if net.network.architecture != "adm":
        names = ("dec.8x8_aux_norm", "dec.8x8_aux_conv")
    return plain_conv(plain_silu(plain_norm(h, state, names[0], how.eps)), state, names[1])


def published(architecture: str, adagn: Any) -> Style:
    """Only what the formulas above read; the initial weights are none of their business."""
    adm = architecture == "adm"
    return Style(
        adagn=adagn,
        eps=1e-5 if adm else 1e-6,
        skip_scale=1 if adm else SQRT_HALF,
        project=not adm,
        smooth=architecture == "ncsnpp",
        init="xavier",
        last_gain=1,
        attention_gain=1,
    )


# --- the code against them


@pytest.mark.parametrize("adagn", ADAGN)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("c_in", "c_out", "heads", "resample"),
    [(8, 8, 0, 0), (24, 16, 0, 0), (8, 16, 4, 0), (8, 8, 0, -1), (8, 8, 1, 1), (8, 16, 0, 1)],
)
def test_a_block_equals_its_formulas(
    architecture: str, adagn: str, c_in: int, c_out: int, heads: int, resample: int
) -> None:
    how = published(architecture, adagn)
    init = Init("xavier", torch.Generator().manual_seed(2))
    block = Block(c_in, c_out, 32, how, init, heads=heads, resample=resample).double()
    shake(block, 3)
    x, emb = randn(3, c_in, 4, 4), randn(3, 32, seed=1)
    expected = plain_block(x, emb, dict(block.state_dict()), resample, how, heads)
    with torch.no_grad():
        torch.testing.assert_close(block(x, *block.condition(emb)), expected)


@pytest.mark.parametrize("gap", [False, True])
@pytest.mark.parametrize("adagn", [None, *ADAGN])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_whole_network_equals_its_formulas(architecture: Any, adagn: Any, gap: bool) -> None:
    network = NetworkConfig(
        architecture=architecture,
        channels=8,
        channel_mult=(1, 2, 3),
        num_blocks=1,
        attention=(8,),
        adagn=adagn,
        head_channels=8,
    )
    net = build(network, size=8, image_channels=1, num_classes=3, gap=gap).double()
    shake(net, 4)
    own = {"ddpmpp": "shift", "ncsnpp": "shift", "adm": "scale_shift"}[architecture]
    x, c_noise, labels = randn(4, 1, 8, 8), randn(4, seed=1), torch.tensor([0, 1, 2, -1])
    extra = randn(4, seed=2) if gap else None
    expected = plain_network(net, published(architecture, adagn or own), x, c_noise, labels, extra)
    with torch.no_grad():
        got = net(x, c_noise, labels, extra)
    assert got.abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("smooth", [False, True])
def test_resampling_equals_its_filter_and_halving_is_doubling_transposed(smooth: bool) -> None:
    x, y = randn(2, 3, 6, 6), randn(2, 3, 12, 12, seed=1)
    how = smooth_filter().double() if smooth else None
    torch.testing.assert_close(double(x, how), plain_resample(x, 1, smooth))
    torch.testing.assert_close(halve(y, how), plain_resample(y, -1, smooth))
    torch.testing.assert_close((double(x, how) * y).sum(), 4 * (x * halve(y, how)).sum())
    # The smooth filter is a constant of the code: nothing to store, nothing to train.
    style = published("ncsnpp" if smooth else "ddpmpp", "shift")
    block = Block(8, 8, 8, style, Init("xavier", None), resample=1)
    assert not [k for k in (*block.state_dict(), *dict(block.named_parameters())) if "fir" in k]
    assert (block.fir is None) == (not smooth)


def test_the_residual_input_is_a_convolution_and_the_filter_as_one() -> None:
    layer = ResidualInput(3, 4, Init("xavier", torch.Generator().manual_seed(0))).double()
    shake(layer, 1)
    x = randn(2, 3, 6, 6)
    state = {f"r.{k}": v for k, v in layer.state_dict().items()}
    bias = state["r.bias"].clone()
    state["r.bias"].zero_()
    expected = fir_down(plain_conv(x, state, "r", pad=2), (1 / 8, 3 / 8, 3 / 8, 1 / 8))
    state["r.bias"].copy_(bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected + bias[:, None, None])


def test_pixel_norm_makes_the_root_mean_square_of_the_channels_one() -> None:
    v = randn(5, 16, 1, 1) * torch.tensor([1e-2, 0.1, 1, 10, 1e3])[:, None, None, None]
    out = pixel_norm(v)
    torch.testing.assert_close(out.square().mean(1), torch.ones_like(out[:, 0]), rtol=1e-3, atol=0)
    torch.testing.assert_close(out / out[:, :1], v / v[:, :1])  # the direction stays
    assert not pixel_norm(torch.zeros(1, 4)).any()


def test_double_norm_bounds_scale_and_shift_however_large_the_layer_gets() -> None:
    how = published("adm", "double_norm")
    block = Block(8, 16, 32, how, Init("fan_in", torch.Generator().manual_seed(0))).double()
    emb = randn(4, 32)
    for size in (1.0, 1e4):
        with torch.no_grad():
            block.affine.weight.mul_(size)
            parts = block.condition(emb)
        for part in parts:
            assert part is not None
            rms = part.square().mean(1).sqrt()
            torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-4, atol=0)


# --- the two places that do not use torch's own function


def test_dropout_zeroes_its_share_and_keeps_the_mean() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = drop(torch.ones(8, 32, 16, 16), 0.3)
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (out == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert (out == 0).float().mean((0, 2, 3)).std() < 0.03  # no channel is privileged


def test_the_dropout_mask_depends_on_neither_memory_format_nor_dtype_nor_forward_mode() -> None:
    h = randn(2, 8, 4, 4).float()

    def dropped(x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return drop(x, 0.5)

    expected = dropped(h) == 0
    assert 0.3 < expected.float().mean() < 0.7
    nhwc = h.contiguous(memory_format=torch.channels_last)
    for other in (nhwc, h.bfloat16(), h.double()):
        assert torch.equal(dropped(other) == 0, expected)
    for x in (h, nhwc):
        primal, tangent = torch.func.jvp(dropped, (x,), (torch.ones_like(x),))
        assert torch.equal(primal == 0, expected)
        assert torch.equal(tangent == 0, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_norm_has_fp32_statistics_under_autocast(dtype: torch.dtype) -> None:
    """Values near 100 in bf16 have steps of 0.5: sums or squares of that precision show."""
    norm = GroupNorm(32, 1e-6)
    x = (100 + 4 * randn(2, 32, 16, 16)).to(dtype)
    exact = norm.double()(x.double())
    norm.float()
    with torch.autocast("cpu", dtype):
        got = norm(x)
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=2**-8)
