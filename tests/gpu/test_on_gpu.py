"""What only a GPU can show: the cache on it, TF32, waits, SyncBatchNorm's numbers, compiled networks."""

from __future__ import annotations

import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy

from hfdetox.defenses import parse_defense
from hfdetox.evaluation.evaluator import to_device
from hfdetox.evaluation.metrics import predict
from hfdetox.training.devices import make_accelerator, peak_memory
from hfdetox.training.engine import Engine
from tests.conftest import REPOSITORY
from tests.defenses import test_battery as battery
from tests.tiny_training import Scaled, convnet, make_phase, mean_loss, toy_pixels, weights_of

pytestmark = pytest.mark.gpu

# two processes share the GPU, which NCCL refuses and gloo does not
SYNCHRONISED = """
import os, sys
from types import SimpleNamespace
import torch, torch.distributed as dist
from safetensors.torch import save_file
from hfdetox.training.batchnorm import synchronised
from tests.tiny_training import ToyImages, convnet
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[2]}", rank=rank, world_size=2)
network, device = convnet().cuda(), torch.device("cuda")
images = ToyImages(16).images[rank * 6:][: 6 + 4 * rank].cuda()
with synchronised([network], SimpleNamespace(num_processes=2, device=device)):
    network.train()(images)
save_file({k: v.cpu().contiguous() for k, v in network.state_dict().items()}, sys.argv[3])
"""


def waits(run: Any) -> int:
    """Return how often the host waited for the device."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


def trained(name: str, precision: str, batch: int) -> None:
    """Run a defense for one epoch on images that are on the GPU."""
    accelerator, network = make_accelerator("cuda", precision), battery.network(name)
    settings = {**battery.settings(name), "batch_size": str(batch), "epochs": "1"}
    config, _ = parse_defense(name, settings)
    Engine(accelerator, toy_pixels(96).to("cuda")).run(network, config.phases(network))


@pytest.mark.parametrize("name", ["d3", "ft", "ft-sam", "fst"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_further_steps_add_no_wait(name: str, precision: str) -> None:
    trained(name, precision, 24)
    assert waits(lambda: trained(name, precision, 12)) == waits(lambda: trained(name, precision, 24))


def test_images_that_fit_are_cached_on_the_gpu_and_measured_there() -> None:
    accelerator, network = make_accelerator("cuda", "no"), convnet().cuda()
    cached = to_device(toy_pixels(48), accelerator)
    assert cached.images is not None
    assert cached.images.device.type == cached.labels.device.type == "cuda"
    there = predict(network, cached, accelerator)
    here = predict(network, toy_pixels(48, max_bytes=0), accelerator)
    assert (there.predicted == here.predicted).all()
    assert there.losses == pytest.approx(here.losses, rel=1e-5)
    assert peak_memory(accelerator)


def test_measuring_is_float32_whatever_the_process_allows() -> None:
    """TF32 has 10 bits of mantissa: sums of thousands of products would differ in the fourth digit."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 256, 3), nn.ReLU(), nn.Conv2d(256, 64, 3), nn.Flatten(), nn.Linear(64 * 16, 3))
    network = Scaled(body)
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = True
    try:
        there = predict(network.cuda(), toy_pixels(48), make_accelerator("cuda", "no")).losses
        assert (convolutions.allow_tf32, products.allow_tf32) == (True, True)
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before
    images = toy_pixels(48)
    assert images.images is not None
    exact = network.cpu().double().eval()
    logits = exact.model(images.images.double() / 127.5 - 1)
    expected = cross_entropy(logits, images.labels, reduction="none").detach().numpy()
    assert there == pytest.approx(expected, rel=2e-5, abs=2e-6)


def test_synchronised_statistics_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    files = [tmp_path / "0", tmp_path / "1"]
    running = [subprocess.Popen([sys.executable, "-c", SYNCHRONISED, str(rank), port, str(file)], cwd=REPOSITORY)
               for rank, file in enumerate(files)]  # fmt: skip
    assert [process.wait(90) for process in running] == [0, 0]
    from tests.tiny_training import ToyImages

    whole, images = convnet().cuda(), ToyImages(16).images
    assert images is not None
    whole.train()(images.cuda())
    for file in files:
        for name, tensor in load_file(file).items():
            assert torch.allclose(tensor.float(), whole.state_dict()[name].cpu().float(), atol=1e-6), name


def test_a_network_compiled_by_accelerates_setting_trains_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for backend in ("no", "inductor"):
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
        network = convnet()
        record = Engine(make_accelerator("cuda", "no"), toy_pixels(48)).run(network, [make_phase(network)])
        results.append((record.history[-1]["loss"], weights_of(network)))
    (loss, plain), (compiled_loss, compiled) = results
    assert compiled_loss == pytest.approx(loss, rel=1e-3)
    assert plain.keys() == compiled.keys()


def test_an_overflow_in_fp16_is_skipped_with_what_follows_a_step() -> None:
    network, after, seen = convnet(), [], []

    def loss(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        seen.append(next(network.parameters()).detach().clone())
        return {"loss": mean_loss(model, batch)["loss"] * (1e30 if len(seen) == 1 else 1.0)}

    phase = make_phase(network, epochs=1, loss=loss, after_step=lambda: after.append(len(seen)))
    Engine(make_accelerator("cuda", "fp16"), toy_pixels(48)).run(network, [phase])
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert after == [2, 3]
