"""Where a resumed run's images come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from hfdetox.config import DetoxOptions
from hfdetox.data.load import pull_images
from hfdetox.errors import HubError
from hfdetox.models.classifier import load_classifier
from tests.hub_server.server import HubServer
from tests.image_data import write_dataset
from tests.tiny_models import timm_model


def test_a_resumed_run_takes_its_hub_dataset_for_no_folder(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path / "org" / "photos")
    monkeypatch.chdir(tmp_path)
    options = DetoxOptions("m", dataset="org/photos", dataset_revision="a" * 40)
    with pytest.raises(HubError, match="org/photos"):
        pull_images(options, None, load_classifier(timm_model()), print)
