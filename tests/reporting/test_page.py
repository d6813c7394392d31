"""`hfdetox report`: one HTML file that asks for nothing, shows strangers' words as words, and sorts in a browser."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hfdetox.cli import app as cli
from hfdetox.evaluation.results import ClassAccuracies, Rate
from hfdetox.reporting.card import build_card
from hfdetox.reporting.page import _rows
from tests.attacked import attack_report
from tests.browser import browser
from tests.conftest import REPOSITORY
from tests.image_data import png
from tests.written_report import SOURCE, written_report

EVIL = "<script>document.title = 'owned'</script>"
LABELS = ("10 plane", EVIL, "9 bird|nest")
PNG = png(0, side=1)


def classes(*values: float | None) -> ClassAccuracies:
    return ClassAccuracies(list(values), 0, Rate(0.5, 1, 2, (0.1, 0.9)), 0.1)


def output(folder: Path) -> Path:
    """Write an output folder whose names are a stranger's."""
    made = written_report()
    report = replace(
        made,
        model=replace(made.model, id=f"someone/{EVIL}", revision=None),
        before=replace(made.before, classes=classes(0.9, 1.0, None)),
        after=replace(made.after, classes=classes(0.875, 0.5, None)),
        warnings=[f"{EVIL} <img src=http://evil.example/x.png> ![x](http://evil.example/y.png)"],
    )
    plots = ["plots/before_after.png", "plots/samples.png"]
    (folder / "plots").mkdir(parents=True)
    for name in plots:
        (folder / name).write_bytes(PNG)
    card = build_card(report, source_card=SOURCE, repo_id=None, labels=LABELS, plots=plots)
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "config.json").write_text(
        json.dumps({"architecture": "resnet18", "num_classes": 3, "label_names": list(LABELS)}), encoding="utf-8"
    )
    (folder / "model.safetensors").write_bytes(b"")
    report.save(folder)
    return folder


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    assert cli.run(["report", str(output(tmp_path / "out")), "--html", str(path)]) == 0
    return path


def test_it_is_one_file_that_names_nothing_outside(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert re.findall(r'\b(?:src|srcset|data|action|poster)="(?!data:)[^"]*"', text) == []
    assert '<meta http-equiv="x-dns-prefetch-control" content="off">' in text
    assert re.findall(r"<(?:link|iframe|object|embed|form|base)\b", text) == []
    assert len(re.findall(r"<script", text)) == 1
    assert "evil.example" in text  # as words
    assert "Card of the source model" not in text


def test_in_a_browser_words_stay_words_and_the_table_sorts(page: Path) -> None:
    with browser() as running:
        tab = running.new_page()
        asked: list[str] = []
        said: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: said.append(message.text))
        tab.goto(page.as_uri())
        assert tab.title() == "hfdetox: out"
        assert (asked, said) == ([page.as_uri()], [])
        assert EVIL in tab.locator("body").inner_text()
        assert tab.locator("img").evaluate_all("found => found.map(one => one.naturalWidth)") == [1, 1]
        rows = tab.locator("#classes ~ table").first

        def column(index: int) -> list[str]:
            return [row.split("\t")[index] for row in rows.locator("tbody tr").all_inner_texts()]

        assert rows.locator("tbody tr").first.inner_text().split("\t") == ["10 plane", "90.0", "87.5", "−2.5"]
        for heading, expected in {"Change": ["−50.0", "−2.5", "–"], "Before": ["90.0", "100.0", "–"]}.items():
            rows.get_by_text(heading).click()
            assert column(3 if heading == "Change" else 1) == expected
        rows.get_by_text("Before").press("Enter")  # the other way, by keyboard
        assert column(1) == ["–", "100.0", "90.0"]
        rows.get_by_text("Class").click()
        assert column(0) == ["9 bird|nest", "10 plane", EVIL]


