"""Repositories that tests of the Hub start from."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.hub.server import HubServer


@pytest.fixture
def model(hub: HubServer, repo_name: Callable[..., str]) -> str:
    """A public model with a regular file, an LFS file and a folder."""
    name = repo_name("model", "org")
    hub.create_repo(name)
    hub.commit(name, {"config.json": b"{}", "model.safetensors": b"weights", "a/b/c.txt": b"deep"})
    return name
