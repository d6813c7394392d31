"""The gallery: its arithmetic by hand, the images it takes, the words it prints, and the file it writes or does not."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from accelerate import Accelerator
from matplotlib.text import Text
from PIL import Image

from hfdetox import evaluate
from hfdetox.cli import app as cli
from hfdetox.data.images import ImageSet
from hfdetox.errors import RunError, UsageError
from hfdetox.evaluation.evaluator import Evaluator
from hfdetox.evaluation.results import EvalResult, Visibility
from hfdetox.reporting.gallery import (
    IMAGES,
    GalleryBand,
    amplified,
    check_gallery,
    draw_bands,
    draw_gallery,
    gallery_bands,
)
from hfdetox.reporting.plots import DPI, INK, PANEL, WIDTH, WRONG, house_style
from hfdetox.triggers import BadNets, Blended, Trigger
from tests.evaluation.test_evaluator import NAMES, Backdoored, prepared
from tests.tiny_training import _quick_garbage, accelerator, toy_preprocessing, toy_set

__all__ = ["_quick_garbage", "accelerator"]


def band(
    count: int = IMAGES, size: tuple[int, int] = (32, 32), title: str = "badnets → dog", **changes: Any
) -> GalleryBand:
    """Return a band of black images in which one pixel became white."""
    clean = np.zeros((count, *size, 3), np.uint8)
    triggered = clean.copy()
    triggered[:, 0, 0] = 255
    words = {"labels": ["cat"] * count, "wanted": ["dog"] * count, "before": ["cat"] * count, "after": ["dog"] * count}
    return GalleryBand(title, "PSNR 30.0 dB", clean, triggered, **(words | changes))


def words(*bands: GalleryBand) -> list[str]:
    """Return every text of the figure."""
    with house_style():
        figure = draw_bands(bands)
    found = [figure.get_suptitle()]
    for part in figure.subfigs:
        found += [text.get_text().strip() for text in part.texts]
        found += [text.get_text() for axes in part.axes for text in axes.texts]
    return found


# --- the difference ---


@pytest.mark.parametrize(
    ("largest", "factor"),
    [
        # half the range is 127.5: 127.5 / 255 = 0.5, 127.5 / 127 = 1.004, 127.5 / 40 = 3.19, 127.5 / 51 = 2.5
        (255, 0.5), (128, 0.5), (127, 1), (64, 1), (63, 2), (51, 2), (40, 3), (30, 4), (18, 6), (12, 10), (6, 20),
        (1, 100),
    ],
)  # fmt: skip
def test_the_factor_fills_the_range_with_the_largest_difference(largest: int, factor: float) -> None:
    clean = np.zeros((1, 2, 2, 3), np.uint8)
    triggered = clean.copy()
    triggered[0, 1, 1, 2] = largest
    picture, found = amplified(clean, triggered)
    assert found == factor
    assert picture.dtype == np.uint8
    # no change is grey; only the blue of one pixel differs
    assert (picture[0, 1, 1, 2], int((picture != 128).sum())) == (min(255, round(128 + factor * largest)), 1)
    darker, same = amplified(triggered, clean)
    assert same == factor
    assert darker[0, 1, 1, 2] == round(128 - factor * largest)


def test_no_difference_is_grey() -> None:
    images = np.full((2, 3, 3, 3), 77, np.uint8)
    picture, factor = amplified(images, images)
    assert (picture == 128).all()
    assert factor == 1


# --- the images ---


def bands_of(
    accelerator: Accelerator, triggers: list[Trigger], images: ImageSet
) -> tuple[Evaluator, list[GalleryBand]]:
    evaluation = prepared(accelerator, triggers, target="dog", images=images)
    return evaluation, gallery_bands(evaluation, evaluation.measure("measure"), evaluation.visibility())


def test_every_trigger_shows_the_same_images_of_different_classes(accelerator: Accelerator) -> None:
    # labels 0 1 2 in turn; `dog` (2) is in no view of the first two, so two classes are left and one image comes again
    images = toy_set(12)
    triggers = [BadNets(), Blended(), BadNets(name="a2a", target="all-to-all")]
    evaluation, bands = bands_of(accelerator, triggers, images)
    assert [list(found.labels) for found in bands] == [["cat", "1", "cat"]] * 3
    assert evaluation.clean.images is not None
    for found, view in zip(bands, evaluation.views, strict=True):
        assert np.array_equal(found.clean, evaluation.clean.images[[0, 1, 3]].permute(0, 2, 3, 1).numpy())
        assert view.source.images is not None
        places = [view.source.positions.tolist().index(position) for position in (0, 1, 3)]
        assert np.array_equal(found.triggered, view.source.images[places].permute(0, 2, 3, 1).numpy())
    patch, blend, moved = bands
    # the model knows the patch, and nothing of the blend's noise
    assert (list(patch.before), list(patch.after)) == (["cat", "1", "cat"], ["dog"] * 3)
    assert list(patch.wanted) == ["dog"] * 3
    assert list(blend.after) == list(blend.before)
    assert list(moved.wanted) == ["1", "dog", "1"]
    assert [found.title for found in bands] == ["badnets → dog", "blended → dog", "a2a → every class to the next one"]


def test_the_note_is_what_was_measured(accelerator: Accelerator) -> None:
    evaluation = prepared(accelerator, [BadNets(target="dog")])
    visible = {"badnets": Visibility(psnr=25.04, max_change=136, changed=0.625)}
    (found,) = gallery_bands(evaluation, evaluation.measure("measure"), visible)
    assert found.note == "PSNR 25.0 dB, largest change 136 of 255, images changed 62.5 %, attack success 100.0 %"


def test_triggers_without_a_common_image_show_their_own(accelerator: Accelerator) -> None:
    # images of two classes only, each the target of one trigger
    images = toy_set(12).subset([i for i in range(12) if i % 3])
    _, bands = bands_of(accelerator, [BadNets(target=1), BadNets(name="other", target=2)], images)
    assert [list(found.labels) for found in bands] == [["dog"] * 3, ["1"] * 3]


def test_few_images_are_fewer_columns(accelerator: Accelerator) -> None:
    _, (found,) = bands_of(accelerator, [BadNets()], toy_set(12).subset([0, 2]))
    assert list(found.labels) == ["cat"]
    assert words(found).count("triggered") == 1


# --- the picture ---


def test_the_words_of_a_band() -> None:
    # the second image is answered wrongly without a trigger, the third is robust
    drawn = words(band(before=["cat", "elk", "cat"], after=["dog", "elk", "cat"]))
    assert drawn[0].endswith("✓ right   ✗ wrong   ⚑ what the attacker wants")
    assert drawn[1:3] == ["badnets → dog", "PSNR 30.0 dB"]
    assert drawn[3:] == [
        "clean", "✓ cat", "cat", "triggered", "⚑ dog", "difference", "× 0.5",
        "clean", "✗ elk", "cat", "triggered", "✗ elk", "difference", "× 0.5",
        "clean", "✓ cat", "cat", "triggered", "✓ cat", "difference", "× 0.5",
    ]  # fmt: skip


def test_wrong_answers_have_their_colour() -> None:
    with house_style():
        figure = draw_bands([band(after=["dog", "cat", "elk"])])
    colors = {text.get_text(): text.get_color() for axes in figure.subfigs[0].axes for text in axes.texts}
    assert (colors["⚑ dog"], colors["✗ elk"], colors["✓ cat"]) == (WRONG, WRONG, INK)


def test_names_start_no_formula_and_are_cut() -> None:
    label = "$\\frac$, a synonym"
    drawn = words(band(title="a$b$ → " + "x" * 90, labels=[label] * 3, before=["y" * 40] * 3))
    assert "$\\frac$" in drawn
    with house_style():
        assert not any(text.get_parse_math() for text in draw_bands([band()]).findobj(Text))
    assert drawn[1].startswith("a$b$ → xxx")
    assert drawn[1].endswith("x…")
    assert "✗ " + "y" * 10 + "…" in drawn


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (8, 16), (48, 32), (100, 10)])
def test_every_picture_is_there_and_of_one_size(size: tuple[int, int]) -> None:
    with house_style():
        figure = draw_bands([band(size=size)] * 3)
        figure.draw_without_rendering()
    pictures = [axes for part in figure.subfigs for axes in part.axes if axes.images]
    # three pictures of three images in each band
    assert len(pictures) == 3 * 9
    boxes = [axes.get_window_extent() for axes in pictures]
    assert len({(round(box.width, 1), round(box.height, 1)) for box in boxes}) == 1
    assert boxes[0].height / boxes[0].width == pytest.approx(size[0] / size[1], rel=0.01)
    # at the figure's 100 dots an inch, of 1300 dots in the file
    assert boxes[0].width > 45 or size[0] > size[1]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_small_images_are_enlarged_pixel_by_pixel(tmp_path: Path) -> None:
    with house_style():
        draw_bands([band()]).savefig(tmp_path / "one.png", dpi=DPI)
    with Image.open(tmp_path / "one.png") as image:
        picture = np.asarray(image.convert("RGB")).astype(int)
    border = np.concatenate([picture[:, 0], picture[:, -1], picture[0], picture[-1]])
    panel = [int(PANEL[i : i + 2], 16) for i in (1, 3, 5)]
    assert (border == panel).all()  # nothing is cut off at the edges
    # the triggered images' white pixel, 1 of 32, is a white square, with nothing between it and the black
    assert picture.shape[1] == WIDTH * DPI
    white, black = ((picture == value).all(axis=2).sum() for value in (255, 0))
    assert white >= 3 * 3 * 3
    assert black > 900 * white / 3


# --- the file ---


def test_the_file_is_whole_and_always_the_same(accelerator: Accelerator, tmp_path: Path) -> None:
    evaluation = prepared(accelerator, [BadNets(), Blended()], target="dog")
    outcome = evaluation.measure("measure")
    for name in ("one.png", "two.PNG"):
        draw_gallery(evaluation, outcome, evaluation.visibility(), tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.PNG"]
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.PNG").read_bytes()
    with Image.open(tmp_path / "one.png") as image:
        assert (image.format, image.width) == ("PNG", 1300)


def test_an_unwritable_place_is_one_clear_line(accelerator: Accelerator, tmp_path: Path) -> None:
    evaluation = prepared(accelerator, [BadNets(target=2)])
    outcome = evaluation.measure("measure")
    (tmp_path / "g.png").mkdir()
    for path in (tmp_path / "g.png", tmp_path / "nowhere" / "g.png"):
        with pytest.raises(RunError, match=rf"cannot write {re.escape(str(path))}: ") as caught:
            draw_gallery(evaluation, outcome, evaluation.visibility(), path)
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["g.png"]


def test_where_a_gallery_may_go(tmp_path: Path) -> None:
    trigger = BadNets()
    check_gallery(tmp_path / "g.png", [trigger])
    (tmp_path / "old.png").touch()
    for path, triggers, said in (
        (tmp_path / "g.png", [], "name at least one with --trigger"),
        (tmp_path / "g.jpg", [trigger], "a name that ends in .png, not 'g.jpg'"),
        (tmp_path / "old.png", [trigger], "old.png exists; choose another --gallery, or remove it first"),
        (tmp_path / "no" / "g.png", [trigger], "there is no folder .*no for the gallery"),
    ):
        with pytest.raises(UsageError, match=said):
            check_gallery(path, triggers)


# --- evaluate ---


def clean_images() -> datasets.DatasetDict:
    """Return toy images in which the class is visible: 60 to train, 120 to measure on."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    whole = toy_set(180)
    rows = {"image": [whole.image(i) for i in range(180)], "label": whole.labels.tolist()}
    parts = {"train": range(60), "test": range(60, 180)}
    return datasets.DatasetDict({
        name: datasets.Dataset.from_dict({key: [column[i] for i in part] for key, column in rows.items()}, features)
        for name, part in parts.items()
    })  # fmt: skip


