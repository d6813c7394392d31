"""Signatures: made at push with a private key, checked by `verify` with the public one, without any network."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from hfdetox.cli import app as cli
from hfdetox.errors import UsageError
from hfdetox.runs.publish import push_output
from hfdetox.runs.signing import check_signature, sign_folder
from tests.output_folder import contents, folder, pushed

__all__ = ["folder"]


def keys(place: Path, name: str, key: object = None) -> tuple[Path, Path]:
    """Write a private key and its public one, and return their paths."""
    made = key or ec.generate_private_key(ec.SECP256R1())
    private, public = place / f"{name}.pem", place / f"{name}.pub"
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private.write_bytes(made.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain))
    public.write_bytes(made.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def finding(place: Path, key: Path) -> tuple[str, str]:
    one = check_signature(place, key)
    return str(one.finding), one.found


def test_a_signed_push_is_signed_here_and_there(hub, repo_name, hub_token, folder, tmp_path, capsys):
    name, (private, public), (_, other) = repo_name(), keys(tmp_path, "mine"), keys(tmp_path, "other")
    assert cli.run(["push", str(folder), name, "--sign", str(private)]) == 0
    there = tmp_path / "there"
    for path, data in pushed(hub, name).items():
        (there / path).parent.mkdir(parents=True, exist_ok=True)
        (there / path).write_bytes(data)
    for place in (folder, there):
        assert finding(place, public)[0] == "match"
        assert finding(place, other) == ("mismatch", "made by another key")
    # pushed elsewhere without a key, its files are others
    again = repo_name()
    assert cli.run(["push", str(folder), again]) == 0
    assert "model.sig is removed: sign again" in capsys.readouterr().err
    assert "model.sig" not in pushed(hub, again)
    # and where it was, the old signature goes
    push_output(folder, name)
    assert "model.sig" not in pushed(hub, name)


@pytest.mark.parametrize("change", ["changed", "removed", "added"])
def test_a_file_that_is_changed_removed_or_added_breaks_the_signature(folder, tmp_path, change):
    private, public = keys(tmp_path, "mine")
    sign_folder(folder, private)
    assert finding(folder, public)[0] == "match"
    (folder / ".hfdetox-manifest.json").write_text("{}")
    (folder / ".gitattributes").write_text("* text\n")
    assert finding(folder, public)[0] == "match"
    if change == "changed":
        (folder / "config.json").write_bytes(b"{ }")
    elif change == "removed":
        (folder / "config.json").unlink()
    else:
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    found = check_signature(folder, public)
    assert (found.finding, found.found) == ("mismatch", "not of these files")
    assert ("pytorch_model.bin" if change == "added" else "config.json") in found.why


@pytest.mark.parametrize("content", [b"", b"{}", b"no json", b'{"mediaType": 3}'])
def test_a_damaged_signature_is_a_mismatch(folder, tmp_path, content):
    private, public = keys(tmp_path, "mine")
    assert finding(folder, public) == ("mismatch", "there is none")
    sign_folder(folder, private)
    (folder / "model.sig").write_bytes(content)
    assert finding(folder, public)[0] == "mismatch"


def test_what_is_no_key_is_refused_in_one_line_before_anything_is_sent(
    hub, repo_name, hub_token, folder, tmp_path, capsys
):
    before, name = contents(folder), repo_name()
    private, public = keys(tmp_path, "mine")
    rsa_key, _ = keys(tmp_path, "rsa", rsa.generate_private_key(65537, 2048))
    koblitz, _ = keys(tmp_path, "koblitz", ec.generate_private_key(ec.SECP256K1()))
    text = tmp_path / "text.pem"
    text.write_text("not a key")
    for wrong in (text, public, rsa_key, koblitz):
        assert cli.run(["push", str(folder), name, "--sign", str(wrong)]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "is not a private key to sign with" in line
    assert contents(folder) == before
    assert not hub.requests("POST", "/commit/")
    with pytest.raises(UsageError, match="is not a public key"):
        check_signature(folder, private)
