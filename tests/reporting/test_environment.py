"""What is recorded about where a run ran, and that no secret is."""

from __future__ import annotations

import importlib.metadata
import platform

import pytest

from hfdetox.logging import is_main_process
from hfdetox.reporting.environment import describe_environment, mask_secrets

TOKEN = "hf_" + "aB3" * 11 + "x"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (TOKEN, "***"),
        (f"token={TOKEN}, again {TOKEN}.", "token=***, again ***."),
        (f"hf_oauth_{'x' * 40}", "***"),
        ("https://me:secret@host/data", "https://***@host/data"),
        ("hf_hub:org/model@main", "hf_hub:org/model@main"),
        ("org/hf_abcdefghijklmnopqrstuvwx", "org/hf_abcdefghijklmnopqrstuvwx"),
    ],
)
def test_what_looks_like_a_token_is_masked(text: str, masked: str) -> None:
    assert mask_secrets(text) == masked


def test_own_token_is_masked_whatever_its_form(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mask_secrets("sesame-open-wide") == "sesame-open-wide"
    monkeypatch.setenv("HF_TOKEN", "sesame-open-wide")
    assert mask_secrets("say sesame-open-wide now") == "say *** now"


def test_short_value_of_a_secret_variable_does_not_tear_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a")
    assert mask_secrets("a banana") == "a banana"


def test_environment_names_versions_and_device() -> None:
    info = describe_environment("cpu", seed=7, command=f"hfdetox m --config {TOKEN}")
    assert info.python == platform.python_version()
    assert info.torch == importlib.metadata.version("torch")
    assert info.datasets == importlib.metadata.version("datasets")
    assert info.device.startswith("cpu (")
    assert len(info.device) > len("cpu ()")
    assert info.seed == 7
    assert info.command == "hfdetox m --config ***"


@pytest.mark.parametrize(("rank", "main"), [(None, True), ("0", True), ("1", False), ("10", False)])
def test_main_process_is_rank_0(rank: str | None, main: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert is_main_process() is main
