"""What the Space's page says, without a browser: strangers' words are words, and who is not signed in is told."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
from markdown_it import MarkdownIt

from hfdetox.evidence.results import ScanReport
from tests.evidence import made
from tests.written_report import written_report

pytest.importorskip("gradio", reason="the Space's extra is not installed: pip install 'hfdetox[space]'")

EVIL = "<script>alert(1)</script> <img src=x onerror=alert(1)> ![x](http://evil.example/x.png) a|b `c` $$d$$ {{e}} ${f}"


@pytest.fixture
def page(work: ModuleType) -> Iterator[ModuleType]:
    """The module of the page."""
    sys.modules.pop("app", None)
    yield importlib.import_module("app")
    sys.modules.pop("app", None)


def html(markdown: str) -> str:
    """Return the Markdown as a parser shows it that takes HTML in it for HTML."""
    return str(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))


def check_words(shown: str) -> None:
    """Fail where a stranger's word became HTML, a picture, a link, or a cell of a table."""
    assert "<script" not in shown
    assert "<img" not in shown
    assert "<a " not in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    assert "a|b `c`" in shown


def test_a_scan_of_strange_labels_is_words(page: ModuleType) -> None:
    evidence, report = made.evidence(finished=False), written_report()
    assert evidence.before is not None
    scores = {name: replace(one, label=EVIL) for name, one in evidence.before.scores.items()}
    scan = replace(evidence.before, label=EVIL, why=EVIL, scores=scores)
    found = ScanReport(report.model, report.dataset, "before", scan, None,
                       {name: replace(one, class_name=EVIL) for name, one in evidence.reconstructed.items()}, None,
                       [EVIL])  # fmt: skip
    shown = html(page.describe_scan(found))
    check_words(shown)
    assert shown.count("<td>") == 4 * len(scores) + 2
    assert "suspicious" in shown.partition("</h2>")[0]


def test_a_report_of_strange_names_is_words(page: ModuleType) -> None:
    report, evidence = written_report(), made.evidence()
    assert report.before is not None
    assert report.after is not None
    states = [replace(state, triggers={EVIL: state.triggers["badnets"]}) for state in (report.before, report.after)]
    made_of = {name: replace(one, class_name=EVIL) for name, one in evidence.reconstructed.items()}
    shown = html(page.describe_report(replace(report, before=states[0], after=states[1], warnings=[EVIL],
                                              evidence=replace(evidence, reconstructed=made_of))))  # fmt: skip
    check_words(shown)
    assert shown.count("<td>") == 3 * 3
    rates = ("93.5 % (91.2–95.3)", "91.5 % (89.0–93.6)", "95.5 % (93.0–97.3)", "1.2 % (0.4–2.9)", "97.2 %", "1.8 %")
    for rate in rates:
        assert rate in shown


def test_who_is_not_signed_in_publishes_nothing(page: ModuleType, tmp_path) -> None:
    assert page.publish(tmp_path, "mine", True, None).startswith("**Not done.** Sign in first")


def test_what_a_push_says_is_a_line_each_without_options(page: ModuleType, tmp_path, monkeypatch) -> None:
    said = f"published: {EVIL}\npictures of images stay here, for x is private: a.png; --publish-images publishes them"
    monkeypatch.setattr(page.work, "publish", lambda *_, **__: said)
    shown = page.publish(tmp_path, "mine", True, page.gr.OAuthToken("t", "", 0))
    assert "publish-images" not in shown
    assert html(shown).count("<p>") == 2
    check_words(html(shown))
