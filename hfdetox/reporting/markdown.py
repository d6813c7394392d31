"""Markdown made safe: strings of strangers inside our text, and the source model's card kept below it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

SOURCE_HEADING = "## Card of the source model"
SOURCE_MARK = "<!-- hfdetox: card of the source model -->"
EARLIER_BEGIN, EARLIER_END = "<!-- hfdetox: earlier run -->", "<!-- hfdetox: end of earlier run -->"

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})(.*)$")
_HEADING = re.compile(r"^( {0,3})(#{1,6})(?=[ \t]|$)(.*)$")
_SETEXT = re.compile(r"^ {0,3}(=+|-+)[ \t]*$")
_NOT_A_PARAGRAPH = re.compile(r"^\s*$|^ {0,3}([#>|]|[-*+][ \t]|\d+[.)][ \t]|<)|^( {4}|\t)")
_HTML_HEADING = re.compile(r"(</?h)([1-6])(?=[\s>])", re.IGNORECASE)
_RELATIVE_LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(\s*<?(?![a-zA-Z][a-zA-Z0-9+.-]*:|#|/)(?:\./)?([^\s)<>]+)>?([^()]*)\)")
_RELATIVE_HTML = re.compile(r"""\b(src|href)=(["'])(?![a-zA-Z][a-zA-Z0-9+.-]*:|#|/)(?:\./)?([^"']+)\2""", re.IGNORECASE)


def one_line(value: object) -> str:
    """Return `str(value)` on one line, control characters and runs of white space turned into single spaces."""
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+", " ", str(value)).strip()


def code(value: object) -> str:
    """Return an inline code span that shows `value` literally, whatever backticks it holds ("(empty)" when empty)."""
    text = one_line(value)
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
    escaped = one_line(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", escaped)


def fenced(value: str, language: str) -> str:
    """Return a fenced code block with a fence longer than any run of backticks in `value`."""
    fence = "`" * max(3, max((len(run) for run in re.findall("`+", value)), default=0) + 1)
    return f"{fence}{language}\n{value.strip()}\n{fence}"


def _lines(markdown: str) -> Iterator[tuple[str, bool]]:
    """Yield (line, whether it is part of a fenced code block)."""
    fence = ""
    for line in markdown.splitlines():
        match = _FENCE.match(line)
        if fence:
            yield line, True
            if match and match[1].startswith(fence) and not match[2].strip():
                fence = ""
        elif match and not (match[1][0] == "`" and "`" in match[2]):
            fence = match[1]
            yield line, True
        else:
            yield line, False


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    return "\n".join(line if fenced_line else change(line) for line, fenced_line in _lines(markdown))


def demote_headings(markdown: str, levels: int) -> str:
    """Push every heading (`#`, underlined and HTML ones, not those in code) `levels` down, to 6 at most."""
    result: list[str] = []
    paragraph = False
    for line, fenced_line in _lines(markdown):
        underline = None if fenced_line else _SETEXT.match(line)
        if underline and paragraph:
            level = min(6, (1 if underline[1][0] == "=" else 2) + levels)
            result[-1] = f"{'#' * level} {result[-1].strip()}"
            paragraph = False
            continue
        if not fenced_line:
            line = _HEADING.sub(lambda m: f"{m[1]}{'#' * min(6, len(m[2]) + levels)}{m[3]}", line)
            line = _HTML_HEADING.sub(lambda m: f"{m[1]}{min(6, int(m[2]) + levels)}", line)
        result.append(line)
        paragraph = not fenced_line and not _NOT_A_PARAGRAPH.match(line)
    return "\n".join(result)


def anchor_links(markdown: str, base_url: str | None) -> str:
    """Make relative links and pictures outside code absolute, below `base_url` (…/REPO/{kind}/COMMIT).

    `base_url` holds the placeholder `{kind}` for `resolve` (pictures) or `blob` (links). None: there is nothing to
    point at, and a relative name would show another file of this repository, so only the words stay.
    """

    def link(match: re.Match[str]) -> str:
        picture, words, path, rest = match.groups()
        if base_url is None:
            return words
        return f"{picture}[{words}]({base_url.replace('{kind}', 'resolve' if picture else 'blob')}/{path}{rest})"

    def attribute(match: re.Match[str]) -> str:
        name, quote, path = match.groups()
        if base_url is None:
            return f"{name}={quote}{quote}"
        kind = "resolve" if name.lower() == "src" else "blob"
        return f"{name}={quote}{base_url.replace('{kind}', kind)}/{path}{quote}"

    return _outside_code(markdown, lambda line: _RELATIVE_HTML.sub(attribute, _RELATIVE_LINK.sub(link, line)))


def embed_source(body: str, base_url: str | None) -> str:
    """Return the source card's text (without its YAML) for use below a level-2 heading; "" when it has none.

    A source that hfdetox wrote holds its own source's text; then that text is kept with the last run's, and what
    earlier runs wrote is left out, so that cards of models processed again and again stay of bounded length.
    """
    # only a mark on a line of its own is ours: names and labels never span lines
    own, *rest = re.split(f"^{re.escape(SOURCE_MARK)}$", body, maxsplit=1, flags=re.MULTILINE)
    if rest:
        own = re.sub(f"^{SOURCE_HEADING}$.*", "", own, flags=re.MULTILINE | re.DOTALL)
    own = demote_headings(anchor_links(own, base_url), 2).strip()
    if not rest:
        return own
    original = re.sub(f"{re.escape(EARLIER_BEGIN)}.*?{re.escape(EARLIER_END)}", "", rest[0], flags=re.DOTALL).strip()
    return f"{EARLIER_BEGIN}\n\n{own}\n\n{EARLIER_END}\n\n{original}".strip()


def empty_sections(markdown: str) -> list[str]:
    """Return the headings that nothing follows but another heading of the same or a higher level, or the end."""
    empty: list[str] = []
    pending: tuple[int, str] | None = None
    for line, fenced_line in _lines(markdown):
        heading = None if fenced_line else _HEADING.match(line)
        if heading:
            level = len(heading[2])
            if pending and level <= pending[0]:
                empty.append(pending[1])
            pending = (level, line.strip())
        elif line.strip():
            pending = None
    return empty + ([pending[1]] if pending else [])
