"""Signatures of output folders in the OpenSSF's format (OMS), made and checked with a key of one's own, offline."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hfdetox.errors import RunError, UsageError, refusing
from hfdetox.files import LOCK_FILES, MANIFEST, SIGNATURE
from hfdetox.reporting.comparison import Check, CheckFinding

# what stays out of repositories, or is the Hub's
_IGNORED = (SIGNATURE, MANIFEST, *LOCK_FILES, ".git", ".gitattributes", ".cache", "__pycache__", ".DS_Store")


def require_signing(key: str | Path) -> None:
    """Raise UsageError where the package that signs is missing, or `key` is not a key it signs with."""
    with refusing(f"--sign {key} is not a private key to sign with"):
        _library("signing").Config().use_elliptic_key_signer(private_key=key)


def sign_folder(folder: Path, key: str | Path, *, omit: Iterable[str] = ()) -> None:
    """Sign every file of an output folder with a private key, into `model.sig`.

    Args:
        key: a PEM file of an elliptic curve key (P-256, P-384 or P-521) without a password.
        omit: paths of files that are not published.

    Raises:
        UsageError: the package is missing, or it is not such a key. RunError: the folder cannot be signed.
    """
    require_signing(key)
    # the folder's own signature is not part of what is signed
    with refusing(f"{folder} cannot be signed", kind=RunError):
        config = _library("signing").Config().use_elliptic_key_signer(private_key=key)
        config.set_hashing_config(_hashing(omit)).sign(folder, folder / SIGNATURE)


def check_signature(folder: Path, key: str | Path, *, unpublished: Iterable[str] = ()) -> Check:
    """Check the signature of every file of a folder with a public key (a PEM file).

    Args:
        unpublished: paths of files that the signature may leave out, all or none.

    Raises:
        UsageError: the package is missing, or it is not a public key.
    """
    what, stated = f"signature ({SIGNATURE})", "of this key, on these files"
    with refusing(f"--public-key {key} is not a public key to check signatures with"):
        config = _library("verifying").Config().use_elliptic_key_verifier(public_key=key)
    if not (folder / SIGNATURE).is_file():
        return Check(what, stated, "there is none", CheckFinding.MISMATCH)
    here = tuple(name for name in unpublished if (folder / name).is_file())
    for omit in dict.fromkeys([(), here]):
        try:
            # it prints what it thinks of old signatures
            with refusing(SIGNATURE), contextlib.redirect_stdout(io.StringIO()):
                config.set_hashing_config(_hashing(omit)).verify(folder, folder / SIGNATURE)
            return Check(what, stated, stated, CheckFinding.MATCH)
        except UsageError as error:
            failure = error
    other = "Key mismatch" in str(failure) or type(failure.__cause__).__name__ == "InvalidSignature"
    found = "made by another key" if other else "not of these files"
    return Check(what, stated, found, CheckFinding.MISMATCH, "" if other else str(failure))


def _hashing(omit: Iterable[str]) -> Any:
    config = _library("hashing").Config()
    # the files of a snapshot in the Hub's cache are links to its blobs
    return config.set_ignored_paths(paths=[*_IGNORED, *omit]).set_allow_symlinks(True)


def _library(module: str) -> Any:
    try:
        return importlib.import_module(f"model_signing.{module}")
    except ImportError as error:
        raise UsageError("signatures need the package model-signing: pip install 'hfdetox[sign]'") from error
