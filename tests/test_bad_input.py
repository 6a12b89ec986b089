"""What users get wrong, through the command itself: one clear line that names key and file, exit 2.

Steps run in this process, so that no Ray starts; the first one fails, and nothing trains.
"""

import errno
import gzip
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infra import storage
from infra.resources import Resources
from pipelines import cli, commands, dag

RECIPE = (Path(__file__).parent / "assets" / "tiny.yaml").read_text()


class InProcess:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def capacity(self) -> Resources:
        return Resources(2.0)

    def submit(self, function: Any, *args: Any, needs: Resources, name: str) -> int:
        assert name in ("shard", "reference"), "bad input must be refused before anything trains"
        self.calls.append((function, args))
        return len(self.calls) - 1

    def wait(self, handles: Sequence[int], timeout: float) -> list[int]:
        return list(handles)

    def result(self, handle: int) -> Any:
        function, args = self.calls[handle]
        return function(*args)

    def cancel(self, handles: Sequence[int]) -> None: ...

    def close(self) -> None: ...


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "_ray", lambda address: InProcess())


@pytest.fixture
def refuse(capsys, tmp_path):
    """Run a recipe that must be refused; the one line it says."""

    def run(*argv: str, recipe: str = RECIPE) -> str:
        (tmp_path / "mine.yaml").write_text(recipe)
        try:
            code = cli.main(["run", "mine.yaml", "--workspace", "work", *argv])
        except SystemExit as stop:
            code = int(str(stop.code))
        captured = capsys.readouterr()
        assert code == 2, captured.err
        assert "Traceback" not in captured.out + captured.err
        assert captured.err.count("\n") == 1, captured.err
        assert not list(Path("work").glob("steps/*/*/COMMIT.json"))
        assert not list(Path("work").glob("steps/*/*/failures"))
        return captured.err.rstrip("\n")

    return run


# --- the recipe ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "seed: 3",
            "sede: 3",
            "mine.yaml:3:1: sede: unknown key, did you mean 'seed'?",
        ),
        (
            "reference: {steps: 20}",
            "reference: {stesp: 20}",
            "mine.yaml:23:13: reference.stesp: unknown key, did you mean 'steps'?",
        ),
        (
            "teacher:\n  images: 128",
            "teacher:\n  images: many",
            "mine.yaml:7:11: teacher.images: ",
        ),
        ("seed: 3", "seed: 3.5", "mine.yaml:3:7: seed: "),
        (
            "teacher:",
            "noise: {sigma_min: 100, sigma_max: 80}\nteacher:",
            "mine.yaml:6:20: noise.sigma_min: 100.0 must be < sigma_max (80.0)",
        ),
        ("model: tiny", "model: a b", "mine.yaml:26:19: register.model: 'a b' may hold letters"),
        ("method: cd", "method: dc", "mine.yaml:12:11: distill.method: unknown method dc"),
        ("seed: 3", "seed: [", "mine.yaml:5:1: not valid YAML: "),
    ],
)
def test_a_mistake_in_the_recipe_is_named_by_file_line_column_and_key(refuse, old, new, said):
    assert RECIPE.count(old) == 1
    assert said in refuse(recipe=RECIPE.replace(old, new))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("teacher.imagse=5", "teacher.imagse: unknown key, did you mean 'images'?"),
        ("teacher.images=many", "teacher.images: expected an integer, got many"),
        ("noise.sigma_min=100", "noise.sigma_min: 100.0 must be < sigma_max (80.0)"),
        ("cluster.workers=0", "workers: 0 must be >= 1"),
        ("cluster.workers=two", "workers: expected an integer, got two"),
        ("cluster.wrokers=2", "wrokers: unknown key, did you mean 'workers'?"),
        ("data.num_shards=0", "data.num_shards: 0 must be > 0"),
        ("data.labels=kind", "data.labels: source digits brings its own"),
        ("network.channels=9", "network.channels: 9 must be even and >= 4"),
        ("data.path=/somewhere", "data.path: source digits is embedded and takes none"),
        ("data.source=folder", "data.path: source folder needs one"),
    ],
)
def test_a_mistake_on_the_command_line_is_named_by_override_and_key(refuse, override, said):
    line = refuse(override)
    assert said in line
    assert line.startswith(f"override {override.removeprefix('cluster.')!r}: ")


def test_all_mistakes_are_said_at_once(refuse, capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("seed: 3", "sede: 3"))
    argv = ["run", "mine.yaml", "teacher.images=many", "distill.lr=-1", "cluster.workers=0"]
    assert cli.main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    keys = ["workers: ", "mine.yaml:3:1: sede: ", "teacher.images: ", "distill.lr: "]
    assert len(lines) == len(keys)
    for key, line in zip(keys, lines, strict=True):
        assert key in line


