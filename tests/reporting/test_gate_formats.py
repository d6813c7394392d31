"""SARIF and CycloneDX of the gate: valid by the published schemas, with the ids, intervals and ancestors in them."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from hfdetox.reporting.cyclonedx import cyclonedx
from hfdetox.reporting.gate_facts import RULES, GatedModel, GateResult, GateVerdict, Reason, Rule, decide
from hfdetox.reporting.sarif import sarif
from hfdetox.reporting.taxonomies import ATTACKS, REMEDY, TAXONOMIES
from tests.conftest import REPOSITORY
from tests.gated import cleaned, result, scan
from tests.written_report import MODEL_COMMIT, card_of, written_report

SARIF = json.loads((REPOSITORY / "tests/schemas/sarif-2.1.0-rtm.5.json").read_text(encoding="utf-8"))
IDS = {"AML.T0018.000", "AML.T0010.003", "AML.T0043.004", "AML.M0008", "NISTAML.023", "NISTAML.021", "NISTAML.026",
       "NISTAML.051", "ML10:2023"}  # fmt: skip
NOTHING = GateResult(GateVerdict.UNKNOWN, [Reason(Rule.UNDECIDED, GateVerdict.UNKNOWN, "the model: not on the Hub")],
                     GatedModel("folder"), "", None, {})  # fmt: skip
RESULTS = {
    "pass": result(Reason(Rule.NO_EVIDENCE, GateVerdict.PASS, "no evidence found on 500 clean images")),
    "reject": result(Reason(Rule.SUSPICIOUS, GateVerdict.REJECT, "the scan suspects 'cat <script>'"),
                     scan=scan("suspicious")),
    "cleaned": cleaned(Reason(Rule.CLEANED, GateVerdict.CLEANED, "cleaned into out")),
    "unknown": result(*(Reason(rule, GateVerdict.UNKNOWN, f"{rule} “quoted” \u2192") for rule in RULES), scan=None,
                      accuracy=None),
    "nothing": NOTHING,
}  # fmt: skip


def strict(bill: dict[str, Any]) -> Any:
    return JsonStrictValidator(SchemaVersion.V1_7).validate_str(json.dumps(bill))


@pytest.mark.parametrize("found", RESULTS.values(), ids=RESULTS)
def test_sarif_is_valid_by_the_published_schema(found: GateResult) -> None:
    log = sarif(found)
    jsonschema.Draft4Validator(SARIF, format_checker=jsonschema.Draft4Validator.FORMAT_CHECKER).validate(log)
    [run] = log["runs"]
    assert [one["ruleId"] for one in run["results"]] == [str(one.rule) for one in found.reasons]
    levels = {"reject": "error", "unknown": "warning"}
    for one, reason in zip(run["results"], found.reasons, strict=True):
        assert one["level"] == levels.get(str(reason.verdict), "none")
        assert one["kind"] == ("fail" if str(reason.verdict) in levels else "pass")
        assert one["message"]["text"] == reason.text


def test_sarif_names_the_taxonomies_and_every_reference_leads_to_its_entry() -> None:
    [run] = sarif(RESULTS["unknown"])["runs"]
    taxonomies = run["taxonomies"]
    assert {taxon["id"] for taxonomy in taxonomies for taxon in taxonomy["taxa"]} == IDS
    assert [one["name"] for one in taxonomies] == ["MITRE ATLAS", "NIST AI 100-2e2025",
                                                   "OWASP Machine Learning Security Top 10"]  # fmt: skip
    assert all(one["version"] for one in taxonomies)
    rules = run["tool"]["driver"]["rules"]
    references = [relation["target"] for rule in rules for relation in rule["relationships"]]
    references += [taxon for one in run["results"] for taxon in one["taxa"]]
    for reference in references:
        taxonomy = taxonomies[reference["toolComponent"]["index"]]
        assert taxonomy["name"] == reference["toolComponent"]["name"]
        assert taxonomy["taxa"][reference["index"]]["id"] == reference["id"]
    assert all(rules[one["ruleIndex"]]["id"] == one["ruleId"] for one in run["results"])
    suspicious = next(rule for rule in rules if rule["id"] == "suspicious-class")
    assert {relation["target"]["id"] for relation in suspicious["relationships"]} == IDS - {REMEDY} == set(ATTACKS)


@pytest.mark.parametrize("found", RESULTS.values(), ids=RESULTS)
def test_cyclonedx_is_valid_by_the_strict_validator(found: GateResult) -> None:
    bill = cyclonedx(found)
    assert strict(bill) is None
    assert strict({**bill, "surplus": 1}) is not None
    model = bill["components"][0]
    assert model["type"] == "machine-learning-model"
    references = [one["bom-ref"] for one in bill["components"]]
    references += [one["bom-ref"] for part in ("claims", "evidence", "assessors") for one in bill["declarations"][part]]
    assert len(set(references)) == len(references)
    assert bill["serialNumber"] == cyclonedx(found)["serialNumber"]


def test_cyclonedx_has_ancestor_metrics_considerations_and_declarations() -> None:
    bill = cyclonedx(RESULTS["cleaned"])
    model = bill["components"][0]
    [ancestor] = model["pedigree"]["ancestors"]
    assert (ancestor["group"], ancestor["name"], ancestor["version"]) == ("someone", "net", MODEL_COMMIT)
    assert ancestor["hashes"] == [{"alg": "SHA-256", "content": "b3" * 32}]
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    accuracy = next(one for one in metrics if one["type"] == "accuracy")
    assert accuracy["value"] == "0.915000"
    assert accuracy["confidenceInterval"] == {"lowerBound": "0.889700", "upperBound": "0.936000"}
    attacks = {one["slice"]: one["value"] for one in metrics if one["type"] == "attack-success-rate"}
    assert attacks == {"400 images with trigger badnets": "0.012500", "400 images with trigger blended": "0.350000"}
    limits = " ".join(model["modelCard"]["considerations"]["technicalLimitations"])
    assert "No scan shows that a model has no backdoor" in limits
    assert "1 of 60" in limits
    assert "22 of 24" in limits
    [claim] = bill["declarations"]["claims"]
    assert claim["target"] == model["bom-ref"]
    assert claim["evidence"] == [bill["declarations"]["evidence"][0]["bom-ref"]]
    [mapped] = bill["declarations"]["attestations"][0]["map"]
    assert (mapped["requirement"], mapped["conformance"]["score"]) == (REMEDY, 1)
    standards = bill["definitions"]["standards"]
    assert {one["identifier"] for standard in standards for one in standard["requirements"]} == IDS
    assert len(standards) == len(TAXONOMIES)


def test_a_refused_model_has_the_claim_against_it() -> None:
    for name in ("reject", "unknown", "nothing"):
        bill = cyclonedx(RESULTS[name])
        [mapped] = bill["declarations"]["attestations"][0]["map"]
        assert mapped["counterClaims"] == ["claim-backdoor"]
        assert mapped["conformance"]["score"] == 0
        assert "pedigree" not in bill["components"][0]
    assert "error rates of this scan were not measured" in json.dumps(cyclonedx(result(scan=scan(combined=None))))


def test_report_and_card_of_a_cleaned_model_carry_the_ids() -> None:
    report = written_report()
    assert {taxon for ids in report.taxonomies.values() for taxon in ids} == IDS
    assert "MITRE ATLAS, 2026.09" in report.taxonomies
    own = card_of(report)
    assert all(taxon in own for taxon in IDS)


def test_the_worst_reason_decides_and_none_is_unknown() -> None:
    reasons = {verdict: Reason(Rule.UNDECIDED, verdict, "") for verdict in GateVerdict}
    good, cleaned_, refused, open_ = (reasons[verdict] for verdict in GateVerdict)
    assert decide([]) is GateVerdict.UNKNOWN
    assert decide([good]) is GateVerdict.PASS
    assert decide([good, cleaned_]) is GateVerdict.CLEANED
    assert decide([good, open_, cleaned_]) is GateVerdict.UNKNOWN
    assert decide([good, open_, refused]) is GateVerdict.REJECT
    statuses = [result(reason).status for reason in (good, cleaned_, refused, open_)]
    assert statuses == [0, 10, 20, 30]
