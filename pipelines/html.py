"""The report: typed values in, one self-contained HTML page out (no script, no request)."""

import re
import shlex
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from pipelines import html_levels, html_metrics, html_sweep, html_training, svg
from pipelines.artifacts import (
    Evaluation,
    ReferenceStats,
    RegisteredModel,
    Score,
    ShardSet,
)
from pipelines.html_levels import SigmaSearch
from pipelines.html_page import document
from pipelines.html_training import Selection, Training, css_class
from pipelines.svg import Stage, duration
from pipelines.sweep_summary import SweepSummary


@dataclass(frozen=True, kw_only=True)
class Page:
    """All that the report says. Images are PNG bytes, so that this file knows no pixels."""

    recipe_name: str
    recipe_yaml: str
    tracking_uri: str
    experiment: str
    stages: tuple[Stage, ...]
    shard: ShardSet
    reference: ReferenceStats
    trainings: tuple[Training, ...]
    sweeps: tuple[SweepSummary, ...] = ()
    selections: tuple[Selection, ...] = ()
    searches: tuple[SigmaSearch, ...] = ()
    evaluation: Evaluation
    registered: RegisteredModel
    samples: Mapping[str, Sequence[bytes]]  # "{candidate}-{steps}" -> one PNG per sample
    grids: Mapping[str, bytes]  # Score.grid -> that file


def sample_key(score: Score) -> str:
    return f"{score.candidate}-{score.steps}"


def model_uri(registered: RegisteredModel) -> str:
    """By alias when it holds one, else by version."""
    if registered.alias is None:
        return f"models:/{registered.name}/{registered.version}"
    return f"models:/{registered.name}@{registered.alias}"


def render(page: Page) -> str:
    """The whole document. Deterministic: the same page gives the same text."""
    title = f"{page.registered.name} {page.registered.version} · cmforge"
    body = "\n".join(
        [
            _headline(page),
            _use(page),
            _workflow(page),
            _sheet(page),
            html_metrics.section(page.evaluation, page.reference, page.registered.candidate),
            *(html_sweep.section(summary) for summary in page.sweeps),
            html_training.curves(page.trainings),
            html_training.selections(page.selections, page.evaluation.text),
            html_levels.section(page.searches, page.evaluation.text),
            _lineage(page),
            _recipe(page),
        ]
    )
    return document(title, body)


# --- sections ------------------------------------------------------------------------------------


def _headline(page: Page) -> str:
    r, shard, evaluation = page.registered, page.shard, page.evaluation
    text = evaluation.text
    one, two = evaluation.score(r.candidate, 1), evaluation.score(r.candidate, 2)
    teachers = [s for s in evaluation.scores if s.candidate == "teacher"]
    teacher = max(teachers, key=lambda s: s.evaluations, default=None)
    kind, said = ("pill held", "no alias") if r.alias is None else ("pill", f"@{r.alias}")
    alias = f'<span class="{kind}">{escape(said)}</span>'
    stats = [
        _stat("one step", text(one.value), _detail(evaluation, one), r.candidate),
        _stat("two steps", text(two.value), _detail(evaluation, two), r.candidate),
    ]
    if teacher is not None:
        called = f"teacher, {teacher.evaluations} evaluations"
        below = _detail(evaluation, teacher)
        stats.append(_stat(called, text(teacher.value), below, "teacher"))
    if evaluation.floor is not None:
        floor = text(evaluation.floor)
        stats.append(_stat("real images, floor", floor, "two halves of the data", ""))
    made = f"learned from {shard.count:,} real ones"
    if any(t.stage == r.candidate and t.model.source is not None for t in page.trainings):
        made = f"adopted as it was, measured against {shard.count:,} real ones"
    tiles = page.samples[sample_key(one)]
    soft, smoothed = _softness(shard)
    turns = "" if one.agreement is None else f" The {shard.num_classes} classes take turns."
    told, ink = f"{len(tiles)} samples", "grey" if shard.channels == 1 else "colour"
    return (
        '<header>\n<p class="over">cmforge report '
        f"<span>recipe {escape(page.recipe_name)}</span></p>\n"
        f'<h1>{escape(r.name)} <small>version {r.version}</small> {alias}</h1>\n<p class="lede">'
        f"A generator of {shard.size} × {shard.size} {ink} images, one "
        f"network call each, {made}. The registered candidate is "
        f'<strong class="{css_class(r.candidate)}">{escape(r.candidate)}</strong>: '
        f'{escape(r.decision.rstrip("."))}.</p>\n<dl class="stats">{"".join(stats)}</dl>\n'
        f'<figure class="hero{soft}"><div class="tiles" role="img" aria-label="{told}">'
        f"{_images(tiles)}</div>\n<figcaption>The first {len(tiles)} samples of the registered "
        "model in one step, none picked, none left out."
        f"{turns}{smoothed}</figcaption></figure>\n</header>"
    )


