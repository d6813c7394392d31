"""Malformed inputs to every reader of a stranger's bytes: a value, or one of hfdetox's own errors, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.faults.readers import Reader, outcome, readers

NAMES = (
    "safetensors", "timm config", "transformers config", "processor", "card", "label map", "suite", "policy",
    "trigger file", "trigger text", "report", "attack report", "run folder", "manifest", "picture", "parquet",
    "command line",
)  # fmt: skip
# the long profile is `make faults`
EXAMPLES = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    return readers(tmp_path_factory.mktemp("readers"))


def test_every_reader_is_tried(made: dict[str, Reader]) -> None:
    assert tuple(made) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_is_whole_is_read(name: str, made: dict[str, Reader]) -> None:
    for content in made[name].whole:
        assert outcome(made[name], content).kind == "value"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_malformed_is_a_value_or_one_line(name: str, made: dict[str, Reader]) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def trial(data: st.DataObject) -> None:
        content = data.draw(made[name].inputs)
        found = outcome(made[name], content)
        assert found.good, f"{found.kind} of {content[:2000]!r}: {found.text}"

    trial()
