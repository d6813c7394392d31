"""What tests/attacks/test_distributed.py runs in two processes: python -m tests.attacks.distributed_script OUT.json"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from accelerate import Accelerator

from hfdetox.attacks import Implant, TrainingSettings, poisoner_for, run_attack
from hfdetox.attacks.poison import PoisonedPixels
from hfdetox.training.devices import make_accelerator
from hfdetox.triggers import parse_trigger
from tests.attacks.toy_jobs import toy_classifier, toy_job
from tests.tiny_training import quick_garbage, weights_of

SETTINGS = {"lf": {"passes": "1", "images": "8"}, "trojannn": {"steps": "3"}, "lc": {"steps": "2"}}


def made(kind: str, accelerator: Accelerator) -> list[str]:
    """Return hashes of a kind's trigger, of what it poisons and of the trained weights, as this process has them.

    Every process has a clean model of its own, in place of devices that round otherwise.
    """
    surrogate = toy_classifier(seed=accelerator.process_index)
    training = TrainingSettings(epochs=1, batch_size=16)
    context = toy_job(accelerator, surrogate=surrogate, training=training)
    backdoor = Implant(parse_trigger(f"{kind}:mode=input"), 0, 0.25, poisoner_for(kind, SETTINGS[kind]))
    (done,) = run_attack(context, [backdoor]).implants
    images = PoisonedPixels(context, [done]).images
    assert images is not None
    weights = b"".join(tensor.numpy().tobytes() for tensor in weights_of(context.classifier.network).values())
    return [hashlib.sha256(data).hexdigest() for data in (done.trigger.file_bytes(), images.numpy().tobytes(), weights)]


def work(file: Path) -> None:
    """Write what each process has, by kind."""
    accelerator = make_accelerator("cpu", "no")
    own = {kind: made(kind, accelerator) for kind in SETTINGS}
    file.with_suffix(f".{accelerator.process_index}").write_text(json.dumps(own), encoding="utf-8")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    with quick_garbage():
        work(Path(sys.argv[1]))
