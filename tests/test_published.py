"""A model folder: what is written is read back, and sample i depends on (seed, i) alone."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from consistency import sampling
from consistency.config import ChurnConfig
from consistency.published import ModelDescription, build, build_network, load
from consistency.schedules import karras_sigmas
from tests.every_kind import KINDS, about, shaken

CHURN = ChurnConfig(S_churn=20.0, S_min=0.05, S_max=50.0, S_noise=1.003)
# One of each way to sample; the two sCM kinds differ from ECT in what the network is told.
SAMPLED = ["teacher", "ict", "ect", "sct", "mean_flow", "tcm"]


def model(kind, **changes):
    description = about(KINDS[kind], **changes)
    return build(description, shaken(build_network(description).state_dict(), seed=3))


def generate(published, indices=range(3), **settings):
    return published.generate(indices, **{"steps": 2, "seed": 0, **settings})


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_back_the_model_that_was_written(kind, tmp_path):
    written = model(kind)
    (tmp_path / "config.json").write_text(written.description.to_json())
    save_file(
        {name: v.contiguous() for name, v in written.function.net.state_dict().items()},
        tmp_path / "weights.safetensors",
    )
    read = load(tmp_path)
    assert read.description == written.description
    assert type(read.function) is type(written.function)
    assert read.description.sampler == {"teacher": "heun", "teacher-weighted": "heun"}.get(
        kind, "mean_flow" if kind == "mean_flow" else "multistep"
    )
    assert np.array_equal(generate(read), generate(written))


@pytest.mark.parametrize("damage", ["missing key", "unknown key", "unknown network key"])
def test_what_is_no_description_is_refused(damage):
    raw = json.loads(about(KINDS["ect"]).to_json())
    if damage == "missing key":
        del raw["network"]
    else:
        (raw if damage == "unknown key" else raw["network"])["colour"] = "red"
    with pytest.raises(ValueError, match="not a cmforge model description"):
        ModelDescription.from_json(json.dumps(raw))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path)


# --- sample i -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SAMPLED)
def test_an_image_does_not_depend_on_the_batch_it_is_made_in(kind):
    published = model(kind)
    whole = generate(published, range(5), steps=3)
    assert whole.shape == (5, 8, 8, 1)
    assert whole.dtype == np.uint8
    for images in (
        generate(published, range(5), steps=3, batch=2),
        np.concatenate([generate(published, [i], steps=3) for i in range(5)]),
        generate(published, [4, 2, 0, 3, 1], steps=3)[[2, 4, 1, 3, 0]],
    ):
        # Kernels may round differently with another batch: a level at most, at a rounding edge.
        assert np.abs(images.astype(int) - whole).max() <= 1
        assert (images != whole).mean() < 0.02
    assert (generate(published, range(5), steps=3, seed=1) != whole).mean() > 0.5
    assert (whole[0] != whole[1]).mean() > 0.5


def test_noise_of_churn_is_a_function_of_seed_and_index():
    published = model("teacher")
    churned = generate(published, range(4), steps=5, churn=CHURN)
    alone = np.concatenate([generate(published, [i], steps=5, churn=CHURN) for i in range(4)])
    assert np.abs(alone.astype(int) - churned).max() <= 1
    assert np.array_equal(generate(published, range(4), steps=5, churn=CHURN), churned)
    assert (generate(published, range(4), steps=5) != churned).mean() > 0.3
    other = generate(published, range(4), steps=5, churn=CHURN, seed=1)
    assert (other != churned).mean() > 0.3


def test_churn_reaches_the_sampler_as_published(monkeypatch):
    seen = {}

    def spy(denoise, noise, steps, labels, **arguments):
        seen.update(arguments)
        return noise(0)

    monkeypatch.setattr(sampling, "sample_heun", spy)
    generate(model("teacher"), churn=CHURN, steps=4)
    assert {k: v for k, v in seen.items() if k.startswith("S_")} == {
        "S_churn": 20.0, "S_min": 0.05, "S_max": 50.0, "S_noise": 1.003,
    }  # fmt: skip
    assert (seen["sigma_min"], seen["sigma_max"], seen["rho"]) == (0.002, 80.0, 7.0)


# --- classes and guidance ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["teacher", "ect", "mean_flow"])
def test_classes_alternate_unless_one_is_asked_for(kind):
    published = model(kind)
    assert published.labels([0, 1, 2, 3, 7]).tolist() == [0, 1, 2, 0, 1]
    assert published.labels([0, 1], 2).tolist() == [2, 2]
    whole, second = generate(published), generate(published, label=1)
    assert np.abs(second[1].astype(int) - whole[1]).max() <= 1
    assert (second[0] != whole[0]).any()


def test_a_model_without_classes_is_told_none():
    plain = replace(about(KINDS["ect"]).network, class_conditional=False)
    published = model("ect", network=plain)
    assert published.labels([0, 1]) is None
    assert generate(published).shape == (3, 8, 8, 1)
    with pytest.raises(ValueError, match="class: 0 is not one of this model's 0 classes"):
        generate(published, label=0)
    with pytest.raises(ValueError, match="guidance: needs a class-conditional model"):
        generate(model("teacher", network=plain), guidance=2.0)


def test_guidance_is_the_formula_on_the_denoiser():
    published = model("teacher")
    D = published.function
    z = sampling.sample_noise(0, range(3), (1, 8, 8))
    sigma, labels = torch.full((3,), 80.0), torch.tensor([0, 1, 2])
    with torch.no_grad():
        null, given = D(80 * z, sigma, torch.full_like(labels, -1)), D(80 * z, sigma, labels)
    expected = sampling.to_uint8((null + 3.0 * (given - null)).clamp(-1, 1)).numpy()
    got = generate(published, steps=1, guidance=3.0)
    assert np.abs(got.astype(int) - expected).max() <= 1
    assert (got != generate(published, steps=1)).any()


# --- levels -------------------------------------------------------------------------------------


def test_noise_levels_of_a_consistency_model():
    published = model("ict")
    assert published.description.levels(1) == [80.0]
    assert published.description.levels(2) == [80.0, 0.821]
    grid = karras_sigmas(5, 0.002, 80.0).flip(0).tolist()
    assert published.description.levels(4) == pytest.approx(grid[:-1])
    assert published.description.evaluations(4) == 4
    other = build(
        replace(published.description, mid_sigma=1.5), published.function.net.state_dict()
    )
    assert other.description.levels(2) == [80.0, 1.5]
    assert (generate(other) != generate(published)).any()


def test_searched_levels_come_before_the_default_ones():
    plain = about(KINDS["ict"])
    found = replace(plain, searched=((80.0, 1.5), (80.0, 1.5, 0.4, 0.1)))
    assert found.levels(1) == [80.0]
    assert found.levels(2) == [80.0, 1.5]
    assert replace(found, mid_sigma=0.5).levels(2) == [80.0, 1.5]  # as register and evaluate do
    assert found.levels(3) == plain.levels(3)  # its default was not beaten
    assert found.levels(4) == [80.0, 1.5, 0.4, 0.1]
    published = model("ict")
    searched = build(found, published.function.net.state_dict())
    np.testing.assert_array_equal(
        generate(searched, steps=2), generate(published, steps=2, levels=[80.0, 1.5])
    )
    np.testing.assert_array_equal(
        generate(searched, steps=2, levels=[80.0, 0.821]), generate(published, steps=2)
    )
    flow = replace(about(KINDS["mean_flow"]), searched=((80.0, 1.5),))
    assert flow.levels(2) == [1.0, 0.6]


def test_searched_levels_are_written_and_read_and_may_be_missing():
    plain = about(KINDS["ict"])
    found = replace(plain, searched=((80.0, 1.5), (80.0, 1.5, 0.4)))
    assert ModelDescription.from_json(found.to_json()) == found
    assert "searched" not in json.loads(plain.to_json())  # the text, and its digest, of before
    assert ModelDescription.from_json(plain.to_json()) == plain


@pytest.mark.parametrize("bad", [5, [5], [["80"]], [[None]], {"2": 1}, None])
def test_searched_levels_that_are_no_numbers_are_no_description(bad):
    raw = {**json.loads(about(KINDS["ict"]).to_json()), "searched": bad}
    with pytest.raises(ValueError, match="not a cmforge model description"):
        ModelDescription.from_json(json.dumps(raw))


@pytest.mark.parametrize("bad", [(70.0, 1.0), (80.0, 90.0), (80.0, 0.0001)])
def test_searched_levels_that_make_no_sense_are_refused_when_asked_for(bad):
    found = replace(about(KINDS["ict"]), searched=(bad,))
    published = build(found, model("ict").function.net.state_dict())
    with pytest.raises(ValueError, match="levels"):
        generate(published, steps=2)


def test_a_truncated_model_is_never_asked_below_its_lowest_level():
    published = model("tcm")
    assert published.description.levels(1) == [80.0]
    assert published.description.levels(2) == [80.0, 1.0]  # not 0.821
    higher = replace(published.description, mid_sigma=2.0)
    assert build(higher, published.function.net.state_dict()).description.levels(2) == [80.0, 2.0]
    for steps in (3, 4, 10):
        levels = published.description.levels(steps)
        assert len(levels) == steps
        assert (levels[0], levels[-1]) == (80.0, pytest.approx(1.0))
        assert min(levels) >= 1.0
        generate(published, steps=steps)
    with pytest.raises(ValueError, match=r"levels: 0\.9 lies below 1, this model's lowest"):
        generate(published, levels=[80.0, 0.9])


def test_times_of_a_mean_flow():
    published = model("mean_flow")
    assert published.description.levels(1) == [1.0]
    assert published.description.levels(2) == [1.0, 0.821 / 1.821]
    assert published.description.levels(4) == [1.0, 0.75, 0.5, 0.25]
    assert published.description.evaluations(4) == 4
    # One step is z - u(z, 1, 1) (Algorithm 2).
    z = sampling.sample_noise(0, range(3), (1, 8, 8))
    one, labels = torch.ones(3), torch.tensor([0, 1, 2])
    with torch.no_grad():
        expected = sampling.to_uint8((z - published.function(z, one, one, labels)).clamp(-1, 1))
    assert np.abs(generate(published, steps=1).astype(int) - expected.numpy()).max() <= 1


@pytest.mark.parametrize("kind", ["ict", "ect", "sct", "mean_flow"])
def test_levels_may_be_given_and_count_instead_of_steps(kind):
    published = model(kind)
    levels = published.description.levels(3)
    given = generate(published, steps=1, levels=levels)
    assert np.array_equal(given, generate(published, steps=3))
    assert (given != generate(published, steps=1)).any()


def test_a_diffusion_model_has_steps_but_no_levels():
    published = model("teacher")
    assert published.description.levels(5) == []
    assert (published.description.evaluations(5), published.description.evaluations(1)) == (9, 1)
    calls = []
    published.function.net.register_forward_hook(lambda *_: calls.append(1))
    for steps in (1, 2, 5):
        calls.clear()
        generate(published, steps=steps)
        assert len(calls) == published.description.evaluations(steps)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("ect", {"steps": 0}, "steps: 0 must be at least 1"),
        ("ect", {"label": 3}, "class: 3 is not one of this model's 3 classes"),
        ("ect", {"label": -1}, "class: -1 is not one"),
        ("teacher", {"levels": [80.0]}, "levels: a diffusion model takes Heun steps"),
        ("ect", {"guidance": 2.0}, "guidance and churn are a diffusion model's"),
        ("mean_flow", {"churn": CHURN}, "guidance and churn are a diffusion model's"),
        ("ect", {"levels": []}, "must start at sigma_max"),
        ("ect", {"levels": [1.0]}, "must start at sigma_max"),
        ("ect", {"levels": [80.0, 80.0]}, "must decrease"),
        ("ict", {"levels": [80.0, 0.001]}, "must not fall below sigma_min"),
        ("mean_flow", {"levels": [0.9]}, "times must start at 1"),
        ("mean_flow", {"levels": [1.0, 0.0]}, "times must start at 1 and stay above 0"),
        ("mean_flow", {"levels": [1.0, 0.5, 0.5]}, "times must decrease"),
    ],
)
def test_what_a_model_cannot_do_is_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(model(kind), **settings)
