"""Aligning a dataset's labels with a model's: by name, by a map, by order."""

from __future__ import annotations

import json
import unicodedata

import numpy as np
import pytest
import timm

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


@pytest.mark.parametrize("names", [None, ["0", "1", "2"], ["a", "1", "c"]])
def test_what_has_no_label_may_be_named_and_is_not_class_1(names):
    model = names or ["a", "b", "c"]
    assert align_labels(names, model, {"-1": None}).mapping == [0, 1, 2]
    assert align_labels(names, model, {-1: None, 2: None} if names is None else {"-1": None}).mapping[1] == 1
    for wrong in ({"-1": "0"}, {"-2": None}, {-1: 1}):
        with pytest.raises(LabelMapError, match=r"the dataset has no class '-[12]'"):
            align_labels(names, model, wrong)
    # a class that is called so is one
    assert align_labels(["-1", "1"], ["-1", "1"], {"-1": None}).mapping == [DROPPED, 1]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"bird": "cat"}, "the dataset has no class 'bird'"),
        ({"x" * 1000: "cat"}, r"^.{,250}$"),
        ({"cat": "x" * 1000}, r"^.{,350}$"),
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


# the same class by another name


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKD"])
@pytest.mark.parametrize("other", ["NFC", "NFD"])
def test_names_are_the_same_in_every_unicode_form(form, other):
    names = ["Äpfel", "Möhre", "Café ﬁn", "Ｂirne"]
    ours, theirs = ([unicodedata.normalize(f, name) for name in names] for f in (form, other))
    assert align_labels(ours, theirs[::-1]).mapping == [3, 2, 1, 0]


def test_aliases_are_names_too():
    labels, aliases = ["Actinic keratoses", "Melanoma, skin"], [["AKIEC", "akiec-1"], ["MEL"]]
    assert align_labels(["mel", "AKIEC"], labels, aliases=aliases).mapping == [1, 0]
    assert align_labels(["melanoma", "Actinic_Keratoses"], labels, aliases=aliases).mapping == [1, 0]
    assert align_labels(["MEL"], labels, aliases=aliases).label_map == {"MEL": "Melanoma, skin"}
    # two labels with one alias name none
    with pytest.raises(LabelMismatchError):
        align_labels(["X"], ["a", "b"], aliases=[["X"], ["X"]])


IMAGENET = timm.data.ImageNetInfo("imagenet-1k")
IDS, TEXTS = IMAGENET.label_names(), IMAGENET.label_descriptions()
IMAGENETTE = ["n01440764", "n02102040", "n02979186", "n03000684", "n03028079", "n03394916", "n03417042", "n03425413",
              "n03445777", "n03888257"]  # fmt: skip


@pytest.mark.parametrize("model", ["names", "ids"])
@pytest.mark.parametrize("dataset", ["names", "ids", "crane2", "crane bird", "ids with names"])
def test_imagenets_own_names_and_ids_align_with_each_other(dataset, model):
    names = {
        "names": TEXTS, "ids": IDS, "crane2": [*TEXTS[:517], "crane2", *TEXTS[518:]],
        "crane bird": [*TEXTS[:134], "crane bird", *TEXTS[135:517], "crane machine", *TEXTS[518:]],
        "ids with names": [f"{one}-{text.split(',')[0]}" for one, text in zip(IDS, TEXTS, strict=True)],
    }[dataset]  # fmt: skip
    alignment = align_labels(names, TEXTS if model == "names" else IDS)
    assert alignment.mapping == list(range(1000))
    assert alignment.note is None


@pytest.mark.parametrize("shuffled", [False, True])
def test_imagenettes_folders_and_names_align_with_imagenet(shuffled):
    labels = TEXTS[::-1] if shuffled else TEXTS
    expected = [labels.index(TEXTS[IDS.index(one)]) for one in IMAGENETTE]
    assert align_labels(IMAGENETTE, labels).mapping == expected
    words = ["tench", "English springer", "cassette player", "chain saw", "church", "French horn", "garbage truck",
             "gas pump", "golf ball", "parachute"]  # fmt: skip
    assert align_labels(words, labels).mapping == expected


