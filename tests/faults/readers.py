"""Every reader of a stranger's bytes, what whole input looks like, and what may become of any other."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import shlex
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.numpy import save

from hfdetox.bench.tasks import bench_runs, load_suite
from hfdetox.cli import app as cli
from hfdetox.config import DetoxOptions
from hfdetox.data.images import ImageSet
from hfdetox.data.labels import align_labels
from hfdetox.data.load import default_dataset
from hfdetox.errors import HfdetoxError, UsageError
from hfdetox.files import check_safetensors
from hfdetox.gate_policy import load_policy
from hfdetox.models.classifier import load_classifier
from hfdetox.models.weights import find_weights
from hfdetox.reporting.card import CardError, build_card, validate_card
from hfdetox.reporting.report import AttackReport, Report
from hfdetox.runs.folder import RunFolder
from hfdetox.runs.manifest import foreign_files
from hfdetox.triggers import load_trigger, parse_trigger
from tests import image_data, tiny_models
from tests.attacked import attack_report
from tests.faults.inputs import TEXTS, damaged, written
from tests.written_report import LABELS, SOURCE, written_report

SECONDS = 20.0  # beyond them a reader hangs
LONGEST = 300  # letters of a line
MEMORY = 2 * 2**30  # bytes that a reader may take beyond what is there
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class HangError(BaseException):
    """A reader did not come back; no library may catch it."""


@dataclass(frozen=True)
class Reader:
    """A reader, and its inputs.

    Attributes:
        inputs: makes bytes.
        read: called with the bytes and a folder of its own; what it returns does not matter.
        whole: bytes that it must read.
        files: the names that it may find in its folder afterwards.
    """

    inputs: st.SearchStrategy[bytes]
    read: Callable[[bytes, Path], Any]
    whole: tuple[bytes, ...]
    files: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Outcome:
    """What became of an input: `value`, `refused`, or what must not be: `traceback`, `hang`, `bad line`, `wrote`."""

    kind: str
    text: str = ""

    @property
    def good(self) -> bool:
        """Whether it is one of the two that are promised."""
        return self.kind in ("value", "refused")


def outcome(reader: Reader, content: bytes) -> Outcome:
    """Return what a reader makes of an input, in a folder of its own."""
    with tempfile.TemporaryDirectory() as place, _limited():
        folder = Path(place) / "given"
        folder.mkdir()
        here = os.getcwd()
        os.chdir(place)
        try:
            reader.read(content, folder)
            found = Outcome("value")
        except HfdetoxError as error:
            line = str(error)
            bad = "\n" in line or len(line) > LONGEST or _CONTROL.search(line) or not line.strip()
            found = Outcome("bad line" if bad else "refused", line)
        except HangError:
            found = Outcome("hang")
        except BaseException:  # noqa: BLE001 (that is what is looked for)
            found = Outcome("traceback", traceback.format_exc())
        finally:
            os.chdir(here)
        strange = {name for name in os.listdir(place) if name != "given"} | (set(os.listdir(folder)) - reader.files)
        return Outcome("wrote", str(sorted(strange))) if strange and found.good else found


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise HangError

    before, (soft, hard) = signal.signal(signal.SIGALRM, ring), resource.getrlimit(resource.RLIMIT_AS)
    pages = Path("/proc/self/statm")
    if pages.exists():
        taken = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _at(name: str, read: Callable[[Path], Any]) -> Callable[[bytes, Path], Any]:
    """Return a reader of a file that is called `name`."""

    def reading(content: bytes, folder: Path) -> Any:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        return read(folder / name)

    return reading


def _model(source: Path, name: str) -> Callable[[bytes, Path], Any]:
    """Return a reader of a model's folder one of whose files is the input."""

    def reading(content: bytes, folder: Path) -> Any:
        for file in source.iterdir():
            (folder / file.name).symlink_to(file) if file.suffix == ".safetensors" else (
                folder / file.name
            ).write_bytes(file.read_bytes())
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)
        # the weights are a link to what lies outside, which hfdetox refuses of strangers
        for link in [file for file in folder.iterdir() if file.is_symlink()]:
            link.unlink()
            os.link(source / link.name, link)
        return load_classifier(folder)

    return reading


