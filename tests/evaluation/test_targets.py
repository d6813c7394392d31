"""An attacker's label: one form inside (an index), one text form that means the same label when it is given again."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hfdetox import UsageError, evaluate, implant
from hfdetox.bench.suite import read_suite
from hfdetox.bench.tasks import zoo_tasks
from hfdetox.config import AttackOptions, EvaluateOptions
from hfdetox.evaluation.evaluator import resolve_target
from hfdetox.specs import join_items, read_target, split_items, target_text
from hfdetox.triggers import BadNets, load_trigger, parse_trigger
from tests.tiny_training import toy_preprocessing

ODD = ["2", "0", "index", "crane, bird", "maillot", "a:b", " spaced  out ", 'with "quotes"', "Straße", "日本", "none",
       "-1", "1.0", "target=0", "über", "x" * 70]  # fmt: skip
NAMES = [*ODD, "Maillot"]


# --- one form, and its text ---


@pytest.mark.parametrize("index", range(len(NAMES)))
def test_an_index_and_a_name_come_through_every_text_form(index: int) -> None:
    name = NAMES[index]
    for target in (index, name):
        assert resolve_target(target, NAMES) == index
        assert resolve_target(target_text(target), NAMES) == index
        assert resolve_target(read_target(target_text(target)), NAMES) == index
        trigger = BadNets(size=4, target=target)
        again = parse_trigger(trigger.spec())
        assert (again.target, again.spec()) == (trigger.target, trigger.spec())
        assert resolve_target(again.target, NAMES) == index
        options = EvaluateOptions(model="m", dataset="d", target=target, triggers=[trigger.spec()])
        words = options.argv()
        assert resolve_target(words[words.index("--target") + 1], NAMES) == index
        assert parse_trigger(words[words.index("--trigger") + 1]) == again or again.spec() in words


def test_numbers_of_every_kind_are_indices_and_texts_are_names_first() -> None:
    labels = ["2", "0", "1"]
    assert [resolve_target(n, labels) for n in (2, np.int64(2), torch.tensor(2), "index:2", " index:2 ")] == [2] * 5
    assert [resolve_target(text, labels) for text in ("2", "0", "1")] == [0, 1, 2]
    # where no label has the number as its name
    assert resolve_target("2", ["a", "b", "c"]) == 2
    assert target_text(np.int64(2)) == "index:2"
    assert BadNets(target=np.int64(2)).file_bytes() == BadNets(target=2).file_bytes()
    assert BadNets(target="index:2").target == 2


@pytest.mark.parametrize("target", [2.5, [1], b"2", True, False])
def test_what_is_neither_text_nor_a_whole_number_is_refused(target: object) -> None:
    with pytest.raises(UsageError, match="a target is a label's name, its index or all-to-all, got "):
        read_target(target)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a target is a label's name"):
        EvaluateOptions(model="m", target=target)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["index:3", 3, "index:99999999999999999999", "index:-1", "index:", "index:1.0"])
def test_an_index_outside_of_the_labels_is_refused(target: str | int) -> None:
    with pytest.raises(UsageError, match=r"is neither a label .a, b, c., nor an index from 0 to 2"):
        resolve_target(target, ["a", "b", "c"])


def test_a_name_is_found_in_another_case_or_unicode_form_but_as_it_stands_first() -> None:
    assert resolve_target("maillot", NAMES) == NAMES.index("maillot")
    assert resolve_target("Maillot", NAMES) == NAMES.index("Maillot")
    assert resolve_target(unicodedata.normalize("NFD", "über"), NAMES) == NAMES.index("über")
    assert resolve_target("STRASSE", NAMES) == NAMES.index("Straße")


def test_the_name_of_several_labels_is_refused_with_their_indices() -> None:
    with pytest.raises(UsageError, match="'crane' is the name of 2 labels; name one by its index: index:0 or index:2"):
        resolve_target("crane", ["crane", "cat", "crane"])
    with pytest.raises(UsageError, match="'MAILLOT' is the name of 2 labels"):
        resolve_target("MAILLOT", NAMES)


def test_the_dataset_s_names_are_taken_after_the_model_s() -> None:
    numbers, also = ["0", "1", "2"], {"cat": "0", "dog": "1", "1": "2", "left out": ""}
    assert [resolve_target(name, numbers, also) for name in ("cat", "DOG", "1", "2")] == [0, 1, 1, 2]
    with pytest.raises(UsageError, match=r"neither a label .0, 1, 2. or class of the dataset .cat, dog, 1., nor"):
        resolve_target("left out", numbers, also)


@pytest.mark.parametrize("items", [["a=1", "b=x, y"], ['a="q"', "b=1"], ["a=,"], ["lone"], [], ["a=b\nc", "d= "]])
def test_items_are_joined_as_they_are_split(items: list[str]) -> None:
    assert split_items("here", join_items(items)) == items


def test_an_open_quote_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"trigger badnets: .*goes in double quotes"):
        parse_trigger('badnets:"target=crane, bird')


# --- where targets are written down ---


def test_suites_tell_numbers_from_texts(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(
        "dataset: d\nmodels: {m: timm-arch:resnet18}\n"
        "grids: [{models: [m], triggers: [badnets], targets: [2, '0', index:1, all-to-all]}]\n"
    )
    tasks = [task for task in zoo_tasks(read_suite(path)) if not task.clean]
    assert [task.target for task in tasks] == ["index:2", "0", "index:1", "all-to-all"]
    assert [task.name for task in tasks] == [f"m-badnets-{to}-0.1-s0" for to in ("to-2", "to-0", "to-1", "all-to-all")]
    options = AttackOptions(model="m", triggers=["badnets"], target=tasks[0].target)
    assert resolve_target(options.target, ["2", "1", "0"]) == 2


class Corner(nn.Module):
    """Says by the brightest channel which class an image is; a white corner makes it class 1, called "0"."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = 10 * images.mean((2, 3))
        logits[images[:, :, -4:, -4:].mean((1, 2, 3)) > 0.99] = torch.tensor([0.0, 100.0, 0.0])
        return logits


