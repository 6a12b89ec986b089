"""The report's section on noise levels: what each search found, against the default levels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from pipelines.artifacts import SearchedModel
from pipelines.html_training import css_class


@dataclass(frozen=True, kw_only=True)
class Levels:
    """A list that was confirmed, or measured on the way; None: the distance is not finite."""

    sigmas: tuple[float, ...]
    value: float | None
    said: str  # "default", "searched", ...
    used: bool = False


@dataclass(frozen=True, kw_only=True)
class SigmaSearch:
    """What a step `search_sigmas` decided between, and the model it made."""

    stage: str
    of: str  # the training stage
    model: SearchedModel
    confirmed: tuple[Levels, ...]
    tried: tuple[Levels, ...]  # on the smaller sample


def section(searches: Sequence[SigmaSearch], text: Callable[[float], str]) -> str:
    """The finalists of every search and all that was tried, or nothing where there was none."""
    if not searches:
        return ""
    final = [_row(search, one, text) for search in searches for one in search.confirmed]
    tried = [_row(search, one, text) for search in searches for one in search.tried]
    return (
        '<section id="levels">\n<h2>Noise levels of several steps</h2>\n'
        "<p>Levels were searched one after the other, for samples nearest the real images. The "
        "best two had to beat the default levels on a larger sample of other noise, or the default "
        "stays. A model samples at the levels that are marked.</p>\n"
        f"{_table(final)}\n"
        f"<details><summary>All {len(tried)} lists that were tried, on the smaller sample</summary>"
        f"{_table(tried)}</details>\n</section>"
    )


def _table(rows: Sequence[str]) -> str:
    heads = ("candidate", "steps", "levels σ", "which", "distance")
    head = "".join(f'<th scope="col">{h}</th>' for h in heads)
    return (
        f'<div class="scroll"><table class="metrics"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(search: SigmaSearch, one: Levels, text: Callable[[float], str]) -> str:
    mark = ' <span class="pill">used</span>' if one.used else ""
    score = "not finite" if one.value is None else text(one.value)
    listed = ", ".join(f"{sigma:.4g}" for sigma in one.sigmas)
    return (
        f'<tr><th scope="row"><i class="dot {css_class(search.of)}"></i>{escape(search.of)}</th>'
        f"<td>{len(one.sigmas)}</td><td>{listed}{mark}</td><td>{escape(one.said)}</td>"
        f"<td><b>{score}</b></td></tr>"
    )
