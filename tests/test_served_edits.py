"""Edits through a registered model: what a consumer sends, gets back, and is refused."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consistency import image_edits, published
from infra import tracking
from tests.test_registry import Place, write_model

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (8, 8), np.uint8)
MASK = np.zeros((8, 8), np.uint8)
MASK[:, 4:] = 255


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    write_model(folder / "models" / "distill", seed=1)
    tracking.open_run(
        tracking.default_tracking_uri(str(folder)), "empty", "empty", "empty", None, {}, {}
    )
    place = Place(folder, folder / "models")
    place.register()
    return place


@pytest.fixture(scope="module")
def served(place: Place) -> Any:
    return place.load()


@pytest.fixture(scope="module")
def model(place: Place) -> published.PublishedModel:
    return published.load(place.models / "distill")


def encoded(pixels: np.ndarray[Any, Any], kind: str = "PNG") -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def edited(served: Any, rows: dict[str, Any], **params: Any) -> Any:
    return served.predict(rows, params={"output": "uint8", **params})


ROW = {"num_samples": [3], "image": [encoded(IMAGE)], "mask": [encoded(MASK)]}


def test_inpainting_keeps_what_the_mask_leaves_and_agrees_with_the_library(
    served: Any, model: published.PublishedModel
) -> None:
    found = edited(served, ROW, edit="inpaint", steps=4, seed=5, **{"class": 1})
    assert found.shape == (3, 8, 8, 1)
    assert found.dtype == np.uint8
    for result in found[..., 0]:
        np.testing.assert_array_equal(result[:, :4], IMAGE[:, :4])
    assert len({result.tobytes() for result in found}) == 3
    setting = image_edits.Setting(
        sigmas=image_edits.levels(model.description, "inpaint", steps=4), seed=5, label=1
    )
    truth = image_edits.edit_images(
        model, "inpaint", IMAGE[None, ..., None], [3], setting, missing=MASK[None] > 127
    )
    np.testing.assert_array_equal(found, truth)


def test_transparent_pixels_are_a_mask(served: Any) -> None:
    clear = np.stack([IMAGE, IMAGE, IMAGE, 255 - MASK], axis=-1)
    rows = {"num_samples": [2], "image": [encoded(clear)]}
    found = edited(served, rows, edit="inpaint", steps=2)
    same = {"num_samples": [2], "image": ROW["image"], "mask": ROW["mask"]}
    np.testing.assert_array_equal(found, edited(served, same, edit="inpaint", steps=2))


def test_a_result_does_not_depend_on_the_other_rows(served: Any) -> None:
    other = encoded(255 - IMAGE)
    rows = {"num_samples": [2, 3], "image": [other, ROW["image"][0]], "mask": ROW["mask"] * 2}
    both = edited(served, rows, edit="inpaint", steps=2)
    alone = edited(served, ROW, edit="inpaint", steps=2)
    assert len(both) == 5
    # Networks of convolutions round differently in another batch: by a grey level at most.
    assert np.abs(both[2:].astype(int) - alone).max() <= 1


def test_every_other_task_is_served(served: Any) -> None:
    row = {"num_samples": [2], "image": [encoded(IMAGE, "WEBP")]}
    for task, params in {
        "stroke": {"steps": 2},
        "denoise": {"sigma": 0.5},
        "superres": {"factor": 4, "steps": 2},
    }.items():
        assert edited(served, row, edit=task, **params).shape == (2, 8, 8, 1)
    small = {"num_samples": [2], "image": [encoded(IMAGE[:2, :2])]}
    big = edited(served, small, edit="superres", sigmas="80,2")
    means = big.reshape(2, 2, 4, 2, 4).mean(axis=(2, 4))
    inside = (big > 0).all() and (big < 255).all()
    assert np.abs(means - IMAGE[:2, :2]).max() < (1 if inside else 255)
    strip = edited(served, {"num_samples": [5]}, edit="interpolate", to_seed=4, **{"class": 2})
    for frame, seed in ((0, 0), (4, 4)):
        end = edited(served, {"num_samples": [1]}, seed=seed, **{"class": 2})
        assert np.abs(strip[frame].astype(int) - end[0]).max() <= 1


def test_a_table_names_the_class_of_every_result(served: Any) -> None:
    table = served.predict(ROW, params={"edit": "inpaint", "steps": 2})
    assert list(table["class"]) == ["zero", "one", "two"]
    assert table["png_base64"][0].startswith("iVBORw0KGgo")


def test_sampling_is_as_it_was(served: Any, model: published.PublishedModel) -> None:
    found = edited(served, {"num_samples": [4]}, steps=2, seed=3)
    np.testing.assert_array_equal(found, model.generate(range(4), steps=2, seed=3))


@pytest.mark.parametrize(
    ("rows", "params", "says"),
    [
        ({}, {"edit": "repaint"}, "edit: 'repaint' is not one of inpaint, colorize"),
        ({}, {"edit": ""}, "image: only an edit has one"),
        ({}, {"output": "jpeg"}, "output: 'jpeg' is not one of"),
        ({}, {"steps": 41}, "inpaint: 41 steps are not in 1 to 40"),
        ({}, {"steps": 0}, "steps: 0 is not in 1 to 1000"),
        ({}, {"class": 3}, "class: 3 is not one of this model's 3 classes"),
        ({"num_samples": [1]}, {}, "class: this model draws by class; give 0 to 2"),
        ({"num_samples": [0]}, {}, "num_samples: need at least 1 a row, at most 10000 in all"),
        ({"num_samples": [10_001]}, {}, "num_samples: need at least 1"),
        ({}, {"sigmas": "80,many"}, "sigmas: '80,many' is not a list of numbers"),
        ({}, {"sigmas": "1,80"}, "an edit's levels must decrease: \\[1, 80\\]"),
        ({}, {"sigmas": "nan"}, "an edit's levels must lie in"),
        ({}, {"sigma": 0.5}, "sigma: how noisy the image is; inpaint has no use for it"),
        ({"image": ["!"]}, {}, "image: row 0 is not base64"),
        ({"image": [""]}, {}, "image: row 0 has none"),
        ({"image": [base64.b64encode(b"GIF89a").decode()]}, {}, "not a PNG, JPEG or WebP"),
        ({"image": [ROW["image"][0][:60]]}, {}, "not a (readable )?PNG, JPEG or WebP"),
        (
            {"image": [encoded(np.zeros((9, 9), np.uint8))]},
            {},
            "image: row 0 is 9x9, the model 8x8",
        ),
        ({"image": [encoded(IMAGE[:4, :4])]}, {}, "mask: row 0 needs one of the image's size"),
        ({"mask": [encoded(0 * MASK)]}, {}, "mask: row 0 needs one of the image's size with some"),
        ({"mask": [None]}, {}, "mask: row 0 needs one"),
        ({}, {"edit": "stroke"}, "mask: inpaint has one, stroke does not"),
        ({"mask": [None]}, {"edit": "colorize"}, "needs a model of colour images"),
        ({"mask": [None]}, {"edit": "denoise"}, "denoise: give the noise in the image"),
        ({"mask": [None]}, {"edit": "denoise", "sigma": 99.0}, "do not fit into this model's"),
        ({"mask": [None]}, {"edit": "denoise", "sigma": -1.0}, "do not fit into this model's"),
        ({"mask": [None]}, {"edit": "superres"}, "superres: the image has the model's size"),
        ({"mask": [None]}, {"edit": "superres", "factor": 3}, "factor 3 does not lead from 8x8"),
        ({"mask": [None]}, {"edit": "superres", "factor": -2}, "factor -2 does not lead"),
    ],
)
def test_a_wrong_edit_is_refused_in_plain_words(
    served: Any, rows: dict[str, Any], params: dict[str, Any], says: str
) -> None:
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match=says) as caught:
        edited(served, {**ROW, **rows}, **{"edit": "inpaint", "steps": 2, **params})
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"


def test_a_bomb_is_not_unpacked(served: Any) -> None:
    """Its header promises 8,000 x 8,000 pixels."""
    import zlib

    from mlflow.exceptions import MlflowException

    data = bytearray(base64.b64decode(ROW["image"][0]))
    data[16:24] = (8_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    row = {**ROW, "image": [base64.b64encode(data).decode()]}
    with pytest.raises(MlflowException, match="8000x8000 pixels, more than 16"):
        edited(served, row, edit="inpaint")


def test_rows_must_agree_in_size(served: Any) -> None:
    from mlflow.exceptions import MlflowException

    rows = {"num_samples": [2, 2], "image": [ROW["image"][0], encoded(IMAGE[:4, :4])]}
    with pytest.raises(MlflowException, match="image: row 1 is of another size than row 0"):
        edited(served, rows, edit="stroke")


def test_a_workspace_reads_its_own_registered_model(place: Place, tmp_path: Path) -> None:
    """The command line edits with what was registered, by name."""
    from pipelines.cli import main
    from tests.test_registry import ALIAS, NAME

    (tmp_path / "i.png").write_bytes(base64.b64decode(ROW["image"][0]))
    out = tmp_path / "o.png"
    argv = ["edit", "stroke", f"models:/{NAME}@{ALIAS}", str(tmp_path / "i.png"), "--class", "1"]
    assert main([*argv, "--workspace", str(place.workspace), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
