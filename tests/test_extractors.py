"""Extractors: the networks compute what they are known to, files are checked before they are
read, and images that are none are refused."""

import dataclasses
import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from consistency.evaluation.backbones import CifarResNet, GoogLeNet, SqueezeNet
from consistency.evaluation.dinov2 import DINOv2
from consistency.evaluation.domain import FeatureNet, extract
from consistency.evaluation.extractors import (
    BATCH,
    Extractor,
    domain_extractor,
    exact_float32,
    load_extractor,
)
from consistency.evaluation.protocol import FID_SHA256, FeatureProtocol
from consistency.evaluation.specs import SPECS
from tests.synthetic_weights import pictures, synthetic

DATA = Path(os.environ.get("CMFORGE_TEST_DATA", Path(__file__).parents[1] / "../shared/data"))
WEIGHTS = DATA / "weights"
with_weights = pytest.mark.skipif(not WEIGHTS.is_dir(), reason=f"needs networks in {WEIGHTS}")
NETWORKS = {
    "squeezenet11": SqueezeNet,
    "googlenet_bvlc": GoogLeNet,
    "resnet56_cifar10": CifarResNet,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ResNet-56 under synthetic weights: the network of the least work."""
    path = tmp_path_factory.mktemp("weights") / "resnet56.safetensors"
    save_file(synthetic(CifarResNet()), path)
    return path


@pytest.fixture(scope="module")
def resnet(small: Path) -> Extractor:
    return load_extractor("resnet56_cifar10", small)


def cifar_images(count: int) -> np.ndarray:
    """The first of the training set: the first sheet, 25 x 40 tiles."""
    sheet = np.asarray(Image.open(DATA / "cifar10" / "train_00.webp").convert("RGB"))
    tiles = sheet.reshape(25, 32, 40, 32, 3).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(-1, 32, 32, 3)[:count]


# --- what the networks compute -------------------------------------------------------------------


@with_weights
@pytest.mark.parametrize("name", NETWORKS)
def test_features_of_cifar_images_are_the_recorded_ones(name: str) -> None:
    """Made from the same weights by other code; GoogLeNet's in float32, whence its tolerance."""
    golden = json.loads((WEIGHTS / "golden_features_cifar_train0_3.json").read_text())
    known = {"squeezenet11": "squeezenet112", "googlenet_bvlc": "googlenet112"}
    expected = golden[known.get(name, "resnet56")]
    extractor = load_extractor(name, WEIGHTS / SPECS[name].file)
    pooled = extractor(cifar_images(4)).pooled
    half = name == "googlenet_bvlc"
    assert pooled.shape == tuple(expected["shape"]) == (4, SPECS[name].dim)
    rtol = 1e-3 if half else 1e-5
    np.testing.assert_allclose(np.linalg.norm(pooled, axis=1), expected["norms"], rtol=rtol)
    np.testing.assert_allclose(pooled.mean(), expected["mean"], rtol=rtol)
    np.testing.assert_allclose(pooled[0, :4], expected["first4"], atol=2e-3 if half else 2e-5)


@with_weights
@pytest.mark.parametrize(("name", "share"), [("squeezenet11", 0.938), ("googlenet_bvlc", 0.865)])
def test_a_photograph_of_a_kitten_is_a_tabby_cat(name: str, share: float) -> None:
    """Class 281 of ImageNet; pins the colour order, the mean and the classifier."""
    net = NETWORKS[name]()
    net.load_state_dict(load_file(WEIGHTS / SPECS[name].file))
    photo = torch.from_numpy(np.array(Image.open(WEIGHTS / "kitten_224.png").convert("RGB")))
    with torch.no_grad():
        logits = net(photo.permute(2, 0, 1)[None].float())[1]
    chances = logits.softmax(1)[0]
    assert int(chances.argmax()) == 281
    assert float(chances[281]) == pytest.approx(share, abs=1e-3)


@with_weights
def test_resnet_knows_cifar_and_its_logits_go_with_its_features() -> None:
    labels = np.load(DATA / "cifar10" / "labels.npy")[:64]
    extractor = load_extractor("resnet56_cifar10", WEIGHTS / SPECS["resnet56_cifar10"].file)
    features = extractor(cifar_images(64))
    assert features.logits is not None
    assert (features.logits.argmax(1) == labels).mean() > 0.95
    weights = load_file(WEIGHTS / SPECS["resnet56_cifar10"].file)
    expected = features.pooled @ weights["linear.weight"].numpy().T + weights["linear.bias"].numpy()
    np.testing.assert_allclose(features.logits, expected, atol=1e-3)


def recomputed(weights: dict[str, Tensor], x: Tensor, heads: int, depth: int) -> Tensor:
    """DINOv2's class token [B, width] from its tensors by name, head by head, patch by patch."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (x.permute(0, 2, 3, 1) / 255 - mean) / std
    side = x.shape[1] // 14
    kernel = weights["patch_embed.proj.weight"].permute(2, 3, 1, 0).flatten(0, 2)
    patches = [
        x[:, 14 * i : 14 * i + 14, 14 * j : 14 * j + 14].flatten(1) @ kernel
        for i in range(side)
        for j in range(side)
    ]
    tokens = torch.stack(patches, 1) + weights["patch_embed.proj.bias"]
    grid = weights["pos_embed"][0, 1:].view(37, 37, -1)
    # Bicubic with a = -0.75, read at 37 / (side + 0.1) per step, the border repeated.
    at = (torch.arange(side) + 0.5) * 37 / (side + 0.1) - 0.5
    mix = torch.zeros(side, 37)
    for row, place in enumerate(at.tolist()):
        for k in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            d, a = abs(place - k), -0.75
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            mix[row, min(max(k, 0), 36)] += near if d <= 1 else far
    grid = torch.einsum("ik,jl,klc->ijc", mix, mix, grid)
    first = (weights["cls_token"] + weights["pos_embed"][:, :1]).expand(len(x), -1, -1)
    t = torch.cat([first, tokens + grid.flatten(0, 1)], 1)

    def norm(t: Tensor, name: str) -> Tensor:
        centred = t - t.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return unit * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(t: Tensor, name: str) -> Tensor:
        return t @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    width = t.shape[-1]
    each = width // heads
    for n in range(depth):
        block = f"blocks.{n}"
        qkv = linear(norm(t, f"{block}.norm1"), f"{block}.attn.qkv")
        mixed = []
        for head in range(heads):
            q, k, v = (
                qkv[..., part * width + head * each : part * width + (head + 1) * each]
                for part in range(3)
            )
            mixed.append((q @ k.transpose(1, 2) / each**0.5).softmax(-1) @ v)
        t = t + weights[f"{block}.ls1.gamma"] * linear(torch.cat(mixed, -1), f"{block}.attn.proj")
        hidden = linear(norm(t, f"{block}.norm2"), f"{block}.mlp.fc1")
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        t = t + weights[f"{block}.ls2.gamma"] * linear(hidden, f"{block}.mlp.fc2")
    return norm(t, "norm")[:, 0]


def test_dinov2_follows_its_formulas() -> None:
    net = DINOv2(width=24, depth=2, heads=3).eval()
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: 0.3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in net.state_dict().items()
    }
    net.load_state_dict(weights)
    x = torch.from_numpy(pictures(2, 56, 56)).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        pooled, logits = net(x)
    assert logits is None
    torch.testing.assert_close(pooled, recomputed(weights, x, 3, 2), atol=1e-4, rtol=1e-4)
    assert (pooled[0] - pooled[1]).norm() > 0.1


def test_dinov2_has_the_published_layout() -> None:
    with torch.device("meta"):
        net = DINOv2()
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    assert sum(tensor.numel() for tensor in net.state_dict().values()) == 304_368_640
    assert shapes["pos_embed"] == (1, 1370, 1024)
    assert shapes["mask_token"] == (1, 1024)
    assert shapes["patch_embed.proj.weight"] == (1024, 3, 14, 14)
    assert shapes["blocks.23.attn.qkv.weight"] == (3072, 1024)
    assert shapes["blocks.0.mlp.fc1.bias"] == (4096,)
    assert shapes["blocks.0.ls2.gamma"] == (1024,)


# --- images in, features out ---------------------------------------------------------------------


def test_features_belong_to_their_images_whatever_the_batches(resnet: Extractor) -> None:
    images = np.random.default_rng(0).integers(0, 256, (BATCH + 3, 32, 32, 3), np.uint8)
    together = resnet(images)
    assert together.pooled.shape == (BATCH + 3, 64)
    assert together.pooled.dtype == np.float32
    assert together.logits is not None
    assert together.logits.shape == (BATCH + 3, 10)
    for index in (0, BATCH - 1, BATCH, BATCH + 2):
        alone = resnet(images[index : index + 1]).pooled[0]
        np.testing.assert_allclose(together.pooled[index], alone, rtol=1e-4, atol=1e-5)


def test_grey_images_are_those_of_three_equal_colours(resnet: Extractor) -> None:
    grey = pictures(2)[..., :1]
    np.testing.assert_array_equal(resnet(grey).pooled, resnet(grey.repeat(3, -1)).pooled)


def test_images_need_not_be_square_where_the_network_resizes(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(synthetic(SqueezeNet()), path)
    extractor = load_extractor("squeezenet11", path)
    wide = pictures(2, 20, 45)
    net = SqueezeNet()
    net.load_state_dict(synthetic(SqueezeNet()))
    x = torch.from_numpy(wide).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        expected, _ = net(F.interpolate(x, size=(112, 112), mode="bilinear"))
    np.testing.assert_allclose(extractor(wide).pooled, expected.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.zeros((2, 32, 32, 3), np.float32), "must be uint8 .* got float32"),
        (np.zeros((32, 32, 3), np.uint8), "must be uint8"),
        (np.zeros((2, 3, 32, 32), np.uint8), "must be uint8"),
        (np.zeros((2, 32, 32, 4), np.uint8), "must be uint8"),
        (np.zeros((0, 32, 32, 3), np.uint8), "at least one image"),
        (np.zeros((2, 28, 28, 3), np.uint8), "expected 32x32, got 28x28"),
    ],
)
def test_what_are_no_images_is_refused(resnet: Extractor, images: np.ndarray, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        resnet(images)


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    weights = synthetic(CifarResNet())
    weights["layer3.8.bn2.bias"][3] = float("nan")
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"resnet56_cifar10: features of images 0\.\.1 are not"):
        load_extractor("resnet56_cifar10", path)(pictures(2))


def test_autocast_and_the_process_settings_change_nothing(resnet: Extractor) -> None:
    before = resnet(pictures(2)).pooled
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            np.testing.assert_array_equal(resnet(pictures(2)).pooled, before)
            with exact_float32(torch.device("cpu")):
                assert torch.get_float32_matmul_precision() == "highest"
                assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cudnn.enabled
    finally:
        torch.set_float32_matmul_precision("highest")


def test_loading_draws_no_random_numbers_and_leaves_nothing_to_train(small: Path) -> None:
    state = torch.get_rng_state()
    load_extractor("resnet56_cifar10", small)(pictures(1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_domain_extractor_is_extract(channels: int) -> None:
    net = FeatureNet(
        size=8,
        image_channels=channels,
        num_classes=5,
        generator=torch.Generator().manual_seed(0),
    )
    images = np.random.default_rng(0).integers(0, 256, (700, 8, 8, channels), np.uint8)
    extractor = domain_extractor(net, "ab" * 32, "cpu")
    features = extractor(images)
    np.testing.assert_array_equal(features.pooled, extract(net, images))
    assert features.logits is not None
    assert features.logits.shape == (700, 5)
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        np.testing.assert_allclose(features.logits, net(pixels).numpy(), rtol=1e-4, atol=1e-5)
    assert extractor.protocol == FeatureProtocol(
        extractor="domain",
        weights_sha256="ab" * 32,
        layer="hidden",
        dim=64,
        resize="none",
        size=8,
        channels="native",
    )
    with pytest.raises(ValueError, match="domain"):
        extractor(images[:, :7])
    with pytest.raises(ValueError, match="domain"):
        extractor(images.repeat(3, -1)[..., : 4 - channels])


# --- files ---------------------------------------------------------------------------------------


def test_the_protocol_tells_the_file(small: Path, resnet: Extractor) -> None:
    spec = SPECS["resnet56_cifar10"]
    assert resnet.protocol == FeatureProtocol(
        extractor=spec.name,
        weights_sha256=hashlib.sha256(small.read_bytes()).hexdigest(),
        layer=spec.layer,
        dim=spec.dim,
        resize=spec.resize,
        size=spec.size,
    )
    assert resnet.protocol.metric == "fd_resnet56_cifar10"


def test_the_pinned_network_is_the_fid_of_the_protocol() -> None:
    spec = SPECS["inception_fid"]
    protocol = FeatureProtocol(
        extractor=spec.name,
        weights_sha256=FID_SHA256,
        layer=spec.layer,
        dim=spec.dim,
        resize=spec.resize,
        size=spec.size,
    )
    assert spec.sha256 == FID_SHA256
    assert protocol.metric == "fid"


def test_a_pinned_hash_is_asked_of_any_network(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, size = hashlib.sha256(small.read_bytes()).hexdigest(), small.stat().st_size
    pinned = dataclasses.replace(SPECS["resnet56_cifar10"], sha256=digest, bytes=size)
    monkeypatch.setitem(SPECS, "resnet56_cifar10", pinned)
    assert load_extractor("resnet56_cifar10", small).protocol.extractor == "resnet56_cifar10"
    monkeypatch.setitem(SPECS, "resnet56_cifar10", dataclasses.replace(pinned, sha256="0" * 64))
    with pytest.raises(ValueError, match="not the weights of resnet56_cifar10"):
        load_extractor("resnet56_cifar10", small)


def test_torch_files_and_half_precision_are_read_as_float32(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    weights = load_file(small)
    counters = {"bn1.num_batches_tracked": torch.tensor(7)}  # of training; some files keep them
    torch.save({name: tensor.half() for name, tensor in weights.items()} | counters, path)
    half = load_extractor("resnet56_cifar10", path)(pictures(2)).pooled
    full = load_extractor("resnet56_cifar10", small)(pictures(2)).pooled
    assert half.dtype == np.float32
    assert np.abs(half - full).max() > 0
    np.testing.assert_allclose(half, full, rtol=0.05, atol=0.05)


class Hostile:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.mark}",)


def spoilt(weights: dict[str, Tensor], how: str, tmp_path: Path) -> Path:
    """A file of the weights with something wrong."""
    path = tmp_path / "w.safetensors"
    if how == "missing":
        del weights["linear.bias"]
    elif how == "shape":
        weights["linear.bias"] = torch.zeros(11)
    elif how == "extra":
        weights["linear.more"] = torch.zeros(1)
    save_file(weights, path)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:5_000])
    elif how == "list":
        path = tmp_path / "w.pth"
        torch.save([torch.zeros(1)], path)
    elif how == "pickle":
        path = tmp_path / "w.pth"
        torch.save({"linear.bias": Hostile(tmp_path / "mark")}, path)
    return path


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "no tensor linear.bias"),
        ("shape", r"linear.bias has shape \[11\], expected \[10\]"),
        ("extra", "tensor linear.more has no place"),
        ("cut", "cannot be read"),
        ("list", "holds other things than tensors"),
        ("pickle", "cannot be read"),
    ],
)
def test_a_file_of_something_else_is_refused_in_one_line(
    small: Path, tmp_path: Path, how: str, said: str
) -> None:
    path = spoilt(load_file(small), how, tmp_path)
    with pytest.raises(ValueError, match=said) as error:
        load_extractor("resnet56_cifar10", path)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "mark").exists()


# --- a network of the user's own -----------------------------------------------------------------


class Means(nn.Module):
    """Mean and contrast of each colour: 6 numbers."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32)
        return torch.cat([y.mean((2, 3)), y.std((2, 3))], 1)


class Detector(nn.Module):
    """As StyleGAN's: probabilities unless asked for features."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        y = x.to(torch.float32).mean((2, 3))
        return y if return_features else y.softmax(1)[:, :2]


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float32).mean((1, 2, 3))


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float32).view(-1, 7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestPrograms:
    def scripted(self, net: nn.Module, path: Path) -> Path:
        torch.jit.script(net).save(str(path))
        return path

    def test_a_program_gets_the_pixels_and_its_output_is_the_features(self, tmp_path: Path) -> None:
        path = self.scripted(Means(), tmp_path / "my-own net.v2.pt")
        extractor = load_extractor("file", path)
        assert extractor.protocol == FeatureProtocol(
            extractor="my_own_net_v2",
            weights_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            layer="output",
            dim=6,
            resize="own",
            size=0,
        )
        assert extractor.protocol.metric == "fd_my_own_net_v2"
        images = pictures(BATCH + 1, 17, 9)
        features = extractor(images)
        assert features.logits is None
        np.testing.assert_allclose(features.pooled[:, :3], images.mean((1, 2)), rtol=1e-5)
        assert extractor(images[..., :1]).pooled.shape == (BATCH + 1, 6)

    def test_a_detector_is_asked_for_features_not_for_classes(self, tmp_path: Path) -> None:
        extractor = load_extractor("file", self.scripted(Detector(), tmp_path / "detector.pt"))
        assert (extractor.protocol.dim, extractor.protocol.layer) == (3, "features")
        images = pictures(2)
        np.testing.assert_allclose(extractor(images).pooled, images.mean((1, 2)), rtol=1e-5)

    @pytest.mark.parametrize(
        ("net", "said"),
        [(Flat(), r"must return float \[B, D\] .* got \[2\]"), (Broken(), "fails on uint8")],
    )
    def test_a_program_of_another_kind_is_refused(
        self, net: nn.Module, said: str, tmp_path: Path
    ) -> None:
        path = self.scripted(net, tmp_path / "own.pt")
        with pytest.raises(ValueError, match=said) as error:
            load_extractor("file", path)
        assert str(error.value).startswith(f"{path}: ")
        assert len(str(error.value).splitlines()) == 1

    @pytest.mark.parametrize("name", ["domain", "inception-fid", "--"])
    def test_a_program_may_not_take_the_name_of_another_network(
        self, name: str, tmp_path: Path
    ) -> None:
        path = self.scripted(Means(), tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match="rename it"):
            load_extractor("file", path)

    @pytest.mark.parametrize("entry", ["data.pkl", "constants.pkl"])
    def test_a_pickle_hidden_in_a_program_is_not_run(self, entry: str, tmp_path: Path) -> None:
        good = self.scripted(Means(), tmp_path / "good.pt")
        path, mark = tmp_path / "bad.pt", tmp_path / "mark"
        with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, "w") as new:
            assert any(item.endswith(entry) for item in old.namelist())
            for item in old.namelist():
                hostile = pickle.dumps(Hostile(mark), protocol=2)
                new.writestr(item, hostile if item.endswith(entry) else old.read(item))
        with pytest.raises(ValueError, match="not a TorchScript file"):
            load_extractor("file", path)
        assert not mark.exists()

    def test_a_state_dict_is_not_a_program(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.pt"
        torch.save(synthetic(CifarResNet()), path)
        with pytest.raises(ValueError, match="not a TorchScript file"):
            load_extractor("file", path)


class TestExported:
    """Exported programs (.pt2): what they compute, and what in them is never run."""

    @pytest.fixture(scope="class")
    @staticmethod
    def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("pt2") / "own.pt2"
        example = (torch.zeros(2, 3, 12, 12, dtype=torch.uint8),)
        sizes = ({0: torch.export.Dim("B")},)
        torch.export.save(torch.export.export(Net(), example, dynamic_shapes=sizes), path)
        return path

    @staticmethod
    def changed(good: Path, path: Path, part: str, change: Callable[[bytes], bytes]) -> Path:
        """The same archive with one part another, or one more."""
        with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, "w") as new:
            found = [name for name in old.namelist() if name.endswith(part)]
            for name in old.namelist():
                data = old.read(name)
                new.writestr(name, change(data) if name in found else data)
            if not found:
                new.writestr(f"own/{part}", change(b""))
        return path

    def test_its_features_are_the_networks(self, good: Path) -> None:
        extractor = load_extractor("file", good)
        assert (extractor.protocol.metric, extractor.protocol.dim) == ("fd_own", 5)
        images = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3), np.uint8)
        with torch.no_grad():
            expected = Net()(torch.from_numpy(images).permute(0, 3, 1, 2))
        np.testing.assert_allclose(extractor(images).pooled, expected.numpy(), rtol=1e-4)

    def test_another_size_than_it_was_exported_for_is_named(self, good: Path) -> None:
        extractor = load_extractor("file", good)
        with pytest.raises(ValueError, match=r"fails on uint8 \[1, 3, 9, 9\]"):
            extractor(np.zeros((1, 9, 9, 3), np.uint8))

    @pytest.mark.parametrize(
        ("part", "said"),
        [
            ("data/sample_inputs/model.pt", "sample inputs are more than tensors"),
            ("data/constants/custom_obj_0", "custom_obj_0, which is not part of a plain"),
            ("data/aotinductor/model/x.so", "which is not part of a plain"),
        ],
    )
    def test_a_pickle_or_a_binary_is_not_run(
        self, good: Path, tmp_path: Path, part: str, said: str
    ) -> None:
        mark = tmp_path / "mark"
        hostile = pickle.dumps(Hostile(mark), protocol=2)
        path = self.changed(good, tmp_path / "bad.pt2", part, lambda _: hostile)
        with pytest.raises(ValueError, match=said):
            load_extractor("file", path)
        assert not mark.exists()

    @pytest.mark.parametrize(
        ("part", "old", "new", "said"),
        [
            ("weights_config.json", '"use_pickle": false', '"use_pickle": true', "is pickled"),
            ("model.json", "torch.ops.aten.mean.dim", "torch.hub.load", "no ATen operator"),
            ("model.json", "torch.ops.aten.mean.dim", "os.system", "no ATen operator"),
            ("model.json", '"guards_code": []', '"guards_code": ["exit()"]', "guards in Python"),
            ("model.json", "Symbol('", "__import__('os').system('", "not arithmetic"),
            ("model.json", "Symbol('", "open('", "not arithmetic"),
        ],
    )
    def test_what_would_be_evaluated_is_refused(
        self, good: Path, tmp_path: Path, part: str, old: str, new: str, said: str
    ) -> None:
        def change(data: bytes) -> bytes:
            assert old.encode() in data
            return data.replace(old.encode(), new.encode())

        path = self.changed(good, tmp_path / "bad.pt2", part, change)
        with pytest.raises(ValueError, match=said) as error:
            load_extractor("file", path)
        assert str(error.value).startswith(f"{path}: ")
        assert len(str(error.value).splitlines()) == 1

    @pytest.mark.parametrize("data", [b"anything", b"PK\x05\x06" + bytes(18)])
    def test_another_file_is_no_exported_program(self, data: bytes, tmp_path: Path) -> None:
        path = tmp_path / "net.pt2"
        path.write_bytes(data)
        with pytest.raises(ValueError, match="not an exported program"):
            load_extractor("file", path)


class Net(torch.nn.Module):
    """A convolution and a mean, with weights of their own."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
        self.register_buffer("weight", weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x.float(), self.weight).mean((2, 3))
