"""Measuring on a GPU: in float32 whatever the process allows, and of as many images at once as fill it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from hfdetox.evaluation.metrics import batch_size
from tests.conftest import REPOSITORY
from tests.tiny_training import ToyImages

# what a person may have written before; torch has an older and a newer way, and refuses some mixtures of both
WAYS = {
    "nothing": "",
    "older, all": "c.allow_tf32 = m.allow_tf32 = True",
    "older, none": "c.allow_tf32 = m.allow_tf32 = False",
    "high": "torch.set_float32_matmul_precision('high')",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "newer, products": "m.fp32_precision = 'tf32'",
    "newer, convolutions": "c.conv.fp32_precision = 'ieee'",
    "newer, both": "m.fp32_precision = c.conv.fp32_precision = 'tf32'",
    "newer, everything": "torch.backends.fp32_precision = 'tf32'",
}
CODE = """
import json, os, sys
import torch
from hfdetox.evaluation.metrics import predict
from hfdetox.training.devices import make_accelerator
from tests.tiny_training import ToyImages, convnet
c, m = torch.backends.cudnn, torch.backends.cuda.matmul
def state():
    found = [m.fp32_precision, c.conv.fp32_precision, c.rnn.fp32_precision]
    for read in (lambda: c.allow_tf32, lambda: m.allow_tf32, torch.get_float32_matmul_precision):
        try:
            found.append(read())
        except RuntimeError:
            found.append("refused")
    return found
def inside(module, images):
    # what torch's kernels ask on a GPU, and whether they would refuse
    seen.append([m.fp32_precision, c.conv.fp32_precision, m.allow_tf32])
network, accelerator, images = convnet(), make_accelerator("cpu", "no"), ToyImages(8)
network.register_forward_pre_hook(inside)
for way in json.loads(sys.argv[1]):
    seen = []
    reader, writer = os.pipe()
    if os.fork() == 0:
        exec(way)
        before = state()
        predict(network, images, accelerator)
        os.write(writer, json.dumps([before, state(), seen[0]]).encode())
        os._exit(0)
    os.close(writer)
    print(os.read(reader, 9999).decode() or "died")
"""


@pytest.fixture(scope="module")
def states() -> dict[str, str]:
    """What each way left, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", CODE, json.dumps(list(WAYS.values()))], cwd=REPOSITORY,
                          capture_output=True, text=True, check=True)  # fmt: skip
    return dict(zip(WAYS, done.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_measuring_is_in_float32_and_leaves_the_process_as_it_was(way: str, states: dict[str, str]) -> None:
    before, after, inside = json.loads(states[way])
    assert after == before
    assert inside[0] != "tf32"
    assert inside[1] == "ieee"
    assert inside[2] is False


@pytest.mark.parametrize(
    ("device", "side", "cached", "expected"),
    [
        ("cpu", 8, True, 256), ("cpu", 224, True, 256), ("cuda", 8, True, 4096), ("cuda", 96, True, 1213),
        ("cuda", 224, True, 256), ("cuda", 320, True, 256), ("cuda", 8, False, 256),
    ],
)  # fmt: skip
def test_a_gpu_gets_more_of_small_images_at_once(device: str, side: int, cached: bool, expected: int) -> None:
    images = ToyImages(2, side)
    if not cached:
        images.images = None
    assert batch_size(images, torch.device(device)) == expected