def _use(page: Page) -> str:
    uri, r, shard = model_uri(page.registered), page.registered, page.shard
    export = f"export MLFLOW_TRACKING_URI={shlex.quote(_no_password(page.tracking_uri))}"
    python = (
        "import mlflow\n\n"
        f'model = mlflow.pyfunc.load_model("{uri}")\n'
        'asked = {"steps": 1, "seed": 0, "output": "uint8"}\n'
        'images = model.predict({"num_samples": [40]}, params=asked)'
        f"  # [40, {shard.size}, {shard.size}, {shard.channels}]"
    )
    shell = f"cmforge sample {shlex.quote(uri)} \\\n    --num 40 --steps 1 --out samples.png"
    return (
        '<section id="use">\n<h2>Use it</h2>\n'
        f"<p>{escape(r.name)} loads wherever mlflow and torch are installed.</p>\n"
        f'<div class="pair"><figure><figcaption>Shell</figcaption>'
        f"<pre><code>{escape(export)}\n{escape(shell)}</code></pre></figure>\n"
        f"<figure><figcaption>Python, with the same export</figcaption>"
        f"<pre><code>{escape(python)}</code></pre></figure></div>\n</section>"
    )


def _workflow(page: Page) -> str:
    known = [s for s in page.stages if s.state != "now"]
    ran = [s for s in known if s.state == "ran"]
    spent = sum(s.seconds or 0.0 for s in ran)
    rest = (
        "; the others were taken from the workspace, their times were spent earlier"
        if len(ran) < len(known)
        else ""
    )
    dashed = any(s.dashed for s in page.stages)
    note = " A dashed edge lends starting weights, not a loss." if dashed else ""
    return (
        '<section id="workflow">\n<h2>Workflow</h2>\n'
        f"<p>{len(ran)} of {len(known)} stages ran, {duration(spent)} of work{rest}. "
        f"Edges that follow from others are left out.{note}</p>\n"
        f"<figure>{svg.dag(page.stages)}{svg.dag(page.stages, vertical=True)}</figure>\n</section>"
    )


def _sheet(page: Page) -> str:
    columns = min(10, *(len(tiles) for tiles in page.samples.values()))
    names = page.shard.class_names
    header = ""
    if any(s.agreement is not None for s in page.evaluation.scores):
        cells = (f"<span>{escape(names[i % len(names)])}</span>" for i in range(columns))
        header = (
            '<div class="row head" aria-hidden="true"><div class="who">class</div>'
            f'<div class="tiles">{"".join(cells)}</div></div>'
        )
    rows = []
    for score in page.evaluation.scores:
        images = _images(page.samples[sample_key(score)][:columns])
        told = f"{columns} samples, {score.candidate}, {_steps(score)}"
        rows.append(
            f'<div class="row"><div class="who {css_class(score.candidate)}"><b>'
            f"{escape(score.candidate)}</b><span>{_steps(score)}</span>"
            f"<span>{page.evaluation.text(score.value)}</span></div>"
            f'<div class="tiles" role="img" aria-label="{escape(told)}">{images}</div></div>'
        )
    whole = "".join(
        f"<figure><figcaption>{escape(s.candidate)}, {_steps(s)}</figcaption>"
        f'<img class="grid" alt="{escape(s.candidate)}, {_steps(s)}" '
        f'src="{_data_uri(page.grids[s.grid])}"></figure>'
        for s in page.evaluation.scores
        if s.grid in page.grids
    )
    more = (
        f'<details><summary>All saved samples</summary><div class="grids">{whole}</div></details>'
    )
    return (
        '<section id="samples">\n<h2>The same noise, down each column</h2>\n'
        "<p>Every column starts from one noise image. Where a candidate has learned the teacher's "
        "own map, it paints the teacher's image with a fraction of the evaluations.</p>\n"
        f'<div class="sheet{_softness(page.shard)[0]}" style="--columns:{columns}">'
        f"{header}{''.join(rows)}</div>\n"
        f"{more if whole else ''}\n</section>"
    )


