"""Markdown made safe: strings of strangers inside our text, and the source model's card kept below it."""

import html
import re
import textwrap

from markdown_it import MarkdownIt
from markdown_it.common.normalize_url import normalizeLink
from markdown_it.tree import SyntaxTreeNode

from hfdetox.errors import one_line

SOURCE_HEADING = "## Card of the source model"
SOURCE_MARK = "<!-- hfdetox: card of the source model -->"
EARLIER_BEGIN, EARLIER_END = "<!-- hfdetox: earlier run -->", "<!-- hfdetox: end of earlier run -->"
# the highest heading of a source's text, which stands below one of level 2
SOURCE_LEVEL = 3
# characters of a source's text that are kept; the parser takes up to a second for so many
SOURCE_MOST = 40_000

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:")
_TAG = re.compile(r"<!--.*?(?:-->|\Z)|<[^<>]*>", re.DOTALL)
_PICTURE = re.compile(r"""<img\s(?:[^<>]*\s)?src\s*=\s*["']([^"'<>\s]+)["']""", re.IGNORECASE)
# what can be read as Markdown anywhere, and what at the start of a line (but a table's row of dashes has pipes)
_SPECIAL = re.compile(r"[\\`\[\]]|\*(?! )|(?<! )\*|(?<!\w)_|_(?!\w)|!$")
_LINE_START = re.compile(r"^(\d*)(?:(?<=\d)(?=[.)])|(?=[~#])|(?=[-+=](?!-*:? *\|[-:| ]*$)))")


def fit_text(value: str, letters: int) -> str:
    """Return a text on one line, at most `letters` long."""
    value = one_line(value, None)
    return value if len(value) <= letters else value[: max(1, letters - 1)].rstrip() + "…"


def code(value: object) -> str:
    """Return an inline code span that shows `value` literally, whatever backticks it holds ("(empty)" when empty)."""
    text = one_line(value, None)
    if not text:
        return "(empty)"
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def cell(value: object) -> str:
    """Return `code(value)` for a table cell, where a pipe must be escaped even inside a code span."""
    return code(value).replace("|", r"\|")


def text(value: object) -> str:
    """Return `value` as plain words: no emphasis, link, HTML, table or maths can start in it."""
    escaped = one_line(value, None).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", escaped)


def fenced(value: str, language: str) -> str:
    """Return a fenced code block with a fence longer than any run of backticks in `value`."""
    fence = "`" * max(3, max((len(run) for run in re.findall("`+", value)), default=0) + 1)
    return f"{fence}{language}\n{value.strip()}\n{fence}"


def _safe(markdown: str, base_url: str | None) -> str:
    """Return a stranger's Markdown written anew from its parse.

    It has no raw HTML (of which words and pictures stay), no heading above `SOURCE_LEVEL`, and no link that could run.
    """
    parser = MarkdownIt("commonmark")
    # the parser leaves a link that it takes for unsafe as text, which another parser may take for a link
    parser.validateLink = lambda url: True  # type: ignore[method-assign]
    # our marks in a stranger's code block would be taken for ours the next time
    shown = markdown[:SOURCE_MOST].replace("<!-- hfdetox:", "<!-- hfdetox,")
    try:
        tree = SyntaxTreeNode(parser.parse(shown))
        highest = min((int(node.tag[1]) for node in tree.walk() if node.type == "heading"), default=SOURCE_LEVEL)
        written = _write(tree, max(0, SOURCE_LEVEL - highest), base_url)
    except RecursionError:
        # emphasis in emphasis, hundreds deep: the parser bounds all but that
        written = fenced(shown, "")
    cut = f"\n\n(Only the first {SOURCE_MOST:,} characters are shown.)" if len(markdown) > SOURCE_MOST else ""
    return written + cut


