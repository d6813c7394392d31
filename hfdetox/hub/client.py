"""How every call to the Hub is made: with a time-out, with retries, and with errors a person can act on.

huggingface_hub retries some requests itself and raises others at once (repo_info, whoami, create_repo, the commit, a
file's GET); `ask` retries those, keeps the Hub's Retry-After, and turns what is left into one `HubError` line.
"""

import contextlib
import email.utils
import errno
import importlib
import json
import re
import socket
import ssl
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants, errors, get_session, get_token
from huggingface_hub.utils import parse_ratelimit_headers

from hfdetox.documents import parse_json
from hfdetox.errors import HfdetoxError, HubError, RunError, UsageError, one_line

# The Hub client's HTTP library: httpx for 1.x, httpx2 for 2.x, with the same names in it. The client's errors are made
# from its own; 1.x exports neither the library nor its time-outs.
http = importlib.import_module(errors.HfHubHTTPError.__bases__[0].__module__)

BASE_DELAY = 1.0
# a commit of many files may take the Hub most of a minute before the first byte of its answer
TIMEOUT = http.Timeout(connect=15.0, read=60.0, write=60.0, pool=60.0)
# what the client itself sets: none at all (2.x), or 10 s for an answer (1.x)
_CLIENT_TIMEOUTS = (http.Timeout(None), http.Timeout(constants.DEFAULT_REQUEST_TIMEOUT, write=60.0))
_TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_NETWORK = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)
_NETWORK_NUMBERS = frozenset({errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH})
# an error that one of these raises is about the Hub or the way to it, whatever its type
_CLIENTS = frozenset({"huggingface_hub", "hf_xet", "fsspec", "httpx", "httpx2", "httpcore", "httpcore2", "h11", "h2"})
_BAD_TOKEN = "Invalid credentials in Authorization header"

Answer = TypeVar("Answer")


class UnknownRepoError(HubError):
    """No such repository, revision or file, or it is hidden from this token."""


class AccessError(HubError):
    """The Hub knows the repository and refuses: gated, disabled, no token, a wrong or a read-only one."""


class UnreachableError(HubError):
    """The Hub does not answer, or not as a Hub does."""


class OfflineError(HubError):
    """HF_HUB_OFFLINE is set and what was asked for is not in the cache."""


class IntegrityError(HubError):
    """What came from the Hub, or lies in the cache, is not what the Hub says it is."""


@dataclass(frozen=True)
class Retry:
    """How often and how patiently a failed request is repeated.

    Attributes:
        attempts: tries of one request in all, at least 1; a call that sends several may fail once at each.
        base_delay: seconds before the first repetition; doubled each time, up to `max_delay`.
        max_delay: longest pause in seconds that hfdetox chooses itself.
        max_wait: longest pause in seconds that the Hub may ask for (Retry-After, RateLimit); beyond it the call fails.
        max_total: seconds after the first failure in which the call is still repeated, pauses that the Hub asked for
            not counted.
    """

    attempts: int = 4
    base_delay: float = BASE_DELAY
    max_delay: float = 8.0
    max_wait: float = 310.0
    max_total: float = 120.0

    def delay(self, failures: int, error: BaseException) -> float | None:
        """Return the seconds to wait after the `failures`-th failure (from 1), or None when it must not be repeated."""
        if failures >= self.attempts or not is_transient(error):
            return None
        asked = asked_delay(error)
        if asked is not None:
            return asked if asked <= self.max_wait else None
        return float(min(self.max_delay, self.base_delay * 2 ** (failures - 1)))


DEFAULT_RETRY = Retry()


def is_transient(error: BaseException) -> bool:
    """Return whether repeating the request may help: 408, 429, 5xx, a lost connection, a file cut short."""
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return False  # the client has already tried these for as long as it does
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in _TRANSIENT_STATUS
    if isinstance(error, json.JSONDecodeError):
        return True  # a gateway's HTML page where the client reads JSON before it looks at the status
    if isinstance(error, http.TransportError):
        return not isinstance(error, (http.UnsupportedProtocol, http.ProxyError))
    # a builtin ConnectionError is a failed Xet transfer, RuntimeError a failed LFS one, OSError a file cut short
    return isinstance(error, ConnectionError) or "Error while uploading" in str(error) or _is_cut_file(error)


def transport_error(error: BaseException | None) -> BaseException | None:
    """Return what, among an error and those that led to it, is the Hub's, the way's to it or a full disk's, or None.

    Everything else that a library raises over a file of strangers is about what is in the file.
    """
    own = (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, http.HTTPError)
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        page = isinstance(error, json.JSONDecodeError) and _is_foreseen(error)
        if isinstance(error, own) or _is_network(error) or _is_cut_file(error) or full or page:
            return error
        error = error.__cause__ or error.__context__
    return None