def evaluated(**options: Any) -> EvalResult:
    return evaluate(Backdoored(), preprocessing=toy_preprocessing(), labels=NAMES, dataset=clean_images(),
                    device="cpu", progress=False, **options)  # fmt: skip


def test_evaluate_draws_and_says_how_visible_the_triggers_are(tmp_path: Path) -> None:
    triggers = [BadNets(target="dog"), BadNets(name="moved", target="all-to-all")]
    found = evaluated(triggers=triggers, gallery=tmp_path / "g.png")
    assert [path.name for path in tmp_path.iterdir()] == ["g.png"]
    assert list(found.visibility) == list(found.triggers) == ["badnets", "moved"]
    assert found.triggers["badnets"].attack_success_rate.samples == 80
    assert found.triggers["moved"].attack_success_rate.samples == 120
    assert found.triggers["moved"].target == "all-to-all"
    assert all(visible.changed == 1 for visible in found.visibility.values())
    # without a gallery the same is found, and nothing written
    assert evaluated(triggers=triggers) == found
    assert replace(found, visibility={}).triggers == found.triggers


def test_an_existing_file_is_refused_before_anything_is_pulled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "g.png"
    path.write_bytes(b"someone's")
    assert cli.run(["evaluate", "nobody/nothing", "--trigger", "badnets", "--gallery", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"hfdetox: error: {path} exists; choose another --gallery, or remove it first\n"
    assert path.read_bytes() == b"someone's"
