"""`hfdetox report`: what hfdetox wrote, as a page that a person opens."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from hfdetox.errors import HfdetoxError, refusing
from hfdetox.files import write_atomically
from hfdetox.models.classifier import peek
from hfdetox.reporting.card import CARD_NAME
from hfdetox.reporting.card_data import shown_id
from hfdetox.reporting.page import build_page
from hfdetox.runs.integrity import pull_output


def write_page(source: str, path: Path, *, revision: str | None = None) -> None:
    """Write the report of a folder or repository as one HTML file; no weights are pulled.

    Args:
        source: a folder, else a Hub id.
        path: the file; what is there is replaced.
        revision: commit, branch or tag of a repository.

    Raises:
        UsageError: hfdetox did not make it. HubError: it cannot be pulled. RunError: the file cannot be written.
    """
    output = pull_output(source, revision, with_weights=False)
    labels = None
    with suppress(HfdetoxError):  # a module of neither library: its classes go by their index
        labels = peek(str(source), output.revision, False)[1]
    card = output.folder / CARD_NAME
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    pictures = {name: (output.folder / name).read_bytes() for name in sorted(output.files)
                if name.startswith("plots/") and name.endswith(".png")}  # fmt: skip
    with refusing(f"{output.name}: the report is not one that a page can be made of"):
        title = f"hfdetox: {shown_id(output.name, output.revision)}"
        page = build_page(output.report, text, title=title, labels=labels, pictures=pictures)
    write_atomically(path, page)
