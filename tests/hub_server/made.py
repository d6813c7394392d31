"""Repositories that tests of the Hub start from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from safetensors.numpy import save

from tests.hub_server.server import HubServer

WEIGHTS = save({"head.weight": np.arange(600, dtype=np.float32).reshape(2, 300)})
OTHER_WEIGHTS = save({"head.weight": np.ones((2, 300), dtype=np.float32)})


@pytest.fixture
def model(hub: HubServer, repo_name: Callable[..., str]) -> str:
    """A public model with a regular file, an LFS file and a folder."""
    name = repo_name("model", "org")
    hub.create_repo(name)
    hub.commit(name, {"config.json": b"{}", "model.safetensors": b"weights", "a/b/c.txt": b"deep"})
    return name


def make_model(hub: HubServer, name: str, **extra: str | bytes) -> str:
    """Create a model with a card and WEIGHTS, and the files `extra`; returns the commit."""
    hub.create_repo(name)
    return hub.commit(name, {"config.json": "{}", "README.md": "# card", "model.safetensors": WEIGHTS, **extra})
