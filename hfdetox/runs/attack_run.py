"""What decides an attack's result, as plain data, and what counts as success."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Final, Self

from hfdetox.errors import UsageError
from hfdetox.runs.folder import ImageOptions, last_part

# the trigger of a clean baseline
NONE: Final = "none"
DEFAULT_RATIO = 0.1
DEFAULT_GOAL = 0.9


@dataclass(frozen=True, kw_only=True)
class AttackRun(ImageOptions):
    """Everything that decides an attack's result and where it goes, as plain data.

    `settings` are the training's and the recipes' by the names and in the texts that `--set` takes; `triggers` is
    `["none"]` for a clean baseline.
    """

    settings: dict[str, str] = field(default_factory=dict)
    poison_ratio: float = DEFAULT_RATIO
    adaptive: str | None = None
    surrogate: str | None = None
    init: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    input_size: int | None = None
    goal_asr: float = DEFAULT_GOAL
    goal_accuracy: float | None = None
    private: bool = False
    public: bool = False
    i_know_this_is_backdoored: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.poison_ratio <= 1:
            raise UsageError(f"--poison-ratio {self.poison_ratio}: a share of the images is above 0 and at most 1")
        for option, goal in (("--goal-asr", self.goal_asr), ("--goal-accuracy", self.goal_accuracy)):
            if goal is not None and not 0 <= goal <= 1:
                raise UsageError(f"{option} {goal}: a rate is a fraction from 0 to 1, such as 0.9")
        if not self.triggers:
            raise UsageError("name a trigger with --trigger, or train a clean baseline with --trigger none")
        if NONE in self.triggers and len(self.triggers) > 1:
            raise UsageError("--trigger none trains a clean baseline: it goes with no other trigger")

    @property
    def clean(self) -> bool:
        """Whether this is a clean baseline, trained the same way without any backdoor."""
        return self.triggers == [NONE]

    def publishing(self) -> dict[str, Any]:
        """Return how the result is published, as the keyword arguments of `push_to_hub`."""
        names = ("private", "create_pr", "overwrite", "public", "i_know_this_is_backdoored")
        return {name: getattr(self, name) for name in names}

    def command_word(self) -> list[str]:
        """Return `attack`."""
        return ["attack"]

    def _without_places(self) -> Self:
        surrogate = last_part(self.surrogate) if self.surrogate else None
        return replace(super()._without_places(), surrogate=surrogate)
