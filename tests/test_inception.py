"""The FID network: its tensors, its numbers under synthetic weights, and, where torch-fidelity
or the real weights are at hand, equality with them.

torch-fidelity: `pip install torch-fidelity`; the real weights: CMFORGE_INCEPTION_WEIGHTS.
"""

import hashlib
import os
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from consistency.evaluation.extractors import load_extractor
from consistency.evaluation.frechet import GaussianStats, frechet_distance
from consistency.evaluation.inception import InceptionV3
from consistency.evaluation.protocol import FID_SHA256
from consistency.evaluation.resize import tf1_bilinear
from consistency.evaluation.specs import SPECS
from infra.sources import open_source
from tests.synthetic_weights import pictures, synthetic

DATA = Path(os.environ.get("CMFORGE_TEST_DATA", Path(__file__).parents[1] / "../shared/data"))
# Of two pictures under synthetic weights, from the network that equals torch-fidelity's to the bit.
POOL3 = [
    [0.53466541, 5.61566401, 2.86452770, 13.09697914],
    [0.37834516, 5.08482075, 2.78465462, 12.99759483],
]
POOL3_NORMS = [236.624878, 232.904846]
LOGIT_NORMS = [231.992462, 228.254044]


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return synthetic(InceptionV3())


@pytest.fixture(scope="module")
def file(weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights, path)
    return path


def exact(weights: dict[str, torch.Tensor]) -> InceptionV3:
    net = InceptionV3().eval().requires_grad_(False)
    net.load_state_dict(weights)
    return net


def as_input(images_u8: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images_u8).permute(0, 3, 1, 2)


def test_its_tensors_are_the_published_files(weights: dict[str, torch.Tensor]) -> None:
    assert len(weights) == 472
    assert sum(tensor.numel() for tensor in weights.values()) == 23_885_392
    shapes = "\n".join(f"{name} {list(weights[name].shape)}" for name in sorted(weights))
    assert hashlib.sha256(shapes.encode()).hexdigest()[:16] == "bd04e829988dd22d"


def test_golden_features_under_synthetic_weights(weights: dict[str, torch.Tensor]) -> None:
    net = exact(weights)
    pool3, logits = net(tf1_bilinear(as_input(pictures(2)).float(), 299))
    assert (pool3.shape, logits.shape) == ((2, 2048), (2, 1008))
    np.testing.assert_allclose(pool3[:, :4].numpy(), POOL3, rtol=1e-4)
    np.testing.assert_allclose(pool3.norm(dim=1).numpy(), POOL3_NORMS, rtol=1e-4)
    np.testing.assert_allclose(logits.norm(dim=1).numpy(), LOGIT_NORMS, rtol=1e-4)


def test_the_extractor_is_the_same_network_folded(
    weights: dict[str, torch.Tensor], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_to_all = replace(SPECS["inception_fid"], sha256=None, bytes=None)
    monkeypatch.setitem(SPECS, "inception_fid", open_to_all)
    extractor = load_extractor("inception_fid", file)
    assert extractor.protocol.metric == "fd_inception_fid"  # not "fid": these are other weights
    features = extractor(pictures(2))
    assert features.logits is not None
    np.testing.assert_allclose(features.pooled[:, :4], POOL3, rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(features.logits, axis=1), LOGIT_NORMS, rtol=1e-4)


def test_other_weights_are_refused_with_both_hashes(file: Path) -> None:
    with pytest.raises(ValueError, match="not the weights of inception_fid") as error:
        load_extractor("inception_fid", file)
    text = str(error.value)
    assert text.startswith(str(file))
    assert FID_SHA256 in text
    assert hashlib.sha256(file.read_bytes()).hexdigest() in text
    assert len(text.splitlines()) == 1


def test_the_average_leaves_the_padding_out_and_the_last_block_takes_the_maximum() -> None:
    with torch.device("meta"):
        net = InceptionV3()
    spot = torch.zeros(1, 1, 8, 8)
    spot[..., 0, 0] = 1
    assert net.Mixed_7b.pool(spot)[0, 0, :2, :2].flatten().tolist() == pytest.approx(
        [1 / 4, 1 / 6, 1 / 6, 1 / 9]
    )
    assert net.Mixed_7c.pool(spot).sum() == 4


# --- with torch-fidelity -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch_fidelity():
    """The oracle. torchvision's wheel for CUDA does not import beside a CPU torch for want of two
    operators that nobody calls here; declaring them is enough."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pytest.skip("torchvision is not installed, nor torch-fidelity therefore")
    except RuntimeError:
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")


def test_equal_to_torch_fidelity_to_the_bit(
    torch_fidelity, weights: dict[str, torch.Tensor], file: Path
) -> None:
    theirs = torch_fidelity.FeatureExtractorInceptionV3(
        "oracle", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file)
    )
    ours = exact(weights)
    for images in (pictures(4), pictures(1, 45, 20), pictures(1, 400, 512)):
        pixels = as_input(images).contiguous()
        pool3, logits = ours(tf1_bilinear(pixels.float(), 299))
        expected_pool3, expected_logits = theirs(pixels)
        assert torch.equal(pool3, expected_pool3)
        assert torch.equal(logits, expected_logits)


def test_resize_equal_to_torch_fidelity_to_the_bit(torch_fidelity) -> None:
    like = torch_fidelity.interpolate_bilinear_2d_like_tensorflow1x
    for height, width in ((32, 32), (28, 28), (17, 45), (299, 299), (600, 512)):
        x = as_input(np.random.default_rng(0).integers(0, 256, (2, height, width, 3))).float()
        expected = like(x, size=(299, 299), align_corners=False)
        assert torch.equal(tf1_bilinear(x, 299), expected)


# --- with the real weights -----------------------------------------------------------------------


@pytest.mark.needs_weights
def test_with_the_real_weights_cifar10_has_its_known_fid() -> None:
    """Train against test is 3.0..3.3 where all of test is at hand; else two thousand images of
    train against two thousand others, whose distance is bias and no more than that."""
    path = os.environ.get("CMFORGE_INCEPTION_WEIGHTS")
    if path is None:
        pytest.skip("needs the FID network's weights: set CMFORGE_INCEPTION_WEIGHTS to the file")
    if not (DATA / "cifar10").is_dir():
        pytest.skip(f"needs CIFAR-10 in {DATA / 'cifar10'}")
    extractor = load_extractor("inception_fid", Path(path))
    assert extractor.protocol.metric == "fid"
    assert extractor.protocol.weights_sha256 == FID_SHA256

    def statistics(split: str, start: int = 0, stop: int | None = None) -> GaussianStats:
        source = open_source(
            "sheets", str(DATA / "cifar10"), size=None, fit="crop", split=split, limit=stop
        )
        images = np.stack([image for image, _ in source.samples()])[start:]
        return GaussianStats.from_features(extractor(images).pooled)

    test = statistics("test")
    if test.n == 10_000:
        assert 3.0 < frechet_distance(statistics("train"), test) < 3.3
    else:
        halves = statistics("train", 0, 2_000), statistics("train", 2_000, 4_000)
        # About 30 at 2,000 against all of test; twice as much when both sides are as small.
        assert 20 < frechet_distance(*halves) < 90
