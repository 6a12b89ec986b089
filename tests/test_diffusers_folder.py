"""Models go to diffusers and come back: the same images there, the same bits here."""

import pytest
import torch
from diffusers import ConsistencyModelPipeline
from diffusers.pipelines.consistency_models import pipeline_consistency_models as pipeline_module
from diffusers.schedulers import scheduling_consistency_models as scheduler_module

from consistency import sampling
from pipelines import diffusers_folder
from tests.foreign_models import EVERY, model_of, weights_of

BOUND = 1e-4


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """diffusers copies code that it runs to a cache."""
    for module in ("diffusers.utils.constants", "diffusers.utils.dynamic_modules_utils"):
        monkeypatch.setattr(f"{module}.HF_MODULES_CACHE", str(tmp_path / "modules"))


def written(tmp_path, name, **changes):
    description = EVERY[name](**changes)
    folder = tmp_path / "model"
    folder.mkdir()
    custom = diffusers_folder.write_folder(folder, description, weights_of(description))
    return folder, description, custom


def drawn(monkeypatch, folder, noise, custom, **call):
    """Images [B, C, H, W] in [0, 1] of the pipeline, every draw of it ours."""
    draws = iter(range(100))

    def ours(shape, **_):
        return noise(next(draws))

    monkeypatch.setattr(pipeline_module, "randn_tensor", ours)
    monkeypatch.setattr(scheduler_module, "randn_tensor", ours)
    more = {"trust_remote_code": True} if custom else {}
    pipe = ConsistencyModelPipeline.from_pretrained(folder, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe, pipe(batch_size=4, output_type="pt", **call).images


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("name", EVERY)
def test_the_pipeline_draws_what_we_draw(tmp_path, monkeypatch, name, conditional):
    folder, description, custom = written(tmp_path, name, conditional=conditional)
    assert custom == ("native" not in name)
    model = model_of(description)
    shape = (description.channels, description.size, description.size)

    def noise(draw):
        return sampling.sample_noise(3, range(4), shape, draw)

    labels = torch.tensor([0, 2, 1, 1]) if conditional else None
    label = {"class_labels": labels} if conditional else {}
    rows = {row["steps"]: row for row in diffusers_folder.sampling(description)}
    calls = [
        ({"num_inference_steps": 1}, [80.0]),
        ({"num_inference_steps": None, "timesteps": rows[2]["timesteps"]}, rows[2]["sigmas"]),
        ({"num_inference_steps": None, "timesteps": rows[4]["timesteps"]}, rows[4]["sigmas"]),
    ]
    if description.boundary > 0:
        calls.append(({"num_inference_steps": 4}, description.sigmas(4)))
    for call, sigmas in calls:
        _, images = drawn(monkeypatch, folder, noise, custom, **call, **label)
        ours = sampling.sample_multistep(
            model.function, noise, [80.0, *sigmas[1:]], labels, sigma_min=description.boundary
        )
        worst = float((images - (ours / 2 + 0.5)).abs().max())
        print(name, conditional, call, sigmas[:4], worst)
        assert worst <= BOUND
