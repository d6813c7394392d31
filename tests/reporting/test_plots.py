"""Every picture opened again: size, colours where bars must be, nothing cut off at the edges, and what is left out."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hfdetox.errors import RunError
from hfdetox.evaluation.results import Rate
from hfdetox.reporting.plots import (
    AFTER,
    BEFORE,
    DPI,
    MAX_COLUMNS,
    PANEL,
    PLOT_FILES,
    WIDTH,
    Answers,
    StripRow,
    draw_destinations,
    draw_plots,
    draw_residual,
    draw_samples,
    draw_training,
    draw_weight_changes,
    house_style,
)
from hfdetox.reporting.report import Report
from tests.evidence.made import evidence, residual
from tests.written_report import trigger, written_report

LONG = "a trigger name that is far too long to fit on one line of the card, with $dollars$ and | pipes 输入"


def rgb(color: str) -> tuple[int, ...]:
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def longest(picture: np.ndarray, color: str) -> int:
    """Return the pixels of this colour in the row that has most: the length of the longest bar."""
    return int((np.abs(picture - np.array(rgb(color))).max(axis=2) <= 2).sum(axis=1).max())


def with_triggers(number: int) -> Report:
    report = written_report()
    assert report.before
    assert report.after
    names = [LONG, *(f"trigger-{i}" for i in range(number - 1))][:number]
    bad, good = Rate(1.0, 400, 400, (0.9908, 1.0)), Rate(0.0, 0, 400, (0.0, 0.0092))
    return replace(
        report,
        before=replace(report.before, triggers={name: trigger(bad, good) for name in names}),
        after=replace(report.after, triggers={name: trigger(good, bad) for name in names}),
        history=[{"phase": "d3", "epoch": e, "clean_loss": 2 / (e + 1), "distance": 4 + e / 10} for e in range(20)],
    )


def strip(rows: int, columns: int, size: tuple[int, int] = (32, 32)) -> list[StripRow]:
    images = np.full((columns, *size, 3), (10, 200, 90), dtype=np.uint8)
    label = "tench, Tinca tinca" if columns % 2 else "a_label_that_is_far_too_long_for_its_place"
    return [
        StripRow(f"row {i} {LONG}", images, [label] * columns, ["wrong"] * columns, [label] * columns)
        for i in range(rows)
    ]


@pytest.mark.parametrize(("triggers", "layers", "columns"), [(0, 1, 1), (8, 7, 3), (1, 2, 12)])
def test_every_plot_is_whole(tmp_path: Path, triggers: int, layers: int, columns: int) -> None:
    rng = np.random.default_rng(0)
    changes = {f"layers.{i}.{LONG}": rng.normal(0, 0.1, (10, 64)) for i in range(layers)}
    names = [f"{i} {LONG} {'x' * 200}" for i in range(1000)]
    answers = [Answers(LONG, names, *rng.dirichlet(np.full(1000, 0.01), 3)) for _ in range(triggers)]
    tested = replace(evidence(), reconstructed={}, residual={f"{i} {LONG}": residual() for i in range(triggers)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = draw_plots(
            replace(with_triggers(triggers), evidence=tested), tmp_path / "plots", weight_changes=changes,
            strip=strip(1 + triggers, columns),
            answers=answers, reconstructed=strip(1, columns), moved=strip(1, columns),
        )  # fmt: skip
    assert written == [
        f"plots/{name}" for name in PLOT_FILES if triggers or name not in ("destinations.png", "residual.png")
    ]
    for name in written:
        picture = pixels(tmp_path / name)
        height, width = picture.shape[:2]
        assert width == WIDTH * DPI == 1300
        assert 200 <= height <= 4000
        assert len(np.unique(picture @ (65536, 256, 1))) > 20
        border = np.concatenate([picture[:, 0], picture[:, -1], picture[0], picture[-1]])
        assert (border == rgb(PANEL)).all()  # a text or bar that is cut off would leave ink on the edge


def test_bars_are_as_long_as_the_rates(tmp_path: Path) -> None:
    report = written_report(triggers=False)
    assert report.after
    half = replace(report, after=replace(report.after, accuracy=Rate(0.4675, 187, 400, (0.41, 0.52))))
    for shown, ratio in ((report, 0.915 / 0.935), (half, 0.5)):
        draw_plots(shown, tmp_path, weight_changes={}, strip=[])
        picture = pixels(tmp_path / "before_after.png")
        assert longest(picture, AFTER) / longest(picture, BEFORE) == pytest.approx(ratio, abs=0.005)


def test_only_what_there_is_data_for_is_drawn(tmp_path: Path) -> None:
    report = written_report()
    assert draw_plots(report, tmp_path, weight_changes={}, strip=[]) == [f"{tmp_path.name}/before_after.png"]
    assert draw_plots(replace(report, after=None), tmp_path / "none", weight_changes={}, strip=[]) == []
    assert list((tmp_path / "none").iterdir()) == []
    no_numbers = replace(report, history=[{"phase": "prune", "epoch": 0, "pruned": 3, "clean_loss": None}])
    assert draw_training(no_numbers) is None
    assert draw_weight_changes({"fc": np.zeros((0, 3)), "nan": np.full(3, np.nan)}) is None
    assert draw_samples([StripRow("empty", np.zeros((0, 8, 8, 3), np.uint8), [], [], [])]) is None


def test_the_residual_tests_have_a_curve_each() -> None:
    with house_style():
        figure = draw_residual({"a": residual(), "b": residual()})
    assert figure is not None
    assert len(figure.axes) == 6
    for name, axes in zip("ab", figure.axes[::3], strict=True):
        assert axes.get_title(loc="left") == name
        again, plain = (line.get_ydata() for line in axes.lines)
        assert list(again) == pytest.approx([4, 22.5, 45, 60, 62.5, 64])
        assert list(plain) == pytest.approx([4, 5, 6, 6.5, 7, 7.5])
    success, accuracy = figure.axes[1].lines
    assert list(success.get_xdata()) == pytest.approx([step / 10 for step in range(11)])
    assert list(success.get_ydata())[::5] == pytest.approx([97.5, 47.5, 4])
    assert next(iter(accuracy.get_ydata())) == pytest.approx(100 * 560 / 600)
    assert list(figure.axes[2].lines[0].get_ydata()) == pytest.approx([10, 100 * 470 / 600])
    assert draw_residual({}) is None


def test_training_shows_phases_and_the_series_that_exist() -> None:
    rows = [{"phase": "unlearn", "clean_loss": 1.0}] * 3 + [{"phase": "recover", "clean_loss": 2.0}] * 2
    figure = draw_training(replace(written_report(), history=rows))
    assert figure is not None
    [axes] = figure.axes
    assert axes.lines[0].get_xdata().tolist() == [1, 2, 3, 4, 5]
    assert axes.lines[0].get_ydata().tolist() == [1.0, 1.0, 1.0, 2.0, 2.0]
    words = [text.get_text() for text in axes.texts]
    assert words == ["unlearn", "recover", "ε = 0.1"]  # the written report has epsilon 0.1


def test_the_layers_that_changed_most_are_shown_in_their_order() -> None:
    figure = draw_weight_changes({f"layer{i}": np.full(4, float(i)) for i in range(9)})
    assert figure is not None
    assert [axes.get_title().strip() for axes in figure.axes] == [f"layer{i}" for i in range(3, 9)]
    assert figure.get_supxlabel().endswith("(6 of 9 layers, those that changed most)")
    assert figure.axes[1].texts[0].get_text() == "4 weights, root mean square 4"


def test_of_many_classes_those_are_shown_that_most_images_go_to() -> None:
    before, after, without = np.zeros(1000), np.zeros(1000), np.zeros(1000)
    before[7], after[[3, 900]], without[3] = 0.95, (0.84, 0.06), 0.02
    names = [f"class {i}, a synonym" for i in range(1000)]
    figure = draw_destinations([Answers("badnets", names, before, after, without)])
    assert figure is not None
    [axes] = figure.axes
    assert axes.get_title() == "Where images with trigger badnets go"
    assert [text.get_text() for text in axes.get_yticklabels()][:3] == ["class 7", "class 3", "class 900"]
    assert len(axes.get_yticklabels()) == 5
    shown = [text.get_text() for text in axes.texts]
    assert (shown[:3], shown[5:8]) == (["95.0 %", "0.0 %", "0.0 %"], ["0.0 %", "84.0 %", "6.0 %"])
    assert axes.lines[0].get_xdata().tolist() == [0.0, 2.0, 0.0, 0.0, 0.0]
    assert draw_destinations([]) is None


def test_the_strip_marks_what_the_attacker_wants_as_the_gallery_does() -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    row = StripRow("badnets", images, ["cat"] * 2, ["dog", "elk"], ["cat", "dog"], ["dog"] * 2)
    figure = draw_samples([row])
    assert figure is not None
    words = [[text.get_text() for text in axes.texts][-3:] for axes in figure.subfigs[0].axes[:2]]
    assert words == [["cat", "⚑ dog", "✓ cat"], ["cat", "✗ elk", "⚑ dog"]]


def test_the_strip_marks_right_and_wrong() -> None:
    images = np.zeros((MAX_COLUMNS + 2, 8, 8, 3), np.uint8)
    row = StripRow("badnets", images, ["cat"] * 8, ["dog"] * 8, ["cat"] * 8)
    figure = draw_samples([row])
    assert figure is not None
    [part] = figure.subfigs
    assert part.get_suptitle() == "badnets"
    assert [len(axes.images) for axes in part.axes] == [1] * MAX_COLUMNS
    words = [[text.get_text() for text in axes.texts] for axes in part.axes]
    assert words[0] == ["true", "before", "after", "cat", "✗ dog", "✓ cat"]
    assert words[1:] == [["cat", "✗ dog", "✓ cat"]] * (MAX_COLUMNS - 1)


def test_an_unwritable_folder_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "plots").write_text("a file is in the way")
    with pytest.raises(RunError, match="plots could not be written") as caught:
        draw_plots(written_report(), tmp_path / "plots", weight_changes={}, strip=[])
    assert "\n" not in str(caught.value)


def test_the_strip_explains_the_flag_where_there_is_one() -> None:
    [clean] = strip(1, 3)
    clean = replace(clean, wanted=list(clean.labels))
    flagged = replace(clean, wanted=["wrong"] * 3)
    said = []
    for rows in ([clean], [clean, flagged]):
        with house_style():
            figure = draw_samples(rows)
        assert figure is not None
        said.append([text.get_text() for text in figure.subfigs[0].texts if "✓" in text.get_text()])
    assert said == [["✓ right   ✗ wrong"], ["✓ right   ✗ wrong   ⚑ the trigger's target"]]
