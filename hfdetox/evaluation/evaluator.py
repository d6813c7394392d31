"""What a run measures on: the evaluation images and their triggered copies, prepared once for before and after.

Also how visible a trigger is: what it changed in the images as the model sees them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator

from hfdetox.attacks.base import Implant, Poisoner
from hfdetox.data.cache import Pixels
from hfdetox.data.images import ImageSet
from hfdetox.data.labels import accuracy_hint, list_names
from hfdetox.data.load import Images
from hfdetox.errors import RunError, UsageError
from hfdetox.evaluation.metrics import BATCH_SIZE, BROKEN, Predictions, TriggerView, measure, predict, rate
from hfdetox.evaluation.results import Measurement, Rate, Visibility
from hfdetox.models.classifier import Classifier
from hfdetox.models.network import uncorrected
from hfdetox.progress import progress_bar, updates
from hfdetox.specs import read_target
from hfdetox.training.phases import UNSTABLE
from hfdetox.triggers.base import ALL_TO_ALL, Target, Trigger

# a model whose interval reaches down to this share of the way from chance to certainty may have learnt nothing here
CHANCE_MARGIN = 0.05
# a relabelling must win this much accuracy before it is worth a warning: small samples always gain a little
PERMUTATION_GAIN = 0.2
# of the GPU's free memory, at most this share is taken by cached images
CACHE_SHARE = 0.25


@dataclass
class Evaluator:
    """Evaluation images of one classifier and one view a trigger, on the device they are measured on."""

    classifier: Classifier
    accelerator: Accelerator
    clean: Pixels
    views: list[TriggerView]
    progress: bool

    def measure(self, title: str, known: Predictions | None = None, *,
                broken: str = f"training was unstable: {UNSTABLE}") -> Predictions:  # fmt: skip
        """Measure the classifier as it is now: float32, eval mode; `known` and `broken` as of `metrics.measure`."""
        network = self.classifier.network.to(self.accelerator.device)
        return measure(network, self.clean, self.views, self.accelerator, labels=self.classifier.labels, title=title,
                       progress=self.progress, broken=broken, known=known)  # fmt: skip

    def measure_plausible(self, title: str, warn: Callable[[str], None], *, trains: bool = True) -> Predictions:
        """Measure a model as it came, and check the result as `check_plausible` does."""
        outcome = self.measure(title, broken=BROKEN)
        check_plausible(outcome, self.clean.labels, self.classifier.labels, warn, trains=trains)
        return outcome

    def measure_uncorrected(self, title: str) -> Measurement | None:
        """Measure the classifier as timm or transformers loads it; None where it has no correction, and is the same."""
        if self.classifier.network.correction is None:
            return None
        with uncorrected(self.classifier.network):
            return self.measure(title).measurement

    def with_triggers(self, triggers: Sequence[Trigger]) -> Evaluator:
        """Return the same images with these triggers, whose targets are label indices or `all-to-all`.

        A view that is here already is used again. Raises UsageError for a trigger that changes no pixel, does not fit
        or has no image left.
        """
        views = {id(view.trigger): view for view in self.views}
        return replace(self, views=[views.get(id(trigger)) or self._view(trigger) for trigger in triggers])

    def _view(self, trigger: Trigger) -> TriggerView:
        labels = self.classifier.labels
        target = resolve_target(trigger.target, labels)
        positions = self.clean.without_label(target) if isinstance(target, int) else self.clean.positions
        if isinstance(target, int) and not len(positions):
            raise UsageError(f"every evaluation image is of the target class {labels[target]!r}; trigger "
                             f"{trigger.name} cannot be measured with them")  # fmt: skip
        with progress_bar(f"trigger {trigger.name}", len(positions), "image", shown=self.progress) as bar:
            pixels = self.clean.view(trigger, positions=positions, progress=updates(bar))
        source = to_device(pixels, self.accelerator)
        if not changes_pixels(self.clean, source):
            raise UsageError(f"trigger {trigger.name} changes no pixel of the images the model sees; check its place "
                             "and size")  # fmt: skip
        return TriggerView(trigger, target, source, len(labels))

    def common_positions(self) -> list[int]:
        """Return the positions, in the image set, of the images that every trigger is put on, in their order."""
        kept = set(self.clean.positions.tolist()).intersection(*(view.source.positions.tolist() for view in self.views))
        return [position for position in self.clean.positions.tolist() if position in kept]

    def visibility(self) -> dict[str, Visibility]:
        """Return how visible each trigger is, by name; nothing where the images are a callable's own floats."""
        if self.classifier.preprocessing.dtype != torch.uint8:
            return {}
        return {view.trigger.name: measure_visibility(self.clean, view.source) for view in self.views}

    def cross_accuracies(self, implants: Sequence[Implant]) -> dict[str, Rate]:
        """Return how the model answers to what its attack teaches it not to react to, of each trigger that has such."""
        truth, found = self.clean.labels.cpu().numpy(), {}
        for one in implants:
            name, source = one.trigger.name, CrossImages(self.clean, one.poisoner, one.trigger)
            if source.taught():
                answers = predict(self.classifier.network, source, self.accelerator, title=f"cross {name}",
                                  progress=self.progress).predicted  # fmt: skip
                found[name] = rate(int((answers == truth).sum()), len(answers))
        return found


