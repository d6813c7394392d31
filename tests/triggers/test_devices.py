"""What triggers keep on each device: nothing is drawn, resized or copied to a device for every batch again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hfdetox.triggers.wanet import WaNet
from tests.triggers.made import every_trigger, noise

# autocast, which these switch off, knows no meta device
WITH_AUTOCAST = {"inputaware", "lira", "ssba", "wanet"}
BARE = [name for name, trigger in every_trigger().items() if trigger.kind not in WITH_AUTOCAST]


class OnTheCPU(TorchDispatchMode):
    """Collect the operations that read a tensor on the CPU or draw one there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [item for item in tree_leaves((args, kwargs, result)) if isinstance(item, torch.Tensor)]
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.seen.append(str(func))
        return result


@pytest.mark.parametrize("name", BARE)
def test_a_second_batch_needs_nothing_from_the_cpu(name: str) -> None:
    trigger, images = every_trigger()[name], noise().to("meta")
    trigger.apply(images)
    with OnTheCPU() as spied:
        stamped = trigger.apply(images)
    assert stamped.device.type == "meta"
    assert spied.seen == []


@pytest.mark.parametrize("kind", ["inputaware", "lira", "ssba"])
def test_a_batch_on_another_device_leaves_the_networks_where_they_are(kind: str) -> None:
    trigger, images = every_trigger()[kind], noise()
    expected = trigger.apply(images)
    # the networks get there, and then autocast refuses; from there they could not come back
    with suppress(RuntimeError):
        trigger.apply(images.to("meta"))
    assert torch.equal(trigger.apply(images), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(every_trigger()))
def test_a_second_batch_never_waits_for_the_gpu(name: str) -> None:
    trigger, images = every_trigger()[name], noise().cuda()
    apply = [trigger.apply, *([trigger.noisy] if isinstance(trigger, WaNet) else [])]
    for function in apply:
        function(images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for function in apply:
            function(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
