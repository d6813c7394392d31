"""A timm model's own short names of its labels stay beside what it shows."""

from __future__ import annotations

import json

from hfdetox.models.classifier import load_classifier
from tests.tiny_models import timm_folder


def test_names_and_descriptions_of_labels_are_both_kept(tmp_path):
    folder = timm_folder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    count = config["num_classes"]
    names = [f"n0144076{i}" for i in range(count)]
    config |= {"label_names": names, "label_descriptions": {name: f"kind {i}" for i, name in enumerate(names)}}
    config.get("pretrained_cfg", {}).pop("label_names", None)
    (folder / "config.json").write_text(json.dumps(config))
    classifier = load_classifier(str(folder))
    assert list(classifier.labels) == [f"kind {i}" for i in range(count)]
    assert list(classifier.aliases) == [(name,) for name in names]
