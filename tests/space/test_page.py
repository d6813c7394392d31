"""The Space in a browser: the demo from the scan to the published model, refusals, strangers' words, the queue."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfdetox.reporting.report import Report
from tests import backdoored
from tests.backdoored import NAMES
from tests.browser import browser
from tests.conftest import REPOSITORY
from tests.hub_server.server import HubServer
from tests.tiny_models import edit_json

pytest.importorskip("gradio", reason="the Space's extra is not installed: pip install 'hfdetox[space]'")
pytest.importorskip("authlib", reason="Gradio's sign-in is not installed: pip install 'gradio[oauth]'")
pytest.importorskip("joserfc", reason="this authlib signs no tokens by joserfc, as the test's own sign-in does")

SPACE = REPOSITORY / "examples" / "space"
SPACES_TOKEN = "hf_thespacesowntoken0123456789"
MINUTES = 20.0
WAIT = 60_000 * MINUTES  # milliseconds
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@dataclass(frozen=True)
class Running:
    """The Space: its address, the folder of its temporary files, what it printed, what signing in asked for."""

    url: str
    files: Path
    printed: Path
    scopes: list[str]

    @property
    def root(self) -> Path:
        """The one folder that it writes into."""
        [root] = self.files.glob("hfdetox-space-*")
        return root


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The Space as Hugging Face runs it: with OAuth's variables, and a token of its own."""
    from tests.space.sign_in import CLIENT, CLIENT_SECRET, provider

    folder = tmp_path_factory.mktemp("space")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with provider("me", HubServer.token) as (sign_in, scopes), (folder / "printed").open("w") as printed:
        environment = {
            **os.environ, "HF_TOKEN": SPACES_TOKEN, "HF_HOME": str(folder / "hf"), "TMPDIR": str(folder),
            "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1", "HFDETOX_SPACE_MINUTES": f"{MINUTES:g}",
            "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "GRADIO_SSR_MODE": "False",
            "SYSTEM": "spaces", "SPACE_ID": "me/hfdetox", "OPENID_PROVIDER_URL": sign_in, "OAUTH_CLIENT_ID": CLIENT,
            "OAUTH_CLIENT_SECRET": CLIENT_SECRET, "OAUTH_SCOPES": "openid profile contribute-repos",
        }  # fmt: skip
        process = subprocess.Popen([sys.executable, "app.py"], cwd=SPACE, env=environment, stdout=printed,
                                   stderr=subprocess.STDOUT)  # fmt: skip
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(url, process)
            yield Running(url, folder, folder / "printed", scopes)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    # it takes its files with it
    assert list(folder.glob("hfdetox-space-*")) == []


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Return when the Space answers: its demo is trained before."""
    until = time.monotonic() + 60 * MINUTES
    while process.poll() is None and time.monotonic() < until:
        try:
            urllib.request.urlopen(url, timeout=10).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the Space did not start")


def opened(running: Any, space: Running) -> Any:
    """Return the page of a new visitor."""
    page = running.new_page()
    page.set_default_timeout(WAIT)
    page.goto(space.url)
    page.get_by_role("button", name="Scan").wait_for()
    return page


def cells(page: Any, place: str) -> list[list[str]]:
    """Return the rows of the first table in a part of the page."""
    rows = page.locator(f"{place} table").first.locator("tr").all()
    return [row.locator("th, td").all_inner_texts() for row in rows]


def shown(rate: Any) -> str:
    """Return a rate as the page shows it, computed here."""
    low, high = rate.interval
    return f"{100 * rate.value:.1f} % ({100 * low:.1f}–{100 * high:.1f})"


def choose(page: Any, model: str, dataset: str) -> None:
    """Name a model of the Hub and its images."""
    page.get_by_label("A model of the Hub").check()
    page.get_by_label("Model", exact=True).fill(model)
    page.get_by_label("Images: a dataset of the Hub").fill(dataset)


def test_the_demo_is_scanned_cleaned_shown_and_published(space: Running, hub, repo_name) -> None:
    hub.add_user("space", SPACES_TOKEN)
    name = repo_name("cleaned")
    with browser() as running:
        page = opened(running, space)
        page.get_by_role("button", name="Sign in with Hugging Face").click()
        page.get_by_role("button", name="Logout (me)").wait_for()
        assert space.scopes == ["openid profile contribute-repos"]

        page.get_by_role("button", name="Scan").click()
        page.locator("#scanned h2").wait_for()
        assert page.locator("#scanned h2").inner_text() == "Scan: suspicious, 'zero'"
        assert ["head-probe", "zero"] in [[row[0], row[-1]] for row in cells(page, "#scanned")]

        page.get_by_role("button", name="Clean").click()
        page.locator("#cleaned h2").wait_for()
        [result] = space.root.glob("result-*/result")
        report = Report.load(result)
        assert report.before is not None
        assert report.after is not None
        known = [report.before.triggers["badnets"], report.after.triggers["badnets"]]
        assert known[0].attack_success_rate.value > 0.9
        assert cells(page, "#cleaned") == [
            ["", "before", "after"],
            ["accuracy", shown(report.before.accuracy), shown(report.after.accuracy)],
            ["attack success of badnets", *(shown(one.attack_success_rate) for one in known)],
            *([one.title, shown(one.before.attack_success_rate), shown(one.after.attack_success_rate)]
              for one in report.evidence.reconstructed.values()),
        ]  # fmt: skip
        assert str(report.verdicts["badnets"]) in page.locator("#cleaned").inner_text()
        widths = page.locator("#pictures img").evaluate_all("found => found.map(one => one.naturalWidth)")
        assert len(widths) >= 2
        assert min(widths) > 100
        card = page.frame_locator("#card iframe")
        card.get_by_role("heading", name="Results").wait_for()
        assert f"{report.after.accuracy.successes} of 500" in card.locator("table").first.inner_text()
        assert [one for one in hub.log if one.had_token and "oauth" not in one.path] == []

        page.get_by_label("Publish as").fill(name.partition("/")[2])
        page.get_by_role("button", name="Publish").click()
        page.get_by_text("published: ").wait_for()
        assert name in page.locator("#published").inner_text()
    assert hub.repo(name).private
    assert hub.history(name)[0].author == "me"
    assert json.loads(hub.files(name)["detox_report.json"])["output"]["pushed_to"] == name
    check_secrets(space, hub.token, SPACES_TOKEN)
    assert list(space.root.glob("job-*")) == []


def check_secrets(space: Running, *tokens: str) -> None:
    """Fail where a token was printed or written."""
    places = [space.printed, *(path for path in space.root.rglob("*") if path.is_file())]
    assert len(places) > 5
    for token in tokens:
        assert [path for path in places if token.encode() in path.read_bytes()] == []


def test_who_is_not_signed_in_publishes_nothing_and_a_wrong_id_is_one_line(space: Running, hub) -> None:
    with browser() as running:
        page = opened(running, space)
        for model, line in {
            "nobody/nothing": "the model nobody/nothing is not on the Hub",
            "../../etc": "must be an id of the Hub",
        }.items():
            choose(page, model, "nobody/images")
            page.get_by_role("button", name="Scan").click()
            page.get_by_text(line).wait_for()
            said = page.locator("#said").inner_text().strip()
            assert said.startswith("Not done. ")
            assert len(said.splitlines()) == 1
        assert page.locator("#scanned").inner_text().strip() == ""
        assert "app.py" not in space.printed.read_text()  # a traceback would name it
    assert list(space.root.glob("job-*")) == []


def test_strangers_words_stay_words_and_the_queue_says_whose_turn_it_is(
    space: Running, hub, repo_name, tmp_path_factory
) -> None:
    made, (model, dataset) = backdoored.made(tmp_path_factory), (repo_name("model", "org"), repo_name("digits", "org"))
    folder = tmp_path_factory.mktemp("evil") / "model"
    labels = [f"{name} {EVIL}" for name in NAMES]
    folder.mkdir()
    for path in filter(Path.is_file, made.timm.iterdir()):
        (folder / path.name).write_bytes(path.read_bytes())
    edit_json(folder / "config.json", label_names=labels)
    hub.create_repo(model)
    hub.commit_folder(model, folder)
    hub.commit(model, {"README.md": f"---\nlicense: mit\n---\n# {EVIL}\n{EVIL}\n"})
    hub.create_repo(dataset, "dataset")
    hub.commit_folder(dataset, made.digits, repo_type="dataset")
    with browser() as running:
        first, second = opened(running, space), opened(running, space)
        choose(first, model, dataset)
        choose(second, model, "")
        first.get_by_role("button", name="Clean").click()
        first.get_by_text("processing").wait_for()
        second.get_by_role("button", name="Scan").click()
        second.get_by_text("queue: 1/1").wait_for()
        first.locator("#cleaned h2").wait_for()
        for place in ("#cleaned", "#card", "#pictures"):
            assert first.locator(f"{place} script, {place} img[src=x]").count() == 0
        card = first.frame_locator("#card iframe")
        card.get_by_role("heading", name="Every class").wait_for()
        assert any(EVIL in table for table in card.locator("table").all_inner_texts())
        assert card.locator("body script").count() == 1
        # a card without images: the second's is refused
        second.get_by_text("Not done.").wait_for()
        assert [page.title() for page in (first, second)] == ["hfdetox", "hfdetox"]


def test_the_spaces_readme_is_what_hugging_face_reads() -> None:
    header = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert (header["sdk"], header["app_file"], header["hf_oauth"]) == ("gradio", "app.py", True)
    assert header["hf_oauth_scopes"] == ["contribute-repos"]
    assert len(header["short_description"]) <= 60
    assert (SPACE / header["app_file"]).is_file()
