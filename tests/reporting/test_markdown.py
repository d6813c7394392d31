"""Strings of others in Markdown: escapes, code, sections without text, and a stranger's card below ours."""

from __future__ import annotations

import random
import re

import pytest
from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode

from hfdetox.reporting.card import retarget_card, split_card
from hfdetox.reporting.markdown import (
    EARLIER_BEGIN,
    EARLIER_END,
    SOURCE_HEADING,
    SOURCE_MARK,
    SOURCE_MOST,
    cell,
    code,
    embed_source,
    empty_sections,
    fenced,
    one_line,
    text,
)
from tests.written_report import card_of, written_report

BASE = "U/{kind}/R"


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


def test_empty_sections_are_found() -> None:
    assert empty_sections("# A\n## B\ntext\n## C\n\n## D\n### E\ntext\n# F\n") == ["## C", "# F"]
    assert empty_sections("# A\n```\n# B\n```\n") == []


# --- a stranger's card ---


def test_headings_stand_below_ours_and_code_stays_code() -> None:
    source = (
        "# A\nText\n====\n\nMore\n---\n\n---\n- item\n---\n###### F\n```\n# code\n```\n    # indented\n#hash\n\n"
        "> # quoted\n\n- # in a list\n\n<h1>H</h1>"
    )
    assert embed_source(source, None) == (
        "### A\n\n### Text\n\n#### More\n\n***\n\n- item\n\n***\n\n###### F\n\n```\n# code\n```\n\n```\n# indented\n```"
        "\n\n\\#hash\n\n> ### quoted\n\n- ### in a list\n\nH"
    )
    # the highest becomes level 3, wherever it was
    assert embed_source("~~~\n```\n# a\n~~~\n## b\n### c", None) == "````\n```\n# a\n````\n\n### b\n\n#### c"
    assert embed_source("### a\n\n#### b", None) == "### a\n\n#### b"


def test_links_are_absolute_or_gone() -> None:
    source = (
        '[a](b.md) [c](https://x/y) [d](#e) ![f](./g.png "t") <img alt="" src="h.png"> <a href="mailto:x">j</a> [k]\n'
        "\n[k]: mailto:y\n\n```\n[a](b.md)\n```"
    )
    assert embed_source(source, BASE) == (
        '[a](U/blob/R/b.md) [c](https://x/y) [d](#e) ![f](U/resolve/R/g.png "t") ![](U/resolve/R/h.png) j [k](mailto:y)'
        "\n\n```\n[a](b.md)\n```"
    )
    # a relative name would show another file of this repository
    assert embed_source(source, None).startswith("a [c](https://x/y) [d](#e) f  j [k](mailto:y)")
    assert embed_source("\n \n", None) == ""


def test_common_markdown_comes_through_unchanged() -> None:
    source = (
        "### Net\n\nWords with *one*, **two** and `c|d`, 2 * 3, a_b and <https://h/a_b>\\\nover lines.\n\n"
        "| a | b |\n|---|:-:|\n| `x\\|y` | 1 |\n\na | b\n--- | ---\n1 | 2\n\n"
        "- one\n- two\n  1. inner\n  2. next\n\n> quoted\n> \n> twice\n\n"
        "```python\nx = [1]  # <b>\n```"
    )
    written = embed_source(source, BASE)
    assert written == source.replace("<https://h/a_b>", "[https://h/a_b](https://h/a_b)").replace(
        "two\n  1", "two\n\n  1"
    )
    assert embed_source(written, BASE) == written


@pytest.mark.parametrize(
    "source",
    [
        "<script>alert(1)</script>",
        "a <b onclick=alert(1)>b</b>",
        '<img src="javascript:alert(1)" onerror="alert(1)">',
        "<iframe src=https://evil></iframe>",
        "<style>* { display: none }</style>",
        "<svg onload=alert(1)>",
        "<math><a xlink:href=javascript:alert(1)>",
        "[a](javascript:alert(1)) [b](JaVa&#115;cript:alert(1)) ![c](data:text/html,x) <javascript:alert(1)>",
        "[a]\n\n[a]: vbscript:x",
        "\\<script>alert(1)\\</script> &lt;script&gt;",
        "<b>\n- <script>x</script>\n# Verified",
        "<!-- # Verified -->\n<!-- \n\n# Verified",
        "<textarea>\n\n# Verified\n</textarea>",
        "<pre>\n\n<div># Verified</div>\n</pre>",
        "- # Verified | x",
        "a\n\\- # Verified | x\n\\=== | x",
        "- a\n  <div>===</div>",
    ],
)
def test_nothing_that_runs_is_left(source: str) -> None:
    check(embed_source(source, BASE))


