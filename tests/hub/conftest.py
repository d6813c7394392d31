"""Failed requests are repeated at once in the tests of the Hub's room."""

from __future__ import annotations

import pytest

from hfdetox.hub import client


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(client, "DEFAULT_RETRY", client.Retry(base_delay=0.01))
