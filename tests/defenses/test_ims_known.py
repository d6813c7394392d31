"""IMS where the right answer is known: three units, of which one is a trigger's, too faint for clean images to move."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hfdetox.defenses.ims import IMS, IMSConfig
from hfdetox.models.network import Network
from hfdetox.training.devices import make_accelerator
from hfdetox.training.engine import Engine
from tests.defenses.pixels import UnitRange
from tests.tiny_training import _quick_garbage

__all__ = ["_quick_garbage"]


class TwoPixels:
    """Images of two pixels: 205 or 50 (class 1 or 2), and 128, or 132 with the trigger."""

    def __init__(self, trigger: int = 128) -> None:
        self.images: torch.Tensor | None = torch.tensor([[205, trigger], [50, trigger]] * 16).view(32, 1, 1, 2).byte()
        self.labels, self.positions = torch.tensor([1, 2] * 16), torch.arange(32)

    def __len__(self) -> int:
        return 32

    def __getitems__(self, items: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert self.images is not None
        return self.positions[items], self.images[items], self.labels[items]


def three_units() -> Network:
    """Return a network of the units relu(40 (x₁ − ½)), relu(40 (½ − x₁)) and T = relu(600 (x₂ − 128/255) + 0.05).

    They speak for the classes 1, 2 and, twice as loudly, 0: at a clean 128 with 0.1, and at 132 with 2 · 9.46 = 18.9
    against 40 · 0.304 = 12.2 and 40 · 0.304. A δ of 20 steps of 0.001 makes 2 · 12.05.
    """
    conv, head = nn.Conv2d(1, 3, (1, 2)), nn.Linear(3, 3)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[40.0, 0], [-40, 0], [0, 600]]).view(3, 1, 1, 2))
        conv.bias.copy_(torch.tensor([-20, 20, -600 * 128 / 255 + 0.05]))
        head.weight.copy_(torch.tensor([[0.0, 0, 2], [1, 0, 0], [0, 1, 0]]))
        head.bias.zero_()
    return Network(nn.Sequential(conv, nn.ReLU(), nn.Flatten(), head), UnitRange(2)).eval()


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(("selection", "cut"), [(0.5, True), (1.0, False)])
def test_the_unit_of_a_faint_trigger_is_cut_if_it_is_not_bound_to_both_sides(
    selection: float, cut: bool, precision: str
) -> None:
    network = three_units()
    images, triggered = TwoPixels().images, TwoPixels(132).images
    assert images is not None
    assert triggered is not None
    assert network(images).argmax(1).tolist() == [1, 2] * 16
    assert network(triggered).argmax(1).tolist() == [0] * 32
    config = IMSConfig(initial_rounds=0, sparse_rounds=0, batch_size=32)
    phases = config.phases(network)
    ims = phases[0].network  # type: ignore[union-attr]
    assert isinstance(ims, IMS)
    with torch.no_grad():
        ims.selection.fill_(selection)
    record = Engine(make_accelerator("cpu", precision), TwoPixels(), seed=3).run(network, phases)
    assert record.precision == "no"
    assert network(images).argmax(1).tolist() == [1, 2] * 16
    # at s = 1 a' has no gradient in a, and f_i, which needs T, keeps s there
    assert network(triggered).argmax(1).tolist() == ([1, 2] * 16 if cut else [0] * 32)
    # what clean images need belongs to f_m alone
    assert (ims.selection[:2] < 0.1).all()
    assert (ims.mask[:2] > 0.9).all()
    assert (ims.mask[2] < 0.5) == cut
