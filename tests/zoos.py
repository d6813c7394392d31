"""A suite of three cells, one of which fails, and the zoo of a suite."""

from __future__ import annotations

from pathlib import Path

from hfdetox.bench.tasks import load_suite
from hfdetox.bench.zoo import Zoo
from hfdetox.config_bench import SuiteOptions

MODEL = 'tiny: {model: "timm-arch:test_resnet", input_size: 32}'
SUITE = f"""
training: {{epochs: 1, batch_size: 16}}
models: {{{MODEL}}}
triggers: {{corner: {{spec: "badnets:size=2", settings: {{epochs: 2}}}}}}
grids:
  - {{models: [tiny], triggers: [corner], targets: [cow]}}
  - {{models: [tiny], triggers: [corner, none], ratios: [0.2]}}
"""
CLEAN, ATTACKED, FAILED = "tiny-clean-s0", "tiny-corner-0.2-s0", "tiny-corner-to-cow-0.1-s0"


def write(folder: Path, text: str) -> Path:
    """Write a suite file."""
    file = folder / "suite.yaml"
    file.write_text(text)
    return file


def zoo_of(text: str, tmp_path: Path, dataset: str | None = "org/pictures") -> Zoo:
    """Return the zoo of a suite, in the folder `zoo`, which is not created."""
    return Zoo(load_suite(write(tmp_path, text)), SuiteOptions(output=tmp_path / "zoo", dataset=dataset))
