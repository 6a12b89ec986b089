"""`cmforge import`: from files and folders as they lie about, to a model that samples."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from consistency import published
from consistency.foreign import openai
from infra import storage
from infra.errors import UserError
from pipelines import cli, importing, model_record, models
from tests import foreign_files, foreign_forward
from tests.test_foreign import EDM, LAYOUTS, OPENAI, classes_of
from tests.test_foreign import imported as mapped

OPTIONS = {"size": 16, "head_channels": 16}


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, torch.Tensor]]:
    return {name: foreign_forward.random_state(LAYOUTS[name]) for name in (*OPENAI, *EDM)}


@pytest.fixture
def openai_file(tmp_path, states) -> Path:
    return foreign_files.state_file(tmp_path / "cd_small.pt", states[OPENAI[0]])


def equal(found: Any, expected: Any) -> bool:
    description, weights = expected
    return (
        found.description == description
        and found.weights.keys() == weights.keys()
        and all(torch.equal(found.weights[key], weights[key]) for key in weights)
    )


# --- files of other projects ---------------------------------------------------------------------


@pytest.mark.parametrize("how", ["zip", "before zip", "safetensors", "nested"])
def test_a_state_dict_of_openais_in_any_wrapping(tmp_path, states, how):
    state = states[OPENAI[1]]
    path = tmp_path / "edm_small_ema.pt"
    if how == "safetensors":
        save_file({k: t.contiguous() for k, t in state.items()}, path)
    elif how == "nested":
        torch.save({"state_dict": state, "step": 3, "lr": 1e-3}, path)
    else:
        foreign_files.state_file(path, state, zipped=how == "zip")
    found = importing.read(str(path), **OPTIONS)
    assert equal(found, mapped(OPENAI[1], state, "denoiser"))
    assert found.source == model_record.Source(
        "openai", path.name, path.stat().st_size, storage.sha256(str(path))
    )


def test_the_kind_is_the_names_unless_asked_for(tmp_path, states, openai_file):
    assert importing.read(str(openai_file), **OPTIONS).description.kind == "consistency"
    asked = importing.read(str(openai_file), **OPTIONS, kind="denoiser")
    assert asked.description.kind == "denoiser"
    other = openai_file.rename(tmp_path / "network.pt")
    with pytest.raises(UserError, match="--kind: the file does not say it"):
        importing.read(str(other), **OPTIONS)
    with pytest.raises(UserError, match=r"network\.pt: size: .* give --size"):
        importing.read(str(other), kind="denoiser")
    with pytest.raises(UserError, match=r"--head-channels: 0 must be at least 1"):
        importing.read(str(other), kind="denoiser", size=16, head_channels=0)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", EDM)
def test_a_pickled_network_of_edms(tmp_path, states, name, protocol, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = foreign_files.network(states[name], LAYOUTS[name]["config"], use_fp16=False)
    path = foreign_files.dump(tmp_path / "snapshot.pkl", network, protocol)
    found = importing.read(str(path))
    assert equal(found, mapped(name, states[name], "denoiser"))
    assert found.source.layout == "edm"
    assert [p.name for p in tmp_path.iterdir()] == ["snapshot.pkl"]  # its source was not run


def test_a_pickled_consistency_model_of_ects(tmp_path, states):
    network = foreign_files.network(
        states[EDM[0]], LAYOUTS[EDM[0]]["config"], "ECMPrecond", sigma_data=0.4, sigma_min=0.004
    )
    path = foreign_files.dump(tmp_path / "network-snapshot.pkl", network)
    about = importing.read(str(path)).description
    assert (about.kind, about.boundary, about.noise.sigma_data) == ("consistency", 0.004, 0.4)
    with pytest.raises(UserError, match="--kind: denoiser, but the file holds a consistency"):
        importing.read(str(path), kind="denoiser")


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_edms_tensors_alone_are_enough_if_the_kind_is_given(tmp_path, states, prefix):
    state = {k.replace("model.", prefix, 1): t for k, t in states[EDM[1]].items()}
    path = tmp_path / "net.safetensors"
    save_file(state, path)
    found = importing.read(str(path), kind="consistency")
    assert equal(found, mapped(EDM[1], states[EDM[1]], "consistency"))
    with pytest.raises(UserError, match="--kind: the file does not say it"):
        importing.read(str(path))
    with pytest.raises(UserError, match="--size: 32, but the file says 16"):
        importing.read(str(path), kind="denoiser", size=32)
    with pytest.raises(UserError, match="--head-channels: EDM's networks have their own"):
        importing.read(str(path), kind="denoiser", head_channels=64)


@pytest.mark.parametrize("wrapper", ["VPPrecond", "Precond", "Spy"])
def test_another_wrapper_is_refused_by_name(tmp_path, states, wrapper):
    network = foreign_files.network(states[EDM[0]], LAYOUTS[EDM[0]]["config"], wrapper)
    path = foreign_files.dump(tmp_path / "a.pkl", network)
    with pytest.raises(UserError, match=f"a.pkl: {wrapper}: "):
        importing.read(str(path))


def test_tensors_of_no_known_layout_are_named(tmp_path):
    path = foreign_files.state_file(tmp_path / "a.pt", {"fc.weight": torch.zeros(2, 2)})
    with pytest.raises(UserError, match=r"tensors of no layout that is known here: fc\.weight"):
        importing.read(str(path))


def test_what_does_not_fit_is_one_line_with_the_file(tmp_path, states):
    state = {k: t for k, t in states[OPENAI[0]].items() if k != "out.2.bias"}
    path = foreign_files.state_file(tmp_path / "cd_a.pt", state)
    with pytest.raises(UserError, match=r"cd_a\.pt: tensors that do not fit: out\.2\.bias \[3\]"):
        importing.read(str(path), **OPTIONS)


# --- folders, ours -------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, openai_file) -> Path:
    return Path(importing.write(importing.read(str(openai_file), **OPTIONS), str(tmp_path / "m")))


def test_what_is_written_and_the_record_last(folder, states):
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "model.json", "weights.safetensors",
    ]  # fmt: skip
    record = json.loads((folder / "model.json").read_text())
    assert record["format"] == 1
    assert record["source"]["name"] == "cd_small.pt"
    assert {path: file["sha256"] for path, file in record["files"].items()} == {
        name: storage.sha256(str(folder / name)) for name in model_record.FILES
    }
    ages = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert max(ages, key=lambda name: ages[name]) == "model.json"
    loaded = models.load(str(folder), "nowhere", "")
    assert loaded.description == mapped(OPENAI[0], states[OPENAI[0]], "consistency")[0]


def test_whoever_may_read_the_folder_may_read_all_of_it(folder):
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_the_same_again_changes_nothing_and_another_is_refused(folder, tmp_path, states):
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    again = importing.read(str(tmp_path / "cd_small.pt"), **OPTIONS)
    assert importing.write(again, str(folder)) == str(folder)
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    other = importing.read(str(tmp_path / "cd_small.pt"), **OPTIONS, kind="denoiser")
    with pytest.raises(UserError, match="another model is there; give another --out"):
        importing.write(other, str(folder))
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_a_half_written_folder_is_no_model_and_is_completed(folder, tmp_path):
    whole = {p.name: p.read_bytes() for p in folder.iterdir()}
    for missing in (["model.json", "config.json"], ["model.json"]):
        for name in missing:
            (folder / name).unlink()
        if len(missing) == 2:
            with pytest.raises(UserError, match=r"not a whole model: config\.json is not there"):
                models.load(str(folder), "nowhere", "")
            with pytest.raises(UserError, match="no such model"):
                importing.read(str(folder))
        importing.write(importing.read(str(tmp_path / "cd_small.pt"), **OPTIONS), str(folder))
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == whole


@pytest.mark.parametrize("name", model_record.FILES)
def test_a_folder_altered_against_its_record_is_refused(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    (folder / name).write_bytes(data)
    for read in (importing.read, lambda source: models.load(source, "nowhere", "")):
        with pytest.raises(UserError, match=f"{name} is altered"):
            read(str(folder))


@pytest.mark.parametrize(
    "record",
    [
        "{}",
        "[]",
        "no json",
        '{"format": 2, "files": {}}',
        '{"format": 1, "files": {}}',
        '{"format": 1, "files": []}',
        '{"format": 1, "files": {"../../secret": {"bytes": 1, "sha256": ""}}}',
        '{"format": 1, "files": {"config.json": {}}}',
    ],
)
def test_a_record_that_is_none_is_refused(folder, record):
    (folder / "model.json").write_text(record)
    with pytest.raises(
        UserError, match=r"model\.json: (not a model's record|lists other|format 2)"
    ):
        models.load(str(folder), "nowhere", "")


def test_import_export_import_of_our_own_is_bit_equal(folder, tmp_path):
    first = importing.read(str(folder))
    other = importing.write(first, str(tmp_path / "other"))
    assert equal(importing.read(other), (first.description, first.weights))
    for name in model_record.FILES:
        assert (Path(other) / name).read_bytes() == (folder / name).read_bytes()
    back = openai.to_openai(first.description, first.weights)
    path = foreign_files.state_file(tmp_path / "cd_back.pt", back)
    assert equal(importing.read(str(path), **OPTIONS), (first.description, first.weights))


def test_options_that_a_folder_of_ours_answers_itself(folder):
    named = importing.read(str(folder), classes=list("abcdefghij"))
    assert named.description.class_names == tuple("abcdefghij")
    assert importing.read(str(folder), kind="consistency").description.kind == "consistency"
    with pytest.raises(UserError, match="--kind: denoiser, but the folder holds a consistency"):
        importing.read(str(folder), kind="denoiser")
    with pytest.raises(UserError, match="knows its size and heads"):
        importing.read(str(folder), size=16)
    with pytest.raises(UserError, match="classes: 1 names for a model of 10 classes"):
        importing.read(str(folder), classes=["a"])


def test_a_description_that_asks_for_too_much_is_refused(folder, tmp_path):
    (folder / "model.json").unlink()
    plain = json.loads((folder / "config.json").read_text())
    for key, value in {"num_blocks": 10**9, "channels": 10**12, "channel_mult": [1] * 40}.items():
        odd = {**plain, "network": {**plain["network"], key: value}}
        (folder / "config.json").write_text(json.dumps(odd))
        for read in (importing.read, lambda source: models.load(source, "nowhere", "")):
            with pytest.raises(UserError):
                read(str(folder))


def test_other_peoples_folders_and_nothing_at_all(tmp_path):
    with pytest.raises(UserError, match="no such model: no file, and no folder with"):
        importing.read(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="no such model: no file, and no folder with"):
        importing.read(str(tmp_path))


def test_a_committed_step_is_read_through_its_record(folder, tmp_path):
    home = tmp_path / "steps" / "teacher" / "f00"
    attempt = home / "attempts" / "a1"
    attempt.mkdir(parents=True)
    for name in model_record.FILES:
        shutil.copy(folder / name, attempt / name)
    files = [vars(file) for file in storage.describe_dir(str(attempt))]
    from pipelines import dag

    record = dict.fromkeys(dag.RECORD_KEYS) | {
        "format": dag.FORMAT, "attempt": "a1", "files": files,
    }  # fmt: skip
    (home / "COMMIT.json").write_text(json.dumps(record))
    first = importing.read(str(folder))
    assert equal(importing.read(str(home)), (first.description, first.weights))
    (attempt / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json has 2 bytes"):
        importing.read(str(home))
    (home / "COMMIT.json").write_text(json.dumps({**record, "attempt": "../../../m"}))
    with pytest.raises(UserError, match="names the attempt"):
        importing.read(str(home))


# --- stores --------------------------------------------------------------------------------------


def test_from_a_store_to_a_store(folder, states, tmp_path):
    url = "memory://imports/cd_small.pt"
    storage.upload_file(str(tmp_path / "cd_small.pt"), url)
    there = importing.write(importing.read(url, **OPTIONS), "memory://imports/model")
    assert there == "memory://imports/model"
    assert storage.read_bytes(f"{there}/model.json") == (folder / "model.json").read_bytes()
    expected = mapped(OPENAI[0], states[OPENAI[0]], "consistency")
    assert equal(importing.read(there), expected)
    assert models.load(there, "nowhere", "").description == expected[0]
    storage.write_bytes(f"{there}/config.json", b"{}")
    with pytest.raises(UserError, match=r"config\.json has 2 bytes"):
        models.load(there, "nowhere", "")
    with pytest.raises(UserError, match="no such file"):
        importing.read("memory://imports/none.pt")
    storage.remove_tree("memory://imports")


# --- the command ---------------------------------------------------------------------------------


def test_imported_and_sampled_by_commands(tmp_path, states, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    foreign_files.state_file(tmp_path / "ct_small.pt", states[OPENAI[0]])
    (tmp_path / "names.txt").write_text("\n".join("abcdefghij") + "\n")
    code = cli.main(
        [
            "import",
            "ct_small.pt",
            "--out=m",
            "--size=16",
            "--head-channels=16",
            "--classes=names.txt",
        ]
    )
    said = capsys.readouterr().out
    assert code == 0
    for words in ("adm, 828,771 parameters", "16x16", "consistency", "1000 ln(sigma) / 4"):
        assert words in said
    assert said.splitlines()[-1] == str(tmp_path / "m")
    sampled = ["sample", "--num", "2", "--steps", "2", "--class", "3", "--out"]
    assert cli.main([*sampled[:1], "m", *sampled[1:], "a.png"]) == 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_a_foreign_file_is_a_model_wherever_a_model_is_asked_for(tmp_path, states):
    network = foreign_files.network(states[EDM[2]], LAYOUTS[EDM[2]]["config"])
    path = foreign_files.dump(tmp_path / "snapshot.pkl", network)
    loaded = models.load(str(path), "nowhere", "")
    expected = published.build(*mapped(EDM[2], states[EDM[2]], "denoiser"))
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 20.0])
    labels = torch.tensor([1, classes_of(EDM[2]) - 1])
    with torch.no_grad():
        assert torch.equal(loaded.function(x, sigma, labels), expected.function(x, sigma, labels))
    with models.located(str(path), "nowhere", "") as (folder, about):
        assert (
            load_file(folder / "weights.safetensors").keys()
            == expected.function.net.state_dict().keys()
        )
        assert about == expected.description


def test_what_cannot_be_imported_ends_with_2_and_one_line(tmp_path, capsys):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": Path}))
    for source in (tmp_path / "a.pkl", tmp_path / "none.pt"):
        assert cli.main(["import", str(source), "--out", str(tmp_path / "m")]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert len(captured.err.splitlines()) == 1
    assert not (tmp_path / "m").exists()


def test_names_of_classes_from_a_list_or_a_file(tmp_path):
    assert importing.class_names("cat,dog") == ["cat", "dog"]
    (tmp_path / "a.txt").write_text("cat\n\n big dog \n")
    assert importing.class_names(str(tmp_path / "a.txt")) == ["cat", "big dog"]
    (tmp_path / "a.json").write_text('["cat", "a, b"]')
    assert importing.class_names(str(tmp_path / "a.json")) == ["cat", "a, b"]
    for wrong in ("[1, 2]", '["a"', "[[]]"):
        (tmp_path / "b.json").write_text(wrong)
        with pytest.raises(UserError, match="--classes: "):
            importing.class_names(str(tmp_path / "b.json"))
