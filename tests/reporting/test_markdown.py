"""Strings of others in Markdown: escapes, code, headings, links and sections without text."""

from __future__ import annotations

import pytest

from hfdetox.reporting.markdown import (
    anchor_links,
    cell,
    code,
    demote_headings,
    embed_source,
    empty_sections,
    fenced,
    one_line,
    text,
)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a", "`a`"),
        ("a`b", "``a`b``"),
        ("`a", "`` `a ``"),
        ("a\n# b", "`a # b`"),
        ("", "(empty)"),
        ("a\u202eb", "`a b`"),
    ],
)
def test_code_spans(source: str, expected: str) -> None:
    assert code(source) == expected


def test_other_escapes() -> None:
    assert cell("a|b") == r"`a\|b`"
    assert (
        text("<i>*a*_b_</i> [c](d) | $e$\n# f & g") == r"&lt;i&gt;\*a\*\_b\_&lt;/i&gt; \[c\](d) \| \$e\$ \# f &amp; g"
    )
    assert one_line(" a\t\x00\x1b b\u2028c ") == "a b c"
    assert fenced("a ```` b", "bash") == "`````bash\na ```` b\n`````"


def test_headings_are_demoted_outside_code_only() -> None:
    source = (
        "# A\nText\n====\n\nMore\n---\n\n---\n- item\n---\n###### F\n```\n# code\n```\n    # indented\n#hash\n"
        "<h1>H</h1>"
    )
    expected = (
        "### A\n### Text\n\n#### More\n\n---\n- item\n---\n###### F\n```\n# code\n```\n    # indented\n#hash\n"
        "<h3>H</h3>"
    )
    assert demote_headings(source, 2) == expected
    assert demote_headings("~~~\n```\n# a\n~~~\n# b", 2) == "~~~\n```\n# a\n~~~\n### b"


def test_links_are_anchored() -> None:
    source = (
        '[a](b.md) [c](https://x/y) [d](#e) ![f](./g.png "t") <img src="h.png"> <a href="mailto:x">'
        "\n```\n[a](b.md)\n```"
    )
    assert anchor_links(source, "U/{kind}/R") == (
        '[a](U/blob/R/b.md) [c](https://x/y) [d](#e) ![f](U/resolve/R/g.png "t") <img src="U/resolve/R/h.png"> '
        '<a href="mailto:x">\n```\n[a](b.md)\n```'
    )
    assert anchor_links(source, None).startswith("a [c](https://x/y) [d](#e) f")
    assert embed_source("\n \n", None) == ""


def test_empty_sections_are_found() -> None:
    assert empty_sections("# A\n## B\ntext\n## C\n\n## D\n### E\ntext\n# F\n") == ["## C", "# F"]
    assert empty_sections("# A\n```\n# B\n```\n") == []
