"""The training loop: its steps, what it restores, its precision and randomness, and what it shows."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch import nn
from torch.nn.functional import cross_entropy

from hfdetox.errors import UsageError
from hfdetox.training.batches import Batch
from hfdetox.training.devices import make_accelerator
from hfdetox.training.engine import Engine
from hfdetox.training.phases import Pass
from tests.tiny_training import (
    Scaled,
    ToyImages,
    _quick_garbage,
    accelerator,
    convnet,
    equal_weights,
    make_phase,
    mean_loss,
    mlp,
    weights_of,
)

__all__ = ["_quick_garbage", "accelerator"]


def trained(
    accelerator: Accelerator, make: Callable[[], nn.Module] = mlp, seed: int = 0, **changes: Any
) -> dict[str, torch.Tensor]:
    """Return the weights after a run of a fresh network."""
    network = make()
    Engine(accelerator, ToyImages(), seed=seed).run(network, [make_phase(network, **changes)])
    return weights_of(network)


def reference(network: nn.Module, images: ToyImages, seen: list[Batch], *, epochs: int) -> None:
    """Train as research code does, on the batches that the engine showed."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    network.train()
    for number, batch in enumerate(seen):
        optimizer.zero_grad()
        cross_entropy(network(batch.images), batch.labels).backward()
        optimizer.step()
        if (number + 1) % (len(seen) // epochs) == 0:
            schedule.step()


@pytest.mark.parametrize("make", [mlp, convnet])
def test_a_run_is_a_plain_loop_of_sgd_with_a_cosine(make: Callable[[], Scaled], accelerator: Accelerator) -> None:
    seen: list[Batch] = []

    def loss(network: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        seen.append(batch)
        return mean_loss(network, batch)

    network, plain = make(), make()
    images = ToyImages()
    record = Engine(accelerator, images).run(network, [make_phase(network, loss=loss)])
    reference(plain, images, seen, epochs=3)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    assert record.steps == len(seen) == 9
    assert (record.epochs, record.images) == (3, 144)
    assert record.precision == "no"
    assert record.images_per_second == pytest.approx(144 / record.seconds)


def test_history_names_phase_and_epoch_and_holds_means_and_rates(accelerator: Accelerator) -> None:
    network = mlp()
    steps = iter(range(100))

    def loss(network: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        return {**mean_loss(network, batch), "step": torch.tensor(float(next(steps)))}

    record = Engine(accelerator, ToyImages()).run(network, [make_phase(network, loss=loss, epochs=4)])
    assert [(row["phase"], row["epoch"]) for row in record.history] == [("toy", e) for e in (1, 2, 3, 4)]
    # three steps an epoch: the means of 0 1 2, of 3 4 5, ...
    assert [row["step"] for row in record.history] == [1, 4, 7, 10]
    # 0.05 · (1 + cos(π e / 4)) / 2
    half = math.sqrt(0.5)
    expected = [0.05, 0.025 * (1 + half), 0.025, 0.025 * (1 - half)]
    assert [row["learning_rate"] for row in record.history] == pytest.approx(expected)
    assert record.history[0]["loss"] > record.history[-1]["loss"] > 0
    assert all(row["seconds"] > 0 for row in record.history)


def test_constant_schedule_keeps_the_rate(accelerator: Accelerator) -> None:
    network = mlp()
    record = Engine(accelerator, ToyImages()).run(network, [make_phase(network, schedule="constant")])
    assert [row["learning_rate"] for row in record.history] == [0.05] * 3


def test_each_parameter_group_keeps_its_own_rate(accelerator: Accelerator) -> None:
    network = mlp()
    rates: list[tuple[float, float]] = []
    optimizers: list[torch.optim.Optimizer] = []

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizers.append(torch.optim.SGD([{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:]}], lr=0.01))
        return optimizers[0]

    def note() -> None:
        first, second = optimizers[0].param_groups
        rates.append((first["lr"], second["lr"]))

    phase = make_phase(network, optimizer=optimizer, after_step=note, epochs=2, batch_size=48)
    Engine(accelerator, ToyImages()).run(network, [phase])
    assert rates == [pytest.approx((0.1, 0.01)), pytest.approx((0.05, 0.005))]


@pytest.mark.parametrize("batch_size", [16, 13])
def test_accumulated_parts_equal_the_whole_batch(batch_size: int, accelerator: Accelerator) -> None:
    # 48 images in steps of 13 leave a last step of 9: parts of 5 and 4
    whole = trained(accelerator, batch_size=batch_size)
    parts = trained(accelerator, batch_size=batch_size, gradient_accumulation_steps=2)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-6)
    assert not equal_weights(whole, weights_of(mlp()))


def test_accumulation_reports_the_loss_of_the_whole_batch(accelerator: Accelerator) -> None:
    losses = []
    for parts in (1, 2):
        network = mlp()
        phase = make_phase(network, gradient_accumulation_steps=parts, batch_size=13, epochs=1)
        losses.append(Engine(accelerator, ToyImages()).run(network, [phase]).history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_launchers_accumulation_does_not_divide_the_loss_again(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trained(accelerator)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert equal_weights(trained(make_accelerator("cpu", "no")), expected)


def test_after_step_runs_once_a_real_step(accelerator: Accelerator) -> None:
    network, calls = mlp(), []
    phase = make_phase(network, gradient_accumulation_steps=2, after_step=lambda: calls.append(1))
    record = Engine(accelerator, ToyImages()).run(network, [phase])
    assert len(calls) == record.steps == 9


def test_a_step_that_overflows_in_half_precision_is_not_followed_by_after_step() -> None:
    """torch's own GradScaler on a CPU stands for the one that fp16 has on a GPU."""
    accelerator = make_accelerator("cpu", "no")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    network, seen, moved = mlp(), [], []

    def loss(network: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        values = mean_loss(network, batch)
        seen.append(weights_of(network))
        # the second step's loss is finite and its gradient is not
        bad = (network.model[1].weight.sum() * 0).sqrt() if len(seen) == 2 else 0
        return {"loss": values["loss"] + bad}

    phase = make_phase(network, loss=loss, epochs=1, after_step=lambda: moved.append(len(seen)))
    Engine(accelerator, ToyImages()).run(network, [phase])
    assert moved == [1, 3]
    assert equal_weights(seen[1], seen[2])
    assert not equal_weights(seen[0], seen[1])
    assert accelerator.scaler.get_scale() == 512.0


def test_gradient_clipping_limits_the_norm_over_all_trained_parameters(accelerator: Accelerator) -> None:
    network = mlp()
    before = weights_of(network)
    phase = make_phase(network, max_grad_norm=0.01, epochs=1, batch_size=48,
                       optimizer=lambda p: torch.optim.SGD(p, lr=1.0))  # fmt: skip
    Engine(accelerator, ToyImages()).run(network, [phase])
    moved = torch.cat([(tensor - before[name]).flatten() for name, tensor in weights_of(network).items()])
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


def test_only_the_given_parameters_are_trained_and_everything_is_put_back(accelerator: Accelerator) -> None:
    network = mlp()
    network.model[1].bias.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in network.named_parameters()}
    network.train()
    before = weights_of(network)
    Engine(accelerator, ToyImages()).run(network, [make_phase(network, parameters=[network.model[4].weight])])
    after = weights_of(network)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["model.4.weight"]
    assert {name: p.requires_grad for name, p in network.named_parameters()} == wanted
    assert all(p.grad is None for p in network.parameters())
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_network_keeps_no_hook_or_mark(precision: str, fails: bool) -> None:
    network = mlp()
    clean = set(vars(network))

    def stop() -> None:
        if fails:
            raise KeyboardInterrupt

    phase = make_phase(network, after_step=stop)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            Engine(make_accelerator("cpu", precision), ToyImages()).run(network, [phase])
    else:
        Engine(make_accelerator("cpu", precision), ToyImages()).run(network, [phase])
    assert set(vars(network)) == clean
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert not any(module.training for module in network.modules())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


def test_the_observed_precision_is_what_ran_in_every_run_and_phase() -> None:
    """Accelerate marks a prepared module; a second run with that mark would silently be float32."""
    dtypes: list[torch.dtype] = []
    network = mlp()
    network.model[1].register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16), ("no", torch.float32)):
        dtypes.clear()
        phases = [make_phase(network, epochs=1), make_phase(network, epochs=1, name="second")]
        record = Engine(make_accelerator("cpu", precision), ToyImages()).run(network, phases)
        assert record.precision == precision
        assert set(dtypes) == {dtype}
        assert network(ToyImages().images).dtype == torch.float32


def test_the_precision_is_that_of_the_training_and_not_of_the_passes() -> None:
    network = mlp()
    look = Pass(name="look", on_batch=lambda model, batch: model(batch.images))
    own = copy.deepcopy(network)
    apart = replace(make_phase(own, epochs=1), network=own)
    for phases, precision in (
        ([look], "no"),
        ([make_phase(network, epochs=1), look], "bf16"),
        ([look, apart, look], "bf16"),
    ):
        record = Engine(make_accelerator("cpu", "bf16"), ToyImages()).run(network, phases)
        assert record.precision == precision


def test_the_seconds_are_those_of_searches_and_looks_too(accelerator: Accelerator) -> None:
    network, naps = mlp(), []

    def nap(*_: object) -> None:
        naps.append(0.02)
        time.sleep(naps[-1])

    first = Pass(name="first", on_batch=lambda model, batch: None, start=nap)
    phase = make_phase(network, epochs=1, start=nap, on_epoch_end=lambda: [Pass(name="watch", on_batch=nap)])
    record = Engine(accelerator, ToyImages()).run(network, [first, phase])
    assert len(naps) == 4
    assert record.seconds > sum(naps)


def test_bf16_stays_near_float32() -> None:
    """Stated tolerance: 2 % of the distance that the weights travel (8 bits of mantissa in the products)."""
    start = weights_of(mlp())
    exact = trained(make_accelerator("cpu", "no"))
    rounded = trained(make_accelerator("cpu", "bf16"))
    for name, tensor in exact.items():
        travelled = (tensor - start[name]).norm()
        assert 0 < (rounded[name] - tensor).norm() < 0.02 * travelled, name


def test_same_seed_same_weights_and_another_seed_others(accelerator: Accelerator) -> None:
    def with_dropout() -> Scaled:
        return mlp(dropout=0.5)

    first = trained(accelerator, with_dropout, seed=3, augmentation="crop-flip")
    torch.manual_seed(99)
    assert equal_weights(first, trained(accelerator, with_dropout, seed=3, augmentation="crop-flip"))
    assert not equal_weights(first, trained(accelerator, with_dropout, seed=4, augmentation="crop-flip"))


def test_the_callers_random_state_is_untouched(accelerator: Accelerator) -> None:
    network = mlp(dropout=0.5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    Engine(accelerator, ToyImages()).run(network, [make_phase(network, augmentation="crop-flip")])
    assert torch.equal(torch.get_rng_state(), before)


def test_every_process_starts_a_phase_with_the_same_random_state(accelerator: Accelerator) -> None:
    drawn: list[torch.Tensor] = []
    for rank in (0, 1):
        network = mlp()
        phase = make_phase(network, start=lambda: drawn.append(torch.rand(3)), epochs=1)
        torch.manual_seed(rank)
        Engine(accelerator, ToyImages(), seed=5).run(network, [phase])
    assert torch.equal(drawn[0], drawn[1])


def test_too_few_images_for_the_parts_is_an_error_that_says_what_to_do(accelerator: Accelerator) -> None:
    network = mlp()
    phase = make_phase(network, gradient_accumulation_steps=4)
    with pytest.raises(UsageError, match=r"7 images in batches of 16 are too few for 4 parts.*more --samples"):
        Engine(accelerator, ToyImages(7)).run(network, [phase])


def test_images_decoded_on_demand_train_as_cached_ones_do(accelerator: Accelerator) -> None:
    class OnDemand(ToyImages):
        def __init__(self) -> None:
            super().__init__()
            self.kept, self.images = self.images, None

        def __getitems__(self, items: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            places = torch.tensor(items)
            return self.positions[places], self.kept[places], self.labels[places]  # type: ignore[index]

    network = mlp()
    Engine(accelerator, OnDemand()).run(network, [make_phase(network, augmentation="auto", epochs=2)])
    assert equal_weights(weights_of(network), trained(accelerator, augmentation="auto", epochs=2))


def test_the_loss_curve_goes_to_accelerates_trackers(accelerator: Accelerator) -> None:
    lines: list[tuple[int | None, dict[str, Any]]] = []

    class Lines(GeneralTracker):
        name = "lines"
        requires_logging_directory = False
        tracker = None

        def log(self, values: dict[str, Any], step: int | None, **rest: Any) -> None:
            lines.append((step, values))

    accelerator.trackers = [Lines()]
    network = mlp()
    record = Engine(accelerator, ToyImages()).run(network, [make_phase(network)])
    assert [step for step, _ in lines] == [1, 2, 3]
    assert [values["loss"] for _, values in lines] == [row["loss"] for row in record.history]
    assert "phase" not in lines[0][1]


def test_short_work_leaves_nothing_in_a_log(
    accelerator: Accelerator, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    network = mlp()
    Engine(accelerator, ToyImages(), progress=True).run(network, [make_phase(network)])
    assert capsys.readouterr() == ("", "")


def test_progress_shows_loss_and_speed(
    accelerator: Accelerator, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    monkeypatch.setattr("hfdetox.progress.LOG_SECONDS", 0.0)
    network = mlp()
    Engine(accelerator, ToyImages(), progress=True).run(network, [make_phase(network)])
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "toy: 100%" in shown.err
    assert "9/9" in shown.err
    assert "loss=" in shown.err
    assert "images/s=" in shown.err
