"""Running the scores on one state of a model, and what they say together."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn

from hfdetox.data.cache import Pixels
from hfdetox.evaluation.metrics import rate
from hfdetox.evaluation.results import Rate
from hfdetox.evidence.base import SCORES, Reconstruction, Score, Suspect, unmeasured
from hfdetox.evidence.results import Finding, ScanResult, ScoreResult
from hfdetox.evidence.thresholds import When, judge_score, judged
from hfdetox.models.classifier import Classifier
from hfdetox.models.network import evaluating, exact_float32
from hfdetox.progress import progress_bar
from hfdetox.triggers.base import Trigger

# clean images that scores look at: the more, the longer the way to the most distant of them
MOST_IMAGES = 1000
# classes that a trigger is reconstructed for, unless all of them are
LOOKED_AT = 2
# where no score names a class, all are looked at, up to so many
MOST_CLASSES = 20


def make_suspect(
    classifier: Classifier, pixels: Pixels | None, accelerator: Accelerator, *, seed: int = 0,
    limit: int | None = None, progress: bool = False,
) -> Suspect:  # fmt: skip
    """Return a model as it is now with at most 1,000 of the clean images, drawn by the seed.

    Args:
        limit: image passes that all scores may take together; None for any number.
    """
    images = labels = None
    if pixels is not None and len(pixels):
        places = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))[:MOST_IMAGES].sort().values
        _, images, labels = pixels.__getitems__(places.tolist())
        labels = labels.cpu()
    network = classifier.network.to(accelerator.device)
    return Suspect(network, images, labels, len(classifier.labels), accelerator, seed, limit, progress)


def chosen_scores(when: When, *, thorough: bool = False) -> dict[str, Score]:
    """Return the scores of a scan in their order, those that reconstruct a trigger last."""
    kinds = [kind for kind in SCORES.values() if kind.when in (when, "both") and (thorough or not kind.thorough)]
    if when == "after" and not thorough:
        # what was reconstructed before is measured after, which tells more than to search anew
        kinds = [kind for kind in kinds if not issubclass(kind, Reconstruction)]
    ordered = sorted(kinds, key=lambda kind: (issubclass(kind, Reconstruction), kind.thorough, kind.name))
    return {kind.name: kind() for kind in ordered}


def scan_suspect(suspect: Suspect, labels: Sequence[str], when: When, *, thorough: bool = False,
                 ) -> tuple[ScanResult, list[Trigger]]:  # fmt: skip
    """Run the scores, and say what they found.

    Args:
        labels: the model's.
        when: whether the model came so, or was cleaned.
        thorough: run all scores, and look at all classes.

    Returns:
        What was found, and the triggers that were reconstructed (mode `input`, each aimed at its class).
    """
    begin, results, triggers = time.perf_counter(), dict[str, ScoreResult](), list[Trigger]()
    scores, total = chosen_scores(when, thorough=thorough), suspect.limit
    with still(suspect.network), progress_bar(f"scan {when}", len(scores), "score", shown=suspect.progress) as bar:
        for left, (name, score) in enumerate(scores.items(), -len(scores)):
            accused = None if thorough else most_accused(results, when)
            if total is not None:
                # each of those left may take an equal share of what is left
                suspect.limit = max(0, total - sum(one.passes for one in results.values())) // -left
            many = accused is None and not thorough and suspect.classes > MOST_CLASSES
            if many and isinstance(score, Reconstruction):
                results[name] = unmeasured(f"left out: no score names a class, and {suspect.classes} are too many to "
                                           "look at all")  # fmt: skip
            else:
                results[name], made = score.run(suspect, accused)
                triggers += made
            bar.update(1)
    samples = 0 if suspect.images is None else len(suspect.images)
    passes = sum(one.passes for one in results.values())
    result = ScanResult(str(Finding.UNKNOWN), None, None, "", results, samples, accuracy_of(suspect), passes,
                        time.perf_counter() - begin)  # fmt: skip
    return judged(result, when, tuple(labels)), triggers


def most_accused(results: Mapping[str, ScoreResult], when: When, count: int = LOOKED_AT) -> list[int] | None:
    """Return the classes that the scores accuse most, the first most; None, for all, where none accuses any.

    First what each score names, the one furthest above its threshold first; then what latent-shift names next, and
    where it could not be measured any other, to compare with.
    """
    judged_ = [judge_score(name, one, when) for name, one in results.items() if one.accused is not None]
    naming = sorted(judged_, key=_exceeds, reverse=True)
    places = [one.accused for one in naming if one.accused is not None]
    norms = results["latent-shift"].values if "latent-shift" in results else None
    if norms:
        finite = [(value, label) for label, value in enumerate(norms) if value is not None]
        places += [label for _, label in sorted(finite)]
    return list(dict.fromkeys([*places, *range(count)]))[:count] if places else None


def _exceeds(one: ScoreResult) -> float:
    return (one.statistic or 0.0) / one.threshold.value if one.threshold is not None else 0.0


def accuracy_of(suspect: Suspect) -> Rate | None:
    """Return the model's accuracy on the images of the scan, of its head's answers; None where these are not known."""
    try:
        heads = suspect.heads
    except ValueError:
        return None
    if not heads or not len(heads[0].features):
        return None
    answers = torch.stack([head.logits for head in heads]).mean(0).argmax(1)
    return rate(int((answers == heads[0].labels).sum()), len(answers))


@contextmanager
def still(network: nn.Module) -> Iterator[None]:
    """Hold a network in eval mode and exact float32, and take no gradients of its weights."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    with evaluating(network), exact_float32():
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
