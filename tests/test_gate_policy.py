"""The gate's policy and its judgement of scans: what passes, and that nothing passes by default."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from hfdetox.cli import app as cli
from hfdetox.config_verify import GateOptions
from hfdetox.errors import UsageError
from hfdetox.gate_policy import Policy, load_policy
from hfdetox.gating import judge_scan
from hfdetox.reporting.gate_facts import GateVerdict, decide
from tests.gated import MEASURED, scan

POLICY = load_policy()


def file_of(folder: Path, text: str) -> Path:
    file = folder / "policy.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def verdict(found: object, policy: Policy = POLICY) -> str:
    return str(decide(list(judge_scan(found, policy, GateVerdict.PASS))))  # type: ignore[arg-type]


def test_the_default_policy_is_cautious_and_a_file_says_what_differs(tmp_path: Path) -> None:
    assert (POLICY.scan.suspicious, POLICY.scan.measured_rates, POLICY.cleaned.verify) == ("reject", True, True)
    assert load_policy(file_of(tmp_path, "")) == POLICY
    other = load_policy(file_of(tmp_path, "scan: {least_images: 7}\naccuracy: {least: 0.5}\n"))
    assert other == replace(POLICY, scan=replace(POLICY.scan, least_images=7),
                            accuracy=replace(POLICY.accuracy, least=0.5))  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("scan: {suspicous: reject}", "unknown fields ['suspicous'] for scan; known: "),
        ("extra: 1", "unknown fields ['extra']"),
        ("source: x", "unknown fields ['source']"),
        ("scan: {suspicious: pass}", "scan.suspicious must be one of reject, unknown, got 'pass'"),
        ("scan: {least_images: 0}", "least_images must be at least 1"),
        ("scan: {measured_rates: 3}", "scan.measured_rates must be true or false"),
        ("scan: 3", "scan must be a mapping"),
        ("scan:", "scan must be a mapping"),
        ("accuracy: {least: 2}", "least must be in [0, 1]"),
        ("accuracy: {most_lost: -1}", "most_lost must be in [0, 100]"),
        ("accuracy: {most_lost: .nan}", "must be a number"),
        ("clean: {defense: 7}", "clean.defense must be text"),
        ("- a", "is not a policy (YAML)"),
        ("scan: {least_images: 1, least_images: 2}", "the key least_images is there twice"),
        ("scan: [", "is not a policy (YAML)"),
        ("1: 2", "is not text"),
    ],
)
def test_a_wrong_policy_is_one_line_that_names_file_and_key(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = file_of(tmp_path, text)
    with pytest.raises(UsageError, match="policy") as raised:
        load_policy(file)
    assert says in str(raised.value)
    assert cli.run(["gate", "org/m", "--dataset", "org/d", "--policy", str(file)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert says in line
    assert file.name in line


def test_a_pass_needs_the_words_enough_images_and_measured_error_rates() -> None:
    assert verdict(scan()) == "pass"
    for combined in (None, replace(MEASURED, measured=False)):
        assert verdict(scan(combined=combined)) == "unknown"
        lenient = replace(POLICY, scan=replace(POLICY.scan, measured_rates=False))
        assert verdict(scan(combined=combined), lenient) == "pass"
    assert verdict(scan(samples=99)) == "unknown"
    assert verdict(scan(samples=100)) == "pass"
    for finding in ("unknown", "clean", "", "no evidence"):
        assert verdict(scan(finding)) == "unknown"


def test_a_suspicious_model_is_refused_or_left_to_a_person() -> None:
    assert verdict(scan("suspicious")) == "reject"
    # few images and no error rates do not make it better
    assert verdict(scan("suspicious", samples=3, combined=None)) == "reject"
    person = replace(POLICY, scan=replace(POLICY.scan, suspicious="unknown"))
    assert verdict(scan("suspicious"), person) == "unknown"
    [reason] = judge_scan(scan("suspicious"), POLICY, GateVerdict.PASS)
    assert "'cat <script>'" in reason.text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"clean": True}, "--clean and --output go together"),
        ({"output": "x"}, "--clean and --output go together"),
        ({"triggers": ["badnets"]}, "--trigger goes with --clean"),
        ({"sarif": "/nowhere/at/all/x"}, "--sarif /nowhere/at/all/x: no such folder"),
        ({"cyclonedx": "/nowhere/at/all/x"}, "--cyclonedx /nowhere/at/all/x: no such folder"),
        ({"sarif": "x.json", "cyclonedx": "./x.json"}, "--sarif and --cyclonedx both name x.json"),
        ({"model": None}, "MODEL is missing"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match="") as raised:
        GateOptions(**{"model": "org/m", "dataset": "org/d", **options}).check()  # type: ignore[arg-type]
    assert says in str(raised.value)


@pytest.mark.parametrize(("option", "text"), [
    ("cyclonedx", '{"bomFormat": "CycloneDX", "components": [{"name": "hfdetox"}, {"name": "numpy"}]}'),
    ("sarif", '{"bomFormat": "CycloneDX", "metadata": [{"name": "hfdetox:gate:verdict"}]}'),
    ("cyclonedx", '{"runs": [{"tool": {"driver": {"name": "hfdetox", "rules": [{"id": "suspicious-class"}]}}}]}'),
])  # fmt: skip
def test_a_file_that_only_names_hfdetox_or_is_of_the_other_kind_is_not_replaced(
    option: str, text: str, tmp_path: Path
) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    options = GateOptions("org/m", dataset="org/d", **{option: file})
    with pytest.raises(UsageError, match="is none that hfdetox wrote"):
        options.check()


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="a file that may not be read, for root neither")
def test_a_file_that_cannot_be_read_is_not_replaced() -> None:
    with pytest.raises(UsageError, match="is none that hfdetox wrote"):
        GateOptions("org/m", dataset="org/d", sarif="/proc/self/mem").check()
