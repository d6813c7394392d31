"""Which device and precision a run gets, and what is refused instead of pretended."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import default_config_file

from hfdetox.errors import UsageError
from hfdetox.training.devices import describe_devices, make_accelerator, resolve_device, resolve_precision


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A function that decides what torch says about this machine."""

    def describe(*, cuda: bool = False, mps: bool = False, gpu_bf16: bool = False, cpu: tuple[str, ...] = ()) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: gpu_bf16 or including_emulation
        )
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(cpu, True), raising=False)

    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    return describe


@pytest.mark.parametrize(
    ("cuda", "mps", "device", "expected"),
    [
        (True, False, "auto", "cuda"), (False, True, "auto", "mps"), (False, False, "auto", "cpu"),
        (True, True, "auto", "cuda"), (True, True, "mps", "mps"), (True, False, "cpu", "cpu"),
        (True, False, "cuda", "cuda"),
    ],
)  # fmt: skip
def test_device(cuda: bool, mps: bool, device: str, expected: str, hardware) -> None:  # type: ignore[no-untyped-def]
    hardware(cuda=cuda, mps=mps)
    assert resolve_device(device) == expected


@pytest.mark.parametrize("value", ["true", "1", "True"])
def test_accelerates_own_switch_forces_the_cpu(value: str, hardware, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    hardware(cuda=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", value)
    assert resolve_device("auto") == "cpu"


def test_a_device_that_is_not_there_is_an_error(hardware) -> None:  # type: ignore[no-untyped-def]
    hardware()
    with pytest.raises(UsageError, match=r"no cuda device here \(or this torch was built without it\)"):
        resolve_device("cuda")
    with pytest.raises(UsageError, match="unknown device 'tpu'; known: auto, cpu, cuda, mps"):
        resolve_device("tpu")


@pytest.mark.parametrize(
    ("device", "gpu_bf16", "cpu", "expected"),
    [
        ("cuda", True, (), "bf16"),
        # emulated bf16 of older GPUs is slower than their fp16
        ("cuda", False, (), "fp16"),
        # oneDNN's gradients in bf16 can be uninitialised memory
        ("cpu", False, ("avx512_bf16", "amx_bf16"), "no"),
        ("mps", False, (), "no"),
    ],
)
def test_auto_precision_is_what_the_hardware_has(
    device: str, gpu_bf16: bool, cpu: tuple[str, ...], expected: str, hardware
) -> None:  # type: ignore[no-untyped-def]
    hardware(gpu_bf16=gpu_bf16, cpu=cpu)
    assert resolve_precision("auto", device) == expected


@pytest.mark.parametrize(("device", "named"), [("cpu", "bf16"), ("cuda", "no"), ("cuda", "fp16"), ("cuda", "bf16")])
def test_auto_precision_is_what_accelerate_launch_names(
    device: str, named: str, hardware, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    hardware(gpu_bf16=named != "bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", named)
    assert resolve_precision("auto", device) == named
    assert resolve_precision("no", device) == "no"


@pytest.fixture
def config_file() -> Iterator[Path]:
    """The file that `accelerate config` writes, in the session's own home."""
    file = Path(default_config_file)
    assert str(file).startswith(os.environ["HF_HOME"])
    file.parent.mkdir(parents=True, exist_ok=True)
    yield file
    file.unlink(missing_ok=True)


WRITTEN = [("mixed_precision: bf16", "bf16"), ("mixed_precision: no", "no"), ("mixed_precision: 'no'", "no"),
           ("debug: false", "fp16"), ("", "fp16")]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), WRITTEN)
def test_without_a_launcher_it_is_what_accelerate_config_wrote(
    text: str, expected: str, config_file: Path, hardware, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    hardware()
    config_file.write_text(text)
    assert resolve_precision("auto", "cuda") == expected
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert resolve_precision("auto", "cuda") == "no"


@pytest.mark.parametrize(("text", "said"), [
    ("mixed_precision: fp16", r"fp16 does not run on a CPU \(named by Accelerate's configuration\); use --precision"),
    ("mixed_precision: fp8", r"unknown precision 'fp8' \(named by Accelerate's configuration\); known: auto, no"),
    ("mixed_precision: [", r"default_config.yaml cannot be read: .*; mend it, or set --precision"),
])  # fmt: skip
def test_a_configuration_that_cannot_be_followed_is_one_line(text: str, said: str, config_file: Path, hardware) -> None:  # type: ignore[no-untyped-def]
    hardware()
    config_file.write_text(text)
    with pytest.raises(UsageError, match=said):
        resolve_precision("auto", "cpu")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_precision_that_is_named_is_taken(precision: str, hardware) -> None:  # type: ignore[no-untyped-def]
    hardware()
    assert resolve_precision(precision, "cpu") == precision
    assert resolve_precision("fp16", "cuda") == "fp16"


def test_fp16_on_a_cpu_and_unknown_precisions_are_errors() -> None:
    with pytest.raises(UsageError, match=r"fp16 does not run on a CPU; use --precision bf16, no or auto"):
        resolve_precision("fp16", "cpu")
    with pytest.raises(UsageError, match=r"fp16 does not run on a CPU"):
        make_accelerator("cpu", "fp16")
    with pytest.raises(UsageError, match="unknown precision 'fp8'; known: auto, no, fp16, bf16"):
        resolve_precision("fp8", "cuda")


def test_each_run_in_a_process_gets_the_precision_it_asks_for() -> None:
    """Accelerate keeps the first precision of a process and raises for a second one."""
    for precision in ("no", "bf16", "no", "no"):
        accelerator = make_accelerator("cpu", precision)
        assert accelerator.mixed_precision == precision
        assert accelerator.device.type == "cpu"
        assert describe_devices(accelerator) == ["cpu"]


def test_a_tracker_that_is_unknown_is_one_line() -> None:
    with pytest.raises(UsageError, match=r"tracker nonsense is not installed here; .*leave --log-with out") as caught:
        make_accelerator("cpu", "no", log_with="nonsense")
    assert "\n" not in str(caught.value)
