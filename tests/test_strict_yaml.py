"""Every mistake in a recipe at its place, all of them in one message."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import UserError
from pipelines.config import load_recipe
from pipelines.recipe import Recipe

MINIMAL = """\
name: tiny
teacher:
  images: 1_000
  batch: 100
distill:
  method: cd
  images: 1_000
  batch: 100
isolate:
  method: ict
  images: 1_000
  batch: 100
register:
  model: tiny
"""


def write(folder: Path, text: str) -> str:
    path = folder / "tiny.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def mistakes(path: str, *overrides: str) -> list[str]:
    """The lines of the error, each without the folder of the file."""
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    return str(error.value).replace(f"{Path(path).parent}/", "").splitlines()


REPLACED = [  # text in MINIMAL, what a person wrote instead, the one line they read
    ("images: 1_000", "imgs: 1_000", "3:3: teacher.imgs: unknown key, did you mean 'images'?"),
    ("name: tiny", "name: tiny\nzzz: 1", "2:1: zzz: unknown key (known: name, seed, data, noise"),
    ("batch: 100", "batch: big", "4:10: teacher.batch: expected an integer, got big"),
    ("batch: 100", "batch: 1e2", "4:10: teacher.batch: expected an integer, got 1e2 (write 100)"),
    ("batch: 100", "batch: true", "4:10: teacher.batch: expected an integer, got true"),
    ("batch: 100", "batch: 0144", "4:10: teacher.batch: expected an integer, got 0144"),
    ("batch: 100", "batch: 1:40", "4:10: teacher.batch: expected an integer, got 1:40"),
    ("batch: 100", "batch: '100'", "4:10: teacher.batch: expected an integer, got '100'"),
    ("batch: 100", f"batch: {'9' * 5000}", "4:10: teacher.batch: expected an integer, got 999"),
    ("batch: 100", "batch:", "4:9: teacher.batch: expected an integer, got nothing"),
    ("batch: 100", "batch: [100]", "4:10: teacher.batch: expected an integer, got a list"),
    ("batch: 100", "lr: .nan", "4:7: teacher.lr: expected a finite number, got .nan"),
    ("batch: 100", "lr: nan", "4:7: teacher.lr: expected a finite number, got nan"),
    ("batch: 100", "lr: 1e999", "4:7: teacher.lr: expected a finite number, got 1e999"),
    ("batch: 100", "lr: -1", "4:7: teacher.lr: -1.0 must be > 0"),
    ("batch: 100", "flip: yes", "4:9: teacher.flip: expected true or false, got yes"),
    ("batch: 100", "flip: 1", "4:9: teacher.flip: expected true or false, got 1"),
    ("batch: 100", "betas: [0.9]", "4:10: teacher.betas: expected 2 values, got 1"),
    ("batch: 100", "betas: [0.9, x]", "4:16: teacher.betas[1]: expected a finite number, got x"),
    ("batch: 100", "betas: 0.9", "4:10: teacher.betas: expected a list [..., ...], got 0.9"),
    (
        "batch: 100",
        "optimizer: adan",
        "4:14: teacher.optimizer: expected one of adam, radam, got adan, did you mean 'adam'?",
    ),
    ("batch: 100", "ema: []", "4:8: teacher.ema: needs at least one entry"),
    (
        "batch: 100",
        "ema: [{beta: 0.9}]",
        "4:9: teacher.ema[0].kind: missing, one of constant, half_life, power",
    ),
    (
        "batch: 100",
        "ema: [{kind: half-life}]",
        "4:16: teacher.ema[0].kind: expected one of constant, half_life, power, got half-life, "
        "did you mean 'half_life'?",
    ),
    (
        "batch: 100",
        "ema: [{kind: power, sigma_rel: 0.3}]",
        "4:34: teacher.ema[0].sigma_rel: 0.3 must be in (0, 0.28)",
    ),
    ("batch: 100", "images: 3", "4:3: teacher.images: duplicate key, first at tiny.yaml:3:3"),
    ("  images: 1_000\n", "", "2:1: teacher.images: missing, there is no default"),
    ("teacher:\n  images: 1_000\n  batch: 100\n", "", "1:1: teacher: missing"),
    ("name: tiny\n", "", "1:1: name: missing, there is no default"),
    ("name: tiny", "name: 3", "1:7: name: expected text, got 3 (quote it if it is meant as text)"),
    ("  method: cd\n", "", "5:1: distill.method: missing, one of cd, ct-2023, ect"),
    (
        "method: cd",
        "method: ct-23",
        "6:11: distill.method: unknown method ct-23, did you mean 'ct-2023'?",
    ),
    ("method: cd", "method: [cd]", "6:11: distill.method: unknown method a list"),
    ("method: cd", "method: ict", "6:11: distill.path: distillation asks the teacher (heun"),
    ("name: tiny", "name: tiny\ndata: 3", "2:7: data: expected a mapping, got 3"),
    (
        "name: tiny",
        "name: tiny\nnoise: {sigma_min: 90}",
        "2:20: noise.sigma_min: 90.0 must be < sigma_max (80.0)",
    ),
    (
        "name: tiny",
        "name: tiny\nnoise: {sigma_max: 0.001}",
        "2:20: noise.sigma_min: 0.002 must be < sigma_max (0.001)",
    ),
    (
        "name: tiny",
        "name: tiny\nnoise: {sigma_max: 0.5}",
        "2:20: evaluate.mid_sigma: 0.821 must lie between",
    ),
    ("name: tiny", "name: tiny\ndata:\n  source: idx", "3:11: data.path: source idx needs one"),
    ("name: tiny", "\tname: tiny", "1:1: not valid YAML: found character '\\t' that cannot start"),
    ("model: tiny", "model: [", "15:1: not valid YAML: "),
    ("model: tiny", "model: &a [*a]", "14:14: not valid YAML: aliases are not supported"),
    ("model: tiny", "model: !!python/name:os.x", "14:10: not valid YAML: tags are not supported"),
    (
        "model: tiny",
        "model: tiny\n  ? [a]\n  : b",
        "15:5: a key must be a word, not a list or mapping",
    ),
    ("model: tiny", "model: tiny\n---\nx: 1", "not valid YAML: but found another document"),
    ("model: tiny", "model: a\x07b", "14:1: not valid YAML: control characters"),
    ("model: tiny", f"model: {'[' * 5000}", "not valid YAML: nested too deeply"),
    (MINIMAL, "", "1:1: expected a mapping (key: value), got nothing"),
    (MINIMAL, "- a\n- b\n", "1:1: expected a mapping (key: value), got a list"),
]


@pytest.mark.parametrize(("old", "new", "line"), REPLACED)
def test_a_mistake_in_the_file_is_one_line_with_its_place(tmp_path, old, new, line):
    assert old in MINIMAL
    lines = mistakes(write(tmp_path, MINIMAL.replace(old, new, 1)))
    assert len(lines) == 1, lines
    assert lines[0].startswith("tiny.yaml:")
    assert line in lines[0]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("teacher.imgs=3", "teacher.imgs: unknown key, did you mean 'images'?"),
        ("techer.images=3", "techer: unknown key, did you mean 'teacher'?"),
        ("teacher.images=x", "teacher.images: expected an integer, got x"),
        ("teacher.images=", "teacher.images: expected an integer, got nothing"),
        ("teacher.lr=-1", "teacher.lr: -1.0 must be > 0"),
        ("teacher.lr=nan", "teacher.lr: expected a finite number, got nan"),
        ("teacher=3", "teacher: expected a mapping, got 3"),
        ("distill=3", "distill: expected a mapping, got 3"),
        ("teacher.ema.beta=1", "teacher.ema: expected a list [..., ...], got a mapping"),
        ("teacher.lr.x=1", "teacher.lr: expected a finite number, got a mapping"),
        ("isolate.method=itc", "isolate.method: unknown method itc, did you mean 'ict'?"),
        ("isolate.method=cd", "isolate.path: isolation training has no teacher in the loss"),
        ("isolate.pairs.levels.s1=3", "isolate.pairs.levels.s1: 3 must be >= s0 (10)"),
        ("noise.sigma_max=0.001", "noise.sigma_min: 0.002 must be < sigma_max (0.001)"),
        ("register.alias=latest", "register.alias: 'latest' is not a legal MLflow alias"),
        ("teacher.ema=[", "not valid YAML: "),
        ("teacher.images", "expected key=value, such as"),
        ("=3", "expected key=value, such as"),
        ("teacher..images=3", "expected key=value, such as"),
    ],
)
def test_a_mistake_in_an_override_is_one_line_that_quotes_it(tmp_path, override, line):
    lines = mistakes(write(tmp_path, MINIMAL), override)
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"override {override!r}: {line}")


def test_all_mistakes_come_at_once_in_reading_order(tmp_path):
    text = MINIMAL.replace("batch: 100", "bacth: 100\n  dropout: 2", 1)
    text = text.replace("register:", "noise:\n  sigma_min: 90\n  rho: -1\nregister:")
    text = text.replace("method: ict", "method: ict\n  pairs: {kind: uniforn}\n  lr: -1")
    lines = mistakes(write(tmp_path, text), "evaluate.seed=true", "register.stepz=2")
    assert lines == [
        "tiny.yaml:4:3: teacher.bacth: unknown key, did you mean 'batch'?",
        "tiny.yaml:5:12: teacher.dropout: 2.0 must be in [0, 1)",
        "tiny.yaml:12:17: isolate.pairs.kind: expected one of uniform, lognormal, ratio, "
        "got uniforn, did you mean 'uniform'?",
        "tiny.yaml:17:14: noise.sigma_min: 90.0 must be < sigma_max (80.0)",
        "tiny.yaml:18:8: noise.rho: -1.0 must be > 0",
        "override 'evaluate.seed=true': evaluate.seed: expected an integer, got true",
        "override 'register.stepz=2': register.stepz: unknown key, did you mean 'steps'?",
    ]


def test_an_unreadable_field_is_not_reported_again_through_its_default(tmp_path):
    # were source taken for its default `digits`, that would object to the path
    text = MINIMAL.replace("name: tiny", "name: tiny\ndata: {source: floder, path: x}")
    assert mistakes(write(tmp_path, text)) == [
        "tiny.yaml:2:16: data.source: expected one of digits, idx, folder, npz, cifar10, sheets, "
        "got floder, did you mean 'folder'?"
    ]


SNIPPETS = st.lists(
    st.sampled_from(MINIMAL.replace(":", " : ").split(" "))
    | st.sampled_from([": ", "- ", "\n", "  ", "[", "]", "{", "}", "kind", "null", "1e9", "'", "#"])
    | st.text(max_size=3),
    max_size=12,
).map("".join)


@settings(deadline=None, max_examples=150)
@given(text=SNIPPETS, at=st.integers(0, len(MINIMAL)), override=SNIPPETS)
def test_no_text_gives_anything_but_a_recipe_or_a_user_error(tmp_path_factory, text, at, override):
    folder = tmp_path_factory.getbasetemp()
    for written in (text, MINIMAL[:at] + text + MINIMAL[at:]):
        path = folder / "fuzz.yaml"
        path.write_bytes(written.encode("utf-8", "surrogatepass"))
        for overrides in ([], [override], [f"isolate.{override}"], [f"isolate.pairs={override}"]):
            with contextlib.suppress(UserError):
                assert isinstance(load_recipe(str(path), overrides), Recipe)


def test_a_file_that_cannot_be_one_says_so(tmp_path, monkeypatch):
    big, latin, utf16 = (tmp_path / f"{name}.yaml" for name in ("big", "latin", "utf16"))
    big.write_text("#" * 1_000_001)
    latin.write_bytes("name: a\nmodel: Zürich\n".encode("latin-1"))
    utf16.write_text(MINIMAL, encoding="utf-16")
    assert mistakes(str(big)) == ["big.yaml: larger than 1,000,000 bytes, not a recipe"]
    assert mistakes(str(latin))[0].startswith("latin.yaml:2:1: not UTF-8 text")
    assert mistakes(str(utf16))[0].startswith("utf16.yaml:1:1: not UTF-8 text")
    assert "is a folder" in mistakes(str(tmp_path))[0]
    assert "No such file" in mistakes(str(tmp_path / "missing.yaml"))[0]
    monkeypatch.chdir(tmp_path)
    assert "missing.yaml: cannot read the recipe" in mistakes("missing.yaml")[0]
