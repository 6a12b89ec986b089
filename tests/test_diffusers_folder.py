"""Models go to diffusers and come back: the same images there, the same bits here."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import ConsistencyModelPipeline
from diffusers.pipelines.consistency_models import pipeline_consistency_models as pipeline_module
from diffusers.schedulers import scheduling_consistency_models as scheduler_module

from consistency import sampling
from consistency.foreign.diffusers_levels import Levels
from infra.errors import UserError
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
    folder.mkdir(parents=True)
    custom = diffusers_folder.write_folder(folder, description, weights_of(description))
    return folder, description, custom


def drawn(monkeypatch, folder, noise, custom, **call):
    """Images [B, C, H, W] in [0, 1] of the pipeline, every draw of it ours."""
    draws = iter(range(100))

    def ours(shape, **_):
        return noise(next(draws))  # of this and of later calls

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
    rows = {row["steps"]: row["timesteps"] for row in diffusers_folder.sampling(description)}
    calls = [
        (1, {"num_inference_steps": 1}),
        (2, {"num_inference_steps": None, "timesteps": rows[2]}),
        (4, {"num_inference_steps": None, "timesteps": rows[4]}),
    ]
    if description.boundary > 0:
        calls.append((4, {"num_inference_steps": 4}))
    for steps, call in calls:
        _, images = drawn(monkeypatch, folder, noise, custom, **call, **label)
        ours = sampling.sample_multistep(
            model.function,
            noise,
            description.sigmas(steps),
            labels,
            sigma_min=description.boundary,
        )
        worst = float((images - (ours / 2 + 0.5)).abs().max())
        assert worst <= BOUND


def test_published_timesteps_of_an_imported_model(tmp_path, monkeypatch):
    """[22, 0] of 40 levels, as in the examples of diffusers."""
    second = Levels(40, 0.002, 80.0, 7.0).middle
    folder, description, custom = written(tmp_path, "adm-native", mid_sigma=second)
    model = model_of(description)

    def noise(draw):
        return sampling.sample_noise(5, range(4), (3, 16, 16), draw)

    labels = torch.tensor([2, 1, 0, 1])
    call = {"num_inference_steps": None, "timesteps": [22, 0], "class_labels": labels}
    pipe, images = drawn(monkeypatch, folder, noise, custom, **call)
    assert pipe.scheduler.config.num_train_timesteps == 40
    ours = sampling.sample_multistep(model.function, noise, description.sigmas(2), labels)
    torch.testing.assert_close(images, ours / 2 + 0.5, atol=BOUND, rtol=0)


def test_a_model_that_knows_high_levels_only_says_so(tmp_path, monkeypatch):
    folder, description, custom = written(tmp_path, "adm-native", lowest_sigma=0.5, mid_sigma=0.5)
    assert custom
    labels = {"class_labels": torch.tensor([0, 1, 2, 0])}
    noise = torch.zeros(4, 3, 16, 16)
    row = diffusers_folder.sampling(description)[1]
    call = {"num_inference_steps": None, "timesteps": row["timesteps"]}
    drawn(monkeypatch, folder, lambda _: noise, custom, **call, **labels)
    with pytest.raises(ValueError, match="no noise level below"):
        drawn(monkeypatch, folder, lambda _: noise, custom, num_inference_steps=40, **labels)


CONSUMER = """
import sys
sys.path[:0] = [{site!r}]  # without the .pth files that lead to cmforge
from importlib.util import find_spec
assert not any(find_spec(name) for name in ("consistency", "infra"))
import torch
from diffusers import ConsistencyModelPipeline
pipe = ConsistencyModelPipeline.from_pretrained({folder!r}, trust_remote_code=True)
images = pipe(
    batch_size=2, class_labels=[0, 2], generator=torch.Generator().manual_seed(0), output_type="np"
).images
print(images.shape, images.dtype, bool((images > 0).any() and (images < 1).any()))
"""


def test_a_folder_with_code_of_its_own_needs_no_cmforge(tmp_path):
    folder, _, custom = written(tmp_path, "quickstart")
    assert custom
    site = str(Path(torch.__file__).parents[1])
    code = CONSUMER.format(site=site, folder=str(folder))
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path,
        env={**kept, "HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "(2, 8, 8, 1) float32 True"


def test_two_models_with_code_of_their_own_live_side_by_side(tmp_path, monkeypatch):
    folders = [written(tmp_path / name, name)[0] for name in ("ddpmpp", "ncsnpp")]
    noise, labels = torch.ones(4, 3, 16, 16), {"class_labels": torch.tensor([0, 1, 2, 0])}
    first, before = drawn(monkeypatch, folders[0], lambda _: noise, True, **labels)
    drawn(monkeypatch, folders[1], lambda _: noise, True, **labels)
    assert torch.equal(first(batch_size=4, output_type="pt", **labels).images, before)


def test_without_trust_nothing_of_the_folder_runs(tmp_path):
    folder, _, _ = written(tmp_path, "quickstart")
    with pytest.raises(ValueError, match="trust_remote_code"):
        ConsistencyModelPipeline.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["denoiser", "mean_flow"])
def test_what_is_no_consistency_model_is_refused(tmp_path, kind):
    with pytest.raises(UserError, match=f"a {kind} model is no consistency model.*onnx"):
        written(tmp_path, "ddpmpp", kind=kind)


# --- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_what_was_written_is_read_bit_by_bit(tmp_path, name):
    folder, description, _ = written(tmp_path, name)
    read, weights = diffusers_folder.read_folder(folder)
    assert read == description
    written_weights = weights_of(description)
    assert set(weights) == set(written_weights)
    assert all(torch.equal(weights[key], value) for key, value in written_weights.items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A native pipeline, as diffusers itself saves it."""
    folder = tmp_path_factory.mktemp("saved")
    made = folder / "made"
    made.mkdir()
    description = EVERY["adm-native"]()
    diffusers_folder.write_folder(made, description, weights_of(description))
    pipe = ConsistencyModelPipeline.from_pretrained(made)
    pipe.save_pretrained(folder / "whole")
    pipe.unet.save_pretrained(folder / "shards", max_shard_size="100KB")
    pipe.unet.save_pretrained(folder / "pickled", safe_serialization=False)
    return folder


