"""What the attacks and the remedy are called elsewhere: the ids that reports for pipelines, and cards, refer to."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Taxon:
    """An entry of a taxonomy; `mitigates` says that it is a remedy, not an attack."""

    id: str
    name: str
    url: str
    mitigates: bool = False


@dataclass(frozen=True)
class Taxonomy:
    """A list of attacks and remedies, by the release that the ids and names are of."""

    name: str
    organization: str
    version: str
    url: str
    taxa: tuple[Taxon, ...]


_ATLAS, _NIST = "https://atlas.mitre.org", "https://doi.org/10.6028/NIST.AI.100-2e2025"
_OWASP = "https://owasp.org/www-project-machine-learning-security-top-10"

ATLAS = Taxonomy(
    "MITRE ATLAS", "The MITRE Corporation", "2026.09", _ATLAS,
    (
        Taxon("AML.T0018.000", "Manipulate AI Model: Poison AI Model", f"{_ATLAS}/techniques/AML.T0018.000"),
        Taxon("AML.T0010.003", "AI Supply Chain Compromise: Model", f"{_ATLAS}/techniques/AML.T0010.003"),
        Taxon("AML.T0043.004", "Craft Adversarial Data: Insert Backdoor Trigger",
              f"{_ATLAS}/techniques/AML.T0043.004"),
        Taxon("AML.M0008", "Validate AI Model", f"{_ATLAS}/mitigations/AML.M0008", mitigates=True),
    ),
)  # fmt: skip
NIST = Taxonomy(
    "NIST AI 100-2e2025", "National Institute of Standards and Technology", "2025", _NIST,
    (
        Taxon("NISTAML.023", "Backdoor Poisoning", _NIST),
        Taxon("NISTAML.021", "Clean-label Backdoor", _NIST),
        Taxon("NISTAML.026", "Model Poisoning (Integrity)", _NIST),
        Taxon("NISTAML.051", "Model Poisoning (Supply Chain)", _NIST),
    ),
)  # fmt: skip
OWASP = Taxonomy(
    "OWASP Machine Learning Security Top 10", "OWASP Foundation", "2023", _OWASP,
    (Taxon("ML10:2023", "Model Poisoning", f"{_OWASP}/docs/ML10_2023-Model_Poisoning"),),
)  # fmt: skip
TAXONOMIES = (ATLAS, NIST, OWASP)
ATTACKS = tuple(taxon.id for taxonomy in TAXONOMIES for taxon in taxonomy.taxa if not taxon.mitigates)
REMEDY = "AML.M0008"


def listed() -> dict[str, list[str]]:
    """Return the ids by taxonomy and release, as reports and cards have them."""
    return {f"{one.name}, {one.version}": [taxon.id for taxon in one.taxa] for one in TAXONOMIES}
