"""Aligning a dataset's labels with a model's: by name, by a map, by order."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hfdetox.data.labels import DROPPED, LabelMapError, LabelMismatchError, accuracy_hint, align_labels
from hfdetox.errors import UsageError


@pytest.mark.parametrize(
    ("dataset", "model", "mapping"),
    [
        (["cat", "dog"], ["cat", "dog"], [0, 1]),
        (["dog", "cat"], ["cat", "dog"], [1, 0]),
        (["Great_White_Shark", "HAMMER-HEAD"], ["hammer head", "great white shark"], [1, 0]),
        (["tench", "goldfish"], ["goldfish, Carassius auratus", "tench, Tinca tinca"], [1, 0]),
        (["Tinca tinca, tench", "Carassius auratus"], ["goldfish, carassius_auratus", "tench"], [1, 0]),
        # the whole name wins over a synonym of another class
        (["cock", "hen"], ["hen", "hen, cock", "cock"], [2, 0]),
        # two of the same name on both sides pair in order, as ImageNet's cranes do
        (["crane", "heron", "crane"], ["heron", "crane", "crane"], [1, 0, 2]),
        # fewer classes than the model has
        (["dog"], ["cat", "dog", "horse"], [1]),
        (["0", "1", "2"], ["2", "0", "1"], [1, 2, 0]),
    ],
)
def test_names_that_match(dataset, model, mapping):
    alignment = align_labels(dataset, model)
    assert alignment.mapping == mapping
    assert alignment.note is None


def test_the_record_holds_the_names_that_differ():
    assert align_labels(["cat", "Dog"], ["dog", "cat"]).label_map == {"Dog": "dog"}
    assert align_labels(["cat", "dog"], ["dog", "cat"]).label_map == {}


def test_order_is_used_and_said_when_no_name_matches_but_the_counts_agree():
    alignment = align_labels(["cat", "dog"], ["LABEL_0", "LABEL_1"])
    assert alignment.mapping == [0, 1]
    assert "their order was used" in alignment.note
    assert alignment.label_map == {"cat": "LABEL_0", "dog": "LABEL_1"}


def test_a_mismatch_lists_the_unmatched_of_both_sides():
    with pytest.raises(LabelMismatchError) as caught:
        align_labels(["cat", "wolf"], ["cat", "dog", "horse"])
    line = str(caught.value)
    assert "unmatched in the dataset (1): wolf" in line
    assert "unmatched in the model (2): dog, horse" in line
    assert "--label-map" in line
    assert isinstance(caught.value, UsageError)


def test_one_matching_name_is_no_reason_to_use_the_order():
    with pytest.raises(LabelMismatchError, match=r"dataset \(1\): wolf"):
        align_labels(["cat", "wolf"], ["cat", "dog"])


def test_a_mismatch_with_a_model_without_names_says_so():
    with pytest.raises(LabelMismatchError, match="2 labels have no names"):
        align_labels(["a", "b", "c"], ["LABEL_0", "LABEL_1"])


def test_an_ambiguous_synonym_is_unmatched():
    with pytest.raises(LabelMismatchError, match="maillot"):
        align_labels(["maillot", "dog"], ["maillot, swimsuit", "tank suit, maillot", "dog"])


def test_the_line_of_a_mismatch_stays_short_and_printable():
    with pytest.raises(LabelMismatchError) as caught:
        align_labels([f"\x1b[31mred{i}" + "x" * 500 for i in range(1000)], [f"m{i}" for i in range(999)])
    line = str(caught.value)
    assert len(line) < 1000
    assert line.isprintable()
    assert "and 992 more" in line


def test_plain_integers_take_the_models_order_and_say_so():
    alignment = align_labels(None, ["cat", "dog", "horse"])
    assert alignment.mapping == [0, 1, 2]
    assert "plain integers" in alignment.note


def test_plain_integers_find_labels_that_are_called_by_them():
    alignment = align_labels(None, ["2", "0", "1"])
    assert alignment.mapping == [1, 2, 0]
    assert alignment.note is None


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_map_file_names_indices_and_what_is_left_out(tmp_path, suffix):
    path = tmp_path / f"map{suffix}"
    entries = {"wolf": "dog", "kitten": 0, "lamp": None}
    text = json.dumps(entries) if suffix == ".json" else "wolf: dog\nkitten: 0\nlamp: null\n"
    path.write_text(text)
    alignment = align_labels(["wolf", "kitten", "lamp", "Horse"], ["cat", "dog", "horse"], path)
    assert alignment.mapping == [1, 0, DROPPED, 2]
    assert alignment.label_map == {"wolf": "dog", "kitten": "cat", "lamp": "", "Horse": "horse"}


def test_only_a_map_may_merge_classes():
    assert align_labels(["cat", "kitten"], ["cat", "dog"], {"kitten": "cat", "cat": "cat"}).mapping == [0, 0]
    with pytest.raises(LabelMismatchError):
        align_labels(["cat", "CAT", "dog"], ["cat", "dog", "horse"])


def test_a_label_name_wins_over_an_index():
    assert align_labels(["a"], ["1", "0"], {"a": "0"}).mapping == [1]
    assert align_labels(["a"], ["1", "0"], {"a": 0}).mapping == [0]


def test_a_map_for_plain_integers():
    alignment = align_labels(None, ["cat", "dog"], {1: "dog", 2: "cat", 3: None})
    assert alignment.mapping == [0, 1, 0, DROPPED]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"bird": "cat"}, "the dataset has no class 'bird'"),
        ({"cat": "bird"}, "the model has no label 'bird'"),
        ({"cat": 7}, "index 7 is outside 0 to 1"),
        ({"cat": True}, "in quotes"),
        ({"cat": ["dog"]}, "in quotes"),
        ({}, "must be a mapping"),
    ],
)
def test_a_map_that_does_not_fit(entries, message):
    with pytest.raises(LabelMapError, match=message):
        align_labels(["cat", "dog"], ["cat", "dog"], entries)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.json", None, "cannot be read"),
        ("broken.json", "{", "not valid"),
        ("broken.yaml", "a: [", "not valid"),
        ("list.yaml", "- a\n- b\n", "must be a mapping"),
        ("tag.yaml", "!!python/object/apply:os.system [true]", "not valid"),
    ],
)
def test_a_map_file_that_is_none(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(LabelMapError, match=message) as caught:
        align_labels(["cat"], ["cat"], path)
    assert "\n" not in str(caught.value)


def test_the_best_renaming_is_found():
    confusion = np.array([[1, 8, 1], [0, 2, 8], [9, 1, 0]])  # accuracy 3/30, renamed (8 + 8 + 9)/30
    assert accuracy_hint(confusion) == pytest.approx(25 / 30)
    assert accuracy_hint(np.diag([5, 5])) == 1.0
    assert accuracy_hint(np.zeros((3, 3), dtype=int)) == 0.0
