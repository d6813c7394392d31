"""`--log-with` with the trackers that need no account: trackio, and wandb offline."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import backdoored
from tests.backdoored import Made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return backdoored.made(tmp_path_factory)


@pytest.mark.parametrize(("tracker", "kept"), [("trackio", "trackio/*.db*"), ("wandb", "wandb/offline-run-*/*.wandb")])
def test_a_tracker_gets_the_curves(made: Made, run_cli, fresh_env, tmp_path: Path, tracker: str, kept: str) -> None:
    pytest.importorskip(tracker)
    environment = {**fresh_env, "WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}
    arguments = [made.timm, "--dataset", made.digits, "--samples", "100", "--eval-samples", "100", "--no-scan",
                 "--output", "out", "--log-with", tracker, *backdoored.settings(epochs=2, batch_size=50)]  # fmt: skip
    done = run_cli(list(map(str, arguments)), env=environment)
    assert done.returncode == 0, done.stderr
    found = b"".join(path.read_bytes() for path in tmp_path.glob(kept))
    for curve in (b"clean_loss", b"distance", b"learning_rate", b"before_after"):
        assert curve in found, (done.stderr, list(tmp_path.rglob("*")))
    # wandb keeps the command too, which has --samples
    assert b"images/samples" not in found
    assert b'"samples"' not in found, "no image of the user goes to a tracker"
