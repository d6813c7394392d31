"""A report as one HTML file that asks for nothing: the card's own text, its pictures, and a table of every class."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources

from markdown_it import MarkdownIt

from hfdetox.reporting.card import retarget_card, templates
from hfdetox.reporting.card_data import split_card
from hfdetox.reporting.markdown import SOURCE_MARK
from hfdetox.reporting.report import RunReport


def build_page(
    report: RunReport, card: str, *, title: str, labels: Sequence[str] | None, pictures: Mapping[str, bytes]
) -> str:
    """Return the HTML of a report.

    Args:
        report: the numbers: the text is made of it anew, as the card's was.
        card: the card, of which licence and names of targets are taken; the source's own text is left out.
        title: of the page.
        labels: the model's; None: classes are shown as indices.
        pictures: the PNG files by their path in the output, such as `plots/training.png`.
    """
    own = card.partition(f"\n{SOURCE_MARK}\n")[0]
    text = split_card(retarget_card(own, report, repo_id=report.output.pushed_to, plots=sorted(pictures)))[1]
    states = {"Before": report.before, "After": report.after}
    classes = {state: found.classes.accuracies for state, found in states.items() if found and found.classes}
    style, script = (resources.files("hfdetox.cards").joinpath(f"report.{kind}").read_text("utf-8")
                     for kind in ("css", "js"))  # fmt: skip
    # what is before the second heading are the results, to which the classes belong
    opening, *chapters = _html(text, pictures).split("<h2>")
    return templates().get_template("report.html.jinja").render(
        title=title, version=report.hfdetox_version, results="<h2>".join([opening, *chapters[:1]]),
        chapters=["<h2>" + chapter for chapter in chapters[1:]], states=_heads(list(classes)),
        classes=_rows(list(classes.values()), labels), style=style, style_hash=_hash(style), script=script,
        script_hash=_hash(script),
    )  # fmt: skip


def _heads(states: list[str]) -> list[str]:
    return [*states, "Change"] if len(states) == 2 else states


def _rows(states: Sequence[Sequence[float | None]], labels: Sequence[str] | None) -> list[list[str]]:
    """Return name, accuracies in percent and, of two states, the difference in points of every class."""
    rows = []
    for index, values in enumerate(zip(*states, strict=True)):
        cells = ["–" if value is None else f"{100 * value:.1f}" for value in values]
        if len(values) == 2:
            before, after = values
            change = "–" if before is None or after is None else f"{100 * (after - before):+.1f}"
            cells.append("0.0" if change in ("+0.0", "-0.0") else change.replace("-", "−"))
        rows.append([labels[index] if labels and index < len(labels) else str(index), *cells])
    return rows


def _html(text: str, pictures: Mapping[str, bytes]) -> str:
    """Return Markdown as HTML: raw HTML in it is shown as text, and pictures are data or left out."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(text)
    for block in tokens:
        for token in block.children or []:
            if token.type == "image":
                # what is no picture of the output would be asked of somebody
                data = base64.b64encode(pictures.get(str(token.attrs["src"]), b"")).decode()
                token.attrs["src"] = f"data:image/png;base64,{data}"
    return str(parser.renderer.render(tokens, parser.options, {}))


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
