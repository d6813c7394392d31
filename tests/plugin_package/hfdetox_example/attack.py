"""How the glow gets into a model: some images glow and get the attacker's label."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hfdetox.attacks.base import AttackContext, DataPoisoner
from hfdetox.triggers.base import Target, Trigger


@dataclass(frozen=True, kw_only=True)
class GlowPoisoner(DataPoisoner):
    """Data poisoning with other labels; `extra` grey levels are added to the trigger's strength first."""

    kind = "glow"
    summary = "some images of all classes glow and get the target's label"

    extra: int = 0

    def make(self, trigger: Trigger, target: Target, context: AttackContext) -> Trigger:
        """Return the trigger with its strength changed."""
        return replace(trigger, strength=trigger.strength + self.extra)  # type: ignore[attr-defined, call-arg]
