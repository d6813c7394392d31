"""Publishing a bench as a dataset: a card, a table of the runs that many people's can be joined with, every report.

Neither models nor pictures of images are in it, nor where on this machine anything lies.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from hfdetox._version import __version__
from hfdetox.bench.summary import RATES, BenchTables
from hfdetox.bench.tables import Row
from hfdetox.bench.tasks import PLOTS
from hfdetox.documents import parse_json
from hfdetox.errors import UsageError, on_disk
from hfdetox.files import BENCH_NAME, REPORT_NAME
from hfdetox.hub.cards import check_card
from hfdetox.hub.client import UnknownRepoError
from hfdetox.hub.download import read_text_file
from hfdetox.hub.upload import PushResult, check_repo, push_folder
from hfdetox.reporting.card_data import hub_id
from hfdetox.reporting.report import Report

TAG = "hfdetox-bench"  # by which all of them are found
RUNS = "data/runs.parquet"
# of a rate each state, see `hfdetox.bench.summary`
_STATES = (*RATES, *(f"{rate}_before" for rate in RATES if rate != "der"))
_TEXTS = ("name", "subject", "model", "attack", "defense", "method", "status", "reason", "verdict", "accuracy_verdict",
          "precision", "device")  # fmt: skip
# what the numbers are of, so that a stranger can tell whether two runs may be compared
_SOURCES = {"model_id": "model.id", "model_revision": "model.revision", "model_sha256": "model.weights_sha256",
            "dataset_id": "dataset.id", "dataset_revision": "dataset.revision",
            "eval_indices_sha256": "dataset.eval_indices_sha256"}  # fmt: skip
# equal in every bench: a column of nothing but None has a type too
SCHEMA = pa.schema([
    ("hfdetox_version", pa.string()), ("suite", pa.string()), *((name, pa.string()) for name in _TEXTS),
    ("settings", pa.string()), *((name, pa.string()) for name in _SOURCES), ("seed", pa.int64()),
    ("samples", pa.float64()), ("clean", pa.bool_()), ("clean_images", pa.int64()), ("eval_images", pa.int64()),
    *((rate, pa.float64()) for rate in _STATES), ("der_low", pa.float64()), ("der_high", pa.float64()),
    ("seconds", pa.float64()), ("peak_memory", pa.int64()),
])  # fmt: skip
# an absolute path, up to its last name; that of an address (https://…) is none
_PATH = re.compile(r"(?<![\w.:/~-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\:;,'\"`()]+[/\\])*(?=[^\s/\\:;,'\"`()])")


def check_push(repo_id: str, suite: str, *, private: bool) -> str:
    """Find out before any work whether `push_bench` could succeed; nothing is changed.

    Args:
        suite: the name of the suite's file.

    Returns:
        The whole id of the repository.

    Raises:
        UsageError: the repository was not made by hfdetox, or is the bench of another suite.
        HubError: token or network.
    """
    name = check_repo(repo_id, repo_type="dataset", private=private)
    try:
        text = read_text_file(name, BENCH_NAME, "main", "dataset")
    except UnknownRepoError:
        return name
    there = parse_json(text) if text is not None else {}
    of = there.get("suite") if isinstance(there, dict) else None
    if text is not None and of != suite:
        raise UsageError(f"dataset {name} holds the bench of {of}, and this is that of {suite}: publish it under "
                         "another name")  # fmt: skip
    return name


def push_bench(tables: BenchTables, repo_id: str, *, private: bool = False) -> PushResult:
    """Publish a bench as one commit to a dataset repository; what an earlier push left there is replaced.

    Raises:
        UsageError: nothing is measured yet, or what `check_push` raises.
        HubError: see `push_folder`.
    """
    if not any(row["status"] == "done" for row in tables.rows):
        raise UsageError(f"no run of {tables.suite} is done: there is nothing to publish")
    name = check_push(repo_id, tables.suite, private=private)
    with tempfile.TemporaryDirectory(prefix="hfdetox-bench-") as place:
        folder = Path(place)
        with on_disk(f"write {folder}"):
            write_bench(tables, folder, name)
        check_card((folder / "README.md").read_text(encoding="utf-8"), "dataset")
        return push_folder(folder, name, repo_type="dataset", private=private, verify_upload=False,
                           message=f"Upload a bench made by hfdetox {__version__}")  # fmt: skip


def write_bench(tables: BenchTables, folder: Path, repo_id: str) -> None:
    """Write what is published of a bench into an empty folder: card, tables, pictures of numbers, reports."""
    reports = {row["name"]: Report.load(tables.folder / row["name"]) for row in tables.rows if row["status"] == "done"}
    plain = {name: without_paths(report.to_dict()) for name, report in reports.items()}
    # before anything is made of the texts, which may write a path otherwise
    told = replace(tables, rows=without_paths(tables.rows))
    _write_json(folder / BENCH_NAME, told.document())
    for name, report in plain.items():
        _write_json(folder / "runs" / name / REPORT_NAME, report)
    (folder / RUNS).parent.mkdir()
    rows = [_run(told, row, plain.get(row["name"], {})) for row in told.rows]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / RUNS)
    # its own alone: what else is in the folder may show anything
    plots = sorted(path for kind in ("heatmap", "scatter") for path in (tables.folder / PLOTS).glob(f"{kind}-*.png"))
    for plot in plots:
        (folder / PLOTS).mkdir(exist_ok=True)
        shutil.copyfile(plot, folder / PLOTS / plot.name)
    pictures = [f"{PLOTS}/{plot.name}" for plot in plots]
    datasets = {one.dataset.id for one in reports.values() if hub_id(one.dataset.id, one.dataset.revision)}
    (folder / "README.md").write_text(_card(told, repo_id, pictures, sorted(datasets)), encoding="utf-8")


def without_paths(value: Any) -> Any:
    """Return plain JSON types in which every absolute path is its last name, or what it is below where we work."""
    if isinstance(value, str):
        for place in (Path.cwd(), Path.home()):  # spaces may be in these
            value = value.replace(f"{place}{os.sep}", "")
        return _PATH.sub("", value)
    if isinstance(value, dict):
        return {without_paths(key): without_paths(inner) for key, inner in value.items()}
    return [without_paths(inner) for inner in value] if isinstance(value, list | tuple) else value


def _run(tables: BenchTables, row: Row, report: dict[str, Any]) -> dict[str, Any]:
    """Return a run's row of the published table."""
    sources = {name: report.get(part, {}).get(key) for name, (part, key) in
               ((name, path.split(".")) for name, path in _SOURCES.items())}  # fmt: skip
    whole = {**row, **sources, "suite": tables.suite, "hfdetox_version": report.get("hfdetox_version", __version__),
             "settings": json.dumps(row["settings"], sort_keys=True)}  # fmt: skip
    return {name: whole.get(name) for name in SCHEMA.names}


def _card(tables: BenchTables, repo_id: str, plots: Sequence[str], datasets: Sequence[str]) -> str:
    """Return the dataset's card: what `bench.md` says, and how to load and join it."""
    head = {
        "pretty_name": f"hfdetox bench {tables.suite}",
        "tags": ["hfdetox", TAG, "backdoor-defense", "image-classification"],
        "configs": [{"config_name": "runs", "data_files": RUNS, "default": True}],
        **({"source_datasets": list(datasets)} if datasets else {}),
    }  # fmt: skip
    text = tables.rendered("bench_card.md.jinja", repo_id=repo_id, tag=TAG, plots=plots,
                           bench=tables.markdown().partition("\n")[2].strip())  # fmt: skip
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n{text.strip()}\n"


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
