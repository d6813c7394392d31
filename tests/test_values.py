"""One coercion for texts, JSON and YAML: what each type takes, and the one line that says what it must be."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from hfdetox.documents import read_json, read_untyped, read_yaml
from hfdetox.errors import UsageError, one_line, refusing
from hfdetox.specs import read_pair, read_pairs
from hfdetox.values import (
    Interval,
    NonNegativeInt,
    PositiveFloat,
    check_fields,
    check_known,
    read,
    read_fields,
    to_text,
    words_of,
)

Word = Literal["near", "far"]


@dataclass(frozen=True)
class Inner:
    """A part."""

    count: int
    share: float = 0.5


@dataclass(frozen=True)
class Outer:
    """A whole."""

    name: str
    inner: Inner | None = None
    parts: dict[str, Inner] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    anything: Any = None


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (int, "3", 3), (float, "3", 3.0), (float, "inf", float("inf")), (bool, "True", True), (bool, "false", False),
        (str, "none", "none"), (Word, "near", "near"), (float | None, "None", None), (float | None, "2", 2.0),
        (float | Literal["auto"], "auto", "auto"), (float | Literal["auto"], "1.5", 1.5), (int | float, "5", 5),
        (int | float, "0.05", 0.05), (tuple[str, ...], "a,,b", ("a", "b")), (list[int], "1,2", [1, 2]),
    ],
)  # fmt: skip
def test_a_text_becomes_a_value_and_a_text_again(hint: Any, text: str, value: Any) -> None:
    found = read("key", hint, text, text=True)
    assert found == value
    assert type(found) is type(value)
    assert read("key", hint, to_text(found), text=True) == value


@pytest.mark.parametrize(
    ("hint", "text", "said"),
    [
        (int, "2.5", "a whole number, got '2.5'"),
        (float, "few", "a number, got 'few'"),
        (bool, "1", "true or false, got '1'"),
        (Word, "middle", "one of near, far, got 'middle'"),
        (float | None, "off", "a number, got 'off'"),
        (float | Word, "x", "a number or near, far, got 'x'"),
        (int | float, "few", "a whole number or a number, got 'few'"),
    ],
)
def test_a_text_that_is_none_is_one_line(hint: Any, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=rf"^key must be {said}$"):
        read("key", hint, text, text=True)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int, 3), (float, 3), (float, 0.5), (bool, True), (str, "x"), (str | int | None, 5), (str | int | None, None),
        (Word | None, "far"), (Sequence[str], ["a"]), (Mapping[str, int], {"a": 1}), (Any, {"a": [1]}),
    ],
)  # fmt: skip
def test_json_of_the_type_stays_as_it_is(hint: Any, value: Any) -> None:
    assert read("key", hint, value) == value


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int, True), (int, 2.0), (int, "3"), (float, "1"), (float, False), (bool, 1), (str, 3), (str, None),
        (Word, "middle"), (Word, [1]), (list[str], "abc"), (list[str], [1]), (dict[str, int], []),
        (dict[str, int], {"a": "1"}), (Inner, {"count": "1"}), (Inner, 3),
    ],
)  # fmt: skip
def test_json_of_another_type_is_refused(hint: Any, value: Any) -> None:
    with pytest.raises(UsageError, match=r"^key.* must be .*, got "):
        read("key", hint, value)


def test_dataclasses_are_read_with_all_that_is_in_them() -> None:
    plain = {"name": "n", "inner": {"count": 1}, "parts": {"a": {"count": 2, "share": 1}}, "tags": ["t"], "anything": 3}
    assert read_fields("", Outer, plain) == Outer("n", Inner(1), {"a": Inner(2, 1)}, ["t"], 3)
    assert read_fields("", Outer, {"name": "n", "inner": None}) == Outer("n")
    for wrong, said in (
        (
            {"name": "n", "colour": 1},
            r"unknown fields \['colour'\] for Outer; known: anything, inner, name, parts, tags",
        ),
        ({}, r"missing fields \['name'\] for Outer"),
        ({"name": "n", "parts": {"a": {}}}, r"missing fields \['count'\] for parts\.a"),
        ({"name": "n", "parts": {"a": {"count": 1.5}}}, r"parts\.a\.count must be a whole number, got 1\.5"),
        ([], r"Outer must be a mapping with anything, inner, name, parts, tags, got \[\]"),
    ):
        with pytest.raises(UsageError, match=f"^{said}$"):
            read_fields("", Outer, wrong)


def test_pairs_of_a_specification_are_known_and_there_once() -> None:
    assert read_pairs("it", ["a=1", "b=x=y"], ("a", "b"), "a=…, b=…") == {"a": "1", "b": "x=y"}
    for items, said in (
        (["c=1"], "it: 'c=1' is not one of a=…"),
        (["a"], "'a' is not"),
        (["a=1", "a=1"], "a is given"),
    ):
        with pytest.raises(UsageError, match=said):
            read_pairs("it", items, ("a",), "a=…")


@pytest.mark.parametrize("text", ["epochs", "=3", " =3"])
def test_what_is_no_pair_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=f"--set {text!r} is not KEY=VALUE"):
        read_pair("--set", text)


def test_a_value_without_a_type_is_json_or_yaml() -> None:
    values = ("1", "0.5", "true", "[1, 2]", "yes", "plain text", '"quoted"')
    assert [read_untyped("it", text) for text in values] == [1, 0.5, True, [1, 2], True, "plain text", "quoted"]
    for text, said in (("[1", "neither JSON nor YAML"), ("{a: 1}", "give a number"), ("", "give a number")):
        with pytest.raises(UsageError, match=f"it: .*{said}"):
            read_untyped("it", text)


def test_words_are_those_of_a_literal_alone_or_in_a_union() -> None:
    assert words_of(Word) == words_of(float | Word) == ("near", "far")
    assert words_of(float) == words_of(float | None) == ()


@dataclass
class Ranged:
    """Fields with ranges and words."""

    share: Annotated[float, Interval("(0, 1]")] = 1.0
    rate_: PositiveFloat | Literal["auto"] = "auto"
    limit: NonNegativeInt | None = None
    word: Word = "near"


@dataclass
class Narrowed(Ranged):
    """Another default and, by the way, a plain type: the range of the base still holds."""

    share: float = 0.5


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"share": 0.0}, r"share must be in \(0, 1\], got 0.0"), ({"share": float("nan")}, "share must be in"),
        ({"rate_": 0}, "rate must be positive and finite, or auto, got 0"), ({"rate_": "much"}, "got 'much'"),
        ({"rate_": float("inf")}, "rate must be positive"), ({"rate_": None}, "got None"),
        ({"limit": -1}, "limit must be at least 0, or none, got -1"), ({"word": "by"}, "word must be one of near, far"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [Ranged, Narrowed])
def test_fields_are_checked_against_the_ranges_and_words_of_their_types(
    kind: type[Ranged], fields: dict[str, Any], said: str
) -> None:
    check_fields(kind(), "it")
    check_fields(kind(share=1.0, rate_=3, limit=0, word="far"), "it")
    with pytest.raises(UsageError, match=f"^it: {said}" if said[0] != "g" else said):
        check_fields(kind(**fields), "it")


def test_an_interval_says_what_it_has() -> None:
    written = {
        "[2, inf]": "at least 2",
        "(0, inf]": "positive",
        "(1, inf)": "above 1 and finite",
        "[0, 1)": "in [0, 1)",
    }
    assert {text: str(Interval(text)) for text in written} == written
    assert float("inf") in Interval("(0, inf]")
    assert float("inf") not in Interval("(0, inf)")
    assert np.int64(2) in Interval("[2, inf]")
    assert "2" not in Interval("[2, inf]")


DEEP = "[" * 200 + "]" * 200
BOMB = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(12))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "Expecting"), (b"", "Expecting"), (b"\xff\xfe{}", "byte 0 is not UTF-8 text"),
        (b"[" * 100_000, "nested too deeply"), (DEEP.encode(), "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "thousands of digits"), (b'{"a": ' + b"9" * 400 + b"}", "hundreds of digits"),
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"), (b'{"a": "x\\u0000"}', "a character that is none"),
        (b'{"\\ud800": 1}', "a character that is none"), (b" " * (33 * 2**20), "larger than 32 MiB"),
        (b"[1]", r"must be a mapping, got \[1\]"), (b'{"a": 1, "\x01": 2}', "Invalid control character"),
    ],
)  # fmt: skip
def test_hostile_json_is_one_line_that_names_the_file(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=rf"^{re.escape(str(file))} is not .*{said}[^\n]*$"):
        read_json(file, dict[str, Any])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: !!bool maybe", "a value is not what its tag"), ("a: !!int 12x", "invalid literal"),
        ("a: !!float x", "could not convert"), ("!!timestamp x", "a value is not what its tag"),
        ("a: 2001-02-30", "day is out of range"), ("a: 2001-99-99", "month must be"), ("a: " + "9" * 5000, "digits"),
        ("a: [", "parsing a flow"), ("a: 1\nb: 2\na: 3", "the key a is there twice"),
        (f"a: {DEEP}", "nested too deeply"),
        (BOMB, "more than 1,000,000 values"), ("a: &a [1, *a]", "nested too deeply"), ("- " * 2000, "nest|depth"),
        ("? [a, b]\n: c", "unhashable"), ("!!python/object/apply:os.system [x]", "constructor"), ("a: \x00", "cha"),
        ("x" * 2**21, "larger than 1 MiB"),
    ],
)  # fmt: skip
def test_hostile_yaml_is_one_line_that_names_the_file(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "suite.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=rf"^{re.escape(str(file))} is not valid YAML: .*{said}[^\n]*$") as caught:
        read_yaml(file)
    assert len(str(caught.value)) < 600


def test_what_is_no_file_is_one_line(tmp_path: Path) -> None:
    for file, said in ((tmp_path, "directory"), (tmp_path / "no", "No such"), (tmp_path / ("n" * 300), "too long")):
        with pytest.raises(UsageError, match=f"cannot be read: .*{said}"):
            read_json(file)
    # it never ends
    with pytest.raises(UsageError, match="larger than 32 MiB"):
        read_json(Path("/dev/zero"))


def test_a_byte_order_mark_and_shared_values_are_no_fault(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(file) == read_yaml(file) == {"a": 1}
    file.write_text("a: &x {b: 1}\nc: *x\nd:\n  <<: *x\n")
    assert read_yaml(file) == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1}}
    check_known("it", {"a": 1, "b": "?", "c": None}, {"a": int, "c": int})
    with pytest.raises(UsageError, match=r"^it\.b must be a whole number, got '\?'"):
        check_known("it", {"a": 1, "b": "?"}, {"b": int})


@pytest.mark.parametrize(("error", "said"), [
    (KeyError("nope"), "it finds no 'nope'"), (KeyError(), "it finds no key"), (ValueError(), "ValueError"),
    (AssertionError("depth"), "AssertionError: depth"), (IndexError("list index out of range"), "list index out of"),
    (UsageError("x is wrong"), "x is wrong"), (KeyError("a b"), "it finds no 'a b'"), (OSError(2, "No"), "[Errno 2]"),
])  # fmt: skip
def test_what_libraries_say_in_a_word_is_said_in_a_sentence(error, said):
    assert one_line(error).startswith(said)
    with pytest.raises(UsageError, match="it cannot be read") as caught, refusing("it cannot be read", "; mend it"):
        raise error if not isinstance(error, UsageError) else ValueError(str(error))
    assert str(caught.value).startswith(f"it cannot be read: {said}")
    assert str(caught.value).endswith("; mend it")
