"""Where a resumed run's images come from, and what a pull gets over."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from hfdetox.config import DetoxOptions
from hfdetox.data.load import pull_images
from hfdetox.errors import HubError
from hfdetox.hub import client
from hfdetox.models.classifier import load_classifier
from tests.hub_server.server import HubServer
from tests.image_data import cycle, load, write_dataset, write_parquet
from tests.tiny_models import timm_model


def test_a_resumed_run_takes_its_hub_dataset_for_no_folder(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path / "org" / "photos")
    monkeypatch.chdir(tmp_path)
    options = DetoxOptions("m", dataset="org/photos", dataset_revision="a" * 40)
    with pytest.raises(HubError, match="org/photos"):
        pull_images(options, None, load_classifier(timm_model()), print)


def test_each_request_for_a_dataset_may_be_cut_once_in_the_same_pull(
    hub: HubServer, repo_name: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "DEFAULT_RETRY", client.Retry(base_delay=0.01))
    repo = repo_name("set", "org")
    hub.create_repo(repo, "dataset")
    hub.commit_folder(repo, write_dataset(tmp_path / "set"), repo_type="dataset")
    load(repo)
    kinds = {(entry.method, entry.path) for entry in hub.log}
    # another commit, of which nothing is cached
    write_parquet(tmp_path / "new.parquet", cycle(60))
    hub.commit(repo, {"data/train-00000-of-00001.parquet": tmp_path / "new.parquet"}, repo_type="dataset")
    rules = []
    for method, path in kinds:
        pattern = re.sub("[0-9a-f]{40,64}", "[0-9a-f]{40,64}", path)
        rules.append(hub.faults.drop_answer(method, rf"{pattern}(\?|$)"))
    assert load(repo)[0].info.clean_samples == 12
    assert sum(rule.hits for rule in rules) > client.DEFAULT_RETRY.attempts
