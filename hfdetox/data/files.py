"""Where the data files of a dataset are: a folder of this machine, or a repository on the Hub at one commit."""

import gc
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from huggingface_hub import HfFileSystem

from hfdetox.data.images import Item, Result
from hfdetox.errors import HfdetoxError, RunError, UsageError, one_line
from hfdetox.files import is_inside
from hfdetox.hub.client import ask, transport_error
from hfdetox.hub.download import fetch


class DatasetError(UsageError):
    """The dataset cannot be opened as asked: no data files, an unknown configuration, a loading script."""


class DamagedFileError(RunError):
    """A data file that cannot be read as what it is said to be."""


class LocalFiles:
    """Data files under one folder of this machine; `readers` is how many are read at a time."""

    readers = 1

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    def path(self, name: str) -> str:
        """Return where the file lies; DatasetError for one, or a link to one, outside the folder, or a pipe."""
        if not is_inside(Path(name), self._folder):
            raise DatasetError(f"{name[:200]} is outside the dataset's folder, and the dataset names it; do not use it")
        if os.path.exists(name) and not os.path.isfile(name):
            raise DatasetError(f"{name[:200]} is no plain file; remove it, or get the dataset anew")
        return name

    def listing(self) -> dict[str, str]:
        """Return the name of every file by its path relative to the folder; hidden ones are left out."""
        found, seen = dict[str, str](), set[str]()
        for root, folders, files in os.walk(self._folder, followlinks=True):
            real = os.path.realpath(root)  # links may lead in a circle
            folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith((".", "__")))
            seen.add(real)
            paths = [Path(root, name) for name in sorted(files) if not name.startswith(".")]
            found |= {path.relative_to(self._folder).as_posix(): str(path) for path in paths}
        return found

    def size(self, name: str) -> int:
        """Return the file's size in bytes."""
        return Path(name).stat().st_size

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading at any place."""
        return open(self.path(name), "rb")

    def read(self, name: str, function: Callable[[Any], Result]) -> Result:
        """Return `function` of the open file, guarded."""

        def attempt() -> Result:
            with self.open(name) as source:
                return function(source)

        return self.guard(name, attempt)

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Return `function` of each item, `readers` at a time."""
        with ThreadPoolExecutor(self.readers, thread_name_prefix="hfdetox-read") as pool:
            return list(pool.map(function, items))

    def guard(self, what: str, call: Callable[[], Result]) -> Result:
        """Return `call()`, what it says of a damaged file as DamagedFileError; remote files repeat it if need be."""
        try:
            return call()
        except HfdetoxError:
            raise
        except Exception as error:
            if (found := transport_error(error)) is not None:
                raise found from error
            reason = one_line(error)[:160] or type(error).__name__
            raise DamagedFileError(f"{what} cannot be read ({reason}); get the dataset anew") from error

    def streaming(self) -> AbstractContextManager[None]:
        """Return what is entered while streams are opened and read."""
        return nullcontext()


class HubFiles(LocalFiles):
    """Data files of a dataset repository at one commit; names are `hf://datasets/ID@SHA/PATH`."""

    readers = 8

    def __init__(self, state: Any) -> None:
        self._state, self._prefix = state, f"hf://datasets/{state.id}@{state.sha}/"
        self._system, self._downloaded = HfFileSystem(), dict[str, str]()

    def open(self, name: str) -> IO[bytes]:
        """Open a file that is downloaded, or one whose reads are range requests of exactly the bytes asked for."""
        self._inside(name)
        if name in self._downloaded:
            return open(self._downloaded[name], "rb")
        return self._system.open(name, "rb", cache_type="none")

    def path(self, name: str) -> str:
        """Download a file into the Hub cache, its hash checked, and return where it lies there."""
        if name not in self._downloaded:
            self._downloaded[name] = str(fetch(self._state, self._inside(name)))
        return self._downloaded[name]

    def listing(self) -> dict[str, str]:
        """Return the name of every file by its path in the repository; hidden ones are left out."""
        shown = [path for path in self._state.files if not re.search(r"(^|/)(\.|__[^/]*/)", path)]
        return {path: self._prefix + path for path in shown}

    def size(self, name: str) -> int:
        """Return the size in bytes that the Hub's listing gives."""
        return int(self._state.files[self._inside(name)].size)

    def guard(self, what: str, call: Callable[[], Result]) -> Result:
        """Return `call()`, repeated where that may help; raises HubError."""
        return ask(lambda: super(HubFiles, self).guard(what, call), f"dataset {self._state.id}")

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Collect no garbage while streams are opened and read, and all of it afterwards.

        `datasets` leaves every streamed file in a cycle of references. Such a file closes itself when it is collected,
        and takes a lock of the client's connections for that; in the middle of a request, which has this lock, the
        process would wait for itself.
        """
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            gc.collect()
            if collects:
                gc.enable()

    def _inside(self, name: str) -> str:
        path = name.removeprefix(self._prefix)
        if path == name or path not in self._state.files:
            raise DatasetError(f"dataset {self._state.id} leads to {name[:200]}, outside its repository at this "
                               "commit; choose another")  # fmt: skip
        return path
