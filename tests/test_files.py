"""Files that are whole or not there, and folders that one process holds at a time."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hfdetox.errors import RunError, UsageError
from hfdetox.files import is_inside, locked, replace_folder, write_atomically

HOLD = """
import sys, time
from pathlib import Path
from hfdetox.files import locked
with locked(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holding(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """Start a process that holds the folder, and return when it does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for content in ("one\n", "zwei: ü\n", b"\0\xff"):
        write_atomically(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert os.listdir(tmp_path) == ["a.txt"]
    umask = os.umask(0o027)
    try:
        write_atomically(path, "")
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o640


def test_what_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "none" / "x", tmp_path / "file" / "x"):
        with pytest.raises(RunError, match=rf"^cannot write {re.escape(str(path))}: [^\n]+; free some space"):
            write_atomically(path, "x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_that_cannot_be_replaced_is_where_it_was(tmp_path: Path) -> None:
    target, old = tmp_path / "target", tmp_path / "old"
    (target / "first").mkdir(parents=True)
    with pytest.raises(OSError, match="No such file"):
        replace_folder(tmp_path / "none", target, old)
    assert os.listdir(target) == ["first"]
    (tmp_path / "fresh" / "second").mkdir(parents=True)
    replace_folder(tmp_path / "fresh", target, old)
    assert (os.listdir(target), os.listdir(old)) == (["second"], ["first"])


def test_the_second_process_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out.run"
    process = holding(folder, 60)
    try:
        said = (f"^the output is in use by process {process.pid} on {re.escape(socket.gethostname())} since "
                r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC: wait for it")  # fmt: skip
        for _ in range(2):  # whoever asks destroys nothing
            with pytest.raises(UsageError, match=said), locked(folder, "the output", wait=0.1):
                pass
    finally:
        process.kill()
        process.wait()


def test_a_dead_holder_holds_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "out.run"
    process = holding(folder, 60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert folder.exists()
    with locked(folder, "it"):
        assert len(os.listdir(folder)) == 2
    assert not folder.exists()


def test_who_waits_gets_the_folder_when_the_other_is_done(tmp_path: Path) -> None:
    process = holding(tmp_path / "out.run", 0.5)
    with locked(tmp_path / "out.run", "it", wait=60):
        assert process.wait() == 0
    assert os.listdir(tmp_path) == []


TURNS = """
import sys
from pathlib import Path
from hfdetox.files import locked
for _ in range(300):
    with locked(Path(sys.argv[1]), "it", wait=60):
        pass
"""


def test_a_folder_that_vanishes_while_others_wait_is_no_error(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TURNS, str(tmp_path / "out.run")]
    several = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate()[1] for process in several] == [""] * 4
    assert os.listdir(tmp_path) == []


def test_a_thread_holds_a_folder_as_often_as_it_likes_and_others_do_not(tmp_path: Path) -> None:
    found: list[object] = []

    def other() -> None:
        try:
            with locked(tmp_path / "x", "it", wait=0.1):
                found.append("held")
        except UsageError as error:
            found.append(error)

    (tmp_path / "link").symlink_to(tmp_path / "x")
    with locked(tmp_path / "x", "it"):
        with locked(tmp_path / "link", "it"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert f"in use by process {os.getpid()} " in str(found.pop())
    other()
    assert found == ["held"]
    with pytest.raises(RuntimeError, match="mine"), locked(tmp_path / "x", "it"):
        raise RuntimeError("mine")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "kept").touch()
    other()
    assert os.listdir(tmp_path / "x") == ["kept"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunError, match=r"cannot write .*file/x: Not a directory"),
        locked(tmp_path / "file" / "x", "it"),
    ):
        pass


def test_links_are_followed_to_their_end(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "deep").mkdir(parents=True)
    (root / "file").touch()
    (tmp_path / "secret").touch()
    (root / "in").symlink_to("deep/../file")
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "far").symlink_to("out")
    (root / "circle").symlink_to("circle")
    (root / "up").symlink_to("..")
    (tmp_path / "root2").mkdir()
    (tmp_path / "alias").symlink_to(root)
    for name in ("file", "in", "deep", "deep/../file", "none"):
        assert is_inside(root / name, root), name
        assert is_inside(tmp_path / "alias" / name, root), name
    for name in ("out", "far", "up/secret", "../secret", "../root2"):
        assert not is_inside(root / name, root), name