def asked_delay(error: BaseException) -> float | None:
    """Return how many seconds the Hub asks to wait (Retry-After in either form, RateLimit), or None."""
    if not isinstance(error, errors.HfHubHTTPError):
        return None
    headers = error.response.headers
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    if value:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            return None  # a header nobody can read is no wish
    limit = parse_ratelimit_headers(headers)
    if error.response.status_code == 429 and limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    return None


def ask(
    call: Callable[[], Answer], what: str, *, retry: Retry | None = None,
    recover: Callable[[BaseException], Answer | None] | None = None,
) -> Answer:  # fmt: skip
    """Return `call()`, repeated as `retry`, else DEFAULT_RETRY, says.

    Errors of hfdetox pass through, and so do those that neither the client libraries nor the system raised: they are
    mistakes in the code, not answers of the Hub.

    Args:
        what: the thing asked for in messages ("model org/m").
        recover: sees each failure, after the pause and before the repetition; what it returns, unless None, is the
            answer: a commit whose answer was lost has happened all the same.

    Raises:
        HubError: the subclass that fits.
        RunError: what this machine refuses (a full disk, no permission).
        UsageError: an id that cannot be one.
    """
    retry, asked, counts = retry or DEFAULT_RETRY, 0.0, Counter[str]()
    began = first = time.monotonic()
    while True:
        set_timeout()
        try:
            return call()
        except HfdetoxError:
            raise
        except (OSError, http.HTTPError, http.InvalidURL, ValueError, KeyError, TypeError, RuntimeError) as error:
            if not _is_foreseen(error):
                raise
            request = _request_of(error)
            counts[request] += 1
            delay = retry.delay(counts[request], error)
            first = time.monotonic() if counts.total() == 1 else first
            if time.monotonic() - first - asked > retry.max_total:
                delay = None
            asked += (delay or 0.0) if asked_delay(error) is not None else 0.0
            time.sleep(delay or 0.0)
            found = recover(error) if recover is not None else None
            if found is not None:
                return found
            if delay is None:
                raise _said(translate(error, what), counts.total(), time.monotonic() - began) from error


def _request_of(error: BaseException) -> str:
    """Return the method and address of the request that failed, without its query; "" where an error has none."""
    response = getattr(error, "response", None)
    with contextlib.suppress(RuntimeError):  # httpx raises it for an error that has none
        request = getattr(error if response is None else response, "request", None)
        if request is not None:
            return f"{request.method} {str(request.url).partition('?')[0]}"
    return ""


def _said(error: HfdetoxError, tries: int, seconds: float) -> HfdetoxError:
    """Return the error of the Hub with how often and how long it was tried, where that was more than once."""
    return type(error)(f"{error} (tried {tries} times in {seconds:.0f} s)") if tries > 1 else error


def set_timeout() -> None:
    """Give the client's shared session our time-out for its default; a person's own session is left as it is."""
    session = get_session()
    if session.timeout in _CLIENT_TIMEOUTS:
        session.timeout = TIMEOUT


def translate(error: BaseException, what: str) -> HfdetoxError:
    """Return the error a person should see for an error of the client libraries; it never holds a token."""
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return translate(error.__cause__, what)
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        return OfflineError(not_cached(what))
    if isinstance(error, errors.LocalTokenNotFoundError):
        return AccessError(f"no token for {what}; log in with `hf auth login` or set HF_TOKEN")
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"{what}: neither a folder nor a Hub id (NAMESPACE/NAME): {line_of(str(error))}")
    if isinstance(error, errors.HfHubHTTPError):
        return _translate_status(error, what)
    if "Invalid metadata in README.md" in str(error):
        return UsageError(f"the Hub refuses the card of {what}: {line_of(str(error))}; correct README.md")
    reason = line_of(str(error)) or type(error).__name__
    if isinstance(error, (http.TransportError, http.InvalidURL)) or _is_network(error):
        step = "check the network and HF_ENDPOINT, or set HF_HUB_OFFLINE=1 to use files that are cached"
        return UnreachableError(f"the Hub at {constants.ENDPOINT} cannot be reached for {what} ({reason}); {step}")
    if isinstance(error, OSError) and error.errno is not None:
        return _translate_local(error, what)
    if _is_cut_file(error):
        return IntegrityError(f"a file of {what} arrived incomplete; run it again")
    return UnreachableError(f"{constants.ENDPOINT} does not answer as a Hub does for {what} ({reason}); check "
                            "HF_ENDPOINT and proxies")  # fmt: skip


