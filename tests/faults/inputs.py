"""Malformed inputs: whole ones that were damaged byte by byte, or given other values where a document has some."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

# what a stranger may write where a number, a text or a list is expected
HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**30, 10**400, -0.5, 0.5, 1e308, float("inf"), float("nan"), "",
    " ", "x", "x" * 10_000, "\x1b[31mred\x1b[0m", "\u202egnp.exe", "a\0b", "a\nb", "../../etc/passwd", "/dev/zero",
    "\ud800", "é", "e\u0301", "١", "2024-99-99", "{{ 7 * 7 }}", "<script>alert(1)</script>", "[x](javascript:alert(1))",
    "|a|b|", [], {}, [None], [[[]]], ["x"] * 1000, {"": ""}, {"a": {"b": {}}}, {"0": "x"}, [1, "x", None, {}],
    {"x" * 300: 1},
)  # fmt: skip
TEXTS: tuple[bytes, ...] = (
    b"", b"\0", b"null", b"[]", b"{}", b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 20_000, b'{"a":' * 5_000, b"9" * 5_000,
    b"&a [*a]", b"a: &a [x,x]\nb: [*a,*a]\n", b"!!python/object/apply:os.system [id]", b"!!bool maybe", b"? ? ? ?",
    b"a: 2024-99-99", b"\x1b]0;title\x07", b"\x80\x04cposix\nsystem\n(S'id'\ntR.", b"version https://git-lfs\noid x\n",
    b"PK\x03\x04" + b"\0" * 60, b"\x89PNG\r\n\x1a\n" + b"\xff" * 60, b"PAR1PAR1", b"---\n---\n", b"---\n" + b"[" * 900,
    b"".join(b"&z%d [%s]\n" % (i, b",".join([b"*z%d" % (i - 1)] * 10 if i else [b"x"] * 10)) for i in range(9)),
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """Return one of `seeds`, which are whole, with one to four places of it cut, changed, doubled or filled."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        if not content:
            break
        # most of what decides lies at the beginning or the end
        end = len(content) - 1
        at = draw(st.integers(0, end) | st.integers(0, min(end, 80)) | st.integers(max(0, end - 80), end))
        size = draw(st.integers(1, 16) | st.integers(1, 4000))
        match draw(st.integers(0, 5)):
            case 0:
                content[at] ^= 1 << draw(st.integers(0, 7))
            case 1:
                del content[at : at + size]
            case 2:
                content[at:at] = draw(st.binary(min_size=1, max_size=12))
            case 3:
                content[at : at + size] = bytes([draw(st.sampled_from([0, 255, 45, 123]))]) * size
            case 4:
                content[at:at] = content[at : at + size]
            case _:
                del content[at:]
    return bytes(content)


@st.composite
def reshaped(draw: st.DrawFn, documents: Sequence[Any]) -> Any:
    """Return one of `documents`, which are valid, with one to three of its values replaced, renamed or left out."""
    root = [copy.deepcopy(draw(st.sampled_from(documents)))]
    for _ in range(draw(st.integers(1, 3))):
        holder: Any = root
        key: Any = 0
        for _ in range(draw(st.integers(0, 8))):
            inner = holder[key]
            if not isinstance(inner, list | dict) or not inner:
                break
            holder, key = inner, draw(st.sampled_from(list(inner) if isinstance(inner, dict) else range(len(inner))))
        # of the same type, as often as not: the others are found out at once
        alike = [value for value in HOSTILE if type(value) is type(holder[key])] if draw(st.booleans()) else []
        value = draw(st.sampled_from(alike or HOSTILE))
        match draw(st.integers(0, 4)):
            case 0 if holder is not root:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[str(draw(st.sampled_from(HOSTILE)))[:40]] = holder.pop(key)
            case 2 if isinstance(holder, dict):
                holder["added"] = copy.deepcopy(value)
            case _:
                holder[key] = copy.deepcopy(value)
        if holder is root and not isinstance(root[0], list | dict):
            break
    return root[0]


def written(documents: Sequence[Any]) -> st.SearchStrategy[bytes]:
    """Return documents as JSON, which is YAML too, most of them reshaped, some damaged or of another kind."""
    seeds = [json.dumps(document).encode() for document in documents]
    other = st.sampled_from(TEXTS)
    return st.one_of(reshaped(documents).map(_dumped), reshaped(documents).map(_dumped), damaged(seeds), other)


def _dumped(document: Any) -> bytes:
    return json.dumps(document).encode()
