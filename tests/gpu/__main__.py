"""Uses the minutes in which a GPU is there: `make gpu` calls this there, without make's environment.

    python3 -m tests.gpu [--bundle DIR] [--output DIR] [--part NAME …] [--toy]

What is missing is taken from the bundle; nothing is downloaded. Then every part runs in a process of its own, which is
ended at its limit, and writes gpu_PART.json as it goes: a part that fails or is cut off stops no other. `paper` is a
run of its own, which goes on where it stopped. With --toy everything is so small that a CPU does it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.gpu.arrive import install
from tests.gpu.needs import ROOT
from tests.gpu.report import Report

# seconds: all of them and the start are 8 minutes, and `paper` is 9
LIMITS = {"tests": 110, "correctness": 80, "speed": 185, "loop": 80, "paper": 515}
USUAL = [name for name in LIMITS if name != "paper"]
# how much more time there is at toy size, on a machine that has other work
SLOWER = 10
# a part is asked to end by itself so long before it is ended
GRACE = 5
PROBE = """
import json, torch
from tests.gpu.report import machine
found = machine()
if torch.cuda.is_available():
    one = torch.cuda.get_device_properties(0)
    found |= {"memory_gib": round(one.total_memory / 2**30, 1), "capability": list(torch.cuda.get_device_capability(0)),
              "multiprocessors": one.multi_processor_count, "cuda": torch.version.cuda,
              "cudnn": torch.backends.cudnn.version()}
import accelerate, datasets, huggingface_hub, numpy, timm, torchvision, transformers
for module in (accelerate, datasets, huggingface_hub, numpy, timm, torchvision, transformers):
    found[module.__name__] = module.__version__
print(json.dumps(found))
"""


def environment(bundle: Path, site: Path) -> dict[str, str]:
    """Return what the parts run with: the wheels first, this checkout, and no network."""
    paths = [str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "GPU_BUNDLE": str(bundle), "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip


def run_part(command: list[str], variables: dict[str, str], limit: float, log: Path) -> dict[str, Any]:
    """Run a part and end it, with all that it started, at its limit; what it prints goes to the log and the screen."""
    begin, ended = time.monotonic(), "done"
    with subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          start_new_session=True) as process:  # fmt: skip
        copy = subprocess.Popen(["tee", "-a", str(log)], stdin=process.stdout)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            ended, code = "timed out", None
        finally:
            # workers too, which may have outlived their part
            _end(process.pid)
        copy.wait()
    if code:
        ended = "failed"
    return {"status": ended, "exit": code, "seconds": round(time.monotonic() - begin, 1), "limit": limit}


def _end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def main() -> int:
    """Run the parts; exit status 1 where one failed or was cut off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=ROOT / "build" / "gpu-bundle")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build" / "gpu"))
    parser.add_argument("--part", nargs="*", choices=LIMITS, help="default: all but paper")
    parser.add_argument("--toy", action="store_true", help="small enough for a CPU, and no numbers to report")
    arguments = parser.parse_args()
    bundle, output = arguments.bundle.resolve(), arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    site, log = bundle.with_name(bundle.name + "-site"), output / "gpu.log"
    installed, unmet = install(bundle, site)
    variables = environment(bundle, site)
    report = Report(output / "gpu_found.json", "make gpu")
    report.put(bundle=_manifest(bundle), installed=installed, unmet=unmet, parts={})
    probe = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, env=variables, capture_output=True, text=True)
    if probe.returncode:
        report.put(broken=probe.stderr[-3000:])
    else:
        report.put(machine=json.loads(probe.stdout.splitlines()[-1]))
    for part in arguments.part or USUAL:
        limit = LIMITS[part] * (SLOWER if arguments.toy else 1)
        print(f"--- {part}, {limit} seconds at most", flush=True)
        command = [sys.executable, "-m", f"tests.gpu.{part}", "--output", str(output / f"gpu_{part}.json"),
                   "--seconds", str(limit - GRACE), *(["--toy"] if arguments.toy else [])]  # fmt: skip
        done = run_part(command, variables, limit, log)
        report.put(parts={**report.found["parts"], part: done})
    return int(any(done["status"] != "done" for done in report.found["parts"].values()))


def _manifest(bundle: Path) -> Any:
    path = bundle / "bundle.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else f"none in {bundle}: make gpu-bundle"


if __name__ == "__main__":
    sys.exit(main())
