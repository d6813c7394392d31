"""Outputs and results pushed with the unmodified client: card and report name the repository they are in."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from hfdetox.cli import app as cli
from hfdetox.errors import HubError, UsageError
from hfdetox.hub.upload import RepoExistsError
from hfdetox.models.classifier import load_classifier
from hfdetox.reporting.report import Report
from hfdetox.runs.publish import push_command, push_output
from hfdetox.runs.result import Artifacts, DetoxResult
from tests.output_folder import card_for, contents, folder, foreign, pushed
from tests.tiny_models import timm_model
from tests.written_report import SOURCE, written_report

__all__ = ["folder"]


def test_the_command_pushes_a_folder_and_refuses_a_wrong_token_in_one_line(hub, repo_name, folder, fresh_env, run_cli):
    name = repo_name()
    refused = run_cli(["push", folder, name], env={**fresh_env, "HF_TOKEN": "hf_wrong_secret"})
    assert refused.returncode == 3
    assert "the Hub refuses the token" in refused.stderr
    assert refused.stderr.strip().endswith(f"`hfdetox push {folder} {name}`")
    assert len(refused.stderr.strip().splitlines()) == 1
    assert "hf_wrong_secret" not in refused.stderr + refused.stdout
    done = run_cli(["push", folder, name, "--private"], env={**fresh_env, "HF_TOKEN": hub.token})
    assert done.returncode == 0, done.stderr
    assert hub.repo(name).private
    assert_addressed(hub, folder, name)
    assert done.stderr == ""


def assert_addressed(hub, folder, name):
    """Card and report here and there name the repository; only the local report knows the commit."""
    there, here = pushed(hub, name), contents(folder)
    assert there["README.md"].decode() == here["README.md"].decode() == card_for(name)
    reports = [Report.from_dict(json.loads(files["detox_report.json"])) for files in (there, here)]
    assert [report.output.pushed_to for report in reports] == [name, name]
    assert [report.output.commit for report in reports] == [None, hub.head(name)]
    assert all(replace(report, output=written_report().output) == written_report() for report in reports)
    assert {n for n in here if here[n] != there.get(n)} == {"detox_report.json"}
    assert set(here) == set(there)


def test_card_and_report_name_the_repository_they_are_pushed_to(hub, repo_name, hub_token, folder):
    first, second = repo_name(), repo_name("model", "org")
    assert 'create_model("local-dir:."' in (folder / "README.md").read_text()
    for name in (first, second, first):
        assert push_output(folder, name.removeprefix("me/")).repo_id == name
        assert_addressed(hub, folder, name)
        card = ModelCard.load(name, ignore_metadata_errors=True)
        assert f'create_model("hf_hub:{name}"' in card.text
        assert (card.data.license, card.data.license_name) == ("other", "house-licence")
        assert card.text.endswith("{{ 7 * 7 }} {% raw %}\n")
    head = hub.head(first)
    assert push_output(folder, first).commit == head


def test_a_model_joins_a_collection(hub, repo_name, hub_token, folder, capsys):
    name, slug = repo_name(), "me/clean-models-0123"
    words = ["push", str(folder), name, "--collection", slug]
    assert cli.run(words) == 3  # which is said before anything is sent
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not hub.exists(name)
    hub.collections[slug] = ["me/another"]
    for _ in range(2):
        assert cli.run(words) == 0
        assert f"in the collection: {hub.url}/collections/{slug}\n" in capsys.readouterr().out
        assert hub.collections[slug] == ["me/another", name]
    address = f"https://huggingface.co/collections/{slug}/"
    assert cli.run([*words[:-1], address]) == 0
    assert hub.collections[slug] == ["me/another", name]
    hub.collections["someone/theirs-01"] = []
    capsys.readouterr()
    # what cannot be is said before anything is sent
    for other, status, line in (("someone/theirs-01", 3, "someone/theirs-01 is not one of me"),
                                ("mine", 2, "--collection mine names no collection: give OWNER/TITLE-ID"),
                                ("a b/c", 2, "names no collection"), (address + "x/y", 2, "names no")):  # fmt: skip
        new = repo_name()
        assert cli.run([*words[:2], new, "--collection", other]) == status
        assert line in capsys.readouterr().err
        assert not hub.exists(new)
    assert hub.collections["someone/theirs-01"] == []


def test_a_card_edited_by_hand_is_pushed_as_it_is(hub, repo_name, hub_token, folder, capsys):
    name = repo_name()
    card = (folder / "README.md").read_text()
    assert card.count("\n## Threat model\n") == 1
    edited = card.replace("\n## Threat model\n", "\nMy own words.\n\n## Threat model\n").encode()
    (folder / "README.md").write_bytes(edited)
    assert cli.run(["push", str(folder), name]) == 0
    warned = capsys.readouterr().err
    assert f"warning: {folder / 'README.md'} is not word for word what this hfdetox wrote" in warned
    assert pushed(hub, name)["README.md"] == (folder / "README.md").read_bytes() == edited
    assert Report.load(folder).output.pushed_to == name


def test_a_push_that_is_refused_leaves_card_and_report(hub, repo_name, hub_token, folder):
    name, before = repo_name(), contents(folder)
    foreign(hub, name)
    with pytest.raises(RepoExistsError):
        push_output(folder, name)
    assert contents(folder) == before
    (folder / "README.md").unlink()
    with pytest.raises(UsageError, match=r"README\.md cannot be read"):
        push_output(folder, repo_name())


@pytest.mark.parametrize("failure", ["refused", "changed meanwhile", "damaged", "offline", "no right"])
def test_a_failed_push_gives_the_command_that_repeats_it(hub, repo_name, hub_token, folder, monkeypatch, failure):
    name = repo_name()
    hub.create_repo(name, private=True)
    first = hub.commit(name, {"theirs.txt": "theirs"})
    if failure == "refused":
        hub.faults.answer("POST", "/commit/", 403)
    elif failure == "changed meanwhile":
        hub.faults.before("POST", "/commit/", lambda: hub.commit(name, {"theirs.txt": "mine now"}))
    elif failure == "damaged":
        hub.faults.before("GET", "/tree/", lambda: spoil_head(hub, name, first), times=None)
    elif failure == "offline":
        monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    else:
        monkeypatch.setenv("HF_TOKEN", hub.read_token)
    with pytest.raises(HubError) as caught:
        push_output(folder, name, private=True, overwrite=True)
    again = f"hfdetox push {folder} {name} --private --overwrite"
    assert str(caught.value).endswith(f"the folder is whole, push it with `{again}`")
    assert hub.token not in str(caught.value)
    hub.faults.clear()


def spoil_head(hub, name, first):
    """Take a file out of the commit on top of `first`, once there is one."""
    head = hub.head(name)
    if head != first:
        path = hub.repo(name).folder / "commits" / f"{head}.json"
        commit = json.loads(path.read_text())
        commit["files"].pop("config.json", None)
        path.write_text(json.dumps(commit))


def test_the_command_survives_a_shell(tmp_path):
    command = push_command(tmp_path / "my model", "me/x", create_pr=True)
    assert command == f"hfdetox push '{tmp_path / 'my model'}' me/x --create-pr"


@pytest.mark.parametrize("saved", [True, False])
def test_a_result_is_pushed_from_its_folder_or_from_memory(hub, repo_name, hub_token, tmp_path, saved):
    classifier = load_classifier(timm_model())
    result = DetoxResult(written_report(), classifier, Artifacts(source_card=SOURCE))
    name, output = repo_name(), tmp_path / "out"
    if saved:
        result.save(output)
    done = result.push_to_hub(name.removeprefix("me/"), private=True)
    assert (done.repo_id, done.commit) == (name, hub.head(name))
    assert hub.repo(name).private
    assert (result.report.output.pushed_to, result.report.output.commit) == (name, done.commit)
    card = pushed(hub, name)["README.md"].decode()
    assert f'create_model("hf_hub:{name}"' in card
    assert result.output == (output if saved else None)
    if saved:
        assert Report.load(output) == result.report
        assert (output / "README.md").read_text() == card


def test_only_the_main_process_writes_and_pushes(hub, hub_token, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    result = DetoxResult(written_report(), load_classifier(timm_model()), Artifacts())
    assert result.save(tmp_path / "out") == result.output == tmp_path / "out"
    assert result.push_to_hub("me/never").url == f"{hub.url}/me/never"
    assert list(tmp_path.iterdir()) == []
    assert not hub.log
