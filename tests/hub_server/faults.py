"""Rules that make the next matching requests fail, and the log of the requests that came."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from tests.hub_server.answers import Answer, Refusal, json_answer

Origin = Literal["hub", "storage"]


@dataclass(frozen=True)
class Logged:
    """One request: `status` is 0 when the connection was dropped in place of an answer. Tokens are never kept."""

    method: str
    path: str
    query: str
    status: int
    had_token: bool
    origin: Origin
    range: str | None = None


@dataclass
class Rule:
    """Which requests a fault is for, how many of them are left, and what happens."""

    method: str
    pattern: re.Pattern[str]
    skip: int
    left: int | None
    origin: Origin | None
    answer: Answer | None = None
    cut_after: int | None = None
    flip_at: int | None = None
    drop: bool = False
    delay: float = 0.0
    before: Callable[[], object] | None = None
    hits: int = 0

    def matches(self, method: str, target: str, origin: Origin) -> bool:
        """Whether the rule is for this request and not used up."""
        right_method = self.method in ("*", method)
        return self.left != 0 and right_method and self.origin in (None, origin) and bool(self.pattern.search(target))

    def use(self) -> bool:
        """Count a matching request; False while it is one of the first `skip`."""
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.left is not None:
            self.left -= 1
        self.hits += 1
        return True


@dataclass
class Faults:
    """The rules in force. Each method adds one for requests whose method is `method` ("*": any) and whose path with
    query, as it came on the wire (`refs%2Fpr%2F1`), is found by the regular expression `path`. It acts on the next
    `times` of them (None: on all from now on) after letting `skip` pass; `origin` limits it to the "hub" or to the
    LFS "storage". The rule comes back; its `hits` say how often it acted."""

    rules: list[Rule] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(
        self,
        method: str,
        path: str,
        status: int,
        *,
        times: int | None = 1,
        headers: dict[str, str] | None = None,
        message: str | None = None,
        code: str | None = None,
        body: object = None,
        skip: int = 0,
        origin: Origin | None = None,
    ) -> Rule:
        """Answer with this status (and headers such as Retry-After), the body being an error or the given JSON.

        The request is not carried out.
        """
        reply = Refusal(status, message or f"fault: status {status}", code, headers).answer()
        if body is not None:
            reply = json_answer(body, status, headers)
        return self._add(Rule(method, re.compile(path), skip, times, origin, answer=reply))

    def cut_body(
        self, path: str, after: int, *, times: int | None = 1, skip: int = 0, origin: Origin | None = None
    ) -> Rule:
        """Close the connection after `after` bytes of a GET's body; bodies not longer than that do not count."""
        return self._add(Rule("GET", re.compile(path), skip, times, origin, cut_after=after))

    def flip_byte(
        self, path: str, at: int = 0, *, times: int | None = 1, skip: int = 0, origin: Origin | None = None
    ) -> Rule:
        """Change the byte at offset `at` of a file sent by GET; answers without that byte, and errors, do not count."""
        return self._add(Rule("GET", re.compile(path), skip, times, origin, flip_at=at))

    def drop_answer(
        self, method: str, path: str, *, times: int | None = 1, skip: int = 0, origin: Origin | None = None
    ) -> Rule:
        """Carry the request out (a commit happens) and close the connection without an answer."""
        return self._add(Rule(method, re.compile(path), skip, times, origin, drop=True))

    def delay(
        self,
        method: str,
        path: str,
        seconds: float,
        *,
        times: int | None = 1,
        skip: int = 0,
        origin: Origin | None = None,
    ) -> Rule:
        """Wait before the request is carried out."""
        return self._add(Rule(method, re.compile(path), skip, times, origin, delay=seconds))

    def before(
        self,
        method: str,
        path: str,
        action: Callable[[], object],
        *,
        times: int | None = 1,
        skip: int = 0,
        origin: Origin | None = None,
    ) -> Rule:
        """Call `action` before the request is carried out, e.g. to let somebody else commit in between."""
        return self._add(Rule(method, re.compile(path), skip, times, origin, before=action))

    def clear(self) -> None:
        """Forget all rules."""
        with self.lock:
            self.rules.clear()

    def before_answer(self, method: str, target: str, origin: Origin) -> list[Rule]:
        """The rules that act on this request whatever its answer will be, counted."""
        return self._take(lambda rule: rule.cut_after is None and rule.flip_at is None, method, target, origin)

    def on_body(self, method: str, target: str, origin: Origin, answer: Answer) -> list[Rule]:
        """The rules that damage this answer's body, counted."""

        def damages(rule: Rule) -> bool:
            if rule.cut_after is not None:
                return answer.length > rule.cut_after
            inside = rule.flip_at is not None and answer.start <= rule.flip_at < answer.start + answer.length
            return inside and answer.status in (200, 206)

        return self._take(damages, method, target, origin)

    def _take(self, wanted: Callable[[Rule], bool], method: str, target: str, origin: Origin) -> list[Rule]:
        with self.lock:
            found = [rule for rule in self.rules if wanted(rule) and rule.matches(method, target, origin)]
            return [rule for rule in found if rule.use()]

    def _add(self, rule: Rule) -> Rule:
        with self.lock:
            self.rules.append(rule)
        return rule


def damaged(answer: Answer, rules: list[Rule]) -> Answer:
    """The answer with the bytes flipped that the rules name (cuts are made while sending)."""
    offsets = [rule.flip_at for rule in rules if rule.flip_at is not None]
    if not offsets:
        return answer
    content = answer.body if isinstance(answer.body, bytes) else answer.body.read_bytes()
    body = bytearray(content[answer.start : answer.stop])
    for offset in offsets:
        body[offset - answer.start] ^= 0xFF
    # From here on the body is the part itself; its headers stay those of the undamaged one.
    return replace(answer, body=bytes(body), start=0, stop=None)
