"""A sample of the sweep over every architecture (tests/benchmarks/architectures.py), each through the whole job."""

from pathlib import Path

import pytest

from tests.benchmarks import architectures
from tests.tiny_training import _quick_garbage

__all__ = ["_quick_garbage"]

# quick ones; most of them have been wrong: heads, norms, widths, dropout, momentum, channels_last
SAMPLE = (
    "transformers/clip", "transformers/siglip", "transformers/hgnet_v2", "transformers/pvt_v2",
    "transformers/perceiver/Fourier", "transformers/levit/WithTeacher", "transformers/mobilenet_v1",
    "transformers/timm_wrapper", "timm/byobnet", "timm/fastvit", "timm/maxxvit", "timm/vision_transformer",
)  # fmt: skip


@pytest.mark.parametrize("name", SAMPLE)
def test_the_whole_job(name: str, tmp_path: Path) -> None:
    line = {"case": name}
    for found in architectures.run(architectures.cases()[name], tmp_path):
        line |= found
    assert architectures.in_order(line), line
