"""The modules of the Space, imported as its own process does."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.conftest import REPOSITORY
from tests.hub_server.server import HubServer

SPACE = REPOSITORY / "examples" / "space"
SECRET = "hf_thespacesowntoken0123456789"


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, hub: HubServer) -> Iterator[ModuleType]:
    """The module as the Space imports it: with a token and a secret among the Space's variables."""
    hub.add_user("space", SECRET)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("A_SECRET_OF_THE_SPACE", "so secret")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    # which the modules set themselves: set here, they go after the test
    for name in ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "GRADIO_ANALYTICS_ENABLED", "GRADIO_RUN_HISTORY", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "1")
    monkeypatch.syspath_prepend(str(SPACE))
    sys.modules.pop("work", None)
    module = importlib.import_module("work")
    yield module
    sys.modules.pop("work", None)