class CrossImages:
    """Evaluation images as the poisoner changes them to teach the model not to react, with their true labels.

    The other image of each is the one before it in the set, of the first the last; that of a lone one is its mirror's.
    """

    def __init__(self, clean: Pixels, poisoner: Poisoner, trigger: Trigger) -> None:
        self.clean, self.poisoner, self.trigger = clean, poisoner, trigger
        self.images, self.labels, self.positions = clean.images, clean.labels, clean.positions

    def __len__(self) -> int:
        return len(self.clean)

    def __getitems__(self, items: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        positions, images, labels = self.clean.__getitems__(items)
        changed = self.poisoner.cross(self.trigger, images, positions, lambda: self._before(items))
        return positions, images if changed is None else changed, labels

    def taught(self) -> bool:
        """Return whether the poisoner teaches such a thing."""
        positions, images, _ = self.clean.__getitems__([0])
        return self.poisoner.cross(self.trigger, images, positions, lambda: self._before([0])) is not None

    def _before(self, items: Sequence[int]) -> torch.Tensor:
        _, images, _ = self.clean.__getitems__([(item - 1) % len(self) for item in items])
        return images if len(self) > 1 else images.flip(-1)


def prepare_evaluator(
    classifier: Classifier, images: ImageSet, triggers: Sequence[Trigger], accelerator: Accelerator, *,
    target: str | int | None, warn: Callable[[str], None], progress: bool, also: Mapping[str, str] | None = None,
) -> Evaluator:  # fmt: skip
    """Decode the evaluation images, and put each trigger on those whose true class is not its target.

    A trigger that moves every class to the next one (`all-to-all`) is put on all of them.

    Args:
        images: what is measured on.
        target: label of the triggers that name none; None: label 0, which `warn` is told.
        progress: whether bars are drawn.
        also: as of `resolve_target`.

    Raises:
        UsageError: a target that is not a label; a trigger that changes no pixel, does not fit or has no image left.
        RunError: an image that cannot be decoded.
    """
    chosen = with_targets(triggers, target, classifier.labels, warn, also)
    clean = decoded(images, classifier, accelerator, "decode", progress)
    return Evaluator(classifier, accelerator, clean, [], progress).with_triggers(chosen)


def settle_order(
    images: Images, classifier: Classifier, accelerator: Accelerator, warn: Callable[[str], None], progress: bool
) -> Images:
    """Try both usual orders of the classes where only an order says which is which, and take the one that fits.

    They are the dataset's own, or that of its numbers, and that of the names. `warn` is told how well each fits.
    """
    if images.other is None:
        return images
    pixels = decoded(images.evaluation, classifier, accelerator, "try both orders", progress)
    predicted = predict(classifier.network.to(accelerator.device), pixels, accelerator).predicted
    own, by_name = (float(np.mean(part.evaluation.labels.numpy() == predicted)) for part in (images, images.other))
    taken = images.other if by_name > own else images
    warn(f"nothing but their order says which of the dataset's classes is which of the model's: in the dataset's own "
         f"the model is right on {own:.1%}, in that of their names on {by_name:.1%} of the evaluation images; "
         f"the {'second' if by_name > own else 'first'} was taken (--label-map says another)")  # fmt: skip
    return replace(taken, other=None)


def with_targets(
    triggers: Sequence[Trigger], target: str | int | None, labels: Sequence[str], warn: Callable[[str], None],
    also: Mapping[str, str] | None = None,
) -> list[Trigger]:  # fmt: skip
    """Return the triggers aimed at label indices (or `all-to-all`): their own targets, else `target`, else label 0.

    Raises:
        UsageError: a target that is not a label.
    """
    for trigger in triggers:
        if trigger.target is None and target is None:
            warn(f"trigger {trigger.name} names no target; label 0 ({labels[0]}) is taken, see --target")
    wanted = [target if trigger.target is None else trigger.target for trigger in triggers]
    return [replace(trigger, target=resolve_target(label, labels, also))
            for trigger, label in zip(triggers, wanted, strict=True)]  # fmt: skip


def decoded(images: ImageSet, classifier: Classifier, accelerator: Accelerator, title: str, progress: bool) -> Pixels:
    """Return the images as the classifier sees them, cached on its device where they fit."""
    with progress_bar(title, len(images), "image", shown=progress) as bar:
        pixels = Pixels(images, classifier.preprocessing, progress=updates(bar))
    return to_device(pixels, accelerator)


def to_device(pixels: Pixels, accelerator: Accelerator) -> Pixels:
    """Move a cache to the GPU when it takes only a part of what is free there."""
    if accelerator.device.type == "cuda" and pixels.images is not None:
        free, _ = torch.cuda.mem_get_info(accelerator.device)
        if pixels.images.nbytes <= CACHE_SHARE * free:
            pixels.to(accelerator.device)
    return pixels


def resolve_target(target: str | int | None, labels: Sequence[str], also: Mapping[str, str] | None = None) -> Target:
    """Return the label index of `target`, or `all-to-all`; None is label 0.

    An int, or `index:2` as a text, is an index. Any other text is a label's name, as it stands or else in another case
    or Unicode form, before it is `all-to-all` or a number.

    Args:
        labels: the model's, in its order.
        also: further names of them, those of the dataset: name to label.

    Raises:
        UsageError: neither a label, nor an index of one, nor `all-to-all`; or the name of several labels.
    """
    target, names = read_target(0 if target is None else target), {k: v for k, v in (also or {}).items() if v}
    found = _places(target, labels, names) if isinstance(target, str) else []
    if len(found) > 1:
        raise UsageError(f"target {target!r} is the name of {len(found)} labels; name one by its index: "
                         f"{' or '.join(f'index:{index}' for index in found[:8])}")  # fmt: skip
    if isinstance(target, str) and not found and _folded(target) == ALL_TO_ALL:
        return ALL_TO_ALL
    digits = str(found[0] if found else target)
    if not digits.isdecimal() or len(digits) > 18 or int(digits) >= len(labels):
        classes = f" or class of the dataset ({list_names(list(names), 10)})" if names else ""
        raise UsageError(f"target {target!r} is neither a label ({list_names(labels, 10)}){classes}, nor an index from "
                         f"0 to {len(labels) - 1}, nor {ALL_TO_ALL} (every class to the next one)")  # fmt: skip
    return int(digits)


def _places(target: str, labels: Sequence[str], names: Mapping[str, str]) -> list[int]:
    """Return the indices of the labels that a text names: as it stands, else in another case or Unicode form."""
    for key in (str, _folded):
        found = [index for index, label in enumerate(labels) if key(label) == key(target)]
        found = found or sorted({labels.index(label) for name, label in names.items() if key(name) == key(target)})
        if found:
            return found
    return []


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name.strip()).casefold()


