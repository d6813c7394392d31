"""Draws the top of a result's model card as a picture, for the README.

    hfdetox demo
    python docs/images/card.py demo-output/cleaned docs/images/card.png

It needs Chromium, and is run by hand when the card changes.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from markdown_it import MarkdownIt
from PIL import Image

WIDTH, HEIGHT = 900, 1044
STYLE = """
body { margin: 24px 32px; font: 15px/1.5 sans-serif; color: #1f2328; background: #fff }
h1, h2 { border-bottom: 1px solid #d1d9e0; padding-bottom: .2em } h1 { font-size: 25px } h2 { font-size: 20px }
table { border-collapse: collapse } td, th { border: 1px solid #d1d9e0; padding: 4px 12px }
code { background: #eff1f3; border-radius: 5px; padding: .1em .35em; font-size: 85%; overflow-wrap: anywhere }
img { max-width: 100% }
"""


def page(folder: Path) -> str:
    """Return the card of a result as HTML that finds the card's own pictures."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    body = MarkdownIt().enable("table").render(re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL))
    base = folder.resolve().as_uri()
    return f'<meta charset="utf-8"><base href="{base}/"><style>{STYLE}</style>{body}'


def draw(folder: Path, output: Path) -> None:
    """Write the picture, with few enough colours to be small."""
    browser = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
    with tempfile.TemporaryDirectory() as scratch:
        html, shot = Path(scratch, "card.html"), Path(scratch, "card.png")
        html.write_text(page(folder), encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
        size = f"--window-size={WIDTH},{HEIGHT}"
        subprocess.run([browser, *flags, size, f"--screenshot={shot}", html.as_uri()], check=True, capture_output=True)
        picture = Image.open(shot).convert("RGB").quantize(96, dither=Image.Dither.NONE)
        picture.save(output, optimize=True)


def main() -> None:
    """Draw the card of the folder that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what hfdetox wrote")
    parser.add_argument("output", type=Path, help="the PNG file")
    arguments = parser.parse_args()
    draw(arguments.folder, arguments.output)


if __name__ == "__main__":
    main()
