"""The report page: escaped, self-contained, complete; and the step that builds it."""

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from consistency.evaluation.protocol import FeatureProtocol
from pipelines import html, html_levels, html_training, svg
from pipelines.artifacts import (
    Committed,
    RegisteredModel,
    SearchedModel,
    ShardSet,
    TrainedModel,
    Tuned,
    to_json,
)
from pipelines.dag import StepContext, StepHistory
from pipelines.png import encode_png, grid
from pipelines.recipe import Cluster
from pipelines.steps import report, search_sigmas, select_ema, tune
from tests import sweeps
from tests.scores import INCEPTION, evaluation, reference, score

HOSTILE = "<script>alert('x')</script>\"&--><img src=http://evil.example/a.png onerror=x>"
STEPS = ("shard", "reference", "teacher", "distill", "isolate", "evaluate", "register")
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Outline(HTMLParser):
    """Every tag closed in order; all attributes and all text kept."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    def sources(self) -> list[str]:
        names = ("src", "href", "srcset", "data", "action", "poster", "xlink:href")
        return [value or "" for _, attrs in self.tags for k, value in attrs.items() if k in names]


SCORES = (
    score("teacher", 18, 1.723, samples=1234, agreement=0.962),
    score("distill", 1, 5.319, 5.411, 5.202, samples=2345, agreement=0.974),
    score("distill", 2, 3.627, 3.501, 3.733, samples=2345, agreement=0.974),
    score("isolate", 1, 4.131, 4.207, 4.019, samples=2345, agreement=0.974),
    score("isolate", 2, 3.528, 3.633, 3.417, samples=2345, agreement=0.974),
)
SHARD = ShardSet(
    count=1797,
    size=8,
    channels=1,
    class_names=tuple("0123456789"),
    num_shards=4,
    bytes=231_424,
    pixel_digest="aa" * 32,
    manifest_sha256="bb" * 32,
)
REFERENCE = reference()
REGISTERED = RegisteredModel(
    name="quickstart-digits",
    version=7,
    alias="champion",
    candidate="isolate",
    digest="cc" * 32,
    metric="fd_domain_2345",
    value=SCORES[3].value,
    outcome="champion",
    decision="0.42 % at one step, distill had 0.54 %",
)


def trained(stage: str) -> TrainedModel:
    return TrainedModel(
        kind="denoiser" if stage == "teacher" else "consistency",
        images=49_280,
        steps=770,
        parameters=752_641,
        final_loss=0.1187,
        train_seconds=61.6,
        weights_sha256=(stage[0] * 64),
        ema="power-0.1",
    )


def curve(stage: str, points: int = 300) -> list[dict[str, float]]:
    rows = []
    for i in range(1, points + 1):
        row = {
            "images": 64 * i,
            "loss": 2.0 * 0.98**i + 1e-3,
            "images_per_second": 780.0 + i % 7,
            "lr": 1e-3,
        }
        if stage == "isolate":
            row["N"] = 10.0 * 2 ** (5 * i // points) + 1
        if stage == "distill":
            row |= {"N": 18.0, "mu": 0.9 + 0.05 * i / points}
        rows.append(row)
    return rows


def pixels(seed: int, n: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 1), np.uint8)


def page(**changes: Any) -> html.Page:
    stages = tuple(
        svg.Stage(
            name=name,
            lane=0,
            inputs=STEPS[max(0, i - 1) : i],
            state="cached" if i < 3 else "ran",
            seconds=10.0 + i,
            fingerprint=f"{i}" * 64,
        )
        for i, name in enumerate(STEPS)
    )
    values: dict[str, Any] = {
        "recipe_name": "quickstart",
        "recipe_yaml": "name: quickstart\nseed: 0\n",
        "tracking_uri": "sqlite:////tmp/ws/mlflow.db",
        "experiment": "quickstart",
        "stages": stages,
        "shard": SHARD,
        "reference": REFERENCE,
        "trainings": tuple(
            html.Training(stage=s, model=trained(s), curve=curve(s))
            for s in ("teacher", "distill", "isolate")
        ),
        "evaluation": evaluation(*SCORES),
        "registered": REGISTERED,
        "samples": {
            html.sample_key(s): [encode_png(image) for image in pixels(i)]
            for i, s in enumerate(SCORES)
        },
        "grids": {s.grid: encode_png(grid(pixels(0), 10, 1, 5)) for s in SCORES},
    }
    return html.Page(**(values | changes))


def test_the_page_is_well_formed_and_asks_nothing_of_any_network() -> None:
    document = html.render(page())
    outline = Outline(document)
    assert all(source.startswith("data:") for source in outline.sources())
    assert len(outline.sources()) > 40 + 50
    for request in ("http://", "https://", "@import", "url("):
        assert request not in document
    assert not {"script", "iframe", "object", "form"} & {tag for tag, _ in outline.tags}
    policy = next(a for t, a in outline.tags if t == "meta" and "http-equiv" in a)
    assert (policy["content"] or "").startswith("default-src 'none'")
    assert len(document.encode()) < 2_000_000
    assert document == html.render(page())


def test_the_headline_shows_the_teacher_at_its_best_not_at_one_evaluation() -> None:
    weak = score("teacher", 1, 0.9)
    samples = {**page().samples, html.sample_key(weak): page().samples["teacher-18"]}
    shown = page(evaluation=evaluation(weak, *SCORES), samples=samples)
    head = html.render(shown).split("<section")[0:3]
    assert "teacher, 35 evaluations" in "".join(head)
    assert "teacher, 1 evaluations" not in "".join(head)


def test_hostile_text_stays_text_wherever_it_comes_from() -> None:
    plain = Outline(html.render(page()))
    scores = tuple(
        dataclasses.replace(s, candidate=HOSTILE, sampler=HOSTILE)
        if s.candidate == "isolate"
        else s
        for s in SCORES
    )
    bad = page(
        recipe_name=HOSTILE,
        recipe_yaml=f"name: {HOSTILE}\n",
        tracking_uri=f"sqlite:///{HOSTILE}",
        experiment=HOSTILE,
        stages=tuple(
            dataclasses.replace(s, fingerprint=HOSTILE, state=HOSTILE) for s in page().stages
        ),
        shard=dataclasses.replace(SHARD, class_names=(HOSTILE,) * 10, pixel_digest=HOSTILE),
        registered=dataclasses.replace(
            REGISTERED, name=HOSTILE, alias=HOSTILE, decision=HOSTILE, candidate=HOSTILE
        ),
        evaluation=evaluation(*scores),
        samples={html.sample_key(s): [encode_png(pixels(0)[0])] * 40 for s in scores},
    )
    outline = Outline(html.render(bad))
    assert [tag for tag, _ in outline.tags] == [tag for tag, _ in plain.tags]
    assert all(source.startswith("data:") for source in outline.sources())
    assert not any(name.startswith("on") for _, attrs in outline.tags for name in attrs)
    assert "".join(outline.text).count(HOSTILE) >= 30


def test_every_number_of_the_metric_table_is_on_the_page() -> None:
    document = html.render(page())
    table = document[document.index('<table class="metrics">') :]
    rows = re.findall(r"<tr.*?</tr>", table[: table.index("</table>")])[1:]
    assert len(rows) == len(SCORES) + 1
    for s, row in zip(SCORES, rows, strict=False):
        cells = [re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", row)]
        assert cells[0].startswith(s.candidate)
        assert ("registered" in cells[0]) == (s.candidate == "isolate")
        assert cells[1] == str(s.steps)
        assert cells[2] == f"{s.value:.2f} %"
        assert cells[3] == ("–" if s.std is None else f"{s.std:.2f} %")
        assert cells[4] == f"{min(s.values):.2f} %"
        assert s.agreement is not None
        assert float(cells[5].removesuffix(" %")) == pytest.approx(100 * s.agreement, abs=0.05)
        assert cells[6] == str(s.evaluations)
        assert cells[7] == f"{s.samples:,} × {len(s.values)}"
        assert cells[8] == s.sampler
        assert cells[9] == {1: "80", 2: "80, 0.821", 18: "18 levels"}[s.steps]
        assert cells[10] == s.protocol.digest[:8]
    assert re.search(r"two halves of the real images.*0\.31 %", rows[-1])
    assert "It is not FID" in document


def test_changed_figures_change_the_page_and_the_old_ones_are_gone() -> None:
    scores = tuple(dataclasses.replace(s, values=(46.25,)) for s in SCORES)
    document = html.render(page(evaluation=evaluation(*scores)))
    for s in SCORES:
        assert f"{s.value:.2f} %" not in document
    assert document.count("46.25 %") >= 5


def test_only_the_verified_network_makes_a_page_that_says_fid() -> None:
    def said(features: FeatureProtocol) -> str:
        scores = tuple(
            dataclasses.replace(s, protocol=dataclasses.replace(s.protocol, features=features))
            for s in SCORES
        )
        given = page(reference=reference(features), evaluation=evaluation(*scores))
        document = html.render(given)
        table = document[document.index('<section id="metrics">') :]
        return table[: table.index("</section>")]

    assert "<b>fid</b>" in said(INCEPTION)
    assert "not FID" not in said(INCEPTION)
    assert "46." not in said(INCEPTION)
    other = said(dataclasses.replace(INCEPTION, weights_sha256="0" * 64))
    assert "<b>fd_inception_fid</b>" in other
    assert "It is not FID" in other


def test_each_protocol_is_told_whole_and_once() -> None:
    document = html.render(page())
    details = document[document.index("The protocols, field by field") :]
    details = details[: details.index("</details>")]
    digests = {s.protocol.digest[:8] for s in SCORES}
    assert len(digests) == 3
    for digest in digests:
        assert details.count(f"<code>{digest}</code>") == 1
    for key in ("weights_sha256", "resize", "quantise", "seed_blocks", "n_reference", "engine"):
        assert details.count(f"<dt>{key}</dt>") == 3


def test_metrics_of_sets_get_columns_of_their_own() -> None:
    with_kid = dataclasses.replace(SCORES[1], secondary={"kid": 0.0123, "recall": 0.5})
    scores = (SCORES[0], with_kid, *SCORES[2:])
    document = html.render(page(evaluation=evaluation(*scores)))
    table = document[document.index('<table class="metrics">') :]
    heads = re.findall(r'<th scope="col">(.*?)</th>', table)
    assert heads[6:8] == ["KID", "recall"]
    rows = re.findall(r"<tr.*?</tr>", table[: table.index("</table>")])
    assert len({row.count("<td>") + row.count("<th") for row in rows[1:]}) == 1
    assert "<td>0.0123</td><td>0.500</td>" in rows[2]


def test_lineage_names_every_fingerprint_and_digest_in_full() -> None:
    p = page()
    text = "".join(Outline(html.render(p)).text)
    for stage in p.stages:
        assert stage.fingerprint in text
    for digest in (SHARD.pixel_digest, SHARD.manifest_sha256, REGISTERED.digest):
        assert digest in text
    for t in p.trainings:
        assert t.model.weights_sha256 in text


def test_the_load_line_uses_the_alias_or_else_the_version() -> None:
    text = "".join(Outline(html.render(page())).text)
    assert 'mlflow.pyfunc.load_model("models:/quickstart-digits@champion")' in text
    assert "export MLFLOW_TRACKING_URI=sqlite:////tmp/ws/mlflow.db" in text
    held = page(registered=dataclasses.replace(REGISTERED, alias=None))
    text = "".join(Outline(html.render(held)).text)
    assert 'load_model("models:/quickstart-digits/7")' in text
    assert "@champion" not in text


def test_paths_with_spaces_are_quoted_and_passwords_left_out() -> None:
    text = "".join(Outline(html.render(page(tracking_uri="sqlite:////a b/m.db"))).text)
    assert "MLFLOW_TRACKING_URI='sqlite:////a b/m.db'" in text
    text = "".join(Outline(html.render(page(tracking_uri="http://ada:s3cret@host:5000"))).text)
    assert "s3cret" not in text
    assert "host:5000" in text


def test_without_classes_no_class_is_spoken_of() -> None:
    scores = tuple(dataclasses.replace(s, agreement=None) for s in SCORES)
    document = html.render(page(evaluation=evaluation(*scores)))
    assert "take turns" not in document
    assert 'class="row head"' not in document
    assert "in the right class" not in document


def test_schedules_are_charts_when_they_move_and_facts_when_they_do_not() -> None:
    text = Outline(html.render(page())).text
    captions = [t for t in text if t in ("grid points N(k)", "target decay μ(k)")]
    assert captions == ["target decay μ(k)", "grid points N(k)"]  # distill's mu, isolate's N
    assert "18 throughout" in text
    assert "log scale" in text


def test_images_of_one_class_have_no_class_agreement() -> None:
    single = dataclasses.replace(REFERENCE, accuracy=None)
    scores = tuple(dataclasses.replace(s, agreement=None) for s in SCORES)
    changed = page(reference=single, evaluation=evaluation(*scores))
    document = html.render(changed)
    text = "".join(Outline(document).text)
    assert "of the real images rightly" not in text
    assert "differences of that size say little." in text
    assert "None" not in text
    floor = document[document.index('<tr class="floor">') :]
    assert floor[: floor.index("</tr>")].count("<td>–</td>") == 8  # one more than with classes


def test_times_of_a_mean_flow_are_not_taken_for_noise_levels() -> None:
    flow = {"sampler": "mean_flow", "levels": (1.0, 0.4508511)}
    scores = (*SCORES[:4], score("isolate", 2, 0.03528, **flow))
    document = html.render(page(evaluation=evaluation(*scores)))
    row = next(r for r in re.findall(r"<tr>.*?</tr>", document) if "mean_flow" in r)
    digest = scores[-1].protocol.digest[:8]
    assert row.endswith(
        f"<td>mean_flow</td><td>t = 1, 0.4509</td><td><code>{digest}</code></td></tr>"
    )


SELECTION = html_training.Selection(
    stage="select_ema-isolate",
    of="isolate",
    model=dataclasses.replace(trained("isolate"), ema="power-0.15", weights_sha256="e" * 64),
    candidates=tuple(
        html_training.Candidate(name=name, value=value, chosen=chosen, rebuilt=rebuilt)
        for name, value, chosen, rebuilt in (
            ("power-0.05", 0.612, False, False),
            ("power-0.1", None, False, False),
            ("power-0.15", 0.487, True, True),
        )
    ),
)


def test_the_averages_that_were_compared_are_a_table_with_one_published() -> None:
    document = html.render(page(selections=(SELECTION,)))
    Outline(document)  # well-formed
    section = document[document.index('<section id="ema">') :]
    rows = re.findall(r"<tr>.*?</tr>", section[: section.index("</section>")])[1:]
    cells = [[re.sub("<.*?>", "", c) for c in re.findall(r"<t[dh].*?</t[dh]>", r)] for r in rows]
    assert cells == [
        ["isolate", "power-0.05", "trained", "0.61 %"],
        ["isolate", "power-0.1", "trained", "not finite"],
        ["isolate", "power-0.15 published", "rebuilt from snapshots", "0.49 %"],
    ]
    assert 'id="ema"' not in html.render(page())


SEARCH = html_levels.SigmaSearch(
    stage="search_sigmas-isolate",
    of="isolate",
    model=SearchedModel(
        **{**to_json(trained("isolate")), "weights_sha256": "9" * 64}, searched=((80.0, 1.234),)
    ),
    confirmed=(
        html_levels.Levels(sigmas=(80.0, 0.821), value=0.66, said="default"),
        html_levels.Levels(sigmas=(80.0, 1.234), value=0.52, said="searched", used=True),
    ),
    tried=(
        html_levels.Levels(sigmas=(80.0, 24.65), value=None, said="fd_domain_500"),
        html_levels.Levels(sigmas=(80.0, 1.234), value=0.55, said="fd_domain_500"),
    ),
)


def test_searched_levels_stand_beside_the_default_ones_with_those_in_use_marked() -> None:
    document = html.render(page(searches=(SEARCH,)))
    Outline(document)  # well-formed
    section = document[document.index('<section id="levels">') :]
    rows = re.findall(r"<tr>.*?</tr>", section[: section.index("</section>")])
    cells = [[re.sub("<.*?>", "", c) for c in re.findall(r"<t[dh].*?</t[dh]>", r)] for r in rows]
    head = ["candidate", "steps", "levels σ", "which", "distance"]
    assert cells == [
        head,
        ["isolate", "2", "80, 0.821", "default", "0.66 %"],
        ["isolate", "2", "80, 1.234 used", "searched", "0.52 %"],
        head,
        ["isolate", "2", "80, 24.65", "fd_domain_500", "not finite"],
        ["isolate", "2", "80, 1.234", "fd_domain_500", "0.55 %"],
    ]
    assert 'id="levels"' not in html.render(page())
    hostile = dataclasses.replace(
        SEARCH, of=HOSTILE, tried=tuple(dataclasses.replace(t, said=HOSTILE) for t in SEARCH.tried)
    )
    outline = Outline(html.render(page(searches=(hostile,))))
    assert [tag for tag, _ in outline.tags] == [tag for tag, _ in Outline(document).tags]
    assert "".join(outline.text).count(HOSTILE) == 6


def test_the_average_of_each_training_is_a_fact() -> None:
    assert html.render(page()).count("<dt>EMA</dt><dd>power-0.1</dd>") == 3


def test_names_in_the_table_of_averages_stay_text() -> None:
    candidates = tuple(dataclasses.replace(c, name=HOSTILE) for c in SELECTION.candidates)
    hostile = dataclasses.replace(SELECTION, of=HOSTILE, candidates=candidates)
    outline = Outline(html.render(page(selections=(hostile,))))
    plain = Outline(html.render(page(selections=(SELECTION,))))
    assert [tag for tag, _ in outline.tags] == [tag for tag, _ in plain.tags]
    assert "".join(outline.text).count(HOSTILE) == 6


# --- the step ------------------------------------------------------------------------------------


class LocalContext(StepContext):
    """Inputs are plain folders here, without commit records."""

    def fetch(self, committed: Committed[Any], name: str) -> Path:
        return Path(committed.url) / name


def _more(name: str) -> object:
    if name.startswith("search_sigmas-"):
        model = trained(name.removeprefix("search_sigmas-"))
        return SearchedModel(**to_json(model), searched=((80.0, 1.5),))
    if not name.startswith("tune-"):
        return trained(name.removeprefix("select_ema-"))
    return Tuned(
        sweep="mine",
        stage=name.removeprefix("tune-"),
        trials=2,
        winner=0,
        settings=(),
        ema="power-0.1",
        trained=None,
        metric="fd_domain_500",
        value=1.0,
        spent=0.5,
    )


def finished(tmp_path: Path, *more: str) -> dict[str, Committed[Any]]:
    """Inputs of the step; `more` are those of truncate and select_ema."""

    def done(step: str, value: object) -> Committed[Any]:
        folder = tmp_path / step
        folder.mkdir()
        return Committed(
            step=step, fingerprint=step[0] * 64, url=str(folder), seconds=12.5, value=value
        )

    inputs = {
        "shard": done("shard", SHARD),
        "reference": done("reference", REFERENCE),
        "teacher": done("teacher", trained("teacher")),
        "distill": done("distill", trained("distill")),
        "isolate": done("isolate", trained("isolate")),
        "evaluate": done("evaluate", page().evaluation),
        "register": done("register", REGISTERED),
        **{name: done(name, _more(name)) for name in more},
    }
    for name in more:
        if name.startswith("tune-"):
            text = json.dumps(
                to_json(dataclasses.replace(sweeps.ordinary(4), stage=name.removeprefix("tune-")))
            )
            (tmp_path / name / tune.SUMMARY).write_text(text)
        if name.startswith("select_ema-"):
            rows = [{"name": "power-0.1", "value": 0.61, "chosen": False}]
            rows += [{"name": "power-0.15", "value": 0.52, "chosen": True}]
            (tmp_path / name / select_ema.TABLE).write_text(json.dumps(rows))
        if name.startswith("search_sigmas-"):
            finalists = [{"sigmas": [80.0, s], "value": s / 2} for s in (1.75, 1.5)]
            decided = {"default": [80.0, 1.75], "kept": [80.0, 1.5], "confirmed": finalists}
            row = {"sigmas": [80.0, 1.5], "values": [0.9], "metric": "fd_domain_1k"}
            measured = [{**row, "confirms": False}, {**row, "confirms": True}]
            table = {"decided": [decided], "measured": measured}
            (tmp_path / name / search_sigmas.TABLE).write_text(json.dumps(table))
    for stage in {"teacher", "distill", "isolate", "truncate"} & set(inputs):
        lines = "".join(json.dumps(row) + "\n" for row in curve(stage))
        (tmp_path / stage / "curve.jsonl").write_text(lines)
    stacks = {html.sample_key(s): pixels(i) for i, s in enumerate(SCORES)}
    np.savez(tmp_path / "evaluate" / "samples.npz", **stacks)
    for s in SCORES:
        sheet = encode_png(grid(stacks[html.sample_key(s)], 10, 1, 5))
        (tmp_path / "evaluate" / s.grid).write_bytes(sheet)
    return inputs


def context(tmp_path: Path, *more: str) -> LocalContext:
    out = tmp_path / "out"
    out.mkdir()
    return LocalContext(
        step="report",
        fingerprint="f" * 64,
        out=out,
        work=str(tmp_path / "work"),
        workspace=str(tmp_path),
        tracking_uri="sqlite:////tmp/ws/mlflow.db",
        experiment="quickstart",
        cluster=Cluster(),
        history=tuple(
            StepHistory(s, "cached" if i < 3 else "ran", 12.5, s[0] * 64)
            for i, s in enumerate((*STEPS, *more))
        ),
    )


def config(isolate_from: str, truncates: str | None = None) -> report.ReportConfig:
    return report.ReportConfig(
        recipe_name="quickstart",
        recipe_yaml="name: quickstart\n",
        isolate_from=isolate_from,
        truncates=truncates,
    )


def test_the_step_writes_one_page_whose_images_are_the_samples(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    result = report.run(ctx, config("scratch"), **finished(tmp_path))
    assert [path.name for path in ctx.out.iterdir()] == [result.file] == ["report.html"]
    document = (ctx.out / result.file).read_bytes()
    assert result.bytes == len(document) < 2_000_000
    outline = Outline(document.decode())
    assert b'class="edge dashed"' not in document
    images = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))
        for source in outline.sources()
        if source.startswith("data:image/png")
    ]
    np.testing.assert_array_equal(images[:40], pixels(3)[..., 0])  # isolate-1 is the headline
    sheet = np.array(images[40:90]).reshape(5, 10, 8, 8)
    for row in range(5):
        np.testing.assert_array_equal(sheet[row], pixels(row)[:10, ..., 0])
    text = "".join(outline.text)
    assert "4 of 7 stages ran, 50.0 s of work" in text


def test_isolate_from_the_teachers_weights_hangs_on_the_teacher_by_a_dashed_edge(
    tmp_path: Path,
) -> None:
    ctx = context(tmp_path)
    report.run(ctx, config("teacher"), **finished(tmp_path))
    document = (ctx.out / "report.html").read_text()
    assert document.count('class="edge dashed"') == 2  # wide and tall


def edges(tmp_path: Path, ctx: LocalContext, how: report.ReportConfig, *more: str) -> set[str]:
    """The arrows of the drawing, "from > to", read off the stages handed to it."""
    drawn: list[svg.Stage] = []
    inputs = finished(tmp_path, *more)
    keep = html.render
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "render", lambda page: [drawn.extend(page.stages), keep(page)][1])
        report.run(ctx, how, **inputs)
    assert {stage.name for stage in drawn} == {*inputs, "report"}
    names = [stage.name for stage in drawn]
    for stage in drawn:  # in an order in which they can be laid out
        assert all(names.index(name) < names.index(stage.name) for name in stage.inputs)
    return {f"{name} > {stage.name}" for stage in drawn for name in stage.inputs}


SPINE = {
    *("shard > reference", "shard > teacher", "teacher > distill", "shard > isolate"),
    *("evaluate > register", "register > report"),
}


def test_truncate_is_drawn_behind_its_first_stage_with_a_curve_of_its_own(tmp_path: Path) -> None:
    ctx = context(tmp_path, "truncate")
    assert edges(tmp_path, ctx, config("scratch", "isolate"), "truncate") == {
        *SPINE,
        *("isolate > truncate", "truncate > evaluate"),
        *("reference > evaluate", "distill > evaluate"),
    }
    document = (ctx.out / "report.html").read_text()
    for stage in ("teacher", "distill", "isolate", "truncate"):
        assert f"<h3>{stage}</h3>" in document


def test_selections_are_drawn_between_the_candidates_and_evaluate(tmp_path: Path) -> None:
    more = ("truncate", "select_ema-distill", "select_ema-isolate", "select_ema-truncate")
    ctx = context(tmp_path, *more)
    drawn = edges(tmp_path, ctx, config("scratch", "distill"), *more)
    assert drawn == {
        *SPINE,
        "distill > truncate",
        *(f"{c} > select_ema-{c}" for c in ("distill", "isolate", "truncate")),
        *(f"reference > {name}" for name in more[1:]),
        *(f"{name} > evaluate" for name in more[1:]),
    }
    document = (ctx.out / "report.html").read_text()
    assert document.count("rebuilt from snapshots") == 3
    text = "".join(Outline(document).text)
    assert "7 of 11 stages ran" not in text
    assert "8 of 11 stages ran" in text
    for name in more:
        assert name in text


@pytest.mark.parametrize("selecting", [True, False])
def test_searches_of_levels_are_drawn_behind_what_is_selected(
    tmp_path: Path, selecting: bool
) -> None:
    candidates = ("distill", "isolate", "truncate")
    selections = tuple(f"select_ema-{c}" for c in candidates) if selecting else ()
    searches = tuple(f"search_sigmas-{c}" for c in candidates)
    more = ("truncate", *selections, *searches)
    ctx = context(tmp_path, *more)
    drawn = edges(tmp_path, ctx, config("scratch", "distill"), *more)
    first = selections or searches
    assert drawn == {
        *SPINE,
        "distill > truncate",
        *(f"{c} > {name}" for c, name in zip(candidates, first, strict=True)),
        *(f"reference > {name}" for name in first),
        *(f"{a} > {b}" for a, b in zip(selections, searches, strict=False)),
        *(f"{name} > evaluate" for name in searches),
    }
    document = (ctx.out / "report.html").read_text()
    section = document[document.index('<section id="levels">') :]
    assert section[: section.index("</section>")].count("80, 1.5 <span") == 3
    assert section.count("fd_domain_1k") == 3


def test_a_sweep_is_drawn_before_its_stage_and_has_a_section(tmp_path: Path) -> None:
    ctx = context(tmp_path, "tune-distill", "tune-isolate")
    how = dataclasses.replace(config("scratch"), after_distill=("tune-isolate",))
    drawn = edges(tmp_path, ctx, how, "tune-distill", "tune-isolate")
    assert drawn >= {
        *("reference > tune-distill", "teacher > tune-distill", "tune-distill > distill"),
        *("reference > tune-isolate", "distill > tune-isolate", "tune-isolate > isolate"),
    }
    html_page = (ctx.out / report.FILE).read_text()
    assert 'id="sweep-distill"' in html_page
    assert 'id="sweep-isolate"' in html_page