def test_more_workers_than_the_machine_has_cpus_are_refused(refuse):
    assert refuse("cluster.workers=3").startswith("cluster.workers: 3 of cpus_per_worker 1 need 3 ")


# --- the images ----------------------------------------------------------------------------------


def save(path: Path, channels: int, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size if channels == 1 else (*size, channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    Image.fromarray(pixels).save(path)


def good_folder(root: Path) -> None:
    for label in ("cat", "dog"):
        for i in range(3):
            save(root / label / f"{i}.png", 3)


def corrupt_png(root: Path) -> None:
    good_folder(root)
    whole = (root / "dog" / "1.png").read_bytes()
    (root / "dog" / "1.png").write_bytes(whole[:60])


def not_an_image(root: Path) -> None:
    good_folder(root)
    (root / "dog" / "1.png").write_text("<html>404</html>")


def mixed_channels(root: Path) -> None:
    good_folder(root)
    save(root / "dog" / "2.png", 1)


def transparent(root: Path) -> None:
    good_folder(root)
    save(root / "dog" / "2.png", 4)


def loose_image(root: Path) -> None:
    good_folder(root)
    save(root / "loose.png", 3)


def broken_link(root: Path) -> None:
    good_folder(root)
    (root / "cat" / "9.png").symlink_to(root / "nowhere.png")


def too_few(root: Path) -> None:
    save(root / "cat" / "0.png", 3)


FOLDER = ["data.source=folder", "data.path=images", "data.size=8", "data.limit=null"]


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda root: None, ["data.path: ", "/images does not exist; "]),
        (lambda root: root.mkdir(), ["data.path: ", "/images has no PNG, JPEG or WebP files; "]),
        (corrupt_png, ["data.path: ", "/images/dog/1.png is not a readable image (", "replace"]),
        (not_an_image, ["data.path: ", "/images/dog/1.png is not a readable image (", "replace"]),
        (
            mixed_channels,
            ["data.path: ", "/images mixes channel counts: cat/0.png has 3, dog/2.png has 1; "],
        ),
        (transparent, ["data.path: ", "/images/dog/2.png is RGBA, neither grey nor RGB"]),
        (loose_image, ["data.path: ", "/images has images both in sub-folders and outside"]),
        (too_few, ["data.path: ", "1 images are too few"]),
        (broken_link, ["", "/images/cat/9.png: a link to nothing; mend or remove it"]),
        (lambda root: root.write_text("a file"), ["data.path: ", "/images has no PNG, JPEG or"]),
    ],
)
def test_a_folder_that_cannot_be_used_is_named_with_the_file(refuse, tmp_path, make, parts):
    make(tmp_path / "images")
    line = refuse(*FOLDER)
    for part in parts:
        assert part in line
    assert line.startswith(parts[0])


def idx_file(magic: int, shape: tuple[int, ...], data: bytes) -> bytes:
    return gzip.compress(struct.pack(f">{1 + len(shape)}I", magic, *shape) + data)


def cut_idx(root: Path) -> None:
    root.mkdir()
    images = idx_file(0x803, (4, 8, 8), bytes(4 * 64))
    (root / "train-images-idx3-ubyte.gz").write_bytes(images[:-9])
    (root / "train-labels-idx1-ubyte.gz").write_bytes(idx_file(0x801, (4,), bytes(4)))


def fewer_labels(root: Path) -> None:
    root.mkdir()
    (root / "train-images-idx3-ubyte.gz").write_bytes(idx_file(0x803, (4, 8, 8), bytes(4 * 64)))
    (root / "train-labels-idx1-ubyte.gz").write_bytes(idx_file(0x801, (3,), bytes(3)))


def floats_npz(root: Path) -> None:
    np.savez(root.with_name("images"), images=np.zeros((4, 8, 8), np.float32))
    root.with_name("images.npz").rename(root)


def oblong_npz(root: Path) -> None:
    np.savez(root.with_name("images"), images=np.zeros((4, 8, 9), np.uint8))
    root.with_name("images.npz").rename(root)


