"""A Space in which a visitor scans and cleans an image classifier of the Hub, or the one of hfdetox's demo."""

from __future__ import annotations

import base64
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import work  # first: it takes the Space's token away

# nothing of a visitor's runs is recorded, and nothing is told to anybody
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
os.environ.setdefault("GRADIO_TEMP_DIR", str(work.ROOT / "shown"))

import gradio as gr

from hfdetox import HfdetoxError, Report
from hfdetox.cli.console import estimate
from hfdetox.cli.findings import NEVER_CLEAN
from hfdetox.evidence.results import Finding, Reconstructed, ScanReport, ScoreResult
from hfdetox.reporting.markdown import text

DEMO, HUB = "The demo: handwritten digits, with a backdoor on purpose", "A model of the Hub"
# signing in works where Hugging Face has given the Space an OAuth app
SIGN_IN = bool(os.environ.get("OAUTH_CLIENT_ID"))
PICTURES = {"before_after": "Before and after", "reconstructed": "Reconstructed triggers", "samples": "Known triggers",
            "moved": "Images that moved"}  # fmt: skip
# fonts of the visitor's machine: nothing is asked of a font server
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = """
.gradio-container .prose { overflow-x: auto; }
.gradio-container .prose :is(th, td) { word-break: normal; overflow-wrap: normal; padding: 6px 8px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.figures img { width: 100%; }
#card iframe { width: 100%; height: 75vh; border: 1px solid var(--border-color-primary); }
"""
INTRO = f"""# hfdetox
Look for a backdoor in an image classifier, fine-tune it away on a few clean images, and measure what that did.

Public models with safetensors up to {work.MEGABYTES:,} MB, images up to {work.MEGABYTES:,} MB, {work.MINUTES:g} minutes
a job, one job at a time. A model's own Python code is never run. What is pulled is removed after each job, a result
after an hour.
"""


def answering(job: Callable[..., dict[Any, Any]]) -> Callable[..., dict[Any, Any]]:
    """Return the job with an error of hfdetox as one line on the page."""

    def answer(*inputs: Any) -> dict[Any, Any]:
        try:
            return job(*inputs)
        except HfdetoxError as error:
            return {said: f"**Not done.** {text(error)}"}

    return answer


def words_of(source: str, folder: Path, *chosen: Any) -> list[str]:
    """Return model and images that were chosen, as words of the command line."""
    return work.demo_words() if source == DEMO else work.hub_words(folder, *chosen)


@answering
def scan(source: str, *chosen: Any) -> dict[Any, Any]:
    """Scan what was chosen."""
    with work.job() as folder:
        found = work.scan(words_of(source, folder, *chosen), folder)
    return {said: "Scanned.", scanned: describe_scan(found)}


@answering
def clean(old: Path | None, source: str, *chosen: Any) -> dict[Any, Any]:
    """Clean what was chosen; an earlier result of the visitor goes when there is a new one."""
    with work.job() as folder:
        words = words_of(source, folder, *chosen)
        made, page = work.clean(words + (work.demo_trigger() if source == DEMO else []), folder)
    work.remove(old)
    return {said: "Cleaned.", **show(made, page)}


def show(made: Path, page: str) -> dict[Any, Any]:
    """Return what is shown of a result."""
    drawn = {title: made / "plots" / f"{name}.png" for name, title in PICTURES.items()}
    # as data: nothing is copied to where Gradio serves files from
    data = {title: data_url(path.read_bytes(), "image/png") for title, path in drawn.items() if path.is_file()}
    figures = [f'<figure><img src="{url}" alt=""><figcaption>{title}</figcaption></figure>'
               for title, url in data.items()]  # fmt: skip
    # a page of its own origin, which may not reach this one
    source = data_url(page.encode(), "text/html;charset=utf-8")
    frame = f'<iframe title="Card" sandbox="allow-scripts" src="{source}"></iframe>'
    return {result: made, cleaned: describe_report(Report.load(made)), card: frame,
            pictures: f'<div class="figures">{"".join(figures)}</div>',
            publishing: gr.Column(visible=True), published: ""}  # fmt: skip


def data_url(content: bytes, kind: str) -> str:
    """Return content as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def publish(made: Path | None, repo: str, private: bool, token: gr.OAuthToken | None) -> str:
    """Publish the visitor's result as the visitor."""
    if token is None:
        return "**Not done.** Sign in first, at the top; then clean again, for signing in loads the page anew."
    try:
        lines = work.publish(made, repo, private=private, token=token.token).splitlines()
        # an option of the command line is of no use here
        return "\n\n".join(text(line.partition("; --publish-images")[0]) for line in lines)
    except HfdetoxError as error:
        # how to go on at a command line is of no use here
        return f"**Not done.** {text(str(error).partition('; the folder is whole')[0])}"