def _write(node: SyntaxTreeNode, shift: int, base_url: str | None) -> str:
    inner = [_write(child, shift, base_url) for child in node.children]
    words = "".join(inner)
    match node.type:
        case "text":
            return _SPECIAL.sub(r"\\\g<0>", html.escape(node.content, quote=False))
        case "code_inline":
            return code(node.content)
        case "softbreak" | "hardbreak":
            return "\n" if node.type == "softbreak" else "\\\n"
        case "em" | "strong":
            return f"{node.markup}{words}{node.markup}"
        case "link" | "image":
            title = f' "{html.escape(text(node.attrs["title"]))}"' if "title" in node.attrs else ""
            url = _absolute(str(node.attrs.get("href", node.attrs.get("src"))), node.type == "image", base_url)
            return f"{'!' * (node.type == 'image')}[{words}]({url}{title})" if url else words
        case "html_block" | "html_inline":
            urls = [_absolute(normalizeLink(url), True, base_url) for url in _PICTURE.findall(node.content)]
            plain = text(html.unescape(_TAG.sub(" ", node.content)))
            return "".join(f"![]({url})" for url in urls if url) + plain
        case "inline":
            return "\n".join(_LINE_START.sub(r"\1\\", line.strip()) for line in words.split("\n"))
        case "heading":
            return f"{'#' * min(6, int(node.tag[1]) + shift)} {words}".replace("\n", " ")
        case "fence" | "code_block":
            return fenced(node.content, re.sub(r"[^\w+.#-].*", "", node.info.strip(), flags=re.DOTALL))
        case "hr":
            return "***"
        case "blockquote":
            return textwrap.indent("\n\n".join(inner), "> ", lambda line: True)
        case "list_item":
            mark = f"{node.info}{node.markup} "
            return mark + textwrap.indent("\n\n".join(inner), " " * len(mark)).lstrip()
    return ("\n" if node.type.endswith("_list") else "\n\n").join(filter(None, inner))


def _absolute(url: str, picture: bool, base_url: str | None) -> str | None:
    """Return a link of a source's text made absolute, None for one that could run or that points nowhere."""
    scheme = _SCHEME.match(url)
    if scheme and scheme[0].lower() not in ("http:", "https:", "mailto:"):
        return None
    url = url.replace("(", "%28").replace(")", "%29")
    if scheme or url.startswith(("#", "/")):
        return url
    return base_url and f"{base_url.replace('{kind}', 'resolve' if picture else 'blob')}/{url.removeprefix('./')}"


def embed_source(body: str, base_url: str | None) -> str:
    """Return the source card's text (without its YAML) for use below a level-2 heading; "" when it has none.

    A source that hfdetox wrote holds its own source's text; then that text is kept with the last run's, and what
    earlier runs wrote is left out, so that cards of models processed again and again stay of bounded length. No part is
    trusted: anybody can write our marks.

    Args:
        body: of whose parts the first `SOURCE_MOST` characters are kept each.
        base_url: where relative links and pictures lie (…/REPO/{kind}/COMMIT), with the placeholder `{kind}` for
            `resolve` (pictures) or `blob` (links). None: there is nothing to point at, and a relative name would show
            another file of this repository, so only the words stay.
    """
    own, mark, original = body.partition(f"\n{SOURCE_MARK}\n")
    if not mark:
        return _safe(own, base_url)
    own = own.partition(f"\n{SOURCE_HEADING}\n")[0]
    original = original.partition(f"\n{EARLIER_END}\n")[2] or original
    return f"{EARLIER_BEGIN}\n\n{_safe(own, base_url)}\n\n{EARLIER_END}\n\n{_safe(original, base_url)}".strip()


def empty_sections(markdown: str) -> list[str]:
    """Return the headings that nothing follows but another heading of the same or a higher level, or the end."""
    nodes = SyntaxTreeNode(MarkdownIt("commonmark").parse(markdown)).children
    return [
        f"{node.markup} {node.children[0].content}"
        for node, after in zip(nodes, [*nodes[1:], None], strict=True)
        if node.type == "heading" and (after is None or (after.type == "heading" and after.tag <= node.tag))
    ]
