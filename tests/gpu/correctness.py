"""Whether the device computes what the CPU does: D3 on a small network that tells digits apart, with a backdoor.

- curves: the same run in float32 on both; the relative difference of each epoch's clean loss and distance.
- precision: accuracy and attack success after bf16 and fp16 against those after float32, means over three seeds.
- fp16_skip: a step whose gradients overflow changes nothing, and the loss scale falls.
- resume: a run that is killed (SIGKILL) and goes on ends with the very weights of one that is not, where the device is
  asked for its deterministic algorithms.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from hfdetox.data.load import Images
from hfdetox.defenses import D3Config
from hfdetox.evaluation.evaluator import decoded, prepare_evaluator
from hfdetox.models.classifier import Classifier
from hfdetox.training.batches import Batch
from hfdetox.training.checkpoints import CheckpointStore
from hfdetox.training.devices import accelerate_state_kept, make_accelerator
from hfdetox.training.engine import Engine, TrainingRecord
from hfdetox.training.phases import Phase
from hfdetox.triggers import parse_trigger
from hfdetox.triggers.base import Trigger
from tests.backdoored import TRIGGER
from tests.gpu.models import TARGET, Data, device, implanted
from tests.gpu.report import Report, arguments_of, machine
from tests.killing import KillingStore

# of each epoch's clean loss and distance, relative; the loss counts from LEAST
TOLERANCE, LEAST = 0.01, 0.05
POINT = 0.01
SEEDS = (0, 1, 2)
CLEAN = 300
KILLED_AFTER = 3
DIGITS = Data(toy=True)


@dataclass(frozen=True)
class Start:
    """What every run begins with: the images, the trigger, and a backdoored network's weights."""

    images: Images
    trigger: Trigger
    weights: dict[str, torch.Tensor]

    def classifier(self) -> Classifier:
        """Return the backdoored classifier, on the CPU."""
        classifier = DIGITS.classifier("test_resnet", DIGITS.side)
        classifier.model.load_state_dict(self.weights)
        return classifier


def start(epochs: int) -> Start:
    """Make the backdoored network."""
    with accelerate_state_kept():
        made = implanted(DIGITS.classifier("test_resnet", DIGITS.side), DIGITS.load(None).clean,
                         make_accelerator(device(), "no"), TRIGGER, epochs=epochs, augmentation="crop")  # fmt: skip
    weights = {name: tensor.cpu() for name, tensor in made.classifier.model.state_dict().items()}
    return Start(DIGITS.load(CLEAN), replace(made.trigger, target=TARGET), weights)


def defended(begin: Start, on: str, precision: str, epochs: int, seed: int = 0,
             store: CheckpointStore | None = None) -> tuple[TrainingRecord, Classifier, list[float]]:  # fmt: skip
    """Return the run of D3, the network after it, and its accuracy and attack success."""
    config = D3Config(lambda_=1.5, epochs=epochs, learning_rate=0.03, batch_size=64, augmentation="crop")
    with accelerate_state_kept():
        accelerator, classifier = make_accelerator(on, precision), begin.classifier()
        evaluator = prepare_evaluator(classifier, begin.images.evaluation, [begin.trigger], accelerator,
                                      target=str(TARGET), warn=print, progress=False)  # fmt: skip
        pixels = decoded(begin.images.clean, classifier, accelerator, "decode", progress=False)
        engine = Engine(accelerator, pixels, seed=seed, checkpoints=store)
        record = engine.run(classifier.network, config.phases(classifier.network))
        after = evaluator.measure("after").measurement
    [result] = after.triggers.values()
    return record, classifier, [after.accuracy.value, result.attack_success_rate.value]


def curves(report: Report, begin: Start, epochs: int) -> None:
    """Compare the losses of every epoch on the CPU and on the device, without TF32."""
    found = [defended(begin, on, "no", epochs)[0].history for on in ("cpu", device())]
    rows = {name: [[entry[name] for entry in history] for history in found] for name in ("clean_loss", "distance")}
    worst = max(abs(a - b) / max(abs(a), LEAST) for cpu, there in rows.values()
                for a, b in zip(cpu, there, strict=True))  # fmt: skip
    report.add(check="curves", passed=worst <= TOLERANCE, worst=worst, tolerance=TOLERANCE, **rows)