def describe_scan(found: ScanReport) -> str:
    """Return what a scan found, as Markdown in which strangers' words are words."""
    named = f", {text(repr(found.scan.label))}" if found.scan.label is not None else ""
    rows = [(name, *score(one), text(one.label or "–")) for name, one in found.scan.scores.items()]
    parts = [f"## Scan: {found.scan.finding}{named}", text(found.scan.why),
             table(("score", "value", "suspicious above", "names"), rows)]  # fmt: skip
    if made := found.reconstructed.values():
        parts.append(table(("what", "images that go to the class"), [reconstructed(one) for one in made]))
    return "\n\n".join([*parts, *warnings(found.warnings), f"*{NEVER_CLEAN.capitalize()}.*"])


def score(one: ScoreResult) -> tuple[str, str]:
    """Return the value of a score, bold where it is suspicious, and its threshold."""
    value = "–" if one.statistic is None else f"{one.statistic:.2f}"
    bold = "**" if one.finding == Finding.SUSPICIOUS else ""
    return f"{bold}{value}{bold}", "–" if one.threshold is None else f"{one.threshold.value:.2f}"


def describe_report(report: Report) -> str:
    """Return the rates before and after, as Markdown in which strangers' words are words."""
    before, after, evidence = report.before, report.after, report.evidence
    assert before is not None
    assert after is not None
    rows = [("accuracy", estimate(before.accuracy), estimate(after.accuracy))]
    for name, one in before.triggers.items():
        rates = (one.attack_success_rate, after.triggers[name].attack_success_rate)
        rows.append((f"attack success of {text(name)}", *map(estimate, rates)))
    rows += [reconstructed(one) for one in evidence.reconstructed.values()] if evidence else []
    loss = [f"Accuracy: **{report.accuracy_loss.verdict}**"] if report.accuracy_loss else []
    said = [*loss, *(f"{text(name)}: **{verdict}**" for name, verdict in report.verdicts.items())]
    return "\n\n".join(["## Before and after", table(("", "before", "after"), rows), " · ".join(said),
                        *warnings(report.warnings), "*In brackets: 95 % interval.*"])  # fmt: skip


def reconstructed(one: Reconstructed) -> tuple[str, ...]:
    """Return the row of a reconstructed trigger: what it is, and the images that it sends to its class."""
    states = [state for state in (one.before, one.after) if state is not None]
    return text(one.title), *(estimate(state.attack_success_rate) for state in states)


def warnings(lines: list[str]) -> list[str]:
    """Return warnings as Markdown."""
    return [f"⚠ {text(line)}" for line in lines]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


with gr.Blocks(title="hfdetox", delete_cache=(600, 3600)) as app:
    result = gr.State(None, time_to_live=3600, delete_callback=work.remove)
    gr.Markdown(INTRO)
    if SIGN_IN:
        gr.Markdown("To publish a result, sign in before you clean: it loads the page anew.")
        gr.LoginButton()
    source = gr.Radio([DEMO, HUB], value=DEMO, label="What")
    with gr.Column(visible=False) as choice:
        model = gr.Textbox(label="Model", placeholder="org/model", max_lines=1)
        dataset = gr.Textbox(label="Images: a dataset of the Hub", max_lines=1,
                             placeholder="org/images; empty: what the model's card names")  # fmt: skip
        archive = gr.File(label="Or your own images: a zip with one folder a class", file_types=[".zip"], height=140)
        samples = gr.Slider(100, 2500, 500, step=100, label="Clean images")
        measured = gr.Slider(0, 5000, 0, step=100, label="Images to measure on (0: the whole split)")
    with gr.Row():
        scans, cleans = gr.Button("Scan"), gr.Button("Clean", variant="primary")
    plain: dict[str, Any] = {"latex_delimiters": []}  # dollars of strangers are dollars
    said = gr.Markdown("Nothing done yet.", elem_id="said", container=True, min_height=60, **plain)
    scanned, cleaned = gr.Markdown(elem_id="scanned", **plain), gr.Markdown(elem_id="cleaned", **plain)
    pictures, card = gr.HTML(elem_id="pictures"), gr.HTML(elem_id="card")
    with gr.Column(visible=False) as publishing:
        repo = gr.Textbox(label="Publish as", placeholder="my-model-detoxed", max_lines=1)
        private = gr.Checkbox(True, label="Make a new repository private")
        publishes = gr.Button("Publish" if SIGN_IN else "Publish (works on Hugging Face alone)", interactive=SIGN_IN)
        published = gr.Markdown(elem_id="published", **plain)

    source.change(lambda chosen: gr.Column(visible=chosen == HUB), source, choice, queue=False)
    inputs = [source, model, dataset, archive, samples, measured]
    # one job at a time, whatever it is
    queued: dict[str, Any] = {"concurrency_id": "job", "concurrency_limit": 1, "api_visibility": "private"}
    scans.click(scan, inputs, [said, scanned], show_progress_on=said, **queued)
    cleans.click(clean, [result, *inputs], [said, result, cleaned, pictures, card, publishing, published],
                 show_progress_on=said, **queued)  # fmt: skip
    publishes.click(publish, [result, repo, private], published, **queued)

app.queue(max_size=20)

if __name__ == "__main__":
    # what is stopped removes its files
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    work.make_demo()
    app.launch(max_file_size=f"{work.MEGABYTES}mb", css=CSS, theme=THEME)