def _report(kind: Any) -> Callable[[bytes, Path], Any]:
    def reading(content: bytes, folder: Path) -> Any:
        (folder / kind.NAME).write_bytes(content)
        report = kind.load(folder)
        # what was read says the same again, and a card can be made of it
        assert kind.from_dict(json.loads(report.to_json())).to_json() == report.to_json()
        validate_card(build_card(report, source_card=None, repo_id=None, labels=None))

    return reading


def _card(content: bytes, folder: Path) -> Any:
    text = content.decode("utf-8", errors="replace")
    with contextlib.suppress(UsageError):
        default_dataset(text)
    card = build_card(written_report(), source_card=text, repo_id="me/net", labels=LABELS)
    with contextlib.suppress(CardError):
        validate_card(card)
    shown = MarkdownIt("commonmark").render(card[card.index("\n---\n") + 5 :])
    assert not re.search(r"<(script|iframe|[^>]* on\w+=|[^>]*javascript:)", shown, re.IGNORECASE), shown


def _weights(path: Path) -> Any:
    return check_safetensors(path), find_weights(path.parent)


def _labels(path: Path) -> Any:
    return align_labels(["apple", "bee", "cat"], tiny_models.NAMES, path)


def _suite(path: Path) -> Any:
    return bench_runs(load_suite(path))


def _line(content: bytes, folder: Path) -> Any:
    words = shlex.split(content.decode("utf-8", errors="surrogateescape").replace("\n", " "))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.run(words)
    lines = err.getvalue().strip().splitlines()
    if status and not (lines and lines[-1].startswith("hfdetox: ")):
        raise AssertionError(f"{words}: {status} {lines}")
    if any(_CONTROL.search(line) or len(line) > LONGEST for line in lines):
        raise AssertionError(f"{words}: {lines}")
    if status:
        raise UsageError(lines[-1][:900])


def _lines() -> st.SearchStrategy[bytes]:
    """Return command lines that end before anything is pulled: no such model, or --dry-run of a folder."""
    words = [
        "detox", "evaluate", "scan", "attack", "push", "verify", "gate", "bench", "list", "--dataset", "--samples",
        "0.1", "-1", "1e999", "--set", "lambda=x", "--set", "=", "--defense", "d3:paper", "d4", "--trigger",
        "badnets:size=3", "badnets:size=99999999999999", "blended:image=/dev/null", "none", "--target", "index:-1",
        "all-to-all", "--seed", "9" * 400, "--output", "''", "'\x1b[31m'", "'a b'", "../x", "/", ".", "..",
        "x" * 5000, "--label-map", "--resume", "--dry-run", "--json", "--quiet", "--device", "cpu", "tpu",
        "--precision", "fp16", "--epochs", "0", "--lr", "nan", "--pixel-range", "5,1", "--suite", "--policy",
        "--model-arg", "a=[", "timm-arch:resnet18", "--private", "--help", "--push-to", "a/b/c", "--create-pr", "٣",
        "'\udcff'", "é", "--", "-x", "--nothing", "--max-accuracy-loss", "101",
    ]  # fmt: skip
    return st.lists(st.sampled_from(words), min_size=1, max_size=7).map(
        lambda chosen: ("--dataset /no/such/folder " * ("--dataset" not in chosen) + " ".join(chosen)).encode(
            "utf-8", errors="surrogateescape"
        )
    )


def _picture(content: bytes, folder: Path) -> Any:
    return ImageSet([content], [0], [0]).image(0)


def _parquet(content: bytes, folder: Path) -> Any:
    (folder / "data").mkdir()
    (folder / "data" / "train.parquet").write_bytes(content)
    images = image_data.load(folder)[0]
    return [images.clean.image(position) for position in range(min(2, len(images.clean)))]


def _trigger_text(content: bytes, folder: Path) -> Any:
    return parse_trigger(content.decode("utf-8", errors="replace"))


def _run(content: bytes, folder: Path) -> Any:
    (folder / "run.json").write_bytes(content)
    return RunFolder(folder).recorded()


def _manifest(content: bytes, folder: Path) -> Any:
    (folder / ".hfdetox-manifest.json").write_bytes(content)
    assert foreign_files(folder) == []