@pytest.mark.parametrize(
    ("source", "make", "parts"),
    [
        ("idx", cut_idx, ["data.path: ", "train-images-idx3-ubyte.gz is damaged ("]),
        ("idx", fewer_labels, ["data.path: ", "has 4 train images but 3 labels"]),
        ("idx", lambda root: root.mkdir(), ["data.path: ", "has no train-images-idx3-ubyte.gz"]),
        ("npz", floats_npz, ["data.path: ", "are float32 (4, 8, 8, 1); give uint8"]),
        ("npz", oblong_npz, ["data.size: ", "is 8x9, not square; give data.size"]),
        ("npz", lambda root: root.write_text("x"), ["data.path: ", "is not a readable .npz ("]),
        ("sheets", lambda root: root.mkdir(), ["data.path: ", "has no train_*.webp or .png"]),
        ("cifar10", lambda root: root.mkdir(), ["data.path: "]),
    ],
)
def test_arrays_that_cannot_be_used_are_named_with_the_file(refuse, tmp_path, source, make, parts):
    make(tmp_path / "images")
    line = refuse(f"data.source={source}", "data.path=images", "data.limit=null")
    for part in parts:
        assert part in line
    assert str(tmp_path / "images") in line


# --- the workspace -------------------------------------------------------------------------------


def refusing(blocked: Callable[[str], bool], code: int) -> Callable[..., Any]:
    """`open` for writing fails on some paths; reading works."""
    real = open

    def guarded(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wxa+") and blocked(str(file)):
            raise OSError(code, os.strerror(code), str(file))
        return real(file, mode, *args, **kwargs)

    return guarded


WORDS = {
    errno.ENOSPC: "disk full: ",
    errno.EDQUOT: "disk quota exceeded: ",
    errno.EROFS: "read-only file system: ",
    errno.EACCES: "permission denied: ",
}


@pytest.mark.parametrize("code", list(WORDS))
def test_a_workspace_that_cannot_be_written_at_all(refuse, monkeypatch, tmp_path, code):
    for module in (dag, storage):  # a plan may read, but the first write is refused
        monkeypatch.setattr(module, "open", refusing(lambda path: True, code), raising=False)
    line = refuse()
    assert line.startswith(WORDS[code] + str(tmp_path / "work"))
    assert "workspace" in line or "place" in line


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_workspace_whose_folder_cannot_be_made(refuse, monkeypatch, tmp_path, code):
    make = os.mkdir

    def mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
        if "work" in str(path):
            raise OSError(code, os.strerror(code), str(path))
        make(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    assert refuse().startswith(WORDS[code] + str(tmp_path / "work"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_workspace_without_write_permission(refuse, tmp_path):
    (tmp_path / "work").mkdir(mode=0o555)
    assert refuse().startswith("permission denied: ")


def test_a_file_where_the_workspace_should_be(refuse, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(RECIPE)
    (tmp_path / "file").write_text("")
    assert cli.main(["run", "mine.yaml", "--workspace", "file"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("a file stands where a folder is needed: ")
    assert str(tmp_path / "file") in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("part", ["recipe.yaml", "manifest.json", ".tar", "COMMIT.json"])
def test_a_disk_that_fills_at_any_file_of_the_first_stage(refuse, monkeypatch, tmp_path, part):
    """The write of one kind of file fails, whichever call makes it."""
    replace, link = os.replace, os.link

    def full(call: Callable[..., None]) -> Callable[..., None]:
        def guarded(source: Any, target: Any, *args: Any, **kwargs: Any) -> None:
            if str(target).endswith(part):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
            call(source, target, *args, **kwargs)

        return guarded

    monkeypatch.setattr(os, "replace", full(replace))
    monkeypatch.setattr(os, "link", full(link))
    line = refuse()
    assert line.startswith(f"disk full: {tmp_path / 'work'}")
    assert line.endswith("free space or choose another --workspace")


def test_a_disk_that_fills_while_bytes_are_written(refuse, monkeypatch, tmp_path):
    guarded = refusing(lambda path: "/steps/shard/" in path, errno.ENOSPC)
    monkeypatch.setattr("builtins.open", guarded)
    assert refuse().startswith(f"disk full: {tmp_path / 'work'}/steps/shard/")


def test_a_workspace_in_a_store_that_does_not_exist(capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text(RECIPE)
    assert cli.main(["run", "mine.yaml", "--workspace", "nofs://bucket/x"]) == 2
    err = capsys.readouterr().err
    assert "nofs" in err
    assert "--workspace" in err or "give a path or an fsspec URL" in err
    assert err.count("\n") == 1


def test_a_remote_workspace_without_a_registry_is_refused_before_anything_runs(capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text(RECIPE)
    assert cli.main(["run", "mine.yaml", "--workspace", "memory://bad-input"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("workspace: memory://bad-input is remote, where sqlite cannot live; ")
    assert err.count("\n") == 1


def test_a_registry_that_cannot_be_opened_is_said_by_doctor(capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "bogus://x")
    assert cli.main(["doctor", "--workspace", "work"]) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    (line,) = [line for line in captured.out.splitlines() if "registry" in line[:20]]
    assert line.startswith("FAIL  registry")
    assert "bogus" in line
