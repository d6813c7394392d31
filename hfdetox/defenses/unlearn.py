"""Unlearn: reconstruct triggers of the classes that the model accuses, and teach it their true labels.

A backdoor's target is a class that the whole model can be pushed to from everywhere, so its latent shift s_k
(`hfdetox.training.shift`) is far shorter than those of other classes. A class whose norm lies `accused_below` or more
below the median, in robust standard deviations, is accused. So is a class that gets more than 73 % of random features
from the head (`hfdetox.training.probe`), and one whose clean images the model hardly finds any more, fewer than half as
many as of the median class: that is what poisoning with images of the target's own class (SIG) leaves behind, for the
model has learnt to wait for the trigger. Where none is accused, for the scores miss some backdoors, a blend of α = 0.05
is searched for each of the ten with the shortest shifts, in 25 steps, and the two that it leads most images to are
taken.

For the accused classes, triggers are searched on the suspect model (`hfdetox.training.search`): a blend for each of
`alphas`, and a small patch. Then the model is fine-tuned:

    min over θ of  mean_i ce(f_θ(T_i(x_i)), y_i)

where T_i is nothing for most images, and for a `share` of them one of the triggers, drawn anew in each step; a blend
has a strength of its own for each image, α ~ U(0.05, 0.25), so that not one dose is unlearnt. As the model changes,
what is left of the backdoor is somewhere else: `rounds` times during the training, one more blend is searched on the
model as it is then. A network without BatchNorm keeps a patch for longer, so there one more patch is searched too, and
it is trained by AdamW at a constant rate. The weights in the end are the mean of those after the first third of the
steps: what was made with a falling rate loses accuracy by steps at a high one, and the mean takes some of that back.
BatchNorm's statistics are then measured anew.

Any network has such triggers, and unlearning those of one without a backdoor costs accuracy. Where all classes are
found, none gets most of the random features, none has a z below −4 and the most of them, and neither a faintest blend
nor a patch of less than 1 % of the image leads 90 % of the images to its class, nothing speaks for a backdoor: half as
many images carry a trigger, and α ends at 0.1.

Neural Cleanse unlearns one patch that way, and i-BAU bounded noise. That there are two families in many strengths, for
classes found without a search, and searched again as the model changes, is hfdetox's own, and so is the whole recipe:
no paper has it. It never sees a true trigger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch

from hfdetox.defenses._perturbed import require_pixels
from hfdetox.defenses._unlearning import (
    LOOK,
    MOST_ACCUSED,
    NONE_ACCUSED,
    SCREEN_IMAGES,
    SCREEN_STEPS,
    SCREENED,
    SEARCH,
    Unlearning,
    UnlearnSettings,
)
from hfdetox.defenses.base import FORWARD, Network, Pass, Phase, trained_parameters, tuned_images
from hfdetox.errors import UsageError
from hfdetox.training.search import BATCH


@dataclass(frozen=True, kw_only=True)
class UnlearnConfig(UnlearnSettings):
    """The defense; its settings are those of `UnlearnSettings`."""

    name = "unlearn"
    summary = "reconstruct triggers of the classes that the model accuses, and teach them their true labels"
    paper = "none: hfdetox's own, after Neural Cleanse (IEEE S&P 2019) and i-BAU (arXiv 2110.03735)"
    cost = ("3 epochs and about 8,000 images there and back for each accused class; as many once more where the "
            "classes have to be screened")  # fmt: skip
    card_text = ("The classes that the model can most easily be pushed to were taken as possible targets of a backdoor "
                 "(latent shift). Triggers that lead to them, faint blends and small patches, were reconstructed on "
                 "{images}, and the model was fine-tuned on those images, a part of them with these triggers and "
                 "their true labels.")  # fmt: skip
    unweighted = "reweight looks at the network between the epochs, where this defense searches triggers"
    presets: ClassVar = {"auto": {}}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(text.isdecimal() for text in self.classes) or len(set(self.classes)) != len(self.classes):
            raise UsageError(f"unlearn: classes must be different indices, as in 0,3, got {','.join(self.classes)!r}")
        if not self.alphas or not all(0 < alpha < 1 for alpha in self.alphas):
            raise UsageError("unlearn: alphas must be one or more shares between 0 and 1, as in 0.08,0.2")

    def choices(self, history: Sequence[Mapping[str, Any]]) -> list[str]:
        look = next((entry for entry in history if entry.get("phase") == LOOK), None)
        if look is None:
            return []
        search = next((entry for entry in history if entry.get("phase") == SEARCH and "evident" in entry), None)
        said = [self._accusation(look, search or {})]
        if search is not None and not search["evident"]:
            said.append("Nothing speaks for a backdoor: no patch found is small, and the faintest blends lead at most "
                        f"{100 * max(value for name, value in search.items() if name.startswith('led_')):.0f} % of the "
                        f"images to these classes. So the triggers were unlearnt gently.")  # fmt: skip
        said += [f"{look['epochs']:.0f} epochs, {look['steps']:.0f} steps: at least {self.epochs} epochs and "
                 f"{self.min_steps} steps.",
                 ("AdamW trained the network, for it has no BatchNorm" if look["adamw"] else "SGD trained the network")
                 + "; its weights are the mean of those of the last two thirds of the steps.",
                 f"Augmentation {self.augmentation if look['augmented'] else 'none'}: the model as it came has "
                 f"{100 * look['accuracy_augmented']:.1f} % of the trusted images right with {self.augmentation}, and "
                 f"{100 * look['accuracy']:.1f} % without."]  # fmt: skip
        return said

    def _accusation(self, look: Mapping[str, Any], search: Mapping[str, Any]) -> str:
        """Return who was accused and why, a sentence."""
        accused = [f"class {look[f'accused_{row}']:.0f}" for row in range(_count(look, "accused_"))]
        if "outliers" not in look:
            return f"Taken as possible targets, as the settings say: {', '.join(accused)}."
        scores = [look[f"score_{row}"] for row in range(len(accused))]
        if screened := _count(search, "screened_"):
            led = [f"class {search[f'screened_{row}']:.0f} ({100 * search[f'faint_{row}']:.0f} %)"
                   for row in range(screened)]  # fmt: skip
            return (f"Taken as possible targets: {', '.join(led)}, the classes to which faint blends led most images; "
                    f"no class was accused by the latent shift, whose lowest score is {min(scores):.1f}.")  # fmt: skip
        hidden = int(look["hidden"])
        why = "no class was accused by the latent shift"
        if any(score < self.accused_below for score in scores[hidden:]):
            why = f"the classes accused by the latent shift (robust z below {self.accused_below:g})"
        elif not look["outliers"]:
            why += ", and these were the lowest"
        if hidden:
            why += f"; of {', '.join(accused[:hidden])} the model hardly finds its clean images"
        if "probed" in look:
            why += (f"; the head gives {100 * look['probed_share']:.0f} % of random features to class "
                    f"{look['probed']:.0f}")  # fmt: skip
        least = f"the lowest of the others is {look['others']:.1f}" if "others" in look else "there are no others"
        return (f"Taken as possible targets: {', '.join(accused)}; {why}. "
                f"Their scores: {', '.join(f'{score:.1f}' for score in scores)}; {least}.")  # fmt: skip

    def settled(self, *, batch_norm: bool) -> Self:
        return self if self.optimizer != "auto" else replace(self, optimizer="sgd" if batch_norm else "adamw")

    def efforts(self, images: int, classes: int) -> tuple[float, ...]:
        shared = 3 * FORWARD * images + tuned_images(self, images)
        return tuple(shared + self.searched(classes, most=most) for most in (False, True))

    def searched(self, classes: int, *, most: bool, rounds: bool = True) -> float:
        """Return about how many images the searches take there and back, where the fewest or most classes are accused.

        Args:
            classes: how many the model tells apart.
            most: whether it is the most; where AdamW may train, patches are searched again then, as without BatchNorm.
            rounds: whether a class is accused, the model trained, and triggers searched again.
        """
        # the fewest is one, and where none is accused two are taken, after ten were screened
        count = len(self.classes) or min(MOST_ACCUSED if most else 1 if rounds else NONE_ACCUSED, classes)
        steps = self.patch_steps + len(self.alphas) * self.blend_steps
        if rounds:
            again = self.optimizer == "adamw" or (most and self.optimizer == "auto")
            steps += self.rounds * (self.blend_steps + (self.patch_steps // 2 if again else 0))
        screened = 0 if rounds or self.classes else min(SCREENED, classes) * SCREEN_STEPS * SCREEN_IMAGES
        return float(count * steps * BATCH + screened)

    def phases(self, network: Network) -> list[Phase | Pass]:
        require_pixels(network, self.name)
        return self.stages(Unlearning(network, self))

    def stages(self, unlearning: Unlearning) -> list[Phase | Pass]:
        """Return the look, the search and the training that share `unlearning`."""
        network = unlearning.network
        phase = self.phase(name=self.name, parameters=trained_parameters(network), loss=unlearning.terms,
                           optimizer=self._optimizer(network), state=unlearning,
                           on_epoch_end=unlearning.after_epoch,
                           after_step=unlearning.average.update,
                           schedule="constant" if unlearning.steady else "cosine")  # fmt: skip
        return [unlearning.look(phase), unlearning.search(), phase]

    def _optimizer(self, network: Network) -> Any:
        if not self.adamw_for(network.model):
            return self.sgd
        return partial(torch.optim.AdamW, lr=self.adamw_learning_rate, weight_decay=self.weight_decay)


def _count(entry: Mapping[str, Any], prefix: str) -> int:
    return sum(name.startswith(prefix) for name in entry)
