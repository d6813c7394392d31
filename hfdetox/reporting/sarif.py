"""The gate's findings as SARIF 2.1.0 (OASIS), with the ids of taxonomies, for code hosts and pipelines."""

from __future__ import annotations

from typing import Any, Final

from huggingface_hub import constants

from hfdetox.reporting.card_data import hub_id
from hfdetox.reporting.gate_facts import RULES, GateResult, GateVerdict, Reason, Rule
from hfdetox.reporting.taxonomies import ATTACKS, REMEDY, TAXONOMIES

SCHEMA: Final = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_LEVELS = {GateVerdict.REJECT: "error", GateVerdict.UNKNOWN: "warning"}
# what rules are about attacks; the others are about the remedy: that the model was validated
_ATTACKS = (Rule.SUSPICIOUS, Rule.DELIBERATE, Rule.LEFT, Rule.ALTERED)


def sarif(found: GateResult) -> dict[str, Any]:
    """Return the SARIF log of a gate's result: one result a reason, at the model's weights."""
    rules = list(RULES)
    return {
        "$schema": SCHEMA, "version": "2.1.0",
        "runs": [{
            "tool": {"driver": {
                "name": "hfdetox", "semanticVersion": found.hfdetox_version, "version": found.hfdetox_version,
                "rules": [_rule(rule) for rule in rules],
                "supportedTaxonomies": [{"name": one.name, "index": place} for place, one in enumerate(TAXONOMIES)],
            }},
            "taxonomies": [_taxonomy(place) for place in range(len(TAXONOMIES))],
            "originalUriBaseIds": {"MODEL": {"uri": _place(found)}},
            "results": [_result(reason, rules.index(reason.rule), found) for reason in found.reasons],
            "properties": {
                "verdict": str(found.verdict), "exitStatus": found.status, "model": found.model.id,
                "revision": found.model.revision, "weightsSha256": found.model.weights_sha256,
                "dataset": found.dataset, "policy": found.policy,
            },
        }],
    }  # fmt: skip


def _rule(rule: Rule) -> dict[str, Any]:
    ids = ATTACKS if rule in _ATTACKS else (REMEDY,)
    return {
        "id": str(rule), "name": "".join(word.title() for word in rule.split("-")),
        "shortDescription": {"text": RULES[rule]},
        "relationships": [{"target": _reference(one), "kinds": ["relevant"]} for one in ids],
    }  # fmt: skip


def _taxonomy(place: int) -> dict[str, Any]:
    taxonomy = TAXONOMIES[place]
    return {
        "name": taxonomy.name, "version": taxonomy.version, "organization": taxonomy.organization,
        "informationUri": taxonomy.url, "isComprehensive": False,
        "shortDescription": {"text": f"{taxonomy.name}, release {taxonomy.version}"},
        "taxa": [{"id": one.id, "name": one.name, "helpUri": one.url, "shortDescription": {"text": one.name}}
                 for one in taxonomy.taxa],
    }  # fmt: skip


def _reference(taxon: str) -> dict[str, Any]:
    place, index = next((place, index) for place, one in enumerate(TAXONOMIES) for index, entry in enumerate(one.taxa)
                        if entry.id == taxon)  # fmt: skip
    return {"id": taxon, "index": index, "toolComponent": {"name": TAXONOMIES[place].name, "index": place}}


def _result(reason: Reason, index: int, found: GateResult) -> dict[str, Any]:
    failed = reason.verdict in _LEVELS
    ids = ATTACKS if reason.rule in _ATTACKS else (REMEDY,)
    file = {"artifactLocation": {"uri": "model.safetensors", "uriBaseId": "MODEL"}}
    # GitHub lists a finding once, however often it is reported, by this
    print_of = f"{found.model.id}/{reason.rule}"
    return {
        "ruleId": str(reason.rule), "ruleIndex": index, "kind": "fail" if failed else "pass",
        "level": _LEVELS.get(reason.verdict, "none"), "message": {"text": reason.text},
        "locations": [{"physicalLocation": file, "logicalLocations": [
            {"name": found.model.id, "fullyQualifiedName": found.name, "kind": "module"}]}],
        "partialFingerprints": {"hfdetoxModelRule/v1": print_of},
        "taxa": [_reference(one) for one in ids],
    }  # fmt: skip


def _place(found: GateResult) -> str:
    """Return where the model lies, ending in a slash; of a local folder the last part only."""
    model = found.model
    if hub_id(model.id, model.revision):
        return f"{constants.ENDPOINT}/{model.id}/resolve/{model.revision}/"
    return "file:///model/"
