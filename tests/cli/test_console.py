"""What the terminal shows: percentages with one decimal and their interval, nothing cut off at 80 columns."""

from __future__ import annotations

import io
from dataclasses import fields, replace

import pytest
from rich.console import Console
from rich.table import Table

from hfdetox.cli import app as cli
from hfdetox.cli import console as console
from hfdetox.evaluation.results import ClassAccuracies, Measurement, Rate, Rating, TriggerResult
from hfdetox.triggers import TRIGGERS


def measurement(attacked: Rate) -> Measurement:
    trigger = TriggerResult(
        "badnets", "badnets", "native", None, 0, attacked, Rate(0.9994, 8995, 9000, (0.9987, 0.9998))
    )
    return Measurement(Rate(0.9312, 9312, 10000, (0.9261, 0.9361)), 0.25, {"[red]": trigger})


BEFORE = measurement(Rate(1.0, 9000, 9000, (0.99959, 1.0)))
AFTER = measurement(Rate(0.0, 0, 9000, (0.0, 0.00041)))


def rendered(table: Table) -> list[list[str]]:
    """Return the cells of what an 80-column terminal shows, row by row; columns are two spaces or more apart."""
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return [[cell for cell in map(str.strip, line.split("  ")) if cell] for line in text.splitlines()]


@pytest.mark.parametrize(("value", "text"), [(0.0, "0.0 %"), (0.05, "5.0 %"), (0.93149, "93.1 %"), (1.0, "100.0 %")])
def test_percent_has_one_decimal(value: float, text: str) -> None:
    assert console.percent(value) == text


def test_estimate_shows_the_interval_in_percent() -> None:
    assert console.estimate(Rating(0.975, (0.9701, 0.9799))) == "97.5 % (97.0–98.0)"


def test_the_worst_class_is_shown_where_every_state_has_it() -> None:
    known = ClassAccuracies([0.9, 0.5], 1, Rate(0.5, 25, 50, (0.3553, 0.6447)), 0.2)
    states = {"before": replace(BEFORE, classes=known), "after": replace(AFTER, classes=known)}
    assert ["worst class", "50.0 % (35.5–64.5)", "50.0 % (35.5–64.5)"] in rendered(console.measurement_table(states))
    states["after"] = AFTER
    assert not any("worst class" in row for row in rendered(console.measurement_table(states)))


def test_before_and_after_stand_side_by_side_at_80_columns() -> None:
    rows = rendered(console.measurement_table({"before": BEFORE, "after": AFTER}, {"[red]": {"verdict": "mitigated"}}))
    assert ["before", "after", "images"] in rows
    assert ["accuracy", "93.1 % (92.6–93.6)", "93.1 % (92.6–93.6)", "10,000"] in rows
    assert ["loss", "0.250", "0.250"] in rows
    assert ["[red]"] in rows
    assert ["attack success", "100.0 % (100.0–100.0)", "0.0 % (0.0–0.0)", "9,000"] in rows
    assert ["robust accuracy", "99.9 % (99.9–100.0)", "99.9 % (99.9–100.0)", "9,000"] in rows
    assert ["verdict", "mitigated"] in rows


def test_one_state_is_one_column() -> None:
    assert ["accuracy", "93.1 % (92.6–93.6)", "10,000"] in rendered(console.measurement_table({"org/[bold]m": BEFORE}))


def test_an_all_to_all_trigger_says_what_it_wants() -> None:
    words = "every class to the next one"
    (trigger,) = BEFORE.triggers.values()
    moved = replace(BEFORE, triggers={"a2a": replace(trigger, target="all-to-all")})
    rows = rendered(console.measurement_table({"m": moved}))
    assert rows[rows.index(["a2a"]) + 1] == [words]
    assert [words] not in rendered(console.measurement_table({"m": BEFORE}))


def test_plan_lines_leave_out_what_was_not_asked_for() -> None:
    plan = {
        "model": "org/m",
        "push_to": None,
        "triggers": [],
        "layers": ["fc", "head"],
        "settings": {"epochs": 3, "max_grad_norm": None},
    }
    assert console.plan_lines(plan) == ["model: org/m", "layers: fc, head", "settings: epochs=3"]


@pytest.mark.parametrize(
    ("revision", "text"), [("0123456789abcdef" * 2 + "01234567", "o/m@0123456789ab"), (None, "o/m")]
)
def test_revision_is_shortened(revision: str | None, text: str) -> None:
    assert console.at_revision("o/m", revision) == text


def test_a_trigger_family_is_shown_with_what_can_be_typed_and_what_files_hold() -> None:
    rows = rendered(console.entry_table(TRIGGERS.entries()["badnets"]))
    assert ["mode", "native (or input)"] in rows
    assert ["pattern", "square (or grid)"] in rows
    assert ["target", "-"] in rows
    assert ["size", "3"] in rows
    assert ["image", "none; image=FILE.png gives one"] in rows
    assert ["dither", "false"] in rendered(console.entry_table(TRIGGERS.entries()["bpp"]))
    assert ["encoder", "kept in the trigger file"] in rendered(console.entry_table(TRIGGERS.entries()["ssba"]))


def test_the_list_of_triggers_has_every_family_its_paper_and_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["list", "triggers"]) == 0
    text = capsys.readouterr().out
    for kind in TRIGGERS.values():
        section = text.partition(f"{kind.kind}: {kind.summary} ({kind.paper})")[2]
        shown = {line.split()[0] for line in section.partition(": ")[0].splitlines() if line.strip()}
        assert {f.name for f in fields(kind)} <= shown
