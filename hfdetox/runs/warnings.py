"""What a run has to say besides its numbers."""

from __future__ import annotations

import logging

from accelerate import Accelerator

logger = logging.getLogger(__name__)


class RunWarnings:
    """What the run has to say besides its numbers: shown at once on the main process, and kept for report and card."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.texts: list[str] = []
        self._shown = accelerator.is_main_process

    def warn(self, text: str) -> None:
        """Keep a warning, once."""
        if text not in self.texts:
            self.texts.append(text)
            if self._shown:
                logger.warning(text)
