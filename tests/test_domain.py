"""The small classifier behind the toy metrics: it learns, repeats itself, and refuses nonsense."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from consistency.evaluation.domain import (
    FeatureNet,
    accuracy,
    extract,
    feature_net_for,
    train_feature_net,
)

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


@pytest.fixture(scope="module")
def digits() -> tuple[Images, Labels]:
    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
    return images, data.target.astype(np.int64)


def noise(count: int, size: int, channels: int) -> Images:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, channels), np.uint8)


def weights(net: FeatureNet) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_digits_are_learned_and_the_features_tell_the_classes_apart(
    digits: tuple[Images, Labels],
) -> None:
    images, labels = digits
    net = train_feature_net(images, labels, 10, steps=100, seed=0)
    assert accuracy(net, images, labels) > 0.97
    wrong = (labels + 1) % 10
    assert accuracy(net, images, wrong) < 0.03

    features = extract(net, images)
    assert features.shape == (1797, 64)
    assert features.dtype == np.float32
    means = np.stack([features[labels == k].mean(0) for k in range(10)])
    nearest = ((features[:, None] - means) ** 2).sum(-1).argmin(1)
    assert (nearest == labels).mean() > 0.95


def test_without_classes_the_task_is_to_tell_rotations(digits: tuple[Images, Labels]) -> None:
    images = digits[0][:600]
    net = train_feature_net(images, np.full(600, -1), 0, steps=60, seed=0)
    turned = np.concatenate([np.rot90(images, k, (1, 2)) for k in range(4)])
    assert accuracy(net, turned, np.repeat(np.arange(4), 600)) > 0.7


def test_the_seed_alone_decides_the_network(digits: tuple[Images, Labels]) -> None:
    images, labels = digits[0][:200], digits[1][:200]
    before = torch.get_rng_state()
    first = train_feature_net(images, labels, 10, steps=5, batch=64, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        second = train_feature_net(images, labels, 10, steps=5, batch=64, seed=3)
    other = train_feature_net(images, labels, 10, steps=5, batch=64, seed=4)
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(other))


@pytest.mark.parametrize("num_classes", [0, 1])
def test_the_rotation_task_ignores_labels(digits: tuple[Images, Labels], num_classes: int) -> None:
    images, labels = digits[0][:100], digits[1][:100]
    nets = [
        train_feature_net(images, y, num_classes, steps=3, batch=16, seed=0)
        for y in (labels, labels * 0 - 1)
    ]
    assert nets[0].num_classes == 4
    assert torch.equal(weights(nets[0]), weights(nets[1]))


@pytest.mark.parametrize("num_classes", [0, 1, 2, 10])
def test_what_was_trained_is_loaded_into_the_net_for_the_same_data(num_classes: int) -> None:
    images, labels = noise(8, 8, 1), np.arange(8) % max(num_classes, 1)
    trained = train_feature_net(images, labels, num_classes, steps=1, batch=4, seed=0)
    again = feature_net_for(size=8, image_channels=1, num_classes=num_classes)
    again.load_state_dict(trained.state_dict())
    assert np.array_equal(extract(again, images), extract(trained, images))


def test_full_batches_learn_a_class_of_a_single_image() -> None:
    """An epoch is a permutation, so a batch of everything holds image 7 at every step."""
    images = noise(32, 8, 1)
    labels = (np.arange(32) == 7).astype(np.int64)
    net = train_feature_net(images, labels, 2, steps=60, batch=32, seed=0)
    assert accuracy(net, images, labels) == 1.0


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_features_do_not_depend_on_the_batch_size(batch: int) -> None:
    net = FeatureNet(
        size=8, image_channels=3, num_classes=4, generator=torch.Generator().manual_seed(0)
    )
    images = noise(20, 8, 3)
    np.testing.assert_allclose(extract(net, images, batch), extract(net, images), atol=1e-4)


@pytest.mark.parametrize(
    ("size", "channels", "layers"), [(4, 1, 3), (8, 1, 3), (28, 1, 3), (32, 3, 3), (64, 3, 4)]
)
def test_every_size_ends_in_64_features_from_a_4x4_map(
    size: int, channels: int, layers: int
) -> None:
    net = FeatureNet(
        size=size,
        image_channels=channels,
        num_classes=5,
        generator=torch.Generator().manual_seed(0),
    )
    assert len(net.convs) == layers
    assert net.hidden.in_features == 64 * 4 * 4
    features = extract(net, noise(3, size, channels))
    assert features.shape == (3, 64)
    assert np.ptp(features, axis=0).max() > 0


def test_features_see_colour() -> None:
    net = FeatureNet(
        size=8, image_channels=3, num_classes=2, generator=torch.Generator().manual_seed(0)
    )
    images = noise(4, 8, 3)
    assert np.abs(extract(net, images) - extract(net, images[..., ::-1])).max() > 1e-2


def test_misfits_are_refused() -> None:
    net = FeatureNet(size=8, image_channels=1, num_classes=2)
    images, labels = noise(4, 8, 1), np.array([0, 1, 0, 1])
    with pytest.raises(ValueError, match=r"expected uint8 \[N, 8, 8, 1\], got uint8 \[4, 9, 9, 1"):
        extract(net, noise(4, 9, 1))
    with pytest.raises(ValueError, match="got float64"):
        extract(net, images / 255)
    with pytest.raises(ValueError, match=r"labels: expected 0\.\.1, got -1\.\.1"):
        accuracy(net, images, np.array([0, 1, -1, 1]))
    with pytest.raises(ValueError, match="labels: expected one for each of 4"):
        accuracy(net, images, labels[:3])
    with pytest.raises(ValueError, match=r"labels: expected 0\.\.1, got 0\.\.2"):
        train_feature_net(images, labels * 2, 2, steps=1, seed=0)
    with pytest.raises(ValueError, match="0 images"):
        train_feature_net(images[:0], labels[:0], 2, steps=1, seed=0)
    with pytest.raises(ValueError, match="size: at least 4"):
        FeatureNet(size=3, image_channels=1, num_classes=2)
