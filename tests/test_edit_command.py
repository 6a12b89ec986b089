"""`cmforge edit`: every task on a model folder, and every mistake in one line."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from consistency.config import NetworkConfig, NoiseConfig
from consistency.published import ModelDescription, build_network
from pipelines.cli import main

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (8, 8), np.uint8)
COLOUR = RNG.integers(0, 256, (8, 8, 3), np.uint8)
MASK = np.zeros((8, 8), np.uint8)
MASK[:, 4:] = 255


def write_model(folder, **changes):
    """A model folder: untrained, of 8x8 images."""
    import torch
    from safetensors.torch import save_file

    about = ModelDescription(
        kind="consistency",
        network=NetworkConfig(channels=8, channel_mult=(1,), num_blocks=1, attention=()),
        noise=NoiseConfig(),
        size=8,
        channels=1,
        class_names=("a", "b", "c"),
    )
    about = replace(about, **changes)
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: 0.2 * torch.randn(value.shape, generator=generator)
        for key, value in build_network(about).state_dict().items()
    }
    folder.mkdir()
    save_file(weights, folder / "weights.safetensors")
    (folder / "config.json").write_text(about.to_json())
    return folder


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """Models and images in the current folder."""
    folder = tmp_path_factory.mktemp("edits")
    conditional = NetworkConfig(
        channels=8, channel_mult=(1,), num_blocks=1, attention=(), class_conditional=True
    )
    write_model(folder / "grey")
    write_model(folder / "colour", channels=3)
    write_model(folder / "classes", network=conditional)
    write_model(folder / "diffusion", kind="denoiser")
    write_model(folder / "flow", kind="mean_flow")
    write_model(folder / "second", lowest_sigma=1.0)
    for name, pixels in {
        "grey.png": GREY,
        "colour.webp": COLOUR,
        "mask.png": MASK,
        "black.png": 0 * MASK,
        "low.png": GREY[:2, :2],
        "tall.png": np.zeros((20, 10), np.uint8),
        "tall-mask.png": np.full((20, 10), 255, np.uint8),
        "clear.png": np.stack([GREY, GREY, GREY, 255 - MASK], axis=-1),
        "deep.png": GREY.astype(np.uint16) * 257,
    }.items():
        Image.fromarray(pixels).save(folder / name, lossless=True)
    (folder / "broken.png").write_bytes((folder / "grey.png").read_bytes()[:60])
    (folder / "words.png").write_text("not an image")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def edited(*argv, channels=1):
    """The result's pixels, [H, W] or [H, W, 3]."""
    assert main(["edit", *argv, "--out", "out.png"]) == 0
    with Image.open("out.png") as image:
        assert image.mode == ("L" if channels == 1 else "RGB")
        return np.asarray(image)


def test_inpainting_keeps_all_but_the_white_of_the_mask(capsys):
    found = edited("inpaint", "grey", "grey.png", "--mask", "mask.png", "--steps", "8")
    assert capsys.readouterr().out == f"{Path('out.png').resolve()}\n"
    np.testing.assert_array_equal(found[:, :4], GREY[:, :4])
    assert (found[:, 4:] != GREY[:, 4:]).any()
    np.testing.assert_array_equal(edited("inpaint", "grey", "clear.png"), found)  # 8 is default
    again = edited("inpaint", "grey", "grey.png", "--mask", "mask.png", "--seed", "1")
    assert (again != found).any()


def test_colouring_keeps_the_luma():
    found = edited("colorize", "colour", "grey.png", "--sigmas", "80,2", channels=3).astype(float)
    assert (found[..., 0] != found[..., 2]).any()
    inside = ((found > 0) & (found < 255)).all(axis=2)
    luma = found @ [0.2989, 0.5870, 0.1140]
    assert inside.any()
    np.testing.assert_allclose(luma[inside], GREY[inside], atol=1.1)


def test_super_resolution_keeps_the_patches_means():
    found = edited("superres", "grey", "low.png", "--steps", "2")
    again = edited("superres", "grey", "low.png", "--steps", "2", "--factor", "4")
    np.testing.assert_array_equal(again, found)
    pixelated = GREY[:2, :2].repeat(4, 0).repeat(4, 1)
    Image.fromarray(pixelated).save("pixelated.png")
    large = edited("superres", "grey", "pixelated.png", "--steps", "2", "--factor", "4")
    np.testing.assert_array_equal(large, found)


def test_strokes_noise_and_interpolation():
    assert edited("stroke", "grey", "colour.webp").shape == (8, 8)
    assert edited("stroke", "colour", "grey.png", channels=3).shape == (8, 8, 3)
    once = edited("denoise", "grey", "grey.png", "--sigma", "0.5")
    np.testing.assert_array_equal(edited("denoise", "grey", "deep.png", "--sigmas", "0.5"), once)
    identity = edited("denoise", "grey", "grey.png", "--sigma", "0.002")
    np.testing.assert_array_equal(identity, GREY)
    strip = edited("interpolate", "grey", "--seeds", "1,2", "--frames", "3")
    assert strip.shape == (40, 3 * 41 - 1)
    for frame, seed in ((0, 1), (2, 2)):
        assert main(["sample", "grey", "--num", "1", "--seed", str(seed), "--out", "one.png"]) == 0
        with Image.open("one.png") as image:
            at = frame * 41
            differ = np.asarray(image).astype(int) - strip[:, at : at + 40]
            assert np.abs(differ).max() <= 1


