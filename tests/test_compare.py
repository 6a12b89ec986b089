"""`cmforge compare`: two models, one protocol, one noise."""

import hashlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from consistency import published
from consistency.config import NetworkConfig, NoiseConfig
from consistency.evaluation.domain import feature_net_for
from consistency.evaluation.frechet import GaussianStats
from infra import tracking
from infra.errors import UserError
from pipelines import compare, models
from pipelines.config import load_recipe
from pipelines.yardstick import FeatureNetwork, Yardstick
from tests.scores import DOMAIN, reference

ABOUT = published.ModelDescription(
    kind="consistency",
    network=NetworkConfig(
        channels=4, channel_mult=(1,), num_blocks=1, attention=(), class_conditional=True
    ),
    noise=NoiseConfig(),
    size=8,
    channels=1,
    class_names=("a", "b"),
)
RECIPE = load_recipe("quickstart", ["evaluate.samples=80", "evaluate.seed_blocks=2"])


def model(folder: Path, seed: int, about: published.ModelDescription = ABOUT) -> str:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in published.build_network(about).state_dict().items()
    }
    folder.mkdir()
    save_file(weights, folder / "weights.safetensors")
    (folder / "config.json").write_text(about.to_json())
    return str(folder)


@pytest.fixture
def yardstick(tmp_path: Path) -> Yardstick:
    """Real images that are the samples of model 1, with other noise than is compared with."""
    net = feature_net_for(
        size=8, image_channels=1, num_classes=2, generator=torch.Generator().manual_seed(1)
    )
    save_file(net.state_dict(), tmp_path / "features.safetensors")
    sha256 = hashlib.sha256((tmp_path / "features.safetensors").read_bytes()).hexdigest()
    network = FeatureNetwork(
        name="domain",
        url=str(tmp_path / "features.safetensors"),
        sha256=sha256,
        size=8,
        channels=1,
        num_classes=2,
    )
    one = published.load(Path(model(tmp_path / "one", 1)))
    real = one.generate(range(10_000, 10_400), steps=1, seed=0)
    stats = GaussianStats.from_features(network.load("cpu")(real).pooled).gaussian
    arrays = {
        "n": np.asarray(400, np.int64),
        "mean": stats.mean,
        "covariance": stats.covariance,
    }
    save_arrays(arrays, tmp_path / "stats.safetensors")
    value = reference(
        replace(DOMAIN, weights_sha256=sha256), total_variance=float(stats.covariance.trace())
    )
    return Yardstick(network=network, reference=value, url=str(tmp_path))


def show(yardstick: Yardstick, home: Path, *names: str, **asked: Any) -> Path:
    out = home / "pictures" / "compare.png"
    places = {"workspace": str(home), "tracking_uri": "", "samples": None, **asked}
    compare.show(names, RECIPE, yardstick, out=out, **places)
    return out


def test_the_better_one_is_named_with_the_margin(
    yardstick: Yardstick, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = model(tmp_path / "other", 2)
    show(yardstick, tmp_path, other, str(tmp_path / "one"))
    said = capsys.readouterr().out
    assert f"A  {other}\nB  {tmp_path / 'one'}\n" in said
    first, second = said.split("fd_domain_80, ")[1:]
    assert first.startswith("1 step\n")
    assert second.startswith("2 steps\n")
    assert "B is lower by" in first
    assert "more than the margin of" in first
    assert first.count("in the right class") == 2
    assert "fd_domain is not FID" in said


def test_a_model_is_no_better_than_itself(
    yardstick: Yardstick, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = str(tmp_path / "one")
    out = show(yardstick, tmp_path, one, one, samples=70)
    said = capsys.readouterr().out
    assert said.count("apart by 0.00 %, within the margin of") == 2
    assert "fd_domain_70, 1 step" in said
    with Image.open(io.BytesIO(out.read_bytes())) as image:
        sheet = np.asarray(image)
    tall = (len(sheet) + 1) // 4  # four rows of tiles, a line between them
    rows = [sheet[tall * n : tall * (n + 1) - 1] for n in range(4)]
    assert np.array_equal(rows[0], rows[1])  # A and B in one step
    assert np.array_equal(rows[2], rows[3])
    assert not np.array_equal(rows[0], rows[2])


def test_a_model_of_other_images_is_refused_before_anything_is_drawn(
    yardstick: Yardstick, tmp_path: Path
) -> None:
    large = model(tmp_path / "large", 3, replace(ABOUT, size=16))
    with pytest.raises(UserError, match=r"16 pixels and 1 channels, the workspace's data have 8"):
        show(yardstick, tmp_path, str(tmp_path / "one"), large)
    with pytest.raises(UserError, match="nowhere: no such model"):
        show(yardstick, tmp_path, str(tmp_path / "one"), "nowhere")


def test_a_registered_model_is_sampled_as_it_is_served(
    yardstick: Yardstick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own second level, not the recipe's: that is what a service gets."""
    served = replace(ABOUT, mid_sigma=5.0)

    def download(uri: str, name: str, folder: Path) -> Path:
        place = folder / "model" / "artifacts"
        place.mkdir(parents=True)
        weights = published.load(tmp_path / "one").function.net.state_dict()
        torch.save(dict(weights), place / "weights.pt")
        (place / "config.json").write_text(served.to_json())
        return folder / "model"

    monkeypatch.setattr(tracking, "download_model", download)
    with models.located("models:/m@champion", "", "") as (folder, about):
        subject = compare._subject("models:/m@champion", folder, about, RECIPE, yardstick)
        assert published.ModelDescription.from_json(subject.description) == served
        drawn = subject.load("cpu").generate(range(5), steps=2, seed=3)
    own = published.build(served, published.load(tmp_path / "one").function.net.state_dict())
    np.testing.assert_array_equal(drawn, own.generate(range(5), steps=2, seed=3))

    monkeypatch.setattr(tracking, "download_model", lambda uri, name, folder: folder)
    with pytest.raises(UserError, match="not a model that cmforge registered"):
        models.load("models:/m/1", "", "")
