"""The tests that need a GPU (`-m gpu`), each one's outcome written as it comes."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.needs import ROOT
from tests.gpu.report import Report, arguments_of, machine

PROCESSES = 8
TEXT = 1500


class Collector:
    """Keeps the counts, and the tests that failed."""

    def __init__(self, report: Report) -> None:
        self.report, self.counts, self.written = report, Counter[str](), time.monotonic()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Take what pytest says of a phase of a test."""
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            self.report.add(test=report.nodeid, text=str(report.longrepr)[-TEXT:])
        if time.monotonic() - self.written > 1:
            self.flush()

    def pytest_collectreport(self, report: Any) -> None:
        """Take a file that could not be imported."""
        if report.failed:
            self.counts["broken"] += 1
            self.report.add(test=report.nodeid, text=str(report.longrepr)[-TEXT:])

    def flush(self) -> None:
        """Write the counts."""
        self.report.put(counts=dict(self.counts))
        self.written = time.monotonic()


def files() -> list[str]:
    """Return the test files with tests that need a GPU."""
    paths = sorted(Path(ROOT, "tests").rglob("test_*.py"))
    return [str(path) for path in paths if "mark.gpu" in path.read_text(encoding="utf-8")]


def main() -> int:
    """Run them; exit status 1 where one fails."""
    arguments = arguments_of(__doc__)
    report = Report(arguments.output, "make gpu")
    report.put(**machine())
    collector = Collector(report)
    processes = [] if arguments.toy else ["-n", str(PROCESSES), "--dist", "load"]
    code = pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", *processes, *files()],
                       plugins=[collector])  # fmt: skip
    collector.flush()
    report.put(exit=int(code))
    return int(code != pytest.ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
