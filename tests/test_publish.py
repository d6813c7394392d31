"""Pushing with the unmodified client, against the server in tests/hub."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import save

from hfdetox import cli
from hfdetox.card import build_card
from hfdetox.errors import HubError, UsageError
from hfdetox.hub import AccessError, IntegrityError, Retry, UnreachableError
from hfdetox.models import load_classifier
from hfdetox.publish import RepoExistsError, check_push_allowed, push_command, push_folder
from hfdetox.push import push_output
from hfdetox.report import Report
from hfdetox.result import DetoxResult, Exhibits
from tests.hub.answers import Answer
from tests.hub.faults import Rule
from tests.tiny_models import timm_model
from tests.written_report import SOURCE, written_report

QUICK = Retry(base_delay=0.01)
WEIGHTS = save({"head.weight": np.arange(600, dtype=np.float32)})
OLD_WEIGHTS = save({"head.weight": np.ones(600, dtype=np.float32)})
COMMIT = r"/commit/"


def card_for(name):
    labels = ("plane", "car", "a `b`, mode `native`) [c]")
    return build_card(
        written_report(), source_card=SOURCE, repo_id=name, labels=labels, plots=["plots/before_after.png"]
    )


@pytest.fixture
def folder(tmp_path):
    """An output folder as hfdetox leaves it."""
    folder = tmp_path / "out"
    for name, content in {
        "config.json": b"{}",
        "model.safetensors": WEIGHTS,
        "README.md": card_for(None).encode(),
        "detox_report.json": written_report().to_json().encode(),
        "plots/before_after.png": b"\x89PNG\0\0",
        ".eval_results/hfdetox.yaml": b"- value: 1\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pushed(hub, name, revision="main"):
    files = hub.files(name, revision)
    files.pop(".gitattributes")
    return files


def foreign(hub, name):
    hub.create_repo(name)
    return hub.commit(name, {
        "config.json": "{old}", "model.safetensors": OLD_WEIGHTS, "pytorch_model.bin": b"\x80\x04.",
        "onnx/model.onnx": b"onnx", "preprocessor_config.json": "{}", "notes.md": "keep me", "plots/theirs.png": b"png",
        "README.md": "# theirs",
    })  # fmt: skip


def test_a_new_repo_gets_everything_in_one_commit(hub, repo_name, hub_token, folder):
    name = repo_name("model", "org")
    assert check_push_allowed(name) == name
    assert not hub.exists(name)
    result = push_folder(folder, name, private=True)
    assert pushed(hub, name) == contents(folder)
    assert hub.head(name) == result.commit
    assert len(hub.history(name)) == 2  # the Hub's own first commit and this one
    assert hub.repo(name).private
    assert (result.repo_id, result.url, result.pull_request) == (name, f"{hub.url}/{name}", None)
    assert not any(entry.had_token for entry in hub.log if entry.origin == "storage")


def test_a_name_without_a_namespace_is_the_users_own(hub, repo_name, hub_token, folder):
    name = repo_name()
    assert check_push_allowed(name.removeprefix("me/")) == name
    assert push_folder(folder, name.removeprefix("me/")).repo_id == name
    assert check_push_allowed(name.removeprefix("me/")) == name
    assert not hub.repo(name).private


def test_a_repo_that_hfdetox_did_not_make_is_left_alone(hub, repo_name, hub_token, folder):
    name = repo_name()
    head = foreign(hub, name)
    for call in (lambda: check_push_allowed(name), lambda: push_folder(folder, name)):
        with pytest.raises(RepoExistsError, match=r"was not made by hfdetox.*--create-pr.*--overwrite"):
            call()
    hub.commit(name, {"detox_report.json": "[1, 2]"})
    with pytest.raises(RepoExistsError):
        push_folder(folder, name)
    hub.commit(name, {"detox_report.json": None})
    assert hub.history(name)[2].id == head


def test_overwriting_removes_what_would_bring_the_old_weights_back(hub, repo_name, hub_token, folder):
    name = repo_name()
    foreign(hub, name)
    check_push_allowed(name, overwrite=True)
    push_folder(folder, name, overwrite=True)
    expected = {**contents(folder), "notes.md": b"keep me", "plots/theirs.png": b"png"}
    assert pushed(hub, name) == expected
    assert len(hub.history(name)) == 3
    removed = "onnx/model.onnx, preprocessor_config.json, pytorch_model.bin"
    assert removed in hub.history(name)[0].message


def test_its_own_repo_and_an_empty_one_are_pushed_to_without_asking(hub, repo_name, hub_token, folder):
    name = repo_name()
    hub.create_repo(name)
    push_folder(folder, name)
    (folder / "plots/before_after.png").unlink()
    (folder / "model.safetensors").write_bytes(OLD_WEIGHTS)
    check_push_allowed(name)
    result = push_folder(folder, name)
    assert pushed(hub, name) == contents(folder)
    # nothing changed: no commit, and the head is what was meant
    assert push_folder(folder, name).commit == result.commit


def test_a_pull_request_leaves_the_main_branch_alone(hub, repo_name, hub_token, folder):
    name = repo_name("model", "stranger")
    head = foreign(hub, name)
    check_push_allowed(name, create_pr=True)
    result = push_folder(folder, name, create_pr=True)
    assert hub.head(name) == head
    assert result.pull_request == result.url == f"{hub.url}/{name}/discussions/1"
    assert hub.head(name, "refs/pr/1") == result.commit
    proposed = pushed(hub, name, "refs/pr/1")
    assert proposed == {**contents(folder), "notes.md": b"keep me", "plots/theirs.png": b"png"}
    # the same push again finds the open pull request
    assert push_folder(folder, name, create_pr=True) == result
    with pytest.raises(UsageError, match="--create-pr needs an existing repository"):
        push_folder(folder, repo_name(), create_pr=True)


@pytest.mark.parametrize("create_pr", [False, True])
def test_a_commit_whose_answer_was_lost_is_recognised(hub, repo_name, hub_token, folder, create_pr):
    name = repo_name()
    hub.create_repo(name)
    rule = hub.faults.drop_answer("POST", COMMIT)
    result = push_folder(folder, name, create_pr=create_pr, retry=QUICK)
    assert rule.hits == len(hub.requests("POST", COMMIT)) == 1
    revision = "refs/pr/1" if create_pr else "main"
    assert hub.head(name, revision) == result.commit
    assert len(hub.history(name, revision)) == 2
    assert len(hub.repo(name).discussions) == int(create_pr)
    assert (result.pull_request is not None) == create_pr


def test_what_the_client_raises_at_once_is_repeated(hub, repo_name, hub_token, folder):
    name = repo_name()
    rules = [
        hub.faults.answer("GET", "/api/whoami-v2", 429, headers={"Retry-After": "0"}),
        hub.faults.answer("POST", "/api/repos/create", 503),
        hub.faults.drop_answer("POST", "/api/repos/create", skip=1),
        hub.faults.answer("POST", "/api/validate-yaml", 502),
        hub.faults.answer("POST", COMMIT, 500, times=2),
        hub.faults.answer("GET", "/auth-check/write", 503),
    ]
    push_folder(folder, name, retry=QUICK)
    assert pushed(hub, name) == contents(folder)
    assert len(hub.history(name)) == 2
    assert [rule.hits for rule in rules[:5]] == [1, 1, 1, 1, 2]
    check_push_allowed(name, retry=QUICK)
    assert rules[5].hits == 1


def test_a_gateways_page_in_place_of_an_answer_is_repeated(hub, repo_name, hub_token, folder):
    name = repo_name()
    page = Answer(502, b"<html>Bad gateway</html>", {"Content-Type": "text/html"})
    rule = Rule("POST", re.compile("/api/validate-yaml"), skip=0, left=2, origin="hub", answer=page)
    hub.faults.rules.append(rule)
    push_folder(folder, name, retry=QUICK)
    assert rule.hits == 2
    assert pushed(hub, name) == contents(folder)


def test_somebody_elses_commit_in_between_is_not_overwritten(hub, repo_name, hub_token, folder):
    name = repo_name()
    hub.create_repo(name)
    hub.faults.before("POST", COMMIT, lambda: hub.commit(name, {"theirs.txt": "mine now"}))
    with pytest.raises(HubError, match="was changed by somebody else meanwhile") as caught:
        push_folder(folder, name, retry=QUICK)
    assert str(caught.value).endswith(f"`hfdetox push {folder} {name}`")
    assert pushed(hub, name) == {"theirs.txt": b"mine now"}


def test_a_failed_push_gives_the_command_and_leaves_the_folder_whole(hub, repo_name, hub_token, folder):
    name = repo_name()
    before = contents(folder)
    rule = hub.faults.answer("POST", COMMIT, 503, times=None)
    with pytest.raises(UnreachableError, match="fails with status 503") as caught:
        push_folder(folder, name, private=True, overwrite=True, retry=QUICK)
    assert rule.hits == QUICK.attempts
    assert str(caught.value).endswith(f"`hfdetox push {folder} {name} --private --overwrite`")
    assert hub.token not in str(caught.value)
    assert contents(folder) == before
    hub.faults.clear()
    push_folder(folder, name, private=True, overwrite=True)
    assert pushed(hub, name) == before


def test_the_command_survives_a_shell(tmp_path):
    command = push_command(tmp_path / "my model", "me/x", create_pr=True)
    assert command == f"hfdetox push '{tmp_path / 'my model'}' me/x --create-pr"


def test_tokens_that_cannot_push_are_found_before_any_work(hub, repo_name, folder, monkeypatch):
    mine, theirs, existing = repo_name(), repo_name("model", "stranger"), repo_name("model", "stranger")
    hub.create_repo(existing)

    def refused(name, match, **options):
        with pytest.raises(AccessError, match=match) as caught:
            check_push_allowed(name, **options)
        assert caught.value.exit_status == 3
        with pytest.raises(AccessError, match=match) as caught:
            push_folder(folder, name, **options)
        assert "`hfdetox push" in str(caught.value)

    refused(mine, "no token.*hf auth login")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_secret")
    refused(mine, "refuses the token")
    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    refused(mine, "may only read")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    refused(theirs, r"me may not create model stranger/.*; push to one of: me, org")
    refused(existing, r"the Hub refuses a push to model stranger/.*\(403")
    assert not hub.requests("POST")


def test_a_push_needs_the_network(hub, repo_name, hub_token, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set; unset it.*hfdetox push"):
        push_folder(folder, repo_name())


def test_private_is_not_promised_for_a_public_repo(hub, repo_name, hub_token, folder):
    name = repo_name()
    hub.create_repo(name)
    with pytest.raises(UsageError, match="exists and is public"):
        push_folder(folder, name, private=True)
    assert pushed(hub, name) == {}


@pytest.mark.parametrize("damage", ["content", "missing"])
def test_what_went_up_is_compared_with_what_was_meant(hub, repo_name, hub_token, folder, damage):
    name = repo_name()
    first = hub.create_repo(name)

    def spoil():
        head = hub.head(name)
        if head == first:
            return
        path = hub.repo(name).folder / "commits" / f"{head}.json"
        commit = json.loads(path.read_text())
        if damage == "missing":
            commit["files"].pop("config.json", None)
        else:
            commit["files"]["config.json"] = commit["files"]["README.md"]
        path.write_text(json.dumps(commit))

    hub.faults.before("GET", "/tree/", spoil, times=None)
    with pytest.raises(IntegrityError, match=r"config\.json of model .* is not what was pushed.*`hfdetox push"):
        push_folder(folder, name)


def test_a_card_that_the_hub_refuses_is_a_usage_error(hub, repo_name, hub_token, folder):
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(UsageError, match="the Hub refuses the card"):
        push_folder(folder, repo_name(), retry=QUICK)


def test_only_output_folders_of_hfdetox_are_pushed(folder, tmp_path):
    def refused(match):
        with pytest.raises(UsageError, match=match):
            push_folder(folder, "me/never")

    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused("is a pickle")
    (folder / "pytorch_model.bin").unlink()
    (folder / "link").symlink_to(tmp_path)
    refused("is a link")
    (folder / "link").unlink()
    (folder / "model.safetensors").write_bytes(b"cut")
    refused("not a safetensors file")
    (folder / "model.safetensors").unlink()
    refused(r"holds no model\.safetensors")
    (folder / "detox_report.json").write_text("{}")
    refused("not an output folder of hfdetox")
    with pytest.raises(UsageError, match="not an output folder"):
        push_folder(tmp_path / "nowhere", "me/never")


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


@pytest.mark.parametrize("saved", [True, False])
def test_a_result_is_pushed_from_its_folder_or_from_memory(hub, repo_name, hub_token, tmp_path, saved):
    classifier = load_classifier(timm_model())
    result = DetoxResult(written_report(), classifier, Exhibits(source_card=SOURCE))
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
    result = DetoxResult(written_report(), load_classifier(timm_model()), Exhibits())
    assert result.save(tmp_path / "out") == result.output == tmp_path / "out"
    assert result.push_to_hub("me/never").url == f"{hub.url}/me/never"
    assert list(tmp_path.iterdir()) == []
    assert not hub.log


def test_a_hub_without_xet_takes_the_files_by_http(hub, repo_name, folder, fresh_env):
    name = repo_name()
    code = (
        "from pathlib import Path\nfrom hfdetox.hub import Retry\nfrom hfdetox.publish import push_folder\n"
        f"print(push_folder(Path({str(folder)!r}), {name!r}, retry=Retry(base_delay=0.01)).commit)"
    )
    environment = {**fresh_env, "HF_HUB_DISABLE_XET": "0", "HF_TOKEN": hub.token}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert hub.requests("GET", "/xet-write-token/")
    assert hub.head(name) == done.stdout.strip()
    assert pushed(hub, name) == contents(folder)