def test_what_diffusers_saves_is_read_whole_bare_and_in_shards(saved):
    expected = weights_of(EVERY["adm-native"]())
    assert len(list((saved / "shards").glob("*.safetensors"))) > 1
    for name in ("whole", "whole/unet", "shards"):
        description, weights = diffusers_folder.read_folder(saved / name)
        assert description.class_names == ("0", "1", "2")
        assert all(torch.equal(weights[key], value) for key, value in expected.items())


def test_pickled_weights_are_never_opened(saved):
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.bin: pickled.*safe_serial"):
        diffusers_folder.read_folder(saved / "pickled")


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def place_elsewhere(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "secret.safetensors")
    index = {"weight_map": {"conv_in.weight": "../secret.safetensors"}}
    path = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))


DAMAGE = {
    "truncated weights": (lambda f: cut(f / "unet/diffusion_pytorch_model.safetensors"), "unet"),
    "truncated json": (lambda f: cut(f / "unet/config.json"), "unet/config.json"),
    "deep json": (
        lambda f: (f / "unet/config.json").write_text("[" * 100_000),
        "unet/config.json",
    ),
    "huge json": (
        lambda f: (f / "unet/config.json").write_text(" " * (5 << 20)),
        "too many for a configuration",
    ),
    "no object": (lambda f: (f / "unet/config.json").write_text("[1]"), "not a JSON object"),
    "no scheduler": (
        lambda f: (f / "scheduler/scheduler_config.json").unlink(),
        "scheduler_config.json is not there",
    ),
    "other pipeline": (
        lambda f: edit(f / "model_index.json", _class_name="DDPMPipeline"),
        "DDPMPipeline",
    ),
    "other unet": (
        lambda f: edit(f / "model_index.json", unet=["evil", "Module"]),
        "only UNet2DModel",
    ),
    "other scheduler": (
        lambda f: edit(f / "scheduler/scheduler_config.json", _class_name="DDIMScheduler"),
        "DDIMScheduler",
    ),
    "out of the folder": (place_elsewhere, "is no file of this folder"),
    "too large": (
        lambda f: edit(f / "unet/config.json", layers_per_block=10**9),
        "larger than any network",
    ),
    "weights gone": (
        lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(),
        "no diffusion_pytorch_model",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_hostile_folder_is_one_line(saved, tmp_path, damage):
    folder = tmp_path / "copy"
    shutil.copytree(saved / "whole", folder)
    harm, said = DAMAGE[damage]
    harm(folder)
    with pytest.raises(UserError, match=said) as caught:
        diffusers_folder.read_folder(folder)
    assert "\n" not in str(caught.value)


def test_our_own_file_beside_changed_ones_is_not_believed(tmp_path):
    folder, _, _ = written(tmp_path, "adm-native")
    edit(folder / "scheduler" / "scheduler_config.json", sigma_max=40.0)
    with pytest.raises(UserError, match="scheduler sigma_max: not what cmforge wrote"):
        diffusers_folder.read_folder(folder)
    (folder / "cmforge.json").unlink()
    assert diffusers_folder.read_folder(folder)[0].noise.sigma_max == 40.0


@pytest.mark.parametrize("change", [{"num_blocks": 10**9}, {"channel_mult": []}, {"colour": 1}])
def test_a_hostile_description_is_refused(tmp_path, change):
    folder, _, _ = written(tmp_path, "ddpmpp")
    path = folder / "unet" / "config.json"
    about = json.loads(path.read_text())["description"]
    edit(path, description={**about, "network": {**about["network"], **change}})
    with pytest.raises(UserError, match=r"larger than|not a cmforge model"):
        diffusers_folder.read_folder(folder)