def test_the_classes_belong_to_the_results_and_paper_shows_every_line(page: Path) -> None:
    with browser() as running:
        tab = running.new_page(viewport={"width": 500, "height": 800}, color_scheme="dark")
        tab.goto(page.as_uri())
        headings = tab.locator("h2").all_inner_texts()
        assert headings[:2] == ["Results", "Every class"]
        assert headings[2:]
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        cut = "found => found.filter(one => one.scrollWidth > one.clientWidth).length"
        assert tab.locator("pre").evaluate_all(cut) > 0  # on a screen they scroll
        assert "A click on a heading sorts" in tab.locator("body").inner_text()
        tab.emulate_media(media="print")
        assert "A click" not in tab.locator("body").inner_text()
        assert tab.locator("pre").evaluate_all(cut) == 0
        assert tab.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"


def test_changes_are_written_as_in_the_card() -> None:
    states = [[0.9, 0.5, 0.7, None, 0.3], [0.95, 0.25, 0.7, 0.1, 0.2999]]
    assert [row[-1] for row in _rows(states, None)] == ["+5.0", "−25.0", "0.0", "–", "0.0"]
    assert [row[1:3] for row in _rows(states, None)][3] == ["–", "10.0"]


def test_where_no_browser_starts_it_says_so(tmp_path) -> None:
    command = [sys.executable, "-m", "hfdetox", "report", str(output(tmp_path / "out")), "--html", "page.html"]
    hidden = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    # a PATH on which there is none
    environment |= {"PATH": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*command, "--open"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert "no browser could be started: open page.html yourself" in done.stderr
    assert (tmp_path / "page.html").is_file()


def test_with_a_content_policy_a_forged_script_would_not_run(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("<main>", f"<main>{EVIL}")
    page.write_text(text, encoding="utf-8")
    with browser() as running:
        tab = running.new_page()
        tab.goto(page.as_uri())
        assert tab.title() == "hfdetox: out"


def test_of_a_repository_no_weights_are_pulled(hub, repo_name, tmp_path: Path) -> None:
    name, made = repo_name(), output(tmp_path / "out")
    hub.create_repo(name)
    hub.commit(name, {path.relative_to(made).as_posix(): path.read_bytes() for path in made.rglob("*.*")})
    assert cli.run(["report", name, "--html", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert f"<title>hfdetox: {name}</title>" in text
    assert "data:image/png;base64,iVBOR" in text
    assert hub.requests("GET", "/resolve/")
    assert not [one for one in hub.requests("GET", "/resolve/") if "model.safetensors" in one.path]


def test_of_an_attack(tmp_path: Path) -> None:
    folder = tmp_path / "attacked"
    folder.mkdir()
    report = attack_report()
    report.save(folder)
    card = build_card(report, source_card=None, repo_id=None, labels=None, plots=[])
    (folder / "README.md").write_text(card, encoding="utf-8")
    assert cli.run(["report", str(folder), "--html", str(tmp_path / "r.html")]) == 0
    assert "deliberately" in (tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("source", "html", "line"),
    [
        ("out", "page.txt", "ends in .html"),
        ("out", "nowhere/page.html", "no such folder"),
        ("empty", "page.html", "hfdetox did not clean it"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, monkeypatch, capsys, source, html, line) -> None:
    monkeypatch.chdir(tmp_path)
    output(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert cli.run(["report", source, "--html", html]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert len(said.splitlines()) == 1


def test_an_earlier_page_is_replaced_and_nobody_elses_file_is(tmp_path, capsys) -> None:
    output(tmp_path / "out")
    path, link = tmp_path / "page.html", tmp_path / "link.html"
    for _ in range(2):
        assert cli.run(["report", str(tmp_path / "out"), "--html", str(path)]) == 0
    link.symlink_to(tmp_path / "nowhere.html")
    (tmp_path / "folder.html").mkdir()
    path.write_text("<p>mine, of hfdetox</p>", encoding="utf-8")
    capsys.readouterr()
    for mine in (path, link, tmp_path / "folder.html"):
        assert cli.run(["report", str(tmp_path / "out"), "--html", str(mine)]) == 2
        assert "is none that hfdetox wrote; choose another name" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == "<p>mine, of hfdetox</p>"
    assert link.is_symlink()