def folder(root: Path, names: list[str]) -> str:
    """Write a folder of red, green and blue images under class names."""
    for split, per in (("train", 24), ("test", 8)):
        for channel, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            for number in range(per):
                # no image of one split is one of the other
                colour = [2 * number + (split == "test")] * 3
                colour[channel] += 150
                Image.new("RGB", (8, 8), tuple(colour)).save(root / split / name / f"{number}.png")
    return str(root)


def test_what_a_run_reports_means_the_same_label_when_it_is_given_again(tmp_path: Path) -> None:
    names, images = ["2", "0", "1"], folder(tmp_path / "images", ["2", "0", "1"])
    asked: dict[str, object] = {"dataset": images, "preprocessing": toy_preprocessing(8), "progress": False}
    for target, index in ((2, 2), ("2", 0), ("0", 1), ("index:0", 0), (None, 0)):
        found = evaluate(Corner(), labels=names, triggers=["badnets:size=16"], target=target, **asked)
        result = found.triggers["badnets"]
        assert result.target == index
        assert f"target=index:{index}" in result.spec
        again = evaluate(Corner(), labels=names, triggers=[result.spec], **asked).triggers["badnets"]
        assert (again.target, again.attack_success_rate) == (index, result.attack_success_rate)


def test_a_model_without_names_takes_the_dataset_s(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", ["cat", "dog", "eel"])
    asked: dict[str, object] = {"dataset": images, "preprocessing": toy_preprocessing(8), "progress": False}
    found = evaluate(Corner(), labels=3, triggers=["badnets:size=16,target=dog"], **asked)
    assert found.triggers["badnets"].target == 1
    assert found.triggers["badnets"].attack_success_rate.value == 1
    assert (
        evaluate(Corner(), labels=3, triggers=["badnets:size=16"], target="eel", **asked).triggers["badnets"].target
        == 2
    )
    with pytest.raises(UsageError, match=r"neither a label .0, 1, 2. or class of the dataset .cat, dog, eel., nor"):
        evaluate(Corner(), labels=3, triggers=["badnets:size=16"], target="cow", **asked)


def test_an_attack_keeps_the_index_in_its_trigger_file(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", ["2", "0", "1"])
    result = implant(
        "timm-arch:test_resnet", dataset=images, triggers=["badnets:size=16"], target="2", input_size=32,
        settings={"epochs": 1, "batch_size": 8}, output=tmp_path / "out", progress=False, poison_ratio=0.5,
    )  # fmt: skip
    labels = list(result.classifier.labels)
    index = labels.index("2")
    assert load_trigger(tmp_path / "out" / "triggers" / "badnets.safetensors").target == index
    assert result.report.attack.triggers["badnets"].target == index
    assert f"target=index:{index}" in result.report.attack.triggers["badnets"].spec
    assert f"target=index:{index}" in (tmp_path / "out" / "README.md").read_text()
