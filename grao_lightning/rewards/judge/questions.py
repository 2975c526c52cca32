"""Every different question once: from the cache, from one in flight, or from the endpoint."""

import asyncio
from typing import Any

from grao_lightning.rewards.judge.cache import AnswerCache, content_key
from grao_lightning.rewards.judge.client import Session
from grao_lightning.rewards.judge.tally import Tally
from grao_lightning.rewards.judge.verdicts import read_verdict

_KEY_VERSION = 1  # raise it when an equal request may mean something else


class Questions:
    """The questions of one batch.

    Args:
        session: Entered.
        cache: Opened.
        request: Everything but the messages.
        max_rereads: Further attempts after an unreadable answer.
        tally: Takes the figures.
    """

    def __init__(
        self,
        session: Session,
        cache: AnswerCache,
        request: dict[str, Any],
        max_rereads: int,
        tally: Tally,
    ) -> None:
        self._session = session
        self._cache = cache
        self._request = request
        self._max_rereads = max_rereads
        self._tally = tally
        self._tasks: dict[bytes, asyncio.Task[int | None]] = {}

    async def verdict(self, text: str) -> int | None:
        """Return 1 where text 1 is better, -1 where text 2 is, 0 for a tie, None for missing."""
        request = {**self._request, "messages": [{"role": "user", "content": text}]}
        asked = {"version": _KEY_VERSION, "base_url": self._session.base_url, **request}
        key = content_key(asked)
        if key not in self._tasks:
            self._tasks[key] = asyncio.ensure_future(self._find(key, request))
        return await self._tasks[key]

    async def _find(self, key: bytes, request: dict[str, Any]) -> int | None:
        kept = self._cache.get(key)
        verdict = None if kept is None else read_verdict(kept)
        self._tally.note("cache_hit_rate", verdict is not None)
        if verdict is not None:
            return verdict
        for _ in range(1 + self._max_rereads):
            answer = await self._session.ask(request)
            if answer is None:
                return None
            # An answer cut off might have gone on to say the opposite.
            verdict = read_verdict(answer.text) if answer.is_whole else None
            self._tally.note("unreadable_rate", verdict is None)
            self._tally.note("latency", answer.seconds)
            self._tally.note("prompt_tokens", answer.prompt_tokens)
            self._tally.note("completion_tokens", answer.completion_tokens)
            if verdict is not None:
                self._cache.put(key, answer.text, answer.prompt_tokens, answer.completion_tokens)
                return verdict
            end = "" if answer.is_whole else ", cut off at max_tokens"
            self._session.tell_once(
                "unreadable",
                f"gave an answer without readable verdict: {answer.text[:80]!r}{end}; if it goes "
                "on so, raise max_tokens, change the template or take a better model",
            )
        return None