def readers(root: Path) -> dict[str, Reader]:
    """Return every reader by its name; models and pictures that they need are written to `root`."""
    timm, vit = tiny_models.timm_folder(root / "timm"), tiny_models.transformers_folder(root / "vit", "vit")
    pictures = []
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(buffer, kind)
        pictures.append(buffer.getvalue())
    image_data.write_parquet(root / "data.parquet", image_data.cycle(30))
    trigger = parse_trigger("badnets:size=3").file_bytes()
    weights = save({"head.weight": np.arange(6, dtype=np.float32), "b": np.zeros(3, np.float16)})
    run = RunFolder(root / "x.run")
    run.begin(DetoxOptions("org/model", dataset="org/data", settings={"lambda": 1}), [])
    suite = {
        "dataset": "org/d",
        "models": {"m": "org/m"},
        "grids": [{"models": ["m"], "triggers": ["badnets"], "ratios": [0.1], "seeds": [0]}],
        "defenses": {"ft": "ft"},
        "bench": [{"models": ["m"], "triggers": ["badnets"], "ratios": [0.1], "defenses": ["ft"], "seeds": [0]}],
    }
    labels = {"apple": "apple", "bee": 1, "cat": None}
    policy = {"scan": {"least_images": 50, "suspicious": "reject"}, "accuracy": {"least": 0.5}}
    reports = [written_report().to_dict(), written_report(triggers=False).to_dict()]

    def documents(*plain: Any) -> tuple[st.SearchStrategy[bytes], tuple[bytes, ...]]:
        return written(plain), tuple(json.dumps(document).encode() for document in plain)

    def config(folder: Path, name: str) -> Reader:
        inputs, whole = documents(json.loads((folder / name).read_text()))
        return Reader(inputs, _model(folder, name), whole, frozenset({file.name for file in folder.iterdir()} | {name}))

    def raw(name: str, read: Callable[[Path], Any], *seeds: bytes) -> Reader:
        return Reader(damaged(seeds) | st.sampled_from(TEXTS), _at(name, read), seeds, frozenset({name}))

    def plain(name: str, read: Callable[[Path], Any], *seeds: Any) -> Reader:
        inputs, whole = documents(*seeds)
        return Reader(inputs, _at(name, read), whole, frozenset({name}))

    cards = [
        SOURCE.encode(),
        b"---\nlicense: mit\ndatasets: [org/d]\n---\n# A\n\n| a | b |\n|---|---|\n| 1 | [x](y) |\n",
        b"---\nlicense: mit\n---\n<b>x</b> ![p](q.png) [z]: javascript:alert(1)\n\n" + b"[" * 300,
    ]
    specs = [b"badnets:size=3,right=1", b"blended:alpha=0.2", b"wanet:s=0.5", b"sig", b"lf:random"]
    words = st.one_of(damaged(specs), st.sampled_from(TEXTS))
    return {
        "safetensors": raw("model.safetensors", _weights, weights),
        "timm config": config(timm, "config.json"),
        "transformers config": config(vit, "config.json"),
        "processor": config(vit, "preprocessor_config.json"),
        "card": Reader(damaged(cards) | st.sampled_from(TEXTS), _card, tuple(cards)),
        "label map": plain("m.yaml", _labels, labels),
        "suite": plain("s.yaml", _suite, suite),
        "policy": plain("p.yaml", load_policy, policy),
        "trigger file": raw("t.safetensors", load_trigger, trigger),
        "trigger text": Reader(words, _trigger_text, tuple(specs)),
        "report": Reader(documents(*reports)[0], _report(Report), documents(*reports)[1], frozenset({Report.NAME})),
        "attack report": Reader(*_attack(), frozenset({AttackReport.NAME})),
        "run folder": Reader(documents(json.loads((run.path / "run.json").read_text()))[0], _run,
                             ((run.path / "run.json").read_bytes(),), frozenset({"run.json"})),
        "manifest": Reader(documents({"files": {"a": "0" * 64}})[0], _manifest, (b'{"files": {}}',),
                           frozenset({".hfdetox-manifest.json"})),
        "picture": Reader(damaged(pictures) | st.sampled_from(TEXTS), _picture, tuple(pictures)),
        "parquet": Reader(damaged([(root / "data.parquet").read_bytes()]) | st.sampled_from(TEXTS), _parquet,
                          ((root / "data.parquet").read_bytes(),), frozenset({"data"})),
        "command line": Reader(_lines(), _line, ()),
    }  # fmt: skip


def _attack() -> tuple[st.SearchStrategy[bytes], Callable[[bytes, Path], Any], tuple[bytes, ...]]:
    seed = attack_report().to_dict()
    return written([seed]), _report(AttackReport), (json.dumps(seed).encode(),)
