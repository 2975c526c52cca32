"""Questions to an OpenAI-compatible endpoint: bounded, paced, retried, and never an exception."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from grao_lightning.faults import Faults

if TYPE_CHECKING:
    from openai import AsyncOpenAI

log = logging.getLogger(__name__)

OPENAI = "https://api.openai.com/v1"
_NO_KEY = "none"  # the client insists on one; servers without keys do not look at it
_MAX_CONNECT_SECONDS = 10.0
_MAX_QUOTED = 200
_RETRIED = (408, 409, 429)  # by the client, as it does no answer and 5xx
_HOPELESS = (401, 402, 404)  # whatever is asked next would fail alike
_REFUSED = (
    "the request is refused: check max_tokens and temperature (null leaves one out), extra_body, "
    "and that prompt and texts fit into the model's context"
)
_ADVICE = {
    400: _REFUSED,
    401: "the key is not accepted: set the environment variable that api_key_variable names",
    402: "the account behind the key has no credit left",
    403: "the key may not do this: check model, base_url and the key in api_key_variable",
    404: "nothing is there: check model and base_url, which often ends in /v1",
    422: _REFUSED,
    429: "too many requests or no quota left: lower concurrency or set requests_per_minute",
}
_NO_ANSWER = "check base_url and the server, or raise timeout or max_retries"


@dataclass(frozen=True)
class Endpoint:
    """Where questions go and how; see `PairwiseJudge` for the fields."""

    base_url: str
    api_key_variable: str | None
    timeout: float
    max_retries: int
    concurrency: int
    requests_per_minute: float | None
    give_up_after: int

    def faults(self) -> Faults:
        """Return what is wrong; values that may hold a secret are not shown."""
        faults = Faults()
        faults.add(_url_fault(self.base_url))
        if self.api_key_variable is not None:
            faults.add(_key_fault(self.api_key_variable, needs_key=self.base_url == OPENAI))
        if not self.timeout > 0:
            faults.add(f"timeout must be > 0 seconds; got {self.timeout}")
        faults.at_least("max_retries", self.max_retries, 0)
        faults.at_least("concurrency", self.concurrency, 1)
        faults.at_least("give_up_after", self.give_up_after, 1)
        if self.requests_per_minute is not None and not self.requests_per_minute > 0:
            faults.add(f"requests_per_minute must be > 0 or null; got {self.requests_per_minute}")
        return faults


@dataclass(frozen=True)
class Answer:
    """What the endpoint said to one question.

    Attributes:
        text: The message; empty where the response holds none.
        is_whole: The model ended it by itself, not at max_tokens.
        prompt_tokens: As the endpoint counts them, 0 if it does not.
        completion_tokens: Likewise.
        seconds: From sending the request that was answered to its last byte.
    """

    text: str
    is_whole: bool
    prompt_tokens: int
    completion_tokens: int
    seconds: float


class Session:
    """Asks the questions of one batch, within one event loop.

    After ``give_up_after`` questions in a row that failed after all their retries, or one failure
    that every question would share, the rest of the batch is given up, whatever is in flight
    included: a dead endpoint then costs one round of retries a batch, and the next batch tries
    again. A question that is refused by itself (400, say, as too long) ends nothing.

    Args:
        endpoint: Without faults.
        told: Kinds of failure logged before, shared by a judge's sessions: each is told once.
    """

    def __init__(self, endpoint: Endpoint, told: set[str]) -> None:
        self._endpoint = endpoint
        self._told = told
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._failures_in_a_row = 0
        self._has_given_up = False
        self._num_given_up = 0
        self._in_flight: set[asyncio.Future[Any]] = set()
        self._client: AsyncOpenAI

    async def __aenter__(self) -> Session:
        import openai

        endpoint = self._endpoint
        hooks = {"request": [self._pace()]} if endpoint.requests_per_minute else {}
        self._client = openai.AsyncOpenAI(
            api_key=_key(endpoint.api_key_variable),
            base_url=endpoint.base_url,
            timeout=openai.Timeout(
                endpoint.timeout, connect=min(endpoint.timeout, _MAX_CONNECT_SECONDS)
            ),
            max_retries=endpoint.max_retries,
            http_client=openai.DefaultAsyncHttpxClient(event_hooks=hooks),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()
        if self._num_given_up:
            log.warning(
                "the judge at %s fails: %d questions of this batch were given up and are missing; "
                "the next batch tries again",
                self.base_url,
                self._num_given_up,
            )

    @property
    def base_url(self) -> str:
        """Return the endpoint's address."""
        return self._endpoint.base_url

    def tell_once(self, kind: str, message: str, said: str = "") -> None:
        """Warn of a kind of failure, the first time it comes.

        Args:
            kind: Of failure.
            message: Goes on from "the judge at ...".
            said: The server's own words, which may repeat the key they came for.
        """
        if kind in self._told:
            return
        self._told.add(kind)
        if self._client.api_key != _NO_KEY:
            said = said.replace(self._client.api_key, "<key>")  # before a cut leaves half of it
        if len(said) > _MAX_QUOTED:
            said = f"{said[:_MAX_QUOTED]}..."
        # Never an exception: those of the client hold the request with all its headers.
        quoted = f"; it says {said!r}" if said else ""
        log.warning("the judge at %s %s%s (told once)", self.base_url, message, quoted)

    async def ask(self, request: dict[str, Any]) -> Answer | None:
        """Return the answer to a chat request; None where there is none after all retries."""
        import openai

        async with self._slots:
            if self._has_given_up:
                self._num_given_up += 1
                return None
            # Raw: a body may be anything, and the client's own types do not check it.
            create = self._client.chat.completions.with_raw_response.create
            sent = asyncio.ensure_future(create(**request))
            self._in_flight.add(sent)
            try:
                response = await sent
            except openai.APIStatusError as error:
                self._failed(error.status_code, _detail(error.body))
                return None
            except openai.APIConnectionError as error:
                self._failed(None, type(error).__name__)
                return None
            except asyncio.CancelledError:
                if not self._has_given_up:
                    raise
                self._num_given_up += 1
                return None
            finally:
                self._in_flight.discard(sent)
        self._failures_in_a_row = 0
        return read_answer(response.content, response.elapsed.total_seconds())

    def _pace(self) -> Any:
        """Return a hook that lets a request through when its turn has come, retries included."""
        from aiolimiter import AsyncLimiter

        # One at a time: a bucket of a minute's requests would let each batch begin with a burst.
        limiter = AsyncLimiter(1, 60.0 / self._endpoint.requests_per_minute)  # type: ignore[operator]

        async def wait(request: Any) -> None:
            await limiter.acquire()

        return wait

    def _failed(self, status: int | None, detail: str) -> None:
        # A server that refuses one question may well answer the next.
        was_retried = status is None or status in _RETRIED or status >= 500
        self._failures_in_a_row = self._failures_in_a_row + 1 if was_retried else 0
        if status in _HOPELESS or self._failures_in_a_row >= self._endpoint.give_up_after:
            self._has_given_up = True
            for sent in self._in_flight:
                sent.cancel()
        if status is None:
            self.tell_once("no answer", f"gives none ({detail}): {_NO_ANSWER}")
        else:
            advice = _ADVICE.get(status, "the endpoint is in trouble")
            # What is said of a wrong key often shows parts of it.
            said = "" if status == 401 else detail
            self.tell_once(f"status {status}", f"answers with status {status}: {advice}", said)