def test_several_results_are_several_files_one_class_after_the_other(capsys):
    argv = ["edit", "inpaint", "classes", "grey.png", "--mask", "mask.png", "--num", "3"]
    assert main([*argv, "--out", "new/several.png"]) == 0
    names = [str(Path("new", f"several-{i}.png").resolve()) for i in (1, 2, 3)]
    assert capsys.readouterr().out.split() == names
    assert len({Path(name).read_bytes() for name in names}) == 3


def test_resize_takes_the_centre_square_of_image_and_mask():
    found = edited("inpaint", "grey", "tall.png", "--mask", "tall-mask.png", "--resize")
    assert found.shape == (8, 8)
    assert edited("stroke", "grey", "tall.png", "--resize").shape == (8, 8)


PAINT = ["inpaint", "grey", "grey.png", "--mask", "mask.png"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["inpaint", "grey", "nowhere.png"], "image: nowhere.png does not exist"),
        (["inpaint", "grey", "grey.png", "--mask", "no.png"], "--mask: no.png does not exist"),
        (["inpaint", "grey", "grey.png"], "nothing is missing; give --mask with white where"),
        (["inpaint", "grey", "grey.png", "--mask", "black.png"], "nothing is missing"),
        (["inpaint", "grey", "grey.png", "--mask", "tall.png"], "--mask: tall.png is 10x20, grey"),
        (["stroke", "grey", "tall.png"], "tall.png is 10x20, the model draws 8x8; --resize"),
        (["stroke", "grey", "words.png"], "words.png: not a PNG, JPEG or WebP"),
        (["stroke", "grey", "broken.png"], "broken.png: not a readable PNG, JPEG or WebP ("),
        (["inpaint", "grey", "grey.png", "--mask", "words.png"], "words.png: not a PNG"),
        (["stroke", "nomodel", "grey.png"], "nomodel: no such model; give models:/NAME@ALIAS"),
        (
            ["stroke", "diffusion", "grey.png"],
            "needs a consistency model, f(x, sigma); this is a dif",
        ),
        (
            ["interpolate", "flow"],
            "an edit needs a consistency model, f(x, sigma); this is a MeanF",
        ),
        (["colorize", "grey", "grey.png"], "needs a model of colour images"),
        (["superres", "grey", "grey.png"], "the image has the model's size; give the factor"),
        (
            ["superres", "grey", "low.png", "--factor", "2"],
            "factor 2 does not lead from 2x2 to 8x8",
        ),
        (["superres", "grey", "tall.png"], "20x10 is no whole fraction of the model's 8x8"),
        (["denoise", "grey", "grey.png"], "denoise: give the noise in the image (sigma)"),
        (["denoise", "grey", "grey.png", "--sigma", "90"], "do not fit into this model's levels"),
        (["denoise", "grey", "grey.png", "--sigma", "nan"], "do not fit into this model's levels"),
        ([*PAINT, "--steps", "0"], "inpaint: 0 steps are not in 1 to 40"),
        ([*PAINT, "--steps", "41"], "inpaint: 41 steps are not in 1 to 40"),
        ([*PAINT, "--sigmas", "80,x"], "--sigmas: '80,x' is not a list of numbers"),
        ([*PAINT, "--sigmas", "2,5"], "an edit's levels must decrease: [2, 5]"),
        ([*PAINT, "--sigmas", "99"], "an edit's levels must lie in 0.002 to 80: [99]"),
        ([*PAINT, "--sigmas", "2", "--steps", "2"], "--sigmas: one evaluation at each of them"),
        ([*PAINT, "--class", "0"], "class: 0 is not one of this model's 0 classes"),
        ([*PAINT, "--num", "0"], "--num: 0 must be between 1 and 1000"),
        (["inpaint", "second", *PAINT[2:], "--sigmas", "2,.5"], "must lie in 1 to 80: [2, 0.5]"),
        (
            ["inpaint", "classes", *PAINT[2:]],
            "this model draws by class; give 0 to 2 (a, b, c, ...)",
        ),
        (["interpolate", "classes"], "this model draws by class; give 0 to 2"),
        (["interpolate", "grey", "--seeds", "1"], "--seeds: '1' is not two numbers, such as 1,2"),
        (["interpolate", "grey", "--frames", "1"], "--frames: 1 must be between 2 and 1000"),
        (["interpolate", "grey", "--sigmas", "5"], "levels begin with 80, where all is noise"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, said, capsys):
    assert main(["edit", *argv, "--out", "never.png"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count(f"{argv[0]}: ") <= 1
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert not Path("never.png").exists()


def test_a_wider_range_is_not_asked_of_a_model_of_high_levels():
    found = edited("inpaint", "second", *PAINT[2:], "--steps", "8")
    np.testing.assert_array_equal(found[:, :4], GREY[:, :4])


def test_help_says_what_the_mask_means(capsys):
    with pytest.raises(SystemExit):
        main(["edit", "inpaint", "--help"])
    assert "white (> 127) is filled in" in " ".join(capsys.readouterr().out.split())
