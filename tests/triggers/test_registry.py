"""Triggers: what they do to pixels, how they are written down, and what is said about a wrong one."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hfdetox import triggers
from hfdetox.errors import UsageError
from hfdetox.plugins import Registry
from hfdetox.triggers import TRIGGERS, BadNets, Blended, Trigger, load_trigger, parse_trigger, parse_triggers
from tests.triggers.made import PICTURE, noise

NEW_FAMILY = """
from dataclasses import dataclass
from typing import ClassVar
from hfdetox.triggers.base import Trigger

@dataclass(frozen=True, kw_only=True, eq=False)
class Invert(Trigger):
    kind: ClassVar[str] = "invert"
    summary: ClassVar[str] = "the negative"

    def apply(self, images):
        return 255 - images
"""


def test_a_new_family_is_one_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "invert.py").write_text(NEW_FAMILY)
    monkeypatch.setattr(triggers, "__path__", [*triggers.__path__, str(tmp_path)])
    found: Registry[Trigger] = Registry("triggers", Trigger, "kind")
    assert set(found) == {*TRIGGERS, "invert"}
    monkeypatch.delitem(sys.modules, "hfdetox.triggers.invert")
    monkeypatch.setattr(triggers, "TRIGGERS", found)
    assert parse_trigger("invert:target=2").apply(torch.full((1, 3, 2, 2), 250, dtype=torch.uint8)).max() == 5


# --- files ---


def test_the_files_json_is_the_metadata_key_trigger(tmp_path: Path) -> None:
    content = BadNets(size=4, target="cat").file_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["trigger"]) == {
        "kind": "badnets", "name": "badnets", "target": "cat", "mode": "native", "pattern": "square", "size": 4,
        "value": 255, "right": 0, "bottom": 0,
    }  # fmt: skip


def trigger_file(folder: Path, header: object, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """Write a file whose metadata key `trigger` is `header` as JSON."""
    file = folder / "t.safetensors"
    save_file(tensors or {}, file, metadata={"trigger": json.dumps(header)})
    return file


@pytest.mark.parametrize(
    ("header", "tensors", "message"),
    [
        (None, {}, "not a trigger file: its metadata has no `trigger` of a known kind"),
        ([1], {}, "not a trigger file"),
        ({"kind": "wonnet"}, {}, r"of a known kind \(badnets, blended, "),
        ({"kind": ["badnets"]}, {}, "of a known kind"),
        ({"kind": "badnets", "colour": 1}, {}, "unknown fields colour for a badnets trigger"),
        ({"kind": "badnets"}, {"mask": torch.zeros(1)}, "unknown fields mask"),
        ({"kind": "badnets", "image": 5}, {}, "unknown fields image"),
        ({"kind": "badnets"}, {"size": torch.zeros(1)}, "unknown fields size"),
        ({"kind": "badnets", "size": "3"}, {}, "size cannot be '3' for a badnets trigger"),
        ({"kind": "badnets", "size": 2.5}, {}, "size cannot be 2.5"),
        ({"kind": "badnets", "size": True}, {}, "size cannot be True"),
        ({"kind": "badnets", "name": 7}, {}, "name cannot be 7"),
        ({"kind": "badnets", "mode": "both"}, {}, "mode cannot be 'both'"),
        ({"kind": "badnets", "target": [1]}, {}, r"target cannot be \[1\]"),
        ({"kind": "blended", "alpha": None}, {}, "alpha cannot be None"),
        ({"kind": "blended"}, {"image": torch.rand(3, 4, 4)}, "image must be a uint8 picture C×h×w, got torch.float32"),
        (
            {"kind": "blended"},
            {"image": torch.zeros(4, 4).byte()},
            r"uint8 picture C×h×w, got torch.uint8 of shape \(4, 4\)",
        ),
        ({"kind": "badnets"}, {"image": torch.zeros(3, 0, 0).byte()}, r"got torch.uint8 of shape \(3, 0, 0\)"),
        ({"kind": "badnets", "size": 0}, {}, "size must be at least 1"),
        ({"kind": "badnets", "size": 10**400}, {}, "a number has hundreds of digits"),
        ({"kind": "badnets", "target": -(10**400)}, {}, "a number has hundreds of digits"),
        ({"kind": "sig", "frequency": 10**400}, {}, "a number has hundreds of digits"),
        ({"kind": "ssba"}, {"encoder.out.bias": torch.zeros(())}, "ssba: encoder does not fit its parameters"),
        (
            {"kind": "inputaware"},
            {"generator.layers.0.weight": torch.zeros(0, 10**16, 3, 3), "mask.x": torch.zeros(0)},
            "inputaware: generator does not fit its parameters",
        ),
        ({"kind": "badnets", "pattern": "dots"}, {}, "pattern cannot be 'dots'"),
        ({"kind": "bpp", "dither": "true"}, {}, "dither cannot be 'true' for a bpp trigger"),
        ({"kind": "sig", "image": 1}, {}, "unknown fields image for a sig trigger"),
        ({"kind": "badnets", "name": "../x"}, {}, "trigger name '../x'"),
    ],
)
def test_a_wrong_trigger_file_is_one_line(
    header: object, tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_trigger(trigger_file(tmp_path, header, tensors))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, '{"kind": "badnets", "size": ' + "9" * 5000 + "}"])
def test_json_that_python_cannot_hold_is_one_line(text: str, tmp_path: Path) -> None:
    save_file({}, tmp_path / "t.safetensors", metadata={"trigger": text})
    with pytest.raises(UsageError, match=r"t\.safetensors cannot be read as a trigger file") as caught:
        load_trigger(tmp_path / "t.safetensors")
    assert "\n" not in str(caught.value)


def test_numbers_of_a_file_may_be_whole_where_fractions_are_meant(tmp_path: Path) -> None:
    trigger = load_trigger(trigger_file(tmp_path, {"kind": "blended", "alpha": 1, "target": None}))
    assert isinstance(trigger, Blended)
    assert trigger.alpha == 1


def test_an_unreadable_trigger_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "folder.safetensors").mkdir()
    no_json = tmp_path / "no_json.safetensors"
    save_file({}, no_json, metadata={"trigger": "{"})
    for file in (
        tmp_path / "missing.safetensors",
        tmp_path / "text.safetensors",
        tmp_path / "folder.safetensors",
        no_json,
    ):
        with pytest.raises(UsageError, match="cannot be read as a trigger file"):
            parse_trigger(str(file))


def test_weights_are_not_a_trigger(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="is not a trigger file"):
        parse_trigger(str(tmp_path / "model.safetensors"))


# --- specifications ---


@pytest.mark.parametrize("text", ["badnets", "badnets:"])
def test_a_bare_name_is_the_default(text: str) -> None:
    trigger = parse_trigger(text)
    assert isinstance(trigger, BadNets)
    assert trigger.parameters() == BadNets().parameters()
    assert (trigger.name, trigger.target, trigger.mode) == ("badnets", None, "native")


def test_every_key_of_a_specification() -> None:
    patch = parse_trigger("badnets:size=5,value=0,right=1,bottom=2,mode=input,target=dog,name=corner")
    assert isinstance(patch, BadNets)
    assert patch.parameters() == {
        "name": "corner", "target": "dog", "mode": "input", "pattern": "square", "size": 5, "value": 0, "right": 1,
        "bottom": 2,
    }  # fmt: skip
    blend = parse_trigger("blended:alpha=0.15,seed=4")
    assert isinstance(blend, Blended)
    assert (blend.alpha, blend.seed) == (0.15, 4)


@pytest.mark.parametrize(("text", "dither"), [("bpp:dither=true", True), ("bpp:dither=false", False), ("bpp", False)])
def test_true_and_false_are_read_and_written_as_words(text: str, dither: bool) -> None:
    trigger = parse_trigger(text)
    assert trigger.parameters()["dither"] is dither
    assert trigger.spec() == ("bpp:dither=true" if dither else "bpp")


def test_a_word_sets_the_field_that_allows_it() -> None:
    assert parse_trigger("badnets:grid").parameters()["pattern"] == "grid"
    assert parse_trigger("sig:input,delta=20").spec() == "sig:mode=input,delta=20.0"


@pytest.mark.parametrize("kind", ["blended", "lf:random", "wanet"])
def test_the_greatest_seed_draws(kind: str) -> None:
    greatest = parse_trigger(f"{kind}{',' if ':' in kind else ':'}seed={2**63 - 1}")
    assert not torch.equal(greatest.apply(noise()), parse_trigger(kind).apply(noise()))


def test_a_specification_leaves_defaults_out() -> None:
    assert BadNets().spec() == "badnets"
    assert BadNets(name="badnets", size=4, target=0).spec() == "badnets:target=index:0,size=4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wonnet", f"unknown trigger 'wonnet'; known: {', '.join(sorted(TRIGGERS))}, or a .safetensors trigger file"),
        ("", "unknown trigger ''"),
        ("badnets:sise=3", "trigger badnets: 'sise=3' is not one of name=…, target=…, mode=…, pattern=…, size=…"),
        ("ssba:sise=3", "name=…, target=…, mode=…, bits=…, seed=…, size=…$"),
        ("badnets:size", "'size' is not one of"),
        ("badnets:3", "'3' is not one of"),
        ("badnets:size=3,size=4", "size is given twice"),
        ("badnets:size=big", "size must be a whole number, got 'big'"),
        ("badnets:size=2.5", "size must be a whole number, got '2.5'"),
        ("blended:alpha=much", "alpha must be a number, got 'much'"),
        ("bpp:dither=1", "trigger bpp: dither must be true or false, got '1'"),
        ("bpp:dither=False", "dither must be true or false, got 'False'"),
        ("ssba:encoder=file", "trigger ssba: encoder is kept in trigger files and cannot be given as text"),
        ("badnets:mode=both", "mode must be one of native, input, got 'both'"),
        ("blended:seed=-1", "trigger blended: seed must be at least 0, got -1"),
        ("wanet:seed=9223372036854775808", r"trigger wanet: seed must be less than 2\*\*63"),
        ("badnets:name=a b", "trigger name 'a b': use letters"),
        ("badnets:name=mean", "and not 'mean'"),
        ("badnets:name=.hidden", "trigger name '.hidden'"),
        ("badnets:name=" + "x" * 65, "up to 64"),
        # letters of four bytes: 196
        ("badnets:name=" + "𐍈" * 49, "up to 64 and 192 bytes"),
        ("badnets:image=/nowhere/f.png", "trigger picture /nowhere/f.png cannot be read"),
    ],
)
def test_a_wrong_specification_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_trigger(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("kind", ["badnets", "blended"])
def test_a_picture_is_read_from_a_file_and_kept_in_the_trigger_file(kind: str, mode: str, tmp_path: Path) -> None:
    picture = Image.fromarray(PICTURE.permute(1, 2, 0).numpy()).convert(mode)
    picture.save(tmp_path / "p.png")
    trigger = parse_trigger(f"{kind}:image={tmp_path / 'p.png'}")
    read = trigger.tensors()["image"]
    assert torch.equal(read, torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1))
    trigger.save(tmp_path / "t.safetensors")
    (tmp_path / "p.png").unlink()
    assert torch.equal(parse_trigger(str(tmp_path / "t.safetensors")).apply(noise()), trigger.apply(noise()))


def test_a_file_that_is_no_picture_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_text("not a picture")
    with pytest.raises(UsageError, match=r"trigger picture .*p.png cannot be read"):
        parse_trigger(f"badnets:image={tmp_path / 'p.png'}")


LONG = "9" * 9000


@pytest.mark.parametrize("spec", [
    f"badnets:image={LONG}", f"lc:name={LONG}", f"blended:seed={LONG}", f"bpp:dither={LONG}", f"sig:{LONG}",
    f"{LONG}:size=3", f"/tmp/{LONG}.safetensors", f"wanet:{LONG}={LONG}", f"badnets:bpp={LONG}", f"bpp:dither=T{LONG}",
])  # fmt: skip
def test_what_is_said_of_a_long_value_is_short(spec: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_trigger(spec)
    assert len(str(caught.value)) < 700
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["levels", "name", "mode", "target", LONG])
def test_what_is_said_of_a_long_value_in_a_trigger_file_is_short(field: str, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    header = json.dumps({"kind": "bpp", field: [LONG] * 3})
    save_file({}, path, metadata={"trigger": header})
    with pytest.raises(UsageError) as caught:
        load_trigger(path)
    assert len(str(caught.value)) < 700


def test_several_triggers_need_names_of_their_own() -> None:
    with pytest.raises(UsageError, match="two triggers are named 'badnets'; give one of them another name with name=…"):
        parse_triggers(["badnets", "badnets:size=5"])
    with pytest.raises(UsageError, match="two triggers are named 'x'"):
        parse_triggers(["badnets:name=x", Blended(name="x")])
    with pytest.raises(UsageError, match="two triggers are named 'a' and 'A', which may be one file; give one of them"):
        parse_triggers(["badnets:name=a", "blended:name=A"])
    assert [t.name for t in parse_triggers(["badnets", BadNets(name="big", size=9), "blended"])] == [
        "badnets",
        "big",
        "blended",
    ]


@pytest.mark.parametrize("name", ["x" * 64, "字" * 64, "𐍈" * 48])
def test_the_longest_names_are_names_of_files(name: str, tmp_path: Path) -> None:
    trigger = parse_trigger(f"badnets:name={name}")
    trigger.save(tmp_path / f"{trigger.name}.safetensors")
    assert parse_trigger(str(tmp_path / f"{name}.safetensors")).name == name


def test_the_list_names_every_key_with_its_default() -> None:
    entries = TRIGGERS.entries()
    assert set(entries) == set(TRIGGERS)
    assert entries["badnets"].parameters["size"] == 3
    assert entries["blended"].parameters == {
        "name": "", "target": None, "mode": "native", "alpha": 0.2, "seed": 0,
    }  # fmt: skip
    assert entries["blended"].member.tensor_fields() == {"image": "picture"}
    for entry in entries.values():
        assert entry.member.summary
        assert entry.member.paper
        assert {f.name for f in fields(entry.member)} == {*entry.parameters, *entry.member.tensor_fields()}
        parse_trigger(entry.member.kind)
