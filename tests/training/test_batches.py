"""The order of an epoch and its split over processes and accumulated parts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from hfdetox.errors import UsageError
from hfdetox.training.batches import StepPlan, source_loader
from tests.tiny_training import ToyImages


@dataclass
class Rank:
    """What a plan asks an Accelerator: how many processes there are and which this is."""

    num_processes: int = 1
    process_index: int = 0


def plans(
    count: int, batch_size: int, accumulated: int, processes: int, seed: int = 0, epoch: int = 0
) -> list[StepPlan]:
    """Return the plan of every process."""
    made = [StepPlan(count, batch_size, accumulated, Rank(processes, i), seed) for i in range(processes)]  # type: ignore[arg-type]
    for plan in made:
        plan.epoch = epoch
    return made


CASES = [
    # count, batch size, accumulated parts, processes, and the sizes of the steps
    (48, 16, 1, 1, [16, 16, 16]),
    (49, 16, 1, 1, [16, 16, 17]),
    (50, 16, 1, 1, [16, 16, 16, 2]),
    (51, 16, 2, 1, [16, 16, 19]),
    (52, 16, 2, 1, [16, 16, 16, 4]),
    (55, 16, 2, 2, [16, 16, 23]),
    (57, 16, 2, 2, [16, 16, 16, 9]),
    (30, 256, 3, 2, [30]),
    (257, 256, 1, 1, [257]),
    (2, 2, 1, 1, [2]),
    (97, 13, 1, 3, [13] * 7 + [6]),
]


@pytest.mark.parametrize(("count", "batch_size", "accumulated", "processes", "sizes"), CASES)
def test_every_image_is_seen_once_an_epoch_in_parts_that_differ_by_one(
    count: int, batch_size: int, accumulated: int, processes: int, sizes: list[int]
) -> None:
    made = plans(count, batch_size, accumulated, processes)
    assert [made[0].size(step) for step in range(made[0].steps)] == sizes
    parts = [list(plan) for plan in made]
    assert [len(own) for own in parts] == [len(plan) for plan in made] == [len(sizes) * accumulated] * processes
    seen = sorted(item for own in parts for part in own for item in part)
    assert seen == list(range(count))
    for step, size in enumerate(sizes):
        lengths = [len(own[step * accumulated + part]) for own in parts for part in range(accumulated)]
        assert sum(lengths) == size
        assert max(lengths) - min(lengths) <= 1
        # BatchNorm needs two
        assert min(lengths) >= 2


@pytest.mark.parametrize(("accumulated", "processes"), [(2, 1), (1, 2), (2, 2), (1, 3)])
def test_a_step_holds_the_same_images_however_it_is_split(accumulated: int, processes: int) -> None:
    (single,) = plans(61, 16, 1, 1, seed=9, epoch=2)
    # 61 leaves a last step of 13 in every split
    split = [list(plan) for plan in plans(61, 16, accumulated, processes, seed=9, epoch=2)]
    for step, whole in enumerate(single):
        together = [item for own in split for part in range(accumulated) for item in own[step * accumulated + part]]
        assert sorted(together) == sorted(whole)


def test_rows_of_a_step_are_dealt_as_its_images_are() -> None:
    """Augmentation draws numbers for the whole step; each process takes the rows of its own images."""
    made = plans(29, 29, 2, 2)
    (order,) = plans(29, 29, 1, 1)[0]
    for plan in made:
        for part, items in enumerate(plan):
            assert torch.tensor(order)[plan.share(part)].tolist() == items
            assert [order[row] for row in plan.rows(0, part)] == items
            assert plan.rows(0, part).stop == 29


def test_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [item for part in plans(40, 40, 1, 1, seed, epoch)[0] for item in part]

    torch.manual_seed(0)
    first = order(1, 0)
    torch.rand(5)
    assert order(1, 0) == first
    assert order(2, 0) != first
    assert order(1, 1) != first
    assert sorted(first) == list(range(40)) != first


def test_making_an_order_leaves_the_global_random_state() -> None:
    before = torch.get_rng_state()
    list(plans(40, 8, 1, 1)[0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("count", "batch_size", "accumulated", "processes"), [(1, 2, 1, 1), (3, 256, 2, 1), (100, 3, 2, 1), (7, 16, 1, 4)]
)
def test_too_few_images_is_an_error(count: int, batch_size: int, accumulated: int, processes: int) -> None:
    number = accumulated * processes
    with pytest.raises(UsageError, match=f"{count} images in batches of {batch_size} are too few for {number} parts"):
        plans(count, batch_size, accumulated, processes)


def test_a_cached_source_is_read_in_this_process_and_in_order() -> None:
    loader = source_loader(ToyImages(10), 4, torch.device("cpu"))
    assert loader.num_workers == 0
    batches = list(loader)
    assert [positions.tolist() for positions, _, _ in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert torch.equal(batches[2][1], ToyImages(10).images[8:])  # type: ignore[index]
    assert batches[0][1].dtype == torch.uint8


def test_a_source_that_decodes_on_demand_gets_workers() -> None:
    images = ToyImages(10)
    images.images = None
    assert source_loader(images, 4, torch.device("cpu")).num_workers > 0