def _lineage(page: Page) -> str:
    said: dict[str, list[tuple[str, str]]] = {
        "shard": [
            ("pixels", page.shard.pixel_digest),
            ("manifest", page.shard.manifest_sha256),
            ("shards", f"{page.shard.num_shards}, {page.shard.bytes:,} bytes"),
        ],
        "register": [
            ("model", page.registered.digest),
            ("version", f"{page.registered.name} {page.registered.version}"),
            ("decision", page.registered.decision),
            ("experiment", page.experiment),
        ],
    }
    made = [(t.stage, t.model) for t in page.trainings]
    made += [(s.stage, s.model) for s in page.selections]
    made += [(s.stage, s.model) for s in page.searches]
    for stage_name, model in made:
        said.setdefault(stage_name, []).append(("weights", model.weights_sha256))
        if model.source is not None:
            said[stage_name].append(("from", model.source))
    rows = []
    for stage in page.stages:
        pairs = [("fingerprint", stage.fingerprint), *said.get(stage.name, [])]
        listed = "".join(
            f'<div class="{k}"><dt>{k}</dt><dd>{escape(v)}</dd></div>' for k, v in pairs
        )
        rows.append(f'<tr><th scope="row">{escape(stage.name)}</th><td><dl>{listed}</dl></td></tr>')
    return (
        '<section id="lineage">\n<h2>Lineage</h2>\n'
        "<p>Each fingerprint covers the stage's configuration and the fingerprints before it; the "
        "digests are SHA-256 of what came out.</p>\n"
        f'<table class="lineage"><tbody>{"".join(rows)}</tbody></table>\n</section>'
    )


def _recipe(page: Page) -> str:
    return (
        '<section id="recipe">\n<h2>Recipe</h2>\n<p>Everything that decides what comes out.</p>\n'
        f"<details><summary>{escape(page.recipe_name)}, resolved</summary>"
        f"<pre><code>{escape(page.recipe_yaml)}</code></pre></details>\n</section>"
    )


# --- pieces --------------------------------------------------------------------------------------


def _stat(name: str, value: str, below: str, candidate: str) -> str:
    said = f"<dt>{escape(name)}</dt><dd>{value}</dd><dd>{escape(below)}</dd>"
    return f'<div class="{css_class(candidate)}">{said}</div>'


def _detail(evaluation: Evaluation, score: Score) -> str:
    agreement = html_metrics.share(score.agreement)
    right = "" if score.agreement is None else f"{agreement} in the right class\n"
    return f"{right}{score.protocol.name}{html_metrics.spread(evaluation, score)}"


def _steps(score: Score) -> str:
    if score.sampler == "heun":
        return f"{score.evaluations} evaluations"
    return f"{score.steps} step{'s' if score.steps > 1 else ''}"


def _softness(shard: ShardSet) -> tuple[str, str]:
    """Class and caption: below 16 pixels, hard-edged squares hide the strokes from the eye."""
    if shard.size >= 16:
        return "", ""
    return " soft", f" Each has {shard.size} × {shard.size} pixels, enlarged smoothly."


def _images(tiles: Sequence[bytes]) -> str:
    return "".join(f'<img alt="" src="{_data_uri(tile)}">' for tile in tiles)


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + b64encode(png).decode("ascii")


def _no_password(uri: str) -> str:
    """scheme://user:secret@host -> scheme://***@host: reports are passed around."""
    return re.sub(r"//[^/@]*@", "//***@", uri)
