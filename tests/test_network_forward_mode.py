"""Forward-mode derivatives through the networks: sCM and MeanFlow are built on them."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from consistency.config import NetworkConfig
from consistency.networks import UNet, build

ARCHITECTURES = ("ddpmpp", "ncsnpp", "adm")
ADAGN = ("shift", "scale_shift", "double_norm")


def network(architecture: Any, adagn: Any, seed: int = 0) -> UNet:
    generator = torch.Generator().manual_seed(seed)
    net = build(
        NetworkConfig(
            architecture=architecture,
            adagn=adagn,
            channels=8,
            channel_mult=(1, 2),
            num_blocks=1,
            attention=(8, 4),
            head_channels=4,
            fourier_scale=0.02,
        ),
        size=8,
        image_channels=1,
        num_classes=3,
        dropout=0.3,
        gap=True,
        generator=generator,
    )
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return net.double().train()


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


X, C_NOISE, GAP = randn(2, 1, 8, 8, seed=1), randn(2, seed=2), randn(2, seed=3).abs()
V = (randn(2, 1, 8, 8, seed=4), randn(2, seed=5), randn(2, seed=6))


def with_one_mask(net: UNet, x: Tensor, c_noise: Tensor, gap: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out: Tensor = net(x, c_noise, torch.tensor([2, -1]), gap)
    return out


def dual_level(f: Callable[..., Tensor], args: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What torch.func.jvp does, by hand."""
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, v) for x, v in zip(args, V, strict=True)]
        out, product = forward_ad.unpack_dual(f(*duals))
    return out, product


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("adagn", ADAGN)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_product_equals_central_differences_in_train_mode_with_dropout(
    architecture: str, adagn: str, memory_format: Any
) -> None:
    net = network(architecture, adagn)
    net.to(memory_format=memory_format)  # type: ignore[call-overload]
    x = X.contiguous(memory_format=memory_format)

    def f(x: Tensor, c_noise: Tensor, gap: Tensor) -> Tensor:
        return with_one_mask(net, x, c_noise, gap)

    step = 1e-5
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        out, product = torch.func.jvp(f, (x, C_NOISE, GAP), V)
        ahead = f(x + step * V[0], C_NOISE + step * V[1], GAP + step * V[2])
        behind = f(x - step * V[0], C_NOISE - step * V[1], GAP - step * V[2])
        torch.testing.assert_close(out, f(x, C_NOISE, GAP))  # the mask of a plain pass, too
        by_hand = dual_level(f, (x, C_NOISE, GAP))
    torch.testing.assert_close(by_hand, (out, product))
    torch.testing.assert_close(product, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_product_is_the_sum_of_those_along_image_noise_level_and_gap(
    architecture: str,
) -> None:
    net = network(architecture, None)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        parts = [
            torch.func.jvp(lambda x: with_one_mask(net, x, C_NOISE, GAP), (X,), V[:1])[1],
            torch.func.jvp(lambda c: with_one_mask(net, X, c, GAP), (C_NOISE,), V[1:2])[1],
            torch.func.jvp(lambda g: with_one_mask(net, X, C_NOISE, g), (GAP,), V[2:])[1],
        ]
        whole = torch.func.jvp(lambda x, c, g: with_one_mask(net, x, c, g), (X, C_NOISE, GAP), V)[1]
    assert all(part.abs().max() > 1e-3 for part in parts)
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_product_equals_the_rows_of_the_backward_pass(architecture: str) -> None:
    """<u, J v> both ways; and a product leaves the network fit for a backward pass after it."""
    net = network(architecture, None)
    u = randn(2, 1, 8, 8, seed=7)

    def f(x: Tensor, c_noise: Tensor, gap: Tensor) -> Tensor:
        return with_one_mask(net, x, c_noise, gap)

    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        product = torch.func.jvp(f, (X, C_NOISE, GAP), V)[1]
    leaves = [t.clone().requires_grad_() for t in (X, C_NOISE, GAP)]
    rows = torch.autograd.grad((f(*leaves) * u).sum(), leaves)
    both = sum((row * v).sum() for row, v in zip(rows, V, strict=True))
    torch.testing.assert_close((product * u).sum(), both)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_product_in_single_precision_agrees_with_double(architecture: str) -> None:
    net = network(architecture, None).eval()

    def product(dtype: torch.dtype) -> Tensor:
        cast = net.to(dtype)
        args = tuple(t.to(dtype) for t in (X, C_NOISE, GAP))
        tangents = tuple(t.to(dtype) for t in V)
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            out: Tensor = torch.func.jvp(
                lambda x, c, g: cast(x, c, torch.tensor([2, -1]), g), args, tangents
            )[1]
        return out

    exact, rough = product(torch.double), product(torch.float)
    assert rough.dtype == torch.float
    assert (rough - exact).abs().max() < 1e-4 * exact.abs().max()
