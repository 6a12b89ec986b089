"""What every network keeps to, whatever its architecture: labels, dropout, gap, precision."""

from typing import Any

import pytest
import torch
from torch import Tensor

from consistency.config import NetworkConfig
from consistency.networks import UNet, blocks, build
from consistency.networks.blocks import Block

ARCHITECTURES = ("ddpmpp", "ncsnpp", "adm")
pytestmark = pytest.mark.parametrize("architecture", ARCHITECTURES)
TINY: dict[str, Any] = {
    "size": 8,
    "image_channels": 1,
    "num_classes": 3,
    "channels": 8,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attention": (4,),
}


def tiny(architecture: str, **changes: Any) -> UNet:
    """A tiny network as training would begin with it; changes go where they belong."""
    given = {**TINY, **changes, "architecture": architecture}
    described = {k: given.pop(k) for k in list(given) if k in NetworkConfig.__dataclass_fields__}
    generator = torch.Generator().manual_seed(0)
    return build(NetworkConfig(**described), **given, generator=generator)


def perturbed(architecture: str, **changes: Any) -> UNet:
    """The same, but none of its weights are (nearly) zero."""
    net = tiny(architecture, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return net


def inputs(batch: int = 4, channels: int = 1, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, size, size, generator=generator)
    return x, torch.linspace(-1.5, 1.1, batch), torch.arange(batch) % 3


def seeded(net: UNet, *args: Tensor | None) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out: Tensor = net(*args)
    return out


# --- shapes, and each image by itself


@pytest.mark.parametrize(("size", "image_channels"), [(8, 1), (12, 3)])
def test_the_output_has_the_shape_of_the_input(
    architecture: str, size: int, image_channels: int
) -> None:
    net = perturbed(architecture, size=size, image_channels=image_channels, attention=(size // 2,))
    x, c_noise, labels = inputs(2, image_channels, size)
    assert net(x, c_noise, labels).shape == x.shape


def test_an_image_of_another_shape_is_refused(architecture: str) -> None:
    _, c_noise, labels = inputs()
    with pytest.raises(ValueError, match=r"expected \[B, 1, 8, 8\], got \[4, 3, 8, 8\]"):
        perturbed(architecture)(torch.zeros(4, 3, 8, 8), c_noise, labels)


def test_a_fresh_network_outputs_nearly_zero(architecture: str) -> None:
    out = tiny(architecture)(*inputs())
    assert out.abs().max() < 1e-2
    assert out.any() == (architecture != "adm")  # ADM starts at zero exactly


def test_each_image_is_treated_alone(architecture: str) -> None:
    net = perturbed(architecture)
    x, c_noise, labels = inputs()
    together = net(x, c_noise, labels)
    for i in range(len(x)):
        one = slice(i, i + 1)
        alone = net(x[one], c_noise[one], labels[one])
        torch.testing.assert_close(alone, together[one], rtol=1e-4, atol=1e-5)


def test_memory_format_does_not_change_the_result(architecture: str) -> None:
    net = perturbed(architecture, dropout=0.3)
    x, c_noise, labels = inputs()
    expected = seeded(net, x, c_noise, labels)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    got = seeded(net, x.contiguous(memory_format=torch.channels_last), c_noise, labels)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# --- what it is told besides the image


@pytest.mark.parametrize("adagn", ["shift", "scale_shift", "double_norm"])
def test_noise_level_and_class_reach_every_pixel(architecture: str, adagn: str) -> None:
    net = perturbed(architecture, adagn=adagn)
    x, c_noise, labels = inputs()
    out = net(x, c_noise, labels)
    for other in (net(x, c_noise + 0.3, labels), net(x, c_noise, (labels + 1) % 3)):
        changed = ((other - out).abs() > 1e-5).float().mean((1, 2, 3))
        assert (changed > 0.9).all()


def test_the_null_label_equals_no_label_and_a_class_changes_the_output(architecture: str) -> None:
    net = perturbed(architecture)
    x, c_noise, labels = inputs()
    none = net(x, c_noise)
    assert torch.equal(none, net(x, c_noise, torch.full_like(labels, -1)))
    per_class = [net(x, c_noise, torch.full_like(labels, k)) for k in range(3)]
    for k, out in enumerate(per_class):
        assert (out - none).abs().max() > 1e-3
        assert (out - per_class[(k + 1) % 3]).abs().max() > 1e-3


def test_a_label_beyond_the_classes_is_refused(architecture: str) -> None:
    x, c_noise, labels = inputs()
    with pytest.raises(IndexError):
        perturbed(architecture)(x, c_noise, labels + 1)


def test_an_unconditional_network_ignores_labels(architecture: str) -> None:
    net = perturbed(architecture, num_classes=0)
    x, c_noise, labels = inputs()
    assert "map_label.weight" not in net.state_dict()
    assert torch.equal(net(x, c_noise), net(x, c_noise, labels))


def test_a_gap_changes_nothing_at_first_and_then_every_output(architecture: str) -> None:
    x, c_noise, labels = inputs()
    gap = torch.linspace(0, 1, len(x))
    fresh = perturbed(architecture, gap=True)
    plain = tiny(architecture)
    torch.nn.init.zeros_(fresh.map_gap.weight)
    torch.nn.init.zeros_(fresh.map_gap.bias)
    odd = plain.load_state_dict(fresh.state_dict(), strict=False)
    assert odd.missing_keys == []
    assert odd.unexpected_keys == ["map_gap.weight", "map_gap.bias"]
    assert torch.equal(fresh(x, c_noise, labels, gap), plain(x, c_noise, labels))

    net = perturbed(architecture, gap=True)
    difference = net(x, c_noise, labels, gap + 0.1) - net(x, c_noise, labels, gap)
    assert (difference.abs().amax((1, 2, 3)) > 1e-5).all()


def test_a_fresh_gap_network_has_the_weights_of_the_one_without(architecture: str) -> None:
    state = tiny(architecture, gap=True).state_dict()
    assert not state.pop("map_gap.weight").any()
    assert not state.pop("map_gap.bias").any()
    expected = tiny(architecture).state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[k], v) for k, v in expected.items())


def test_a_gap_goes_with_the_network_made_for_it(architecture: str) -> None:
    x, c_noise, labels = inputs()
    with pytest.raises(ValueError, match=r"^gap: .* needs one"):
        tiny(architecture, gap=True)(x, c_noise, labels)
    with pytest.raises(ValueError, match=r"^gap: .* takes none"):
        tiny(architecture)(x, c_noise, labels, torch.zeros(4))


# --- dropout


def test_dropout_acts_in_train_mode_only_and_follows_the_generator(architecture: str) -> None:
    net = perturbed(architecture, dropout=0.5)
    args = inputs()
    first = seeded(net.train(), *args)
    assert torch.equal(first, seeded(net, *args))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        assert not torch.equal(first, net(*args))
    assert torch.equal(net.eval()(*args), perturbed(architecture, dropout=0.0)(*args))


@pytest.mark.parametrize(
    ("max_side", "sides"),
    # Blocks in encoder and decoder: 8x8 has 1 + 3, 4x4 has 2 + 4.
    [(None, {8: 4, 4: 6}), (8, {8: 4, 4: 6}), (7, {4: 6}), (4, {4: 6}), (3, {})],
)
def test_dropout_acts_only_up_to_the_side_asked_for(
    architecture: str,
    max_side: int | None,
    sides: dict[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[int, int] = {}

    def counting(h: Tensor, p: float) -> Tensor:
        assert p == 0.5
        seen[h.shape[-1]] = seen.get(h.shape[-1], 0) + 1
        return h

    monkeypatch.setattr(blocks, "drop", counting)
    tiny(architecture, dropout=0.5, dropout_max_side=max_side)(*inputs())
    assert seen == sides


# --- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adagn", ["shift", "double_norm"])
def test_close_noise_levels_stay_apart_under_autocast(
    architecture: str, adagn: str, dtype: torch.dtype
) -> None:
    """0.25 ln sigma in bf16 near 1.1 has a spacing of 1/128: these four would be one value."""
    net = perturbed(architecture, adagn=adagn, gap=True)
    x = inputs(1)[0].expand(4, -1, -1, -1)
    c_noise = 1.0925 + 1e-3 * torch.arange(4)
    gap = 1 - c_noise / 2
    if dtype == torch.bfloat16:
        assert len(c_noise.bfloat16().unique()) == 1
    seen: list[Tensor] = []
    for module in net.modules():
        if isinstance(module, Block):
            module.affine.register_forward_hook(lambda *a: seen.append(a[2]))
    exact = net(x, c_noise, None, gap)
    with torch.autocast("cpu", dtype):
        rough = net(x, c_noise, None, gap)
        loss = rough.float().square().sum()
    assert rough.dtype == dtype
    assert torch.isfinite(rough).all()
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()
    half = len(seen) // 2
    assert half == 10
    for shift_exact, shift_rough in zip(seen[:half], seen[half:], strict=True):
        assert shift_rough.dtype == torch.float32
        assert torch.equal(shift_rough, shift_exact)
        assert (shift_rough[1:] != shift_rough[:-1]).any(dim=1).all()
    loss.backward()
    for p in net.parameters():
        assert p.dtype == torch.float32
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        assert torch.isfinite(p.grad).all()


def test_a_double_network_embeds_in_double(architecture: str) -> None:
    """Noise levels 1e-9 apart, which are one value in fp32."""
    net = perturbed(architecture, fourier_scale=1.0).double()
    x = inputs(1)[0].double().expand(2, -1, -1, -1)
    c_noise = torch.tensor([0.5, 0.5 + 1e-9], dtype=torch.double)
    out = net(x, c_noise)
    assert out.dtype == torch.double
    assert not torch.equal(out[0], out[1])
    # And a single network takes a double noise level.
    assert net.float()(x.float(), c_noise).dtype == torch.float32


# --- gradients


def test_the_gradient_reaches_every_parameter_and_the_input(architecture: str) -> None:
    net = perturbed(architecture, gap=True)
    x, c_noise, labels = inputs()
    x.requires_grad_()
    net(x, c_noise, labels, c_noise).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    silent = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_without_labels_every_parameter_still_has_a_gradient(architecture: str) -> None:
    """Distributed training waits for every parameter of the first step."""
    net = perturbed(architecture)
    x, c_noise, _ = inputs()
    net(x, c_noise).sum().backward()
    assert [k for k, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("adagn", ["shift", "scale_shift", "double_norm"])
def test_a_fresh_network_learns(architecture: str, adagn: str) -> None:
    net = tiny(architecture, adagn=adagn, dropout=0.1)
    x, c_noise, labels = inputs()
    target = torch.roll(x, 1, 0)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for step in range(8):
        optimizer.zero_grad()
        out = seeded(net, x, c_noise, labels if step % 2 else None)
        loss = (out - target).square().mean()
        loss.backward()
        assert [k for k, p in net.named_parameters() if p.grad is None] == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("adagn", ["shift", "scale_shift", "double_norm"])
def test_the_gradient_agrees_with_finite_differences(architecture: str, adagn: str) -> None:
    net = perturbed(architecture, adagn=adagn, size=4, attention=(2,), num_classes=0)
    net.double().requires_grad_(False)
    x, c_noise, _ = inputs(1, 1, 4)
    args = (x.double().requires_grad_(), c_noise.double().requires_grad_())
    assert torch.autograd.gradcheck(net, args)
