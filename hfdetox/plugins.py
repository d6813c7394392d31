"""What a package offers by name: a new trigger, attack or defense is one new file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any


def discover(package: str, path: Iterable[str], base: type[Any], attribute: str) -> dict[str, type[Any]]:
    """Return the subclasses of `base` in the modules of a package, by their class attribute `attribute`.

    A class without the attribute is a base of others and left out.

    Args:
        package: the package's full name.
        path: the folders of its modules, its `__path__`.
    """
    modules = [importlib.import_module(f"{package}.{found.name}") for found in pkgutil.iter_modules(path)]
    kinds = [kind for module in modules for kind in vars(module).values() if isinstance(kind, type)]
    return {getattr(kind, attribute): kind for kind in kinds if issubclass(kind, base) and hasattr(kind, attribute)}
