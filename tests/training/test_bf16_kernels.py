"""In bf16 on a CPU, no convolution is left to oneDNN whose kernel has a position that meets no image."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from hfdetox.training.devices import make_accelerator, meets_image, whole_kernels


@pytest.mark.parametrize(("kernel", "stride", "dilation"), list(itertools.product((1, 2, 3, 5, 7), (1, 2, 4), (1, 2))))
def test_a_position_meets_an_image_when_it_has_a_gradient(kernel: int, stride: int, dilation: int) -> None:
    for padding, height, width in itertools.product((0, kernel // 2, kernel - 1), (1, 2, 3, 8), (1, 5)):
        conv = nn.Conv2d(1, 1, kernel, stride, padding, dilation, bias=False)
        if any(side + 2 * padding < dilation * (kernel - 1) + 1 for side in (height, width)):
            continue
        (gradient,) = torch.autograd.grad(conv(torch.ones(1, 1, height, width)).sum(), [conv.weight])
        assert meets_image(conv, (height, width)) == bool((gradient > 0).all())


def gradients(network: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradients of two steps in bf16 after memory was filled with NaN."""
    found = []
    for _ in range(8):
        junk = [torch.full((2**n,), math.nan) for n in range(6, 20)]
        del junk
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = network(images)
        found.append(torch.autograd.grad(output.float().sum(), [network[1].weight])[0])  # type: ignore[index, list-item]
    return found


def test_such_convolutions_are_computed_in_float32_and_the_others_in_bf16() -> None:
    network = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1, bias=False))
    kinds: list[torch.dtype] = []
    for module in network:
        module.register_forward_hook(lambda _module, _inputs, output: kinds.append(output.dtype))
    with whole_kernels(network, make_accelerator("cpu", "bf16")):
        for gradient in gradients(network, torch.ones(64, 3, 2, 2)):
            assert gradient.isfinite().all()
            assert (gradient[:, :, 0] == 0).all()
            assert (gradient[:, :, :, 0] == 0).all()
            assert (gradient[:, :, 1, 1] != 0).any()
        assert set(kinds) == {torch.float32}
        kinds.clear()
        gradients(network, torch.ones(2, 3, 32, 32))
        assert set(kinds) == {torch.bfloat16}
    kinds.clear()
    gradients(network, torch.ones(2, 3, 2, 2))
    assert set(kinds) == {torch.bfloat16}
    with whole_kernels(network, make_accelerator("cpu", "no")):
        assert not network[0]._forward_pre_hooks


def test_a_convolution_that_fails_leaves_no_context_behind() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1))
    with whole_kernels(network, make_accelerator("cpu", "bf16")), torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError, match="to have 3 channels"):
            network(torch.ones(1, 5, 2, 2))
        assert torch.is_autocast_enabled("cpu")
