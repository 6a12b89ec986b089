"""The reference step: what it writes is what the evaluation loads, with classes and without."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file

from consistency.evaluation.domain import extract, feature_net_for
from consistency.evaluation.frechet import GaussianStats
from infra import shards, sources
from pipelines.artifacts import ReferenceStats, from_json, to_json
from pipelines.recipe import ReferenceConfig
from pipelines.steps import reference


@pytest.mark.parametrize("classes", [1, 2])
def test_the_yardstick_is_loaded_as_it_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int
) -> None:
    monkeypatch.setenv("CMFORGE_CACHE", str(tmp_path / "cache"))
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(12) % classes)
    source = sources.open_source("npz", str(tmp_path / "a.npz"), size=None, fit="crop")
    manifest = shards.write_shards(source, str(tmp_path / "shards"), num_shards=1)

    about = SimpleNamespace(num_classes=classes, manifest_sha256=manifest.sha256)
    shard: Any = SimpleNamespace(url=str(tmp_path), value=about)
    ctx: Any = SimpleNamespace(out=tmp_path)
    value = reference.run(ctx, ReferenceConfig(steps=2, batch=8), shard)

    assert (value.accuracy is None) == (classes == 1)
    assert from_json(ReferenceStats, to_json(value)) == value
    net = feature_net_for(size=8, image_channels=1, num_classes=classes)
    net.load_state_dict(load_file(tmp_path / "features.safetensors"))
    stats = GaussianStats.from_dict(load_arrays(tmp_path / "stats.safetensors"))
    assert stats.n == value.count == 12
    again = GaussianStats.from_features(extract(net, images))
    np.testing.assert_allclose(stats.mean, again.mean, atol=1e-5)
    np.testing.assert_allclose(stats.m2, again.m2, atol=1e-3)
