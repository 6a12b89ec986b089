"""`cmforge import` of folders that diffusers saved, and export of them again."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from consistency.published import load
from infra import storage
from pipelines import diffusers_folder, models
from pipelines.cli import main
from tests.foreign_models import EVERY, weights_of

NATIVE = next(name for name in EVERY if "native" in name)
CUSTOM = next(name for name in EVERY if "native" not in name)


@pytest.fixture(params=[NATIVE, CUSTOM])
def saved(request, tmp_path: Path):
    """A folder for diffusers, with the model that is in it."""
    description = EVERY[request.param](conditional=True)
    weights = weights_of(description)
    folder = tmp_path / "theirs"
    folder.mkdir()
    diffusers_folder.write_folder(folder, description, weights)
    return folder, description, weights


def same(folder: Path, description, weights) -> None:
    assert load(folder).description == description
    found = load_file(folder / "weights.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], value) for key, value in weights.items())


def test_a_folder_comes_in_as_it_went_out_and_goes_out_again(saved, tmp_path, capsys):
    folder, description, weights = saved
    assert main(["import", str(folder), "--out", str(tmp_path / "ours")]) == 0
    assert "layout      diffusers" in capsys.readouterr().out
    same(tmp_path / "ours", description, weights)
    record = json.loads((tmp_path / "ours" / "model.json").read_text())
    tensors = folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert record["source"] == {
        "layout": "diffusers",
        "name": "theirs",
        "bytes": tensors.stat().st_size,
        "sha256": storage.sha256(str(tensors)),
    }

    again = ["export", str(tmp_path / "ours"), "--format", "diffusers", "--out"]
    assert main([*again, str(tmp_path / "again")]) == 0
    for path, _ in storage.list_files(str(folder)):
        if path != "README.md":  # which names the folder
            assert (tmp_path / "again" / path).read_bytes() == (folder / path).read_bytes(), path


def test_a_command_that_takes_a_model_takes_the_folder_as_it_is(saved, tmp_path):
    folder, description, weights = saved
    loaded = models.load(str(folder), "", "")
    assert loaded.description == description
    assert all(
        torch.equal(loaded.function.net.state_dict()[key], value) for key, value in weights.items()
    )


def test_from_a_store_with_names_of_its_classes(saved, tmp_path):
    folder, description, _ = saved
    url = f"memory://diffusers/{os.getpid()}/{tmp_path.name}"
    storage.upload_dir(str(folder), url)
    names = [f"class {n}" for n in range(description.num_classes)]
    out = tmp_path / "ours"
    assert main(["import", url, "--out", str(out), "--classes", ",".join(names)]) == 0
    assert load(out).description.class_names == tuple(names)


def test_the_network_alone(tmp_path):
    description = EVERY[NATIVE](conditional=True)
    weights = weights_of(description)
    folder = tmp_path / "theirs"
    folder.mkdir()
    diffusers_folder.write_folder(folder, description, weights)
    assert main(["import", str(folder / "unet"), "--out", str(tmp_path / "ours")]) == 0
    found = load_file(tmp_path / "ours" / "weights.safetensors")
    assert all(torch.equal(found[key], value) for key, value in weights.items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kind", "denoiser"], "--kind: denoiser, but the folder holds a consistency model"),
        (["--size", "16"], "its configuration says size and heads; leave them out"),
        (["--classes", "a"], "classes: 1 names for a model of"),
    ],
)
def test_what_the_folder_says_itself_is_not_to_be_said_otherwise(
    saved, tmp_path, capsys, options, said
):
    folder, _, _ = saved
    assert main(["import", str(folder), "--out", str(tmp_path / "ours"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "ours").exists()


def test_a_broken_folder_is_one_line(saved, tmp_path, capsys):
    folder, _, _ = saved
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text()[:-20])
    assert main(["import", str(folder), "--out", str(tmp_path / "ours")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "unet/config.json" in line