def check_plausible(
    outcome: Predictions, truth: torch.Tensor, labels: Sequence[str], warn: Callable[[str], None], *,
    trains: bool = True,
) -> None:  # fmt: skip
    """Stop when the model's accuracy is near chance; say so when other label orders would fit far better.

    Too few images to tell are said only, where nothing `trains` on from here.

    Raises:
        RunError: near chance, where a defense and its numbers would mean nothing.
    """
    accuracy, count = outcome.measurement.accuracy, len(labels)
    # only the labels that occur: with the 21,843 of ImageNet-21k the whole table would take gigabytes
    present, places = np.unique(np.concatenate([truth.cpu().numpy(), outcome.predicted]), return_inverse=True)
    confusion = np.zeros((len(present), len(present)), dtype=np.int64)
    np.add.at(confusion, (places[: len(truth)], places[len(truth) :]), 1)
    best = accuracy_hint(confusion)
    said, hint = f"the model's accuracy on the clean images is {accuracy.value:.1%}", ""
    if best > accuracy.value + PERMUTATION_GAIN:
        hint = (f"; with its labels in another order it would reach {best:.1%}, so the labels are probably permuted: "
                "give the right pairs with --label-map")  # fmt: skip
    chance = 1 / count
    least = chance + CHANCE_MARGIN * (1 - chance)
    if accuracy.interval[0] <= least < accuracy.value:
        few = (f"{said}, but on {accuracy.samples} images that cannot be told from chance ({chance:.1%}); "
               f"measure more of them (--eval-samples){hint}")  # fmt: skip
        if trains:
            raise RunError(few)
        warn(few)
    elif accuracy.value <= least:
        raise RunError(f"{said}, near chance ({chance:.1%}): its labels or its preprocessing are probably wrong for "
                       f"this dataset{hint}")  # fmt: skip
    elif hint:
        warn(f"{said}{hint}")


