"""Importing hfdetox, and each of its public names, changes nothing in the process of the one who does."""

from __future__ import annotations

import json
import subprocess
import sys

from hfdetox import __all__ as public
from tests.conftest import REPOSITORY

# what a process has that an import could change
STATE = """
import json, locale, logging, multiprocessing, os, random, signal, socket, sys, threading, warnings
def state():
    import numpy as np, torch
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return {
        "environment": dict(os.environ), "folder": os.getcwd(), "threads of torch": torch.get_num_threads(),
        "threads between": torch.get_num_interop_threads(), "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()), "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32": [cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark, cudnn.deterministic],
        "random": [hash(random.getstate()), torch.random.initial_seed(), int(np.random.get_state()[1][0])],
        "root": [*map(repr, logging.root.handlers), logging.root.level, logging.root.disabled],
        "warnings": [*map(repr, warnings.filters), warnings.showwarning.__module__],
        "signals": [repr(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
        "start": multiprocessing.get_start_method(allow_none=True),
        "hooks": [repr(hook) for hook in (sys.excepthook, sys.displayhook, threading.excepthook)],
        "recursion": sys.getrecursionlimit(), "time out": socket.getdefaulttimeout(),
        "locale": locale.setlocale(locale.LC_ALL), "alive": sorted(one.name for one in threading.enumerate()),
    }
def show(before, after):
    print(json.dumps({k: [before[k], after[k]] for k in before if before[k] != after[k]}))
"""
# the libraries below change something when they are imported themselves
OTHERS = "import accelerate, datasets, matplotlib.figure, scipy.stats, timm, torchvision, transformers, yaml\n"


def run(code: str, environment: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=REPOSITORY, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_importing_hfdetox_imports_neither_torch_nor_transformers(fresh_env: dict[str, str]) -> None:
    code = "import sys, hfdetox; print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    assert run(code, fresh_env) == "[]\n"


def test_importing_leaves_the_process_as_it_was(fresh_env: dict[str, str]) -> None:
    """Before torch is there as well: its threads and oneDNN read the environment when they start."""
    code = "import os\nfirst = dict(os.environ)\nimport hfdetox\nassert os.environ == first\n"
    code += f"{STATE}{OTHERS}before = state()\n"
    code += "".join(f"from hfdetox import {name}\nshow(before, state())\n" for name in public)
    assert [json.loads(line) for line in run(code, fresh_env).splitlines()] == [{}] * len(public)
