# /// script
# requires-python = ">=3.11"
# dependencies = ["hfdetox>=0.2"]
#
# [tool.hf-jobs]
# flavor = "t4-small"
# timeout = "2h"
# secrets = ["HF_TOKEN"]
# ///
"""Clean a model on Hugging Face Jobs: a GPU for one run, without a clone or an environment of your own.

    hf buckets create my-runs
    hf jobs uv run --attempts 3 -v hf://buckets/me/my-runs:/runs detox_job.py \\
        org/model --dataset org/images --push-to me/model-detoxed

takes the options of `hfdetox MODEL`. With a bucket mounted at /runs (`--runs` names another place) an attempt goes on
where one before it died: with its checkpoints, or, if it died while it pushed, with the push. Use a bucket, or a folder
in it, for each run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hfdetox.arguments import options_of
from hfdetox.cli.app import run
from hfdetox.config import CleanedPublishOptions

PUBLISHING = {f"--{option.flag}" for option in options_of(CleanedPublishOptions).values()}


def command(arguments: Sequence[str]) -> list[str]:
    """Return the command line of hfdetox for this attempt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--push-to", required=True, metavar="REPO")
    parser.add_argument("--runs", type=Path, default=Path("/runs"), help="a folder that outlives an attempt")
    given, rest = parser.parse_known_args(arguments)
    runs = given.runs if given.runs.is_dir() else Path()
    output = runs / f"{given.model.rstrip('/').rpartition('/')[2]}-detoxed"
    unfinished = output.with_name(f"{output.name}.run")
    # how it is published is said anew each time
    how = [word for word in rest if word in PUBLISHING]
    if (output / "detox_report.json").is_file():
        return ["push", str(output), given.push_to, *how]
    if (unfinished / "run.json").is_file():
        return ["--resume", str(unfinished), "--push-to", given.push_to, *how]
    return [given.model, *rest, "--output", str(output), "--push-to", given.push_to]


if __name__ == "__main__":
    words = command(sys.argv[1:])
    print("hfdetox", *words, flush=True)
    sys.exit(run(words))
