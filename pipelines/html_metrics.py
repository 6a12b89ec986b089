"""The report's table of numbers, and under which protocol each came about."""

from html import escape

from pipelines.artifacts import Evaluation, ReferenceStats, Score
from pipelines.html_training import css_class
from pipelines.svg import figure

# How the metrics of sets are called; what is not here is not shown.
SECONDARY = {
    "kid": "KID",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "fd_infinity": "FD∞",
}


def section(evaluation: Evaluation, reference: ReferenceStats, winner: str) -> str:
    """All scores, the floor, and the protocols."""
    shown = [k for k in SECONDARY if any(k in s.secondary for s in evaluation.scores)]
    rows = [_row(evaluation, score, shown, winner) for score in evaluation.scores]
    if evaluation.floor is not None:
        blanks = "<td>–</td>" * (len(shown) + 1)
        count = "–" if reference.count is None else f"{reference.count:,}"
        rows.append(
            '<tr class="floor"><th scope="row">two halves of the real images</th><td>–</td>'
            f"<td><b>{evaluation.text(evaluation.floor)}</b></td><td>–</td><td>–</td>"
            f"<td>{share(reference.accuracy)}</td>{blanks}"
            f"<td>{count}</td><td>–</td><td>–</td><td>–</td></tr>"
        )
    heads = ["candidate", "steps", "mean", "std", "lowest", "class agreement"]
    heads += [SECONDARY[key] for key in shown]
    heads += ["evaluations", "samples", "sampler", "levels σ", "protocol"]
    head = "".join(f'<th scope="col">{h}</th>' for h in heads)
    return (
        '<section id="metrics">\n<h2>Measured</h2>\n'
        f"<p>{_about(evaluation, reference)}</p>\n"
        f'<div class="scroll"><table class="metrics"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>\n{_protocols(evaluation)}\n</section>"
    )


def _row(evaluation: Evaluation, s: Score, shown: list[str], winner: str) -> str:
    mark = ' <span class="pill">registered</span>' if s.candidate == winner else ""
    std = "–" if s.std is None else evaluation.text(s.std)
    also = "".join(
        f"<td>{figure(s.secondary[key]) if key in s.secondary else '–'}</td>" for key in shown
    )
    return (
        f'<tr><th scope="row"><i class="dot {css_class(s.candidate)}"></i>'
        f"{escape(s.candidate)}{mark}</th>"
        f"<td>{s.steps}</td><td><b>{evaluation.text(s.value)}</b></td><td>{std}</td>"
        f"<td>{evaluation.text(s.lowest)}</td><td>{share(s.agreement)}</td>{also}"
        f"<td>{s.evaluations}</td>"
        f"<td>{s.samples:,} × {len(s.values)}</td><td>{escape(s.sampler)}</td>"
        f"<td>{_levels(s)}</td><td><code>{s.protocol.digest[:8]}</code></td></tr>"
    )


def _about(evaluation: Evaluation, reference: ReferenceStats) -> str:
    features = evaluation.features
    net = (
        "a small classifier trained on these very shards"
        if features.unit
        else f"{escape(features.extractor)} (weights {features.weights_sha256[:12]})"
    )
    text = (
        f"<b>{escape(evaluation.metric)}</b> is a Fréchet distance between real and generated "
        f"images in {features.dim} features of {net}, the mean over seed blocks of so many samples."
    )
    if evaluation.metric != "fid":
        text += " It is not FID, and no published FID compares with it."
    if features.unit:
        text += (
            " It is 100 × distance / total variance of the real features "
            f"({figure(reference.total_variance, 4)})."
        )
    if evaluation.floor is not None:
        text += (
            f" Two halves of the real images lie {evaluation.text(evaluation.floor)} apart, so "
            "differences of that size say little."
        )
    if reference.accuracy is not None:
        text += (
            " Class agreement is the share of samples the classifier puts into the class asked "
            f"for; it names {share(reference.accuracy)} of the real images rightly."
        )
    biased = dict.fromkeys(s.protocol.bias for s in evaluation.scores if s.protocol.bias)
    return f"{text} Only rows of one protocol compare. {'; '.join(biased)}".rstrip()


def _protocols(evaluation: Evaluation) -> str:
    """Each protocol whole, once."""
    found = {s.protocol.digest: s.protocol for s in evaluation.scores}
    rows = []
    for digest, protocol in found.items():
        listed = "".join(
            f"<div><dt>{escape(key)}</dt><dd>{escape(str(value))}</dd></div>"
            for key, value in protocol.flat().items()
        )
        rows.append(
            f'<tr><th scope="row"><code>{digest[:8]}</code> {escape(protocol.name)}</th>'
            f"<td><dl>{listed}</dl></td></tr>"
        )
    table = f'<table class="lineage"><tbody>{"".join(rows)}</tbody></table>'
    return f"<details><summary>The protocols, field by field</summary>{table}</details>"


def spread(evaluation: Evaluation, score: Score) -> str:
    """ " ± 0.02 %", or nothing for a single seed block."""
    return "" if score.std is None else f" ± {evaluation.text(score.std)}"


def share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _levels(score: Score) -> str:
    if not 0 < len(score.levels) <= 3:
        return f"{score.protocol.steps} levels"
    listed = ", ".join(f"{level:.4g}" for level in score.levels)
    return f"t = {listed}" if score.sampler == "mean_flow" else listed