def _is_foreseen(error: BaseException) -> bool:
    """Return whether an error is the system's, a client library's own, or was raised by one, or by Python for one."""
    if isinstance(error, OSError) and (error.errno is not None or isinstance(error, _NETWORK)):
        return True
    if type(error).__module__.partition(".")[0] in _CLIENTS:
        return True
    frames = traceback.walk_tb(error.__traceback__)
    packages = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in frames]
    return next((name in _CLIENTS for name in reversed(packages) if name not in sys.stdlib_module_names), False)


def _is_network(error: BaseException) -> bool:
    return isinstance(error, _NETWORK) or (isinstance(error, OSError) and error.errno in _NETWORK_NUMBERS)


def _translate_local(error: OSError, what: str) -> RunError:
    """Return the error for what the system refuses: what it is, and of which file."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = error.filename or constants.HF_HUB_CACHE
        return RunError(f"the disk is full ({place}); free some space or set HF_HOME elsewhere")
    caches = (constants.HF_HOME, constants.HF_HUB_CACHE)
    if error.filename is not None and any(Path(str(error.filename)).is_relative_to(cache) for cache in caches):
        return RunError(f"the cache cannot be used: {line_of(str(error))}; set HF_HOME to a folder that can be written")
    return RunError(f"{what}: {line_of(str(error))}; this is not the Hub's answer but this machine's")


def _translate_status(error: errors.HfHubHTTPError, what: str) -> HfdetoxError:
    status = error.response.status_code
    said = f": {line_of(error.server_message)}" if error.server_message else ""
    logged_in = bool(_token())
    if isinstance(error, errors.GatedRepoError):
        step = ("this account has no access; ask for it on the repository's page" if logged_in else
                "there is no token; log in with `hf auth login` or set HF_TOKEN")  # fmt: skip
        return AccessError(f"{what} is gated and {step}")
    if _BAD_TOKEN in str(error) or "Invalid user token" in str(error):
        return AccessError(f"the Hub refuses the token for {what}; log in again with `hf auth login` or set HF_TOKEN")
    if isinstance(error, errors.RepositoryNotFoundError):
        step = "that this account may read it" if logged_in else "if it is private `hf auth login` or set HF_TOKEN"
        nor = "" if what.startswith("a ") else " (there is no folder of that name either)"
        return UnknownRepoError(f"{what} is not on the Hub at {constants.ENDPOINT}; check the spelling{nor}, and "
                                f"{step}")  # fmt: skip
    if isinstance(error, errors.RevisionNotFoundError):
        return UnknownRepoError(f"{what}: no such branch, tag or commit; leave the revision out to use the main branch")
    if isinstance(error, errors.EntryNotFoundError):
        return UnknownRepoError(f"{what}: a file is missing on the Hub ({error.response.url.path})")
    if isinstance(error, errors.DisabledRepoError):
        return AccessError(f"{what} was disabled on the Hub; choose another")
    if status in (401, 403):
        return AccessError(f"the Hub refuses {what} ({status}{said}); use a token that may do this")
    if status == 429:
        until = f"in {wait:.0f} s" if (wait := asked_delay(error)) else "later"
        return UnreachableError(f"the Hub limits requests (asked for {what}); try again {until}, or log in")
    if status == 412:
        return HubError(f"{what} was changed by somebody else meanwhile; run it again")
    if isinstance(error, errors.BadRequestError) or status < 500:
        return HubError(f"the Hub rejects the request for {what} ({status}{said})")
    later = "try again later (https://status.huggingface.co)"
    return UnreachableError(f"the Hub fails with status {status} for {what}; {later}")


def not_cached(what: str) -> str:
    """Return the line for something that is asked for offline and not there."""
    return f"{what} is not in the cache and HF_HUB_OFFLINE is set; unset it, or pull it once while online"


def _is_cut_file(error: BaseException) -> bool:
    return isinstance(error, OSError) and "Consistency check failed" in str(error)


def _token() -> str | None:
    try:
        return get_token()
    except OSError:
        return None  # the token's file cannot be read; what is being reported says so already


def line_of(text: str) -> str:
    """Return `text` as one line, its sentences where it holds JSON, without the token should a server echo it."""
    token = _token()
    start = re.search(r'[\[{]\s*["{]', text)
    with contextlib.suppress(ValueError):
        if start and (said := list(_sentences(parse_json(text[start.start() :])))):
            text = text[: start.start()] + "; ".join(said)
    return one_line(text.replace(token, "<token>") if token else text, 200)


def _sentences(answer: Any) -> Iterator[str]:
    """Yield the texts called `message` or `error` in JSON, and what is inside of those that are JSON again."""
    for key, value in answer.items() if isinstance(answer, dict) else enumerate(answer):
        if isinstance(value, dict | list):
            yield from _sentences(value)
        elif isinstance(value, str) and key in ("message", "error"):
            yield line_of(value)
