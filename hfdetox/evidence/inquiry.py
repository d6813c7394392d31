"""What one run finds without the attacker's trigger: scans, and what was reconstructed, before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor

from hfdetox.data.cache import Pixels
from hfdetox.errors import UsageError
from hfdetox.evaluation.evaluator import Evaluator
from hfdetox.evaluation.metrics import Predictions
from hfdetox.evidence.claims import class_shifts, find_agreement, grade_images
from hfdetox.evidence.residual import residual
from hfdetox.evidence.results import Evidence, Reconstructed, ScanResult
from hfdetox.evidence.run import make_suspect, most_accused, scan_suspect
from hfdetox.evidence.thresholds import When
from hfdetox.triggers.base import Trigger

# of the image passes that a run's scans may take, those before cleaning
_BEFORE = 0.8


@dataclass
class Inquiry:
    """The evidence of one run, as far as it goes.

    Attributes:
        evaluation: the evaluation images with the known triggers.
        pixels: the clean images; None where there are none.
        seed: of the run.
        limit: image passes that both scans may take together; None for any number.
        thorough: run all scores, and look at all classes.
        wanted: whether anything is looked for at all.
        tested: whether known and reconstructed triggers are tested for being asleep, at the end.
        found: what was found so far.
        suspect: the weights of the model as it came, where `tested`.
        views: the evaluation images with the reconstructed triggers; None before the first scan.
        before, after: what was measured of these.
    """

    evaluation: Evaluator
    pixels: Pixels
    seed: int
    limit: int | None = None
    thorough: bool = False
    wanted: bool = True
    tested: bool = False
    suspect: dict[str, Tensor] = field(default_factory=dict)
    found: Evidence = field(default_factory=Evidence)
    views: Evaluator | None = None
    before: Predictions | None = None
    after: Predictions | None = None

    def begin(self, measured: Predictions, when: When = "before") -> Evidence | None:
        """Scan the model as it is, grade the clean images, and measure what was reconstructed.

        That is, of what was reconstructed for the class that is accused most.

        Args:
            measured: of the same model, on the evaluation images.
            when: whose thresholds count: `after` for a model that was cleaned in another run.
        """
        if self.tested:
            state = self.evaluation.classifier.network.state_dict()
            self.suspect = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        if not self.wanted:
            return None
        share = _BEFORE if when == "before" else 1.0
        limit = None if self.limit is None else int(share * self.limit)
        scan, triggers, images = self._scan(when, limit, graded=True)
        # measuring takes as long as for a known trigger, so that of all classes looked at it is one
        most = most_accused(scan.scores, when, 1) if scan.accused is None else [scan.accused]
        self.views = with_reconstructed(self.evaluation, [one for one in triggers if one.target in (most or ())])
        self.before = self.views.measure("reconstructed, before", known=measured)
        labels, results = self.evaluation.classifier.labels, self.before.measurement.triggers
        made = {name: Reconstructed(name.split("-")[1], int(one.target), labels[int(one.target)], one)
                for name, one in results.items()}  # fmt: skip
        self.found = Evidence(scan, None, made, images)
        return self.found

    def end(self, measured: Predictions, first: Predictions) -> Evidence | None:
        """Scan the cleaned model, and measure on it what was reconstructed on the one that came.

        Args:
            measured: of the cleaned model, on the evaluation images.
            first: of the model as it came.
        """
        if self.tested:
            views = [*self.evaluation.views, *(self.views.views if self.views is not None else ())]
            self.found = replace(self.found, residual=residual(self.evaluation, self.pixels, self.suspect, views,
                                                               seed=self.seed))  # fmt: skip
        if self.views is None:
            return self.found if self.tested else None
        spent = self.found.before.passes if self.found.before else 0
        limit = None if self.limit is None else max(0, self.limit - spent)
        scan, _, _ = self._scan("after", limit, graded=False)
        self.after = self.views.measure("reconstructed, after", known=measured)
        later = self.after.measurement.triggers
        made = {name: replace(one, after=later[name]) for name, one in self.found.reconstructed.items()}
        truth = self.evaluation.clean.labels.cpu().numpy()
        labels = self.evaluation.classifier.labels
        agreement = find_agreement(truth, first.predicted, measured.predicted, labels)
        shifts = class_shifts(self.found.before, scan, labels) if self.found.before is not None else []
        self.found = replace(self.found, after=scan, reconstructed=made, agreement=agreement, shifts=shifts)
        return self.found

    @property
    def triggers(self) -> list[Trigger]:
        """What was reconstructed and is measured."""
        return [view.trigger for view in self.views.views] if self.views is not None else []

    def _scan(self, when: When, limit: int | None, *, graded: bool) -> tuple[ScanResult, list[Trigger], Any]:
        accelerator, classifier = self.evaluation.accelerator, self.evaluation.classifier

        def work() -> tuple[ScanResult, list[Trigger], Any]:
            suspect = make_suspect(classifier, self.pixels, accelerator, seed=self.seed, limit=limit,
                                   progress=self.evaluation.progress)  # fmt: skip
            scan, triggers = scan_suspect(suspect, classifier.labels, when, thorough=self.thorough)
            return scan, triggers, grade_images(self.pixels, suspect) if graded else None

        if accelerator.num_processes == 1:
            return work()
        # each process would find the same but for rounding, and all must measure the same triggers
        found = [work() if accelerator.is_main_process else None]
        result = broadcast_object_list(found)[0]
        assert result is not None
        return result


def with_reconstructed(evaluation: Evaluator, triggers: Sequence[Trigger]) -> Evaluator:
    """Return the evaluation images with reconstructed triggers alone, named `reconstructed-SCORE-LABEL`.

    One that changes no pixel, or of a class that all images are of, is left out.
    """
    taken, views = {view.trigger.name for view in evaluation.views}, []
    for trigger in triggers:
        name = f"reconstructed-{trigger.name}"
        while name in taken:
            name += "-again"
        taken.add(name)
        try:
            views += evaluation.with_triggers([replace(trigger, name=name)]).views
        except UsageError:
            continue
    return replace(evaluation, views=views)


def planned_passes(settings: Any, images: int) -> int:
    """Return about how many image passes a defense takes; one whose gradient is taken counts as one more.

    Args:
        settings: its configuration; of one that trains no epochs nothing is known, and one pass is counted.
        images: how many clean images there are.
    """
    epochs, batch = getattr(settings, "epochs", 0), min(getattr(settings, "batch_size", images), images)
    steps = max(epochs * math.ceil(images / max(1, batch)), getattr(settings, "min_steps", 0))
    return max(images, 2 * steps * batch)