def read_answer(body: bytes, seconds: float) -> Answer:
    """Return what a response says; anything unexpected is an empty text.

    Args:
        body: Of a response with status 200.
        seconds: It took.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    text, is_whole = "", True
    counts: dict[str, Any] = {}
    match content:
        case {"choices": [{"message": {"content": str(text)}, **choice}, *_]}:
            is_whole = choice.get("finish_reason") != "length"
    match content:
        case {"usage": dict(counts)}:
            pass
    return Answer(
        text.encode("utf-8", "replace").decode("utf-8"),  # no file can keep a lone surrogate
        is_whole,
        _count(counts.get("prompt_tokens")),
        _count(counts.get("completion_tokens")),
        seconds,
    )


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _detail(body: Any) -> str:
    """Return the message of an error's body, if it has one in a usual place."""
    match body:
        case {"message": str(message)} | {"error": {"message": str(message)}}:
            return message
        case {"detail": str(message)} | {"error": str(message)}:
            return message
    return ""


def _key(variable: str | None) -> str:
    return (os.environ.get(variable, "").strip() if variable else "") or _NO_KEY


def _url_fault(base_url: str) -> str | None:
    try:
        url = urlsplit(base_url)
        is_usable = url.scheme in ("http", "https") and bool(url.hostname) and (url.port or 1) > 0
    except ValueError:
        is_usable = False
    if not is_usable:
        return "base_url must be an address such as http://localhost:8000/v1"
    if url.username or url.password or url.query or url.fragment:
        return (
            "base_url must hold no user, password or parameter, since the config is saved with the "
            "run: put the key into an environment variable and name it in api_key_variable"
        )
    return None


def _key_fault(variable: str, *, needs_key: bool) -> str | None:
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        return (
            "api_key_variable must be the name of an environment variable in capitals, such as "
            "OPENAI_API_KEY, and never the key itself, since the config is saved with the run"
        )
    key = _key(variable)
    if needs_key and key == _NO_KEY:
        return (
            f"api_key_variable: {OPENAI} needs a key, and the environment variable {variable} is "
            "not set: set it, or give base_url of another server"
        )
    if not re.fullmatch(r"[!-~]+", key):
        return (
            f"api_key_variable: what the environment variable {variable} holds is no key: it must "
            "be printable ASCII without spaces; set it again"
        )
    return None