def test_a_name_that_others_begin_with_is_not_taken_for_them():
    with pytest.raises(LabelMismatchError):
        align_labels(["stage1", "stage2"], ["stage 3", "stage 4", "other"])
    with pytest.raises(LabelMismatchError):
        align_labels(["crane bird", "cranefly", "crane machine"], ["crane", "crane", "heron", "stork"])


# numbers


def folders(count, first=0):
    return sorted(map(str, range(first, first + count)))


@pytest.mark.parametrize("labels", [list(map(str, range(12))), [f"kind {chr(97 + i)}" for i in range(12)]])
@pytest.mark.parametrize("first", [0, 1])
def test_numbered_folders_are_indices_and_the_order_of_their_names_is_kept_beside(labels, first):
    names = folders(12, first)
    alignment = align_labels(names, labels)
    assert alignment.mapping == [int(name) - first for name in names]
    assert alignment.other.mapping == list(range(12))
    assert alignment.other.mapping != alignment.mapping


def test_few_numbered_folders_have_one_order():
    assert align_labels(folders(10), [f"LABEL_{i}" for i in range(10)]).other is None
    assert align_labels(["3", "11"], [f"kind {chr(97 + i)}" for i in range(12)]).mapping == [3, 11]
    with pytest.raises(LabelMismatchError):
        align_labels(["3", "12"], [f"kind {chr(97 + i)}" for i in range(12)])


@pytest.mark.parametrize("name", ["class_{}", "{}", "p{}.photo", "level {} of 12"])
def test_names_with_numbers_have_the_order_of_these_beside_that_of_folders(name):
    names = sorted(name.format(i) for i in range(1, 13))
    alignment = align_labels(names, [f"LABEL_{i}" for i in range(12)])
    by_number = [int("".join(filter(str.isdecimal, one.replace("of 12", "")))) - 1 for one in names]
    assert {tuple(alignment.mapping), tuple(alignment.other.mapping)} == {tuple(range(12)), tuple(by_number)}


def test_a_model_without_names_keeps_the_order_of_the_names_beside_that_of_the_dataset():
    alignment = align_labels(["wolf", "cat", "dog"], ["0", "1", "2"])
    assert alignment.mapping == [0, 1, 2]
    assert alignment.other.mapping == [2, 0, 1]
    assert alignment.other.label_map == {"wolf": "2", "cat": "0", "dog": "1"}
    assert align_labels(["cat", "dog", "wolf"], ["0", "1", "2"]).other is None
    assert align_labels(["dog", "cat"], ["cat", "dog"]).other is None


@pytest.mark.parametrize("text", [
    '{"cat": ' + "9" * 5000 + "}", '{"cat": 0, "cat": 1}', "[" * 100_000, "\ufeff{", '"cat"', "null", '{"cat": 1.5}',
    '{"cat": true}', '{"cat": {"a": 0}}',
])  # fmt: skip
@pytest.mark.parametrize("ending", ["json", "yaml"])
def test_hostile_label_maps_are_one_line(tmp_path, text, ending):
    path = tmp_path / f"map.{ending}"
    path.write_text(text)
    with pytest.raises(LabelMapError, match=f"map.{ending}") as caught:
        align_labels(["cat"], ["cat", "dog"], path)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", [
    "!!timestamp x", "a: !!int 12x", "a: 2001-99-99", "cat: !!bool x", "&a [*a]", "? [1, 2]\n: 0", "cat: .nan",
    "red: [&z0 [x,x,x,x,x,x,x,x,x,x],&z1 [*z0,*z0,*z0,*z0,*z0,*z0,*z0,*z0,*z0,*z0]]", "cat: 0\ncat: 1", "1: [",
    "no: 0", "\x00", "cat: \x1b[31m",
])  # fmt: skip
def test_hostile_yaml_label_maps_are_one_line(tmp_path, text):
    path = tmp_path / "map.yaml"
    path.write_text(text)
    with pytest.raises(LabelMapError, match="label map") as caught:
        align_labels(["cat"], ["cat", "dog"], path)
    assert len(str(caught.value)) < 500
