"""ONNX and torch.export programs give what torch gives: any batch, one step and several."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from consistency import sampling
from consistency.config import NoiseConfig
from infra.errors import UserError
from pipelines import programs
from tests.foreign_models import EVERY, described, model_of

BOUND = 1e-4
TINY = {"channel_mult": (1,), "attention": (), "size": 8}
KINDS = {
    "quickstart": EVERY["quickstart"](),
    "ncsnpp": EVERY["ncsnpp"](conditional=False),
    "adm": EVERY["adm-native"](),
    "denoiser": described("adm", kind="denoiser", conditional=False, **TINY),
    "mean_flow": described("ddpmpp", kind="mean_flow", **TINY),
    "angle": described("ddpmpp", noise=NoiseConfig(c_noise="angle"), boundary=0.0, **TINY),
}


def inputs(description, batch):
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, description.channels, description.size, description.size)
    ramp = torch.linspace(0.01, 1, batch)
    if description.kind == "mean_flow":
        given = {"z": torch.randn(shape, generator=generator), "t": ramp, "t_minus_r": ramp / 3}
    else:
        sigma = 80 * ramp
        x = torch.randn(shape, generator=generator) * sigma.view(-1, 1, 1, 1)
        given = {"x": x, "sigma": sigma}
    if description.num_classes:
        given["labels"] = torch.arange(batch) % (description.num_classes + 1) - 1
    return given


def onnx_function(file):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file))
    names = [put.name for put in session.get_inputs()]

    def function(*given):
        values = {n: v.numpy() for n, v in zip(names, given, strict=True) if v is not None}
        return torch.from_numpy(session.run(None, values)[0])

    return session, names, function


def check(description, function):
    """One call for several batches, and the sampler of several steps."""
    model = model_of(description)
    for batch in (1, 3, 7):
        given = inputs(description, batch)
        difference = function(*given.values()) - model.function(**given)
        assert float(difference.abs().max()) <= BOUND
    shape = (description.channels, description.size, description.size)

    def noise(draw):
        return sampling.sample_noise(0, range(3), shape, draw)

    labels = torch.tensor([0, 1, 2]) if description.num_classes else None
    if description.kind == "consistency":
        for levels in (description.sigmas(1), description.sigmas(4)):
            a, b = (
                sampling.sample_multistep(
                    lambda x, sigma, labels, f=f: f(
                        *[v for v in (x, sigma, labels) if v is not None]
                    ),
                    noise,
                    levels,
                    labels,
                    sigma_min=description.boundary,
                )
                for f in (function, model.function)
            )
            assert float((a - b).abs().max()) <= BOUND


# torch's ONNX exporter takes ten seconds for a network of two levels.
@pytest.mark.parametrize(
    "name",
    [
        "ncsnpp",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("quickstart", "adm", "mean_flow")
        ),
    ],
)
def test_onnx(tmp_path, name):
    description, file = KINDS[name], tmp_path / "model.onnx"
    programs.write_onnx(model_of(description), file)
    session, names, function = onnx_function(file)
    assert names == programs.input_names(description)
    assert [put.shape[0] for put in session.get_inputs()] == ["batch"] * len(names)
    check(description, function)
    about = session.get_modelmeta().custom_metadata_map
    assert about["cmforge.kind"] == description.kind
    assert json.loads(about["cmforge.levels"])["2"] == description.levels(2)
    assert json.loads(about["cmforge.class_names"]) == (
        list(description.class_names) if description.num_classes else []
    )
    assert str(Path(__file__).parents[1]).encode() not in file.read_bytes()


@pytest.mark.parametrize("name", KINDS)
def test_pt2(tmp_path, name):
    description, file = KINDS[name], tmp_path / "model.pt2"
    programs.write_pt2(model_of(description), file)
    extra = {programs.METADATA: ""}
    loaded = torch.export.load(file, extra_files=extra).module()
    names = programs.input_names(description)

    def function(*given):
        return loaded(**dict(zip(names, given, strict=True)))

    check(description, function)
    assert json.loads(extra[programs.METADATA])["kind"] == description.kind
    assert str(Path(__file__).parents[1]).encode() not in file.read_bytes()


def test_pt2_needs_no_cmforge(tmp_path):
    programs.write_pt2(model_of(KINDS["denoiser"]), tmp_path / "model.pt2")
    code = (
        f"import sys; sys.path[:0] = [{str(Path(torch.__file__).parents[1])!r}]\n"
        "from importlib.util import find_spec; assert find_spec('consistency') is None\n"
        "import torch; f = torch.export.load('model.pt2').module()\n"
        "print(tuple(f(x=torch.zeros(5, 3, 8, 8), sigma=torch.ones(5)).shape))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path,
        env={},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "(5, 3, 8, 8)"


def test_without_onnx_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'cmforge\[onnx\]'"):
        programs.write_onnx(model_of(KINDS["denoiser"]), tmp_path / "model.onnx")


def test_large_weights_lie_beside_the_onnx_file(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "LARGEST_ONNX", 1000)
    description = KINDS["denoiser"]
    programs.write_onnx(model_of(description), tmp_path / "model.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    check(description, onnx_function(tmp_path / "model.onnx")[2])