@torch.inference_mode()
def measure_visibility(clean: Pixels, view: Pixels) -> Visibility:
    """Compare every triggered image with its clean one, as prepared for the model (uint8, 0 to 255).

    The peak signal-to-noise ratio of an image is 10·log10(255² / MSE) dB, its MSE taken over all pixels and channels;
    the mean is over the images that changed, for those that did not have none. It is computed where the caches are;
    without a cache both images are decoded anew.

    Args:
        clean: the images without a trigger.
        view: triggered copies of some or all of them.

    Raises:
        ValueError: images that are not uint8 (a callable's own floats), for which a grey level means nothing.
    """
    if view.preprocessing.dtype != torch.uint8:
        raise ValueError(f"visibility is measured in grey levels of uint8 images, got {view.preprocessing.dtype}")
    parts = []
    for before, triggered in _pairs(clean, view):
        change = (triggered.float() - before.float()).flatten(1)
        parts.append(torch.stack([change.square().mean(1), change.abs().amax(1)], 1))
    # the only wait for the device
    errors, largest = torch.cat(parts).cpu().double().unbind(1)
    changed = largest > 0
    ratios = 10 * torch.log10(255**2 / errors[changed])
    return Visibility(psnr=float(ratios.mean()) if changed.any() else None, max_change=int(largest.max()),
                      changed=float(changed.double().mean()))  # fmt: skip


def changes_pixels(clean: Pixels, view: Pixels) -> bool:
    """Tell whether any image of the view differs from its clean one; looks no further than the first batch that does.

    It also takes images that are a callable's own floats.
    """
    return any(not torch.equal(before, triggered) for before, triggered in _pairs(clean, view))


def _pairs(clean: Pixels, view: Pixels) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the clean and the triggered images of each batch of the view, on the view's device."""
    place = {position: item for item, position in enumerate(clean.positions.tolist())}
    for positions, triggered, _ in view.batches(BATCH_SIZE):
        _, before, _ = clean.__getitems__([place[position] for position in positions.tolist()])
        yield before.to(triggered.device), triggered
