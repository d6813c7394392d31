"""What `d3:auto` runs: unlearn what can be reconstructed, and push where nothing speaks for a backdoor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hfdetox.defenses._perturbed import require_pixels
from hfdetox.defenses._unlearning import EVIDENT, LOOK, SEARCH, UNABLE, Unlearning
from hfdetox.defenses.base import Network, Pass, Phase, TuningConfig
from hfdetox.defenses.unlearn import UnlearnConfig
from hfdetox.errors import UsageError

CARD_TEXT = (
    "A backdoor was looked for on {images}: classes that the model can most easily be pushed to or that its head "
    "prefers, and faint blends and small patches that lead to them. Where something speaks for a backdoor these "
    "triggers are unlearnt: the model is fine-tuned on those images, a part of them with the triggers and their true "
    "labels. Where nothing does, D3, distance-driven detoxification (arXiv 2411.09585), fine-tunes the model while "
    "pushing the weights of the selected layers away from where the author left them, as far as the loss on those "
    "images allows; some of the images carry random gratings or the triggers that were found, and in the end the model "
    "keeps to what it said as it came. The list says which of the two this run did."
)
History = Sequence[Mapping[str, Any]]
_SEARCHED = "searched."


def unlearning_of(config: TuningConfig, features: Any) -> UnlearnConfig:
    """Return the settings of the unlearning in a run with these settings: its own, and no more than the run has.

    Args:
        features: what trains the network, `sgd`, `adamw` or `auto`.
    """
    own = UnlearnConfig()
    return UnlearnConfig(
        epochs=min(own.epochs, config.epochs), min_steps=min(own.min_steps, getattr(config, "min_steps", 0)),
        batch_size=min(own.batch_size, config.batch_size), optimizer=features,
        augmentation="none" if config.augmentation in ("none", "crop") else own.augmentation,
        gradient_accumulation_steps=config.gradient_accumulation_steps, max_grad_norm=config.max_grad_norm,
    )  # fmt: skip


class Push:
    """What the push learns besides: the triggers that were searched before it, which speak for no backdoor.

    Its state is that of the push and of the search, for a run that was stopped in the push.
    """

    def __init__(self, d3: Any, unlearning: Unlearning) -> None:
        self.d3, self.unlearning = d3, unlearning

    def state_dict(self) -> dict[str, Tensor]:
        """Return both states."""
        found = {_SEARCHED + name: value for name, value in self.unlearning.state_dict().items()}
        return {**self.d3.state_dict(), **found}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where a run was stopped."""
        ours = {name.removeprefix(_SEARCHED): value for name, value in state.items() if name.startswith(_SEARCHED)}
        self.unlearning.load_state_dict(ours)
        self.d3.load_state_dict({name: value for name, value in state.items() if not name.startswith(_SEARCHED)})


def searched(network: Network, unlearn: UnlearnConfig) -> Unlearning | None:
    """Return what searches triggers before the push; None where the images are no grey levels and nothing can be."""
    try:
        require_pixels(network, unlearn.name)
    except UsageError:
        return None
    return Unlearning(network, unlearn, needed=False)


def by_evidence(unlearning: Unlearning, unlearn: UnlearnConfig, push: Sequence[Phase | Pass]) -> list[Phase | Pass]:
    """Return the phases of `unlearn`, and those of `push`, which run where the search found nothing."""
    look, search, training = unlearn.stages(unlearning)
    search.when = able
    training.when = evident
    for stage in push:
        stage.when = not_evident
        stage.state = Push(stage.state, unlearning)
    return [look, search, training, *push]


def with_triggers(images: Tensor, unlearning: Unlearning | None) -> Tensor:
    """Return the images (N×C×H×W), a part of them with triggers that the search found, if there was one."""
    if unlearning is None or len(unlearning.masks) + len(unlearning.blends) == 0:
        return images
    return unlearning.stamped(images)[0]


def able(history: History) -> bool:
    """Tell whether classes could be accused."""
    return not any(entry.get(UNABLE) for entry in history)


def evident(history: History) -> bool:
    """Tell whether something was found that speaks for a backdoor."""
    return any(entry.get(EVIDENT) for entry in history if entry.get("phase") == SEARCH)


def not_evident(history: History) -> bool:
    """Tell the opposite, for the push."""
    return not evident(history)


def ways(unlearn: UnlearnConfig, history: History) -> list[str]:
    """Return what was found, and which way was taken, a sentence each."""
    if not any(entry.get("phase") == LOOK for entry in history):
        return ["The weights were pushed: no trigger can be searched, for the model's images are no grey levels."]
    if not able(history):
        return ["The weights were pushed: no class can be accused, for the model's head is not linear."]
    said = unlearn.choices(history)
    if evident(history):
        return ["Something speaks for a backdoor, and what was reconstructed of it was unlearnt; the weights were not "
                "pushed.", *said]  # fmt: skip
    return ["Nothing that was reconstructed speaks for a backdoor, which does not mean that there is none: so the "
            "weights were pushed, with these triggers and random gratings on some of the images.", said[0]]  # fmt: skip
