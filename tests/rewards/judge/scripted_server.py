"""An OpenAI-compatible server on loopback that answers, fails and breaks off as a script says.

Not a mock: real sockets, HTTP/1.1 and keep-alive, in a thread of its own.
"""

import asyncio
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Question:
    """A request as it came in.

    Attributes:
        text: The one message.
        attempt: How often this text has been asked by now, from 1.
        body: The whole JSON.
        headers: By lower-case name.
        seconds: When it came, on the clock of `time.monotonic`.
    """

    text: str
    attempt: int
    body: dict[str, Any]
    headers: dict[str, str]
    seconds: float

    @property
    def texts(self) -> tuple[str, str]:
        """Return the texts compared."""
        first, second = (
            re.search(rf"<text_{side}_(\w+)>\n(.*)\n</text_{side}_\1>", self.text, re.DOTALL)
            for side in (1, 2)
        )
        assert first and second, self.text
        return first[2], second[2]


@dataclass(frozen=True)
class Reply:
    """What to do with a request.

    Attributes:
        text: The judge's message, None for null.
        finish_reason: "length" where max_tokens cut it off.
        status: Of HTTP.
        body: The whole body instead.
        headers: Further ones.
        delay: Seconds before anything is sent.
        cut: Break the connection off: "before" anything is sent, or "amid" the body.
    """

    text: str | None = ""
    finish_reason: str = "stop"
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: str | None = None


Script = Callable[[Question], Reply]
PROMPT_TOKENS, COMPLETION_TOKENS = 70, 5  # of every whole reply


class ScriptedServer:
    """Keeps what it was asked; started by `serving`."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.questions: list[Question] = []
        self.most_at_once = 0
        self._at_once = 0
        self._seen: Counter[str] = Counter()
        self.port = 0
        self.errors: list[Exception] = []

    @property
    def base_url(self) -> str:
        """Return the address for a client."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def times_asked(self) -> Counter[str]:
        """Return how often each text was asked."""
        return Counter(question.text for question in self.questions)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until either side ends it."""
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                request_line, *lines = head.strip().split("\r\n")
                headers = {
                    name.lower(): value.strip()
                    for name, _, value in (line.partition(":") for line in lines)
                }
                body = json.loads(await reader.readexactly(int(headers["content-length"])))
                assert request_line.startswith("POST /v1/chat/completions "), request_line
                self._at_once += 1
                self.most_at_once = max(self.most_at_once, self._at_once)
                try:
                    await self._reply(self._note(body, headers), writer)
                except AssertionError as error:  # the script's own: a test must not miss it
                    self.errors.append(error)
                    raise
                finally:
                    self._at_once -= 1
        writer.close()

    def _note(self, body: dict[str, Any], headers: dict[str, str]) -> Question:
        text = body["messages"][-1]["content"]
        self._seen[text] += 1
        question = Question(text, self._seen[text], body, headers, time.monotonic())
        self.questions.append(question)
        return question

    async def _reply(self, question: Question, writer: asyncio.StreamWriter) -> None:
        reply = self.script(question)
        await asyncio.sleep(reply.delay)
        if reply.cut == "before":
            writer.transport.abort()
            return
        body = _body(question, reply) if reply.body is None else reply.body
        headers = {"content-type": "application/json", "content-length": len(body), **reply.headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        whole = f"HTTP/1.1 {reply.status} Scripted\r\n{head}\r\n".encode("latin-1") + body
        if reply.cut == "amid":
            writer.write(whole[: -len(body) // 2])
            await writer.drain()
            writer.close()
            return
        writer.write(whole)
        await writer.drain()


@contextmanager
def serving(script: Script, port: int = 0) -> Iterator[ScriptedServer]:
    """Run a server while the block lasts."""
    server = ScriptedServer(script)
    loop = asyncio.new_event_loop()

    async def start() -> asyncio.Server:
        return await asyncio.start_server(server.handle, "127.0.0.1", port, limit=2**24)

    listening = loop.run_until_complete(start())
    server.port = listening.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server
    finally:

        async def stop() -> None:
            listening.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        assert not server.errors, server.errors


def _body(question: Question, reply: Reply) -> bytes:
    if reply.status != 200:
        return json.dumps({"error": {"message": reply.text, "type": "scripted"}}).encode()
    message = {"role": "assistant", "content": reply.text}
    return json.dumps(
        {
            "id": "scripted",
            "object": "chat.completion",
            "created": 0,
            "model": question.body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": reply.finish_reason}],
            "usage": {
                "prompt_tokens": PROMPT_TOKENS,
                "completion_tokens": COMPLETION_TOKENS,
                "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
            },
        }
    ).encode()
