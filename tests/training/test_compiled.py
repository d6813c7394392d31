"""A network compiled by Accelerate's own setting trains as one that is not, and is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from hfdetox.training.devices import make_accelerator
from hfdetox.training.engine import Engine
from tests.tiny_training import ToyImages, _quick_garbage, convnet, equal_weights, make_phase, weights_of

__all__ = ["_quick_garbage"]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_compiled_by_accelerates_setting(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend `eager` takes the network in as any other does, and needs no compiler."""
    results = []
    for backend in ("no", "eager"):
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
        torch.compiler.reset()
        counters.clear()
        network = convnet()
        before = list(network.state_dict())
        phases = [make_phase(network), make_phase(network, epochs=1)]
        record = Engine(make_accelerator("cpu", precision), ToyImages()).run(network, phases)
        assert list(network.state_dict()) == before
        assert "forward" not in vars(network)
        results.append((weights_of(network), record.precision, [entry["loss"] for entry in record.history]))
        assert (counters["stats"]["unique_graphs"] > 0) == (backend != "no")
    (plain, *first), (taken_in, *second) = results
    assert equal_weights(plain, taken_in)
    assert first == second
    assert first[0] == precision
