"""A bench as a dataset on the test Hub: one commit, loads with `datasets`, joins with others, tells no path."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from huggingface_hub import DatasetCard

from hfdetox.bench.plots import draw_bench
from hfdetox.bench.publish import SCHEMA, push_bench, without_paths
from hfdetox.bench.summary import BenchTables
from hfdetox.errors import HubError, UsageError
from hfdetox.hub import client
from hfdetox.hub.client import AccessError
from hfdetox.hub.upload import RepoExistsError
from tests.bench.test_summary import row, undone
from tests.conftest import REPOSITORY
from tests.hub_server.server import HubServer
from tests.written_report import written_report


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "DEFAULT_RETRY", client.Retry(base_delay=0.01))


def bench(folder: Path, suite: str = "suite.yaml", *defenses: str) -> BenchTables:
    """A finished bench of two defenses, a third of which failed; all that it knows of this machine is in its texts."""
    here = folder / "secret-place"
    rows = [row(defense=name, settings={"trigger": f"{here}/mine.safetensors"}) for name in defenses or ("ft", "d3")]
    for one in rows:
        run = folder / one["name"]
        (run / "plots").mkdir(parents=True)
        (run / "plots" / "samples.png").write_bytes(b"an image of the user's")
        (run / "README.md").write_text("card")
        report = written_report()
        environment = replace(report.environment, command=f"hfdetox {here}/net --dataset={here}/pictures")
        replace(report, environment=environment, warnings=[f"it lies in {here}/x"]).save(run)
    reason = f"cannot read {here}/pictures/1.png; see {here}/x.log, https://example.org/a/b or 'C:\\{here.name}\\y'"
    tables = BenchTables(folder, suite, [*rows, undone("failed", reason, defense="broken")])
    tables.write()
    draw_bench(tables)
    (folder / "plots" / "gallery.png").write_bytes(b"an image of the user's")
    return tables


def test_one_commit_has_the_table_and_every_report(hub: HubServer, hub_token: str, repo_name, tmp_path: Path) -> None:
    name, tables = repo_name("bench"), bench(tmp_path / "bench")
    pushed = push_bench(tables, name.removeprefix("me/"))
    assert (pushed.repo_id, pushed.url) == (name, f"{hub.url}/datasets/{name}")
    assert len(hub.history(name, repo_type="dataset")) == 2  # the Hub's own first one, and this
    assert not hub.exists(name)  # no model
    files = hub.files(name, repo_type="dataset")
    assert set(files) - {".gitattributes"} == {
        "README.md", "bench.json", "data/runs.parquet", "plots/heatmap-m.png", "plots/scatter-m.png",
        *(f"runs/{one['name']}/detox_report.json" for one in tables.rows[:2]),
    }  # fmt: skip
    everything = b"".join(content for path, content in files.items() if not path.endswith(".png"))
    for word in (tmp_path.name, "secret-place", Path.cwd().as_posix(), "an image of the user's"):
        assert word.encode() not in everything, word
    assert b"https://example.org/a/b" in files["bench.json"]
    card = DatasetCard(files["README.md"].decode())
    assert "hfdetox-bench" in card.data.tags
    assert card.data.to_dict()["source_datasets"] == ["org/pictures"]
    assert f'load_dataset("{name}", split="train")' in card.text
    assert "| ft |" in card.text
    # the same again is no commit
    assert push_bench(tables, name).commit == pushed.commit


def test_many_peoples_runs_are_one_table(hub: HubServer, hub_token: str, repo_name, tmp_path: Path) -> None:
    names = [repo_name("bench"), repo_name("bench", "org")]
    push_bench(bench(tmp_path / "one"), names[0])
    other = bench(tmp_path / "two", "other.yaml", "nad")
    # nothing but None in a column: its type is the same all the same
    push_bench(replace(other, rows=[{**one, "verdict": None, "peak_memory": None} for one in other.rows]), names[1])
    runs = datasets.concatenate_datasets([datasets.load_dataset(name, split="train") for name in names])
    assert runs.column_names == SCHEMA.names
    frame = runs.to_pandas()
    assert frame["defense"].tolist() == ["ft", "d3", "broken", "nad", "broken"]
    assert frame["suite"].tolist() == ["suite.yaml"] * 3 + ["other.yaml"] * 2
    done = frame[frame["status"] == "done"]
    assert done["attack_success"].tolist() == [0.5] * 3
    assert set(done["model_id"]) == {"someone/net"}
    assert json.loads(done["settings"].iloc[0]) == {"trigger": "mine.safetensors"}


def test_the_leaderboard_of_the_docs_has_runs_on_local_images_too(
    hub: HubServer, hub_token: str, repo_name, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, tables = repo_name("bench"), bench(tmp_path / "bench", "suite.yaml", "nad")
    made = written_report()
    local = replace(made, dataset=replace(made.dataset, id="pictures", revision=None))
    local.save(tables.folder / tables.rows[0]["name"])
    push_bench(tables, name)
    page = (REPOSITORY / "docs" / "how-to" / "compare-defenses.md").read_text(encoding="utf-8")
    [code] = [block.partition("```")[0] for block in page.split("```python\n")[1:] if "hfdetox-bench" in block]
    # the test Hub lists no repositories by tag
    lines = (line for line in code.splitlines() if not line.startswith("names ="))
    exec("\n".join(lines), {"names": [name]})  # noqa: S102
    assert "nad" in capsys.readouterr().out


def test_a_later_bench_takes_the_place_of_the_earlier_one(
    hub: HubServer, hub_token: str, repo_name, tmp_path: Path
) -> None:
    name, tables = repo_name("bench"), bench(tmp_path / "bench")
    push_bench(tables, name)
    hub.commit(name, {"notes.md": "mine"}, repo_type="dataset")
    push_bench(replace(tables, rows=tables.rows[:1]), name)
    files = hub.files(name, repo_type="dataset")
    assert f"runs/{tables.rows[1]['name']}/detox_report.json" not in files
    assert files["notes.md"] == b"mine"
    with pytest.raises(UsageError, match=r"holds the bench of suite\.yaml, and this is that of other\.yaml"):
        push_bench(bench(tmp_path / "other", "other.yaml"), name)


def test_what_is_not_ours_stays(hub: HubServer, hub_token: str, repo_name, tmp_path: Path) -> None:
    name, tables = repo_name("bench"), bench(tmp_path / "bench")
    hub.create_repo(name, "dataset")
    hub.commit(name, {"data/train.parquet": b"theirs", "bench.json": "[1]"}, repo_type="dataset")
    with pytest.raises(RepoExistsError, match="not made by hfdetox; push to another name"):
        push_bench(tables, name)
    assert len(hub.history(name, repo_type="dataset")) == 2
    with pytest.raises(UsageError, match="nothing to publish"):
        push_bench(replace(tables, rows=tables.rows[2:]), repo_name("bench"))


def test_a_push_that_fails_leaves_nothing(
    hub: HubServer, hub_token: str, repo_name, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, tables = repo_name("bench"), bench(tmp_path / "bench")
    hub.faults.answer("POST", "/commit/", 503, times=None)
    with pytest.raises(HubError):
        push_bench(tables, name)
    assert set(hub.files(name, repo_type="dataset")) <= {".gitattributes"}
    hub.faults.rules.clear()
    push_bench(tables, name)
    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    with pytest.raises(AccessError, match="may only read"):
        push_bench(tables, name)


def test_paths_are_told_from_other_texts() -> None:
    told = {
        "/home/me/x.log": "x.log", f"{Path.cwd()}/x y": "x y",
        "see /a/b/c.log, or '/d/e'": "see c.log, or 'e'", "~/x/y": "y", "--out=/a/b": "--out=b",
        r"C:\Users\me\y.png": "y.png", "org/model": "org/model", "https://a.org/b/c": "https://a.org/b/c",
        "./x/y": "./x/y", "1/2": "1/2", "a / b": "a / b", "images/s": "images/s",
    }  # fmt: skip
    assert {text: without_paths(text) for text in told} == told
    assert without_paths({"a": ["/b/c", 1, None, ("/d/e",)]}) == {"a": ["c", 1, None, ["e"]]}
