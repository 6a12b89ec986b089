"""The picture of docs/editing.md: before, input and after of all six edits.

python docs/tint.py tinted.npz
cmforge run quickstart data.source=npz data.path=tinted.npz data.labels=labels \
    register.model=tinted --workspace tinted
python docs/editing.py WORKSPACE tinted tinted.npz docs/editing.png

WORKSPACE: of `cmforge run quickstart`. The models registered from both workspaces edit the digits
they were trained on.
"""

import argparse
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from consistency.edit_presets import DEFAULT_STEPS
from consistency.image_edits import Setting, edit_images, interpolate, levels
from consistency.published import PublishedModel
from infra import sources
from pipelines import models

TILE, PAD, LEFT, TOP, GAP = 64, 6, 190, 34, 12  # pixels of the sheet
AFTER = 5  # results of each edit
INK, FAINT, HOLE = (34, 34, 34), (120, 120, 120), (240, 168, 72)
DIGITS = (3, 6)  # which of the real digits
SAYS = {
    "inpaint": ("inpaint", "orange is filled in"),
    "superres": ("super-resolution", "means of patches are kept"),
    "stroke": ("stroke", "after a rough guide"),
    "denoise": ("denoise", "noise of sigma {sigma}"),
    "colorize": ("colorize", "luma is kept"),
}
SIGMA = 0.4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("workspace", "tinted", "images", "out"):
        parser.add_argument(name)
    given = parser.parse_args()
    digits, tinted = (models.load(None, place, "") for place in (given.workspace, given.tinted))
    pairs = list(sources.open_source("digits", None, size=None, fit="crop").samples())
    with np.load(given.images) as file:
        colours, labels = file["images"], file["labels"]
    rows = []
    for task in ("inpaint", "superres", "stroke", "denoise"):
        rows += [row(digits, task, *pairs[pick]) for pick in DIGITS]
    rows += [row(tinted, "colorize", colours[pick], int(labels[pick])) for pick in DIGITS]
    rows.append(between(digits))
    sheet(rows).save(given.out, optimize=True)


def row(
    model: PublishedModel, task: Any, image: np.ndarray[Any, Any], label: int
) -> tuple[str, str, list[Any]]:
    """(title, what is said of it, tiles): the image, what the edit is given, and its results."""
    about = model.description
    sigma = SIGMA if task == "denoise" else None
    steps = DEFAULT_STEPS[task]
    setting = Setting(
        sigmas=levels(about, task, steps=steps, sigma=sigma),
        label=label if about.num_classes else None,
    )
    size, missing, factor, shown, small = about.size, None, None, image, image
    if task == "inpaint":
        missing = np.zeros((1, size, size), bool)
        missing[:, size // 4 : -size // 8, size // 2 - size // 8 :] = True
        shown = np.where(missing[0, ..., None], np.array(HOLE, np.uint8), image)
    elif task == "superres":
        factor = 2 if size < 16 else 4
        small = means(image, factor)
        shown = small.repeat(factor, 0).repeat(factor, 1)
    elif task == "stroke":
        shown = (means(image, 2).repeat(2, 0).repeat(2, 1) // 86 * 85).astype(np.uint8)
    elif task == "denoise":
        noise = np.random.default_rng(0).normal(0, SIGMA * 127.5, image.shape)
        shown = (image + noise).round().clip(0, 255).astype(np.uint8)
    elif task == "colorize":
        luma = (image @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8)
        shown = luma[..., None].repeat(3, axis=2)
    source = {"inpaint": image, "superres": small}.get(task, shown)
    count = 1 if task == "denoise" else AFTER  # f of one noisy image is one image
    results = edit_images(
        model, task, source[None], [count], setting, missing=missing, factor=factor
    )
    title, says = SAYS[task]
    spent = "1 evaluation" if steps == 1 else f"{steps} evaluations"
    return title, f"{says.format(sigma=SIGMA)}\n{spent}", [image, shown, *results]


def means(image: np.ndarray[Any, Any], p: int) -> np.ndarray[Any, Any]:
    """The means of p x p patches."""
    height, width, channels = image.shape
    patches = image.reshape(height // p, p, width // p, p, channels).mean(axis=(1, 3))
    small: np.ndarray[Any, Any] = patches.round().astype(np.uint8)
    return small


def between(model: PublishedModel) -> tuple[str, str, list[Any]]:
    setting = Setting(sigmas=levels(model.description, "interpolate", steps=1), seed=1, label=7)
    frames = interpolate(model, 2, 2 + AFTER, 1, setting)
    return "interpolate", "between the ends\n1 evaluation", list(frames)


def sheet(rows: list[tuple[str, str, list[Any]]]) -> Image.Image:
    """All rows below each other; a title stands at the first of its rows."""
    step = TILE + PAD
    tops, top, before = [], TOP, ""
    for title, _, tiles in rows:
        group = f"{title} {tiles[0].shape}"
        top += GAP if before not in ("", group) else 0
        tops.append(top)
        top, before = top + step, group
    width = LEFT + (2 + AFTER) * step + 2 * GAP
    page = Image.new("RGB", (width, top + GAP), "white")
    draw = ImageDraw.Draw(page)
    large, small = ImageFont.load_default(17), ImageFont.load_default(12)
    for column, heading in ((0, "before"), (1, "input"), (2, "after")):
        draw.text((left_of(column), 12), heading, INK, small)
    before = ""
    for at, (title, says, tiles) in zip(tops, rows, strict=True):
        group = f"{title} {tiles[0].shape}"
        if group != before:
            draw.text((GAP, at + 4), title, INK, large)
            draw.multiline_text((GAP, at + 28), says, FAINT, small, spacing=3)
        before = group
        for column, tile in enumerate(tiles):
            page.paste(enlarged(tile), (left_of(column), at))
    return page


def left_of(column: int) -> int:
    return LEFT + column * (TILE + PAD) + (GAP if column > 1 else 0)


def enlarged(tile: np.ndarray[Any, Any]) -> Image.Image:
    big = tile.repeat(TILE // tile.shape[0], 0).repeat(TILE // tile.shape[1], 1)
    return Image.fromarray(np.broadcast_to(big, (TILE, TILE, 3)).copy())


if __name__ == "__main__":
    main()
