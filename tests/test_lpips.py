import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from consistency.lpips import LPIPS, STAGES, WIDTHS, load_lpips


@pytest.fixture(scope="module")
def vgg():
    """Random weights by torchvision's names, sized so that activations neither fade nor grow."""
    generator, weights, channels = torch.Generator().manual_seed(0), {}, 3
    for stage, (places, width) in enumerate(zip(STAGES, WIDTHS, strict=True)):
        for place in places:
            gain = math.sqrt(2 / (9 * channels))
            kernel = torch.randn(width, channels, 3, 3, generator=generator)
            weights[f"features.{place}.weight"] = gain * kernel
            weights[f"features.{place}.bias"] = 0.1 * torch.randn(width, generator=generator)
            channels = width
        linear = torch.rand(1, width, 1, 1, generator=generator)
        weights[f"lin{stage}.model.1.weight"] = linear
    return weights


@pytest.fixture(scope="module")
def distance(vgg, tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "vgg.safetensors"
    save_file(vgg | {"classifier.0.weight": torch.zeros(1)}, path)  # torchvision's file has these
    return load_lpips(path)


def images(size, channels=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(1, channels, size, size, generator=generator) * 2 - 1
    return a, (a + 0.3 * torch.randn(a.shape, generator=generator)).clamp(-1, 1)


@pytest.fixture(scope="module")
def of_pair(distance):
    with torch.no_grad():
        return distance(*images(32))


def bilinear(n, m):
    """[m, n] matrix of linear interpolation between pixel centres."""
    at = ((torch.arange(m) + 0.5) * n / m - 0.5).clamp(0, n - 1)
    low = at.floor().long().clamp(max=n - 2)
    matrix = torch.zeros(m, n)
    matrix[torch.arange(m), low] = 1 - (at - low)
    matrix[torch.arange(m), low + 1] = at - low
    return matrix


def recomputed(vgg, a, b):
    """The definition from the weights by name, on images in [0, 1], with the paper's norm."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    grow = bilinear(a.shape[-1], 224)
    total, maps = 0.0, []
    for x in (a, b):
        x = grow @ ((x + 1) / 2).expand(-1, 3, -1, -1) @ grow.T
        x, outputs, place = (x - mean[:, None, None]) / std[:, None, None], [], 0
        for convs in (2, 2, 3, 3, 3):
            for _ in range(convs):
                name = f"features.{place}."
                x = F.conv2d(x, vgg[name + "weight"], vgg[name + "bias"], padding=1).clamp(min=0)
                place += 2
            outputs.append(x / x.square().sum(1, keepdim=True).sqrt().clamp(min=1e-10))
            x, place = F.max_pool2d(x, 2), place + 1
        maps.append(outputs)
    for stage, (fa, fb) in enumerate(zip(*maps, strict=True)):
        linear = vgg[f"lin{stage}.model.1.weight"]
        total = total + F.conv2d((fa - fb) ** 2, linear).mean((1, 2, 3))
    return total


def test_distance_equals_its_definition_recomputed(vgg, of_pair):
    assert of_pair.shape == (1,)
    assert of_pair.dtype == torch.float32
    torch.testing.assert_close(of_pair, recomputed(vgg, *images(32)), rtol=1e-4, atol=0)


def test_distance_is_zero_at_equality_and_symmetric_with_one_number_per_pair(distance, of_pair):
    a, b = images(32)
    with torch.no_grad():
        same, swapped = distance(torch.cat([a, b]), torch.cat([a, a]))
    assert same == 0
    assert swapped > 0.01
    torch.testing.assert_close(swapped, of_pair[0])


def test_gradient_reaches_the_images_alone_and_descends(distance):
    a, b = images(32)
    a.requires_grad_()
    before = distance(a, b)
    before.sum().backward()
    assert torch.isfinite(a.grad).all()
    assert b.grad is None
    assert all(p.grad is None and not p.requires_grad for p in distance.parameters())
    with torch.no_grad():
        assert distance(a - 0.05 * a.grad / a.grad.norm(), b) < before


def first_convolution(distance, a, b):
    """Input and output of the first convolution; the rest, which is slow, is not run."""

    def stop(module, inputs, output):
        raise StopIteration(inputs[0], output)

    handle = distance.stages[0][0].register_forward_hook(stop)
    with pytest.raises(RuntimeError) as caught:  # what a generator makes of StopIteration
        distance(a, b)
    handle.remove()
    return caught.value.__cause__.args


@pytest.mark.parametrize(("size", "seen"), [(32, 224), (64, 224), (255, 224), (256, 256)])
def test_sides_below_256_are_brought_to_224(distance, size, seen):
    entered, _ = first_convolution(distance, *images(size))
    assert entered.shape == (1, 3, seen, seen)


def test_one_channel_is_seen_as_three_equal_ones(distance):
    a, b = images(28, channels=1)
    entered, _ = first_convolution(distance, a, b)
    repeated, _ = first_convolution(distance, *(x.repeat(1, 3, 1, 1) for x in (a, b)))
    torch.testing.assert_close(entered, repeated)


def test_autocast_does_not_touch_it(distance):
    a, b = images(32)
    with torch.autocast("cpu", torch.bfloat16):
        entered, left = first_convolution(distance, a.bfloat16(), b.bfloat16())
    assert entered.dtype == left.dtype == torch.float32


def test_features_that_are_all_zero_give_no_nan(vgg):
    dead = {k: v - 100 if k == "features.28.bias" else v for k, v in vgg.items()}
    a, b = images(32)
    a.requires_grad_()
    out = LPIPS(dead)(a, b)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(a.grad).all()


def test_the_layouts_of_torchvision_and_of_the_lpips_package_are_the_same_network(
    vgg, distance, tmp_path
):
    renamed = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    for stage, places in enumerate(STAGES):
        for kind in ("weight", "bias"):
            for place in places:
                renamed[f"net.slice{stage + 1}.{place}.{kind}"] = vgg[f"features.{place}.{kind}"]
        renamed[f"lins.{stage}.model.1.weight"] = vgg[f"lin{stage}.model.1.weight"]
    torch.save(renamed, tmp_path / "lpips.pth")
    other = load_lpips(str(tmp_path / "lpips.pth"))
    for name, parameter in distance.state_dict().items():
        assert torch.equal(parameter, other.state_dict()[name])
    assert sum(p.numel() for p in other.parameters()) == 14_714_688 + 1472  # VGG16's and 5 linear


def test_weights_in_half_precision_become_float32_and_loading_draws_no_random_number(vgg):
    state = torch.get_rng_state()
    half = LPIPS({name: tensor.half() for name, tensor in vgg.items()})
    assert torch.equal(torch.get_rng_state(), state)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert not half.training


@pytest.mark.parametrize(
    ("altered", "message"),
    [
        ({"features.10.bias": None}, r"no tensor features.10.bias \(nor net.slice3.10.bias\)"),
        ({"lin2.model.1.weight": None}, "no tensor lin2.model.1.weight"),
        ({"lin0.model.1.weight": torch.zeros(64)}, r"has shape \[64\], expected \[1, 64, 1, 1\]"),
        ({"lin0.model.1.weight": -torch.ones(1, 64, 1, 1)}, "negative"),
    ],
)
def test_weights_that_are_not_those_of_lpips_are_refused_by_name(vgg, altered, message):
    wrong = {name: tensor for name, tensor in (vgg | altered).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        LPIPS(wrong)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pt", None, "FileNotFoundError"),
        ("absent.safetensors", None, "FileNotFoundError"),
        ("noise.pt", b"noise", "cannot be read"),
        ("noise.safetensors", b"noise", "cannot be read"),
        ("weights.onnx", b"noise", "must end in .safetensors, .pt or .pth"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_lpips(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"), [([1, 2], "holds a list"), ({"state_dict": 1}, "no tensor features.0")]
)
def test_a_readable_file_of_something_else_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=message):
        load_lpips(tmp_path / "other.pt")


@pytest.mark.parametrize("shape", [(1, 4, 32, 32), (2, 3, 32, 32), (3, 32, 32)])
def test_shapes_it_cannot_compare_are_refused(distance, shape):
    with pytest.raises(ValueError, match="LPIPS compares"):
        distance(torch.zeros(shape), torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="LPIPS compares"):
        distance(torch.zeros(1, 4, 32, 32), torch.zeros(1, 4, 32, 32))
