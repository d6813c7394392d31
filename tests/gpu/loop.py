"""hfdetox against the same method as research code writes it, on the same device: see tests/benchmarks/speed.py."""

from __future__ import annotations

import copy
import time

from hfdetox.defenses import D3Config
from hfdetox.training.devices import accelerate_state_kept, make_accelerator
from tests.benchmarks.speed import SAMPLES, ours, ratios, research
from tests.gpu.models import Data, implanted
from tests.gpu.report import Report, arguments_of, machine


def main() -> None:
    """Make a backdoored model, run both, and write the ratios."""
    arguments = arguments_of(__doc__)
    data, toy = Data(arguments.toy), arguments.toy
    report = Report(arguments.output, "make gpu")
    report.put(**machine())
    images = data.load(300 if toy else None, 100 if toy else None)
    with accelerate_state_kept():
        made = implanted(data.classifier("test_resnet" if toy else "resnetv2_18", data.side, small_stem=not toy),
                         images.clean, make_accelerator(), "badnets", epochs=2 if toy else 10)  # fmt: skip
    report.put(training_seconds=round(made.seconds, 1), epochs=(epochs := 2 if toy else 20))
    begin = time.perf_counter()
    images, config = data.load(100 if toy else SAMPLES, 100 if toy else None), D3Config(epochs=epochs)
    loading = time.perf_counter() - begin
    with accelerate_state_kept():
        mine = ours(copy.deepcopy(made.classifier), images.clean, images.evaluation, config)
    report.put(hfdetox=mine, loading_seconds=round(loading, 2))
    theirs = research(made.classifier, images.clean, images.evaluation, config)
    report.put(research=theirs, times_faster=ratios(theirs, mine, loading, epochs))


if __name__ == "__main__":
    main()
