"""Requests to the Hub that fail, are repeated, or cannot be made, against the server in tests/hub_server."""

from __future__ import annotations

import email.utils
import errno
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from hfdetox.errors import RunError
from hfdetox.hub import client
from hfdetox.hub.client import OfflineError, Retry, UnreachableError, ask, asked_delay, http, line_of
from hfdetox.hub.download import pull_model, resolve
from tests.hub_server.made import OTHER_WEIGHTS, WEIGHTS, make_model


def facts(name):
    """The path of the request that names the commit."""
    return rf"/api/models/{name}(\?|$)"


def test_requests_that_the_client_raises_at_once_are_repeated(hub, repo_name):
    name = repo_name()
    make_model(hub, name)
    known = hub.faults.answer("GET", facts(name), 503, times=2)
    dropped = hub.faults.drop_answer("GET", facts(name), times=1, skip=0)
    files = hub.faults.answer("GET", name, 502, times=2, origin="storage")
    pulled = pull_model(name)
    assert (known.hits, dropped.hits, files.hits) == (2, 1, 2)
    assert (pulled.folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_lasting_failure_ends_after_the_last_attempt(hub, repo_name, monkeypatch):
    monkeypatch.setattr(client, "DEFAULT_RETRY", Retry(attempts=3, base_delay=0.01))
    name = repo_name()
    make_model(hub, name)
    rule = hub.faults.answer("GET", facts(name), 500, times=None)
    with pytest.raises(UnreachableError, match="fails with status 500"):
        resolve(name)
    assert rule.hits == 3


def test_a_call_of_many_requests_may_fail_once_at_each_of_them(hub, repo_name):
    names = [repo_name() for _ in range(client.DEFAULT_RETRY.attempts + 2)]
    for name in names:
        make_model(hub, name)
    rules = [fault("GET", facts(name)) for name in names for fault in (
        hub.faults.drop_answer, lambda *which: hub.faults.answer(*which, 503))]  # fmt: skip
    found = ask(lambda: [HfApi().model_info(name).id for name in names], "all of them")
    assert found == names
    assert [rule.hits for rule in rules] == [1] * len(rules)


def test_repeating_ends_when_its_time_is_over_and_how_long_it_was_is_said(hub, repo_name, monkeypatch):
    monkeypatch.setattr(client, "DEFAULT_RETRY", Retry(attempts=1000, base_delay=0.1, max_delay=0.1, max_total=0.4))
    name = repo_name()
    make_model(hub, name)
    rule = hub.faults.answer("GET", facts(name), 500, times=None)
    with pytest.raises(UnreachableError, match=r"\(tried \d+ times in \d+ s\)$"):
        resolve(name)
    assert 2 < rule.hits < 10
    # a pause that the Hub asks for does not count
    hub.faults.clear()
    monkeypatch.setattr(client, "DEFAULT_RETRY", Retry(max_total=0.5))
    rule = hub.faults.answer("GET", facts(name), 429, headers={"Retry-After": "1"}, times=2)
    resolve(name)
    assert rule.hits == 2
    # nor does the time before the first failure: a long upload that is cut is sent again
    monkeypatch.setattr(client, "DEFAULT_RETRY", Retry(max_total=0.3, base_delay=0.1))
    rule = hub.faults.answer("GET", facts(name), 503)
    hub.faults.delay("GET", facts(name), 0.6)
    resolve(name)
    assert rule.hits == 1


def test_retry_after_is_kept_and_bounded(hub, repo_name):
    name = repo_name()
    make_model(hub, name)
    hub.faults.answer("GET", facts(name), 429, headers={"Retry-After": "1"})
    start = time.monotonic()
    resolve(name)
    assert time.monotonic() - start >= 1
    rule = hub.faults.answer("GET", facts(name), 429, headers={"RateLimit": '"api";r=0;t=900'}, times=None)
    with pytest.raises(UnreachableError, match=r"limits requests.*try again in 900 s"):
        resolve(name)
    assert rule.hits == 1


def failure(status, **headers):
    request = http.Request("GET", "http://127.0.0.1/api/models/a/b")
    return HfHubHTTPError("failed", response=http.Response(status, headers=headers, request=request))


def test_pauses_double_up_to_their_limit_and_stop_with_the_attempts():
    retry = Retry(attempts=6, base_delay=1, max_delay=5)
    assert [retry.delay(n, failure(503)) for n in range(1, 7)] == [1, 2, 4, 5, 5, None]
    assert [retry.delay(1, failure(status)) for status in (400, 401, 403, 404, 409, 412)] == [None] * 6
    assert [retry.delay(1, failure(status)) for status in (408, 429, 500, 502, 503, 504)] == [1] * 6
    assert retry.delay(1, failure(503, **{"Retry-After": "7"})) == 7
    assert retry.delay(1, http.ReadTimeout("slow")) == 1
    in_a_minute = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert 55 < asked_delay(failure(429, **{"Retry-After": in_a_minute})) <= 60
    assert asked_delay(failure(429, **{"Retry-After": "soon"})) is None


def test_a_hub_that_does_not_answer_runs_into_the_time_out(hub, repo_name, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(client, "DEFAULT_RETRY", Retry(attempts=1))
    name = repo_name()
    make_model(hub, name)
    hub.faults.delay("GET", facts(name), 1.5, times=None)
    with pytest.raises(UnreachableError, match="cannot be reached"):
        resolve(name)


def test_every_call_has_a_time_out(hub):
    from huggingface_hub import close_session, get_session

    close_session()
    assert ask(lambda: get_session().timeout, "the session").read == 60.0
    # the defaults of client 2.x and 1.x; what a person set stays
    for given, read in ((http.Timeout(None), 60.0), (http.Timeout(10, write=60.0), 60.0), (http.Timeout(7.0), 7.0)):
        get_session().timeout = given
        assert ask(lambda: get_session().timeout, "the session").read == read
    close_session()


def test_an_answer_that_is_no_hubs_is_one_line(hub, repo_name):
    name = repo_name()
    make_model(hub, name)
    hub.faults.answer("GET", facts(name), 200, times=None, message="a portal")
    with pytest.raises(UnreachableError, match="does not answer as a Hub does"):
        resolve(name)


def run_python(code: str, environment: dict[str, str], **more: str) -> str:
    environment = {**environment, **more}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=True).stdout


PULL = """
from hfdetox.errors import HfdetoxError
from hfdetox.hub import client
from hfdetox.hub.download import pull_model, read_text_file
client.DEFAULT_RETRY = client.Retry(base_delay=0.01)
try:
    pulled = pull_model({name!r})
    print("pulled", pulled.revision, *pulled.warnings, sep="|")
    print(*(read_text_file({name!r}, file, pulled.revision) for file in ("README.md", "eval.yaml")))
except HfdetoxError as error:
    print(type(error).__name__, error.exit_status, error, sep="|")
"""


def test_offline_uses_the_cache_says_so_and_still_checks_it(hub, repo_name, fresh_env):
    name = repo_name()
    commit = make_model(hub, name)
    code = PULL.format(name=name)
    nothing = run_python(code, fresh_env, HF_HUB_OFFLINE="1")
    assert nothing.startswith(f"OfflineError|3|model {name} is not in the cache and HF_HUB_OFFLINE is set")
    assert run_python(code, fresh_env).splitlines() == [f"pulled|{commit}", "# card None"]
    hub.log.clear()
    offline = run_python(code, fresh_env, HF_HUB_OFFLINE="1")
    assert offline.startswith(f"pulled|{commit}|offline: model {name} is the cached commit {commit[:12]}; nobody")
    assert offline.endswith("# card None\n")
    assert not hub.requests(path=name)
    blob = next(Path(fresh_env["HF_HOME"]).glob("hub/models--*/snapshots/*/model.safetensors")).resolve()
    blob.write_bytes(OTHER_WEIGHTS)
    assert run_python(code, fresh_env, HF_HUB_OFFLINE="1").startswith("IntegrityError|3|model.safetensors of")
    assert run_python(code, fresh_env, HF_HUB_OFFLINE="1").startswith("OfflineError|3|")


def test_an_unreachable_hub_is_one_line_although_the_files_are_cached(hub, repo_name, fresh_env):
    name = repo_name()
    make_model(hub, name)
    code = PULL.format(name=name)
    run_python(code, fresh_env)
    said = run_python(code, fresh_env, HF_ENDPOINT="http://127.0.0.1:9")
    assert said.startswith(f"UnreachableError|3|the Hub at http://127.0.0.1:9 cannot be reached for model {name}")
    assert "HF_HUB_OFFLINE=1" in said
    assert len(said.splitlines()) == 1


def test_an_ill_named_revision_offline_leaves_the_cache_alone(hub, monkeypatch):
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    for revision in ("../../../other", "/etc/passwd", "0" * 40):
        with pytest.raises(OfflineError, match="HF_HUB_OFFLINE"):
            resolve("org/m", revision=revision)


def test_a_cache_that_cannot_be_written_names_the_remedy(hub, repo_name, fresh_env, tmp_path):
    name = repo_name()
    make_model(hub, name)
    (tmp_path / "taken").write_text("a file where the cache should be")
    said = run_python(PULL.format(name=name), fresh_env, HF_HOME=str(tmp_path / "taken"))
    assert said.startswith("RunError|1|the cache cannot be used")
    assert "HF_HOME" in said


def raising(error):
    def call():
        raise error

    return call


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("sha"), TypeError("x"), RuntimeError("x"), OSError("x")])
def test_a_mistake_in_the_code_is_not_called_the_hubs(error):
    with pytest.raises(type(error)) as caught:
        ask(raising(error), "model org/m")
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), "Permission denied: '/data/x'"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (PermissionError(errno.EACCES, "denied", f"{constants.HF_HUB_CACHE}/x"), "cache cannot be used.*HF_HOME"),
    ],
)  # fmt: skip
def test_what_this_machine_refuses_is_said_as_it_is(error, said):
    with pytest.raises(RunError, match=said) as caught:
        ask(raising(error), "dataset org/d")
    assert "Hub at" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [ConnectionRefusedError(errno.ECONNREFUSED, "refused"), ConnectionError("xet"), TimeoutError("slow"),
              socket.gaierror(-2, "Name or service not known"), OSError(errno.ENETUNREACH, "Network is unreachable")]
)  # fmt: skip
def test_what_the_network_refuses_is_the_networks(error):
    with pytest.raises(UnreachableError, match="cannot be reached for model org/m"):
        ask(raising(error), "model org/m")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ('[{"code": "invalid", "options": ["mit"], "path": ["license"], "message": "Expected mit"}]', "Expected mit"),
        ('{"error": "no", "x": [{"message": "a"}, {"message": "b"}]}', "no; a; b"),
        ('Invalid metadata in README.md.\n- [{"message": "\\"license\\" must be known"}]',
         'Invalid metadata in README.md. - "license" must be known'),
        ("a sentence [with] {marks}", "a sentence [with] {marks}"),
        ('{"a": [' * 5000, '{"a": ['), ("\x1b[31mred\n", "[31mred"),
    ],
)  # fmt: skip
def test_json_of_the_hub_is_shown_as_its_sentences(answer: str, said: str) -> None:
    line = line_of(answer)
    assert line.startswith(said)
    assert len(line) <= 210
