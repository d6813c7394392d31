"""Reads the YAML of a suite file; light, so that a file that is none is refused before the libraries are loaded."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from hfdetox.errors import UsageError


class SuiteError(UsageError):
    """A suite file that cannot be read or asks for what there is not; the message names the file and the key."""


class _Loader(yaml.SafeLoader):
    """YAML's plain types; a key that is there twice is refused, where YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            mark = (key.tag, str(key.value))
            if mark in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is there twice", key.start_mark
                )
            seen.add(mark)
        return super().construct_mapping(node, deep=deep)


def read_yaml(file: Path) -> Any:
    """Return what a suite file says, as YAML's plain types; SuiteError when it cannot be read or is empty."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteError(f"{file}: the suite cannot be read ({error}); give a YAML file") from error
    try:
        # a SafeLoader with one more check
        content = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise SuiteError(f"{file}: the suite is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        raise SuiteError(f"{file}: the suite is empty; it needs models and grids, or subjects and a bench")
    return content