def precisions(report: Report, begin: Start, epochs: int, seeds: tuple[int, ...], limit: float) -> None:
    """Compare the rates after mixed precision with those after float32."""
    names = ("no", "bf16", *(["fp16"] if device() == "cuda" else []))
    means = {name: np.mean([defended(begin, device(), name, epochs, seed)[2] for seed in seeds], 0) for name in names}
    for name in names[1:]:
        apart = float(np.abs(means[name] - means["no"]).max())
        accuracy, success = zip(means["no"], means[name], strict=True)
        report.add(check=f"precision {name}", passed=apart <= limit, apart=apart, limit=limit,
                   accuracy=[*map(float, accuracy)], attack_success=[*map(float, success)])  # fmt: skip
    if "fp16" not in names:
        report.add(check="precision fp16", passed=None, why="fp16 does not run on a CPU")


def fp16_skip(report: Report, begin: Start) -> None:
    """Take two steps in fp16, of which the first overflows."""
    if device() == "cpu":
        report.add(check="fp16_skip", passed=None, why="fp16 does not run on a CPU")
        return
    with accelerate_state_kept():
        accelerator, classifier = make_accelerator("cuda", "fp16"), begin.classifier()
        seen: list[torch.Tensor] = []
        losses: list[float] = []
        after: list[int] = []

        def loss(network: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
            seen.append(next(classifier.model.parameters()).detach().clone())
            errors = cross_entropy(network(batch.images).float(), batch.labels)
            losses.append(1e30 if not losses else 1.0)
            return {"loss": errors * losses[-1]}

        assert accelerator.scaler is not None
        scale = accelerator.scaler.get_scale()
        parameters = list(classifier.network.parameters())
        phase = Phase(name="skip", parameters=parameters, optimizer=lambda p: torch.optim.SGD(p, lr=0.01), loss=loss,
                      epochs=1, batch_size=64, steps=3, augmentation="none",
                      after_step=lambda: after.append(len(seen)))  # fmt: skip
        pixels = decoded(begin.images.clean, classifier, accelerator, "decode", progress=False)
        Engine(accelerator, pixels).run(classifier.network, [phase])
        kept, moved = torch.equal(seen[0], seen[1]), not torch.equal(seen[1], seen[2])
        fell = accelerator.scaler.get_scale() < scale
    report.add(check="fp16_skip", passed=kept and moved and fell and after == [2, 3], kept=kept, moved=moved,
               scale_fell=fell, after_steps=after)  # fmt: skip


def kill() -> NoReturn:
    """End this process as the system would."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit


def child(folder: Path, saves: int, epochs: int) -> None:
    """Run with checkpoints in a folder, in which the weights at the start are and those at the end go."""
    _deterministic()
    begin = Start(DIGITS.load(CLEAN), parse_trigger(TRIGGER), load_file(folder / "start.safetensors"))
    _, classifier, _ = defended(begin, device(), "no", epochs, store=KillingStore(folder, saves, kill))
    _write(classifier.model.state_dict(), folder / "end.safetensors")


def resume(report: Report, begin: Start, epochs: int) -> None:
    """Kill a run after some epochs, let it go on, and compare its weights with those of a run that was not."""
    _deterministic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _write(begin.weights, folder / "start.safetensors")
        codes = []
        for kill in (KILLED_AFTER, 0):
            command = [sys.executable, "-m", "tests.gpu.correctness", "--child", scratch, str(kill), str(epochs)]
            codes.append(subprocess.run(command, check=False).returncode)
        again = load_file(folder / "end.safetensors") if codes[1] == 0 else {}
    whole = defended(begin, device(), "no", epochs)[1].model.state_dict()
    apart = [float((again[name].float() - whole[name].cpu().float()).abs().max()) for name in again]
    passed = codes == [-signal.SIGKILL, 0] and again.keys() == whole.keys() and not any(apart)
    report.add(check="resume", passed=passed, exit_statuses=codes, largest_difference=max(apart, default=None))


def _deterministic() -> None:
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)


def _write(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}, path)


def main() -> int:
    """Run the checks; exit status 1 where one fails."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
        return 0
    arguments = arguments_of(__doc__)
    report = Report(arguments.output, "make gpu")
    report.put(**machine())
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    begin, epochs = start(5 if arguments.toy else 14), 5 if arguments.toy else 20
    curves(report, begin, 2 if arguments.toy else 6)
    # so short a training has not settled
    precisions(report, begin, epochs, SEEDS[:1] if arguments.toy else SEEDS, 10 * POINT if arguments.toy else POINT)
    fp16_skip(report, begin)
    resume(report, begin, epochs)
    return int(any(row["passed"] is False for row in report.found["rows"]))


if __name__ == "__main__":
    sys.exit(main())
