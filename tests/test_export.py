"""`cmforge export`: what is written is whole, loads, and is never written over something else."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from consistency.published import ModelDescription, load
from infra import storage
from pipelines import diffusers_folder, programs
from pipelines.cli import main
from pipelines.export import write_model
from tests.foreign_models import EVERY, weights_of


@pytest.fixture
def model(tmp_path):
    """A model folder such as steps write: without a record."""
    folder = tmp_path / "model"
    folder.mkdir()
    description = EVERY["quickstart"]()
    write_model(folder, description, weights_of(description), "one")
    (folder / "model.json").unlink()
    return folder


@pytest.fixture
def export(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(format, out, name=None):
        return main(["export", str(name or model), "--format", format, "--out", str(out)])

    return run


def tree(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_a_model_folder_comes_with_its_record_and_the_same_bits(export, model, tmp_path, capsys):
    assert export("safetensors", "out") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "out"
    assert any('published.load(Path("out"))' in line for line in shown)
    out = tmp_path / "out"
    record = json.loads((out / "model.json").read_text())
    assert record["format"] == 1
    for name, file in record["files"].items():
        assert file == {
            "bytes": (out / name).stat().st_size,
            "sha256": storage.sha256(str(out / name)),
        }
    assert set(record["files"]) == {"weights.safetensors", "config.json"}
    before, after = (load_file(f / "weights.safetensors") for f in (model, out))
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert load(out).description == load(model).description


def test_export_of_an_export_is_the_same(export, tmp_path):
    assert export("safetensors", "one") == export("safetensors", "two", name="one") == 0
    one, two = tree(tmp_path / "one"), tree(tmp_path / "two")
    assert {k: v for k, v in one.items() if k != "model.json"} == {
        k: v for k, v in two.items() if k != "model.json"
    }


def test_diffusers_and_back(export, model, tmp_path, capsys):
    assert export("diffusers", "deep/er/out") == 0
    assert "trust_remote_code=True" in capsys.readouterr().out
    description, weights = diffusers_folder.read_folder(tmp_path / "deep/er/out")
    assert description == load(model).description
    expected = load_file(model / "weights.safetensors")
    assert all(torch.equal(weights[key], value) for key, value in expected.items())


def test_the_same_again_is_no_harm_and_another_thing_is_left_alone(export, tmp_path, capsys):
    for _ in range(2):
        assert export("diffusers", "out") == 0
    made = tree(tmp_path / "out")
    assert export("safetensors", "out") == 2
    assert "give another path" in capsys.readouterr().err
    (tmp_path / "out" / "README.md").write_text("mine")
    assert export("diffusers", "out") == 2
    assert "README.md is there and not of this export" in capsys.readouterr().err
    assert tree(tmp_path / "out") == {**made, "README.md": b"mine"}
    (tmp_path / "file").write_text("mine")
    assert export("safetensors", "file") == 2
    assert (tmp_path / "file").read_text() == "mine"
    assert [name for name in os.listdir(tmp_path) if name.startswith(".tmp")] == []


def test_an_empty_folder_is_filled(export, tmp_path):
    (tmp_path / "out").mkdir()
    assert export("safetensors", "out") == 0
    assert len(tree(tmp_path / "out")) == 3


def test_a_file_is_whole_or_not_there(export, tmp_path, monkeypatch, capsys):
    (tmp_path / "folder").mkdir()
    assert export("pt2", "folder") == 2
    assert "a folder is there" in capsys.readouterr().err
    (tmp_path / "taken.pt2").write_text("mine")

    def half(model, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    for name in ("model.pt2", "taken.pt2"):
        monkeypatch.setattr(programs, "write_pt2", half)
        assert export("pt2", name) == 130
        monkeypatch.setattr(programs, "write_pt2", lambda model, file: file.write_bytes(b"whole"))
        assert export("pt2", name) == (0 if name == "model.pt2" else 2)
    assert (tmp_path / "model.pt2").read_bytes() == b"whole"
    assert (tmp_path / "taken.pt2").read_text() == "mine"
    assert export("pt2", "model.pt2") == 0  # the same again


def test_a_store_gets_the_record_last(export, monkeypatch):
    sent, upload = [], storage.upload_file

    def noted(local, url):
        sent.append(url)
        if len(sent) == 3:
            raise KeyboardInterrupt
        upload(local, url)

    monkeypatch.setattr(storage, "upload_file", noted)
    url = f"memory://exports/{os.getpid()}"
    assert export("safetensors", url) == 130
    assert not storage.exists(f"{url}/model.json")
    assert export("safetensors", url) == 0  # goes on where it stopped
    assert sent[-1].endswith("model.json")
    text = storage.read_bytes(f"{url}/config.json").decode()
    assert ModelDescription.from_json(text) == EVERY["quickstart"]()
    assert export("safetensors", url) == 0
    assert export("diffusers", url) == 2


def test_no_such_model_is_one_line(export, capsys):
    assert export("safetensors", "out", name="nothing") == 2
    assert "no such model" in capsys.readouterr().err