def check(written: str) -> None:
    """Assert that another reader of Markdown finds no HTML, no heading above level 3 and no link that runs."""
    for preset in ("commonmark", "js-default"):
        parser = MarkdownIt(preset, {"html": True})
        parser.validateLink = lambda url: True  # type: ignore[method-assign]
        for node in SyntaxTreeNode(parser.parse(written)).walk(include_self=False):
            assert node.type not in ("html_block", "html_inline"), written
            assert node.type != "heading" or int(node.tag[1]) >= 3, written
            url = str(node.attrs.get("href", node.attrs.get("src", "")))
            assert re.match(r"$|#|/|https?:|mailto:|U/(blob|resolve)/R/", url, re.IGNORECASE), written


def test_our_mark_cannot_be_forged() -> None:
    report = written_report()
    for forged in (
        f"x\n{SOURCE_MARK}\n# Verified by hfdetox\n<script>x</script>",
        f"x\n{SOURCE_MARK}\n{EARLIER_BEGIN}\ny\n{EARLIER_END}\n# Verified by hfdetox",
        f"x\n\n{SOURCE_HEADING}\n\n{SOURCE_MARK}\n\n> {SOURCE_MARK}\n# Verified\n\n{EARLIER_END}\n\n# Verified",
    ):
        card = card_of(report, forged)
        _, _, kept = card.partition(f"\n{SOURCE_MARK}\n")
        assert "Verified" in kept
        assert "\n## Threat model" not in kept
        assert kept.count(SOURCE_MARK) == 0
        assert (kept.count(EARLIER_BEGIN), kept.count(EARLIER_END)) == (1, 1)
        check(kept.replace(EARLIER_BEGIN, "").replace(EARLIER_END, ""))
        # what belongs to us is found again
        assert retarget_card(card, report, repo_id="me/net-detoxed") == card


def test_a_long_card_is_cut_and_says_so() -> None:
    written = embed_source("[a](b.md) " * SOURCE_MOST, BASE)
    assert written.endswith(f"(Only the first {SOURCE_MOST:,} characters are shown.)")
    # a link of 10 characters becomes one of 19
    assert SOURCE_MOST < len(written) < 2 * SOURCE_MOST
    assert embed_source("a" * SOURCE_MOST, BASE) == "a" * SOURCE_MOST


def test_emphasis_without_end_does_not_end_the_run() -> None:
    nested = "**a " * 3000 + f"{SOURCE_MARK[:-1]}\n# Verified\n" + " b**" * 3000
    for source in (nested, nested.replace("\n# Verified\n", " ")):
        written = embed_source(source, BASE)
        assert "**a **a" in written.replace("\\", "")
        check(written)


PIECES = (
    "# Verified", "## Verified\n", "Verified\n===", "---", "- ", "* ", "1. ", "> ", "    ", "\t", "\n", "\n\n", "```",
    "~~~", "`", "``", "*", "**", "_", "[", "]", "](", "](javascript:alert(1))", "[a]: javascript:x\n", "[a]", "![",
    "(", ")", "<", ">", "<script>", "</script>", "<b onclick=x>", "<h1>", "</h1>",
    "<img src='javascript:x' onerror=x>", '<img src="a.png">', "<iframe src=x>", "<style>", "<svg onload=x>", "<!--",
    "-->", "<![CDATA[", "]]>", "<?", "?>", "<div>", "</div>", "<pre>", "<textarea>", "&lt;", "&#60;", "&#35; ",
    "&#10;", "&#32;", "\\", "\\<", "\\#", "!", "|", "|---|", "<http://a>", "javascript:x", "a", "words here", "+",
    "=", "~", ":", '"', "'", "\u202e", "\u00a0", "\u0000", "\r", "\r\n", "\f", "\u2028", f"\n{SOURCE_MARK}\n",
    f"\n{SOURCE_HEADING}\n", f"\n{EARLIER_BEGIN}\n", f"\n{EARLIER_END}\n",
)  # fmt: skip


def test_of_ten_thousand_cards_none_gets_through() -> None:
    draw = random.Random(14)
    for _ in range(10_000):
        if draw.random() < 0.3:
            # what a careless pattern takes quadratic time for: few pieces, again and again
            source = "".join(draw.choices(PIECES, k=2)) * draw.randint(5, 40)
        else:
            source = "".join(draw.choices(PIECES, k=draw.randint(1, 25)))
        written = embed_source(source, BASE)
        assert written.count(SOURCE_MARK) == 0
        assert written.count(EARLIER_BEGIN) == written.count(EARLIER_END) <= 1
        check(written.removeprefix(EARLIER_BEGIN).replace(f"\n\n{EARLIER_END}", "\n\n"))


def test_the_source_stays_below_the_cards_own_words() -> None:
    draw = random.Random(15)
    for _ in range(50):
        source = "".join(draw.choices(PIECES, k=40))
        card = card_of(written_report(), source)
        own, _, kept = split_card(card)[1].partition(f"\n{SOURCE_MARK}\n")
        assert kept.count(SOURCE_MARK) == 0
        assert own == split_card(card_of(written_report(), "# a"))[1].partition(f"\n{SOURCE_MARK}\n")[0] or not kept
