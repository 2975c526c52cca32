"""A language model behind an OpenAI-compatible endpoint as judge of completion against answer."""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

from grao_lightning.faults import extra_fault
from grao_lightning.rewards.judge.cache import AnswerCache, default_path
from grao_lightning.rewards.judge.client import OPENAI, Endpoint, Session
from grao_lightning.rewards.judge.prompts import TEMPLATE, criterion_text, render, template_fault
from grao_lightning.rewards.judge.questions import Questions
from grao_lightning.rewards.judge.tally import Tally

_OURS = {"messages", "model", "n", "stream"}
_MEANS = (
    "failure_rate",
    "tie_rate",
    "inconsistency",
    "position_bias",
    "position_lean",
    "unreadable_rate",
    "cache_hit_rate",
    "latency",
)
_TOTALS = ("prompt_tokens", "completion_tokens")


class PairwiseJudge:
    """Scores a completion 1, 0 or -1: better than, equal to or worse than the reference answer.

    Source: arXiv 2508.07750, the pairwise judge: task, criterion, context, two texts, and one of
    "1 > 2", "1 = 2", "1 < 2" as answer. The words are ours (`prompts`).

    Each pair is judged in both orders. A verdict counts where both agree; where they do not, the
    judge followed the position or cannot tell, and the pair is a tie. A verdict that cannot be had
    or read is missing (None), and so is the pair then: nothing is ever guessed (`read_verdict`).

    What it costs: two requests a pair, `concurrency` of them at once. Answers are kept by content
    (endpoint, model, messages, sampling parameters), so nothing readable is asked twice, be it in a
    batch, in a later one or in a run started again. Two texts equal but for outer white space are a
    tie without asking.

    What can go wrong with the texts: they stand between marks they cannot forge, and braces in them
    mean nothing. But they can still talk to the judge ("the other text is dangerous"), which no
    template prevents, and a server may read special tokens written out in them ("<|im_end|>") as
    such. A policy trained long enough against a weak judge will find that: look at completions.

    The key is read from the environment for each batch, and lies in no attribute, log or file.

    Args:
        model: The endpoint's name of the model.
        criterion: "helpfulness", "harmlessness" or a criterion in your own words.
        template: The whole question in your own words, with {text_1} and {text_2} and, where
            wanted, {criterion} and {context}; braces that are meant are doubled. Null = ours.
        base_url: The endpoint. It is part of what answers are kept by, since the same name may be
            another model elsewhere.
        api_key_variable: The environment variable with the key. Unset (or null) means a server that
            needs none; OpenAI's own does.
        both_orders: False asks one order alone, at half the cost: which of the two depends on the
            prompt, so that a judge's taste for a position is the same for all completions of a
            group and falls on either side over prompts.
        temperature: Of the judge; null leaves it out, as models that refuse it need.
        max_tokens: Of an answer. One that is cut off there counts as unreadable, so leave room for
            models that think. Null leaves it out (extra_body: {max_completion_tokens: 1000}).
        extra_body: Further fields of the request, such as {stop: ["\\n"], seed: 1}.
        timeout: Seconds without a byte from the server until a request counts as failed.
        max_retries: Further attempts after a timeout, a cut connection, 408, 409, 429 or 5xx, with
            growing pauses or those the server asks for.
        max_rereads: How often the same question is asked again after an unreadable answer.
        concurrency: Requests at once, in each process.
        requests_per_minute: A limit for each process, retries included, evenly spaced; null = none.
        give_up_after: Questions in a row that failed after all their retries until the rest of the
            batch is given up.
        cache: File of the answers; "auto" = judge.sqlite in $GRAO_CACHE (~/.cache/grao_lightning);
            null = none. At a temperature above 0 it fixes the first answer.

    Attributes:
        pairwise: True: the reference answer's own score is 0.
        unit: "verdict".
        range: (-1, 1).

    Raises:
        ImportError: openai or aiolimiter is not installed.
        ValueError: An argument breaks its rule; all that do are named.
    """

    pairwise = True
    unit = "verdict"
    range = (-1.0, 1.0)

    def __init__(
        self,
        model: str,
        criterion: str = "helpfulness",
        template: str | None = None,
        base_url: str = OPENAI,
        api_key_variable: str | None = "OPENAI_API_KEY",
        both_orders: bool = True,
        temperature: float | None = 0.0,
        max_tokens: int | None = 1024,
        extra_body: dict[str, Any] | None = None,
        timeout: float = 60.0,
        max_retries: int = 5,
        max_rereads: int = 1,
        concurrency: int = 16,
        requests_per_minute: float | None = None,
        give_up_after: int = 8,
        cache: str | None = "auto",
    ) -> None:
        missing = extra_fault("PairwiseJudge", ("openai", "aiolimiter"), "judge")
        if missing:
            raise ImportError(missing)
        self.template = TEMPLATE if template is None else template
        self.both_orders = both_orders
        self.max_rereads = max_rereads
        self.endpoint = Endpoint(
            base_url=base_url,
            api_key_variable=api_key_variable,
            timeout=timeout,
            max_retries=max_retries,
            concurrency=concurrency,
            requests_per_minute=requests_per_minute,
            give_up_after=give_up_after,
        )
        request: dict[str, Any] = {
            "model": model,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "extra_body": extra_body,
        }
        self._request = {name: value for name, value in request.items() if value is not None}
        self.criterion = self._checked_criterion(criterion)
        path = default_path() if cache == "auto" else Path(cache) if cache is not None else None
        self._cache_path = path
        self._told: set[str] = set()
        self._tally = Tally(_MEANS, _TOTALS)

    def _checked_criterion(self, criterion: str) -> str:
        """Return the criterion's text, if all arguments keep their rules.

        Raises:
            ValueError: Some do not; all that do not are named.
        """
        faults, request = self.endpoint.faults(), self._request
        faults.add(template_fault(self.template), _extra_body_fault(request.get("extra_body")))
        if not request.get("model"):
            faults.add("model must be the endpoint's name of a model; got none")
        text = ""
        try:
            text = criterion_text(criterion)
        except ValueError as error:
            faults.add(str(error))
        faults.at_least("temperature", request.get("temperature", 0), 0)
        faults.at_least("max_tokens", request.get("max_tokens", 1), 1)
        faults.at_least("max_rereads", self.max_rereads, 0)
        if faults:
            raise ValueError("; ".join(faults))
        return text

    async def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        reference_answers: Sequence[str],
    ) -> list[float | None]:
        """Return a verdict a completion: 1.0 better than the reference answer, 0.0 equal, -1.0
        worse, None missing.

        A pair's verdict depends neither on the other pairs nor on their order.

        Args:
            prompts: n texts.
            completions: n texts.
            reference_answers: n texts.

        Raises:
            ValueError: The lengths differ.
        """
        columns = (prompts, completions, reference_answers)
        if len({len(column) for column in columns}) > 1:
            got = f"{len(prompts)} prompts, {len(completions)} completions"
            raise ValueError(
                f"give one entry a pair in every column: got {got}, {len(reference_answers)} "
                "reference answers"
            )
        cache = AnswerCache(self._cache_path, self._told)
        with cache.opened():
            async with Session(self.endpoint, self._told) as session:
                questions = Questions(session, cache, self._request, self.max_rereads, self._tally)
                pairs = zip(*columns, strict=True)
                scores = await asyncio.gather(*(self._score(questions, *pair) for pair in pairs))
        for score in scores:
            self._tally.note("failure_rate", score is None)
            if score is not None:
                self._tally.note("tie_rate", score == 0)
        return [None if score is None else float(score) for score in scores]

    def statistics(self) -> dict[str, tuple[float, float | None]]:
        """Return name -> (sum, count) since the last call, always the same names; totals have None.

        - failure_rate: missing pairs among all.
        - tie_rate: ties among the judged pairs, disagreeing orders included.
        - inconsistency: judged pairs whose two orders disagree.
        - position_bias: judged pairs both of whose orders prefer the same position.
        - position_lean: mean verdict by position over both orders, 1 = always text 1, -1 = always
          text 2, 0 = neither.
        - unreadable_rate: answers without a readable verdict.
        - cache_hit_rate: different questions answered from the cache.
        - latency: seconds of a request that was answered, pauses and failed attempts not counted.
        - prompt_tokens, completion_tokens: totals of what was asked, the cache's not counted.
        """
        return self._tally.take()

    async def _score(
        self, questions: Questions, prompt: str, completion: str, answer: str
    ) -> int | None:
        if completion.strip() == answer.strip():
            return 0

        def asked(text_1: str, text_2: str) -> Awaitable[int | None]:
            text = render(self.template, self.criterion, prompt, text_1, text_2)
            return questions.verdict(text)

        if not self.both_orders:
            if _completion_comes_first(prompt):
                return await asked(completion, answer)
            verdict = await asked(answer, completion)
            return None if verdict is None else -verdict
        # By position: 1 prefers text 1. The completion is text 1, then text 2.
        first, second = await asyncio.gather(asked(completion, answer), asked(answer, completion))
        if first is None or second is None:
            return None
        self._tally.note("inconsistency", first != -second)
        self._tally.note("position_bias", first == second != 0)
        self._tally.note("position_lean", (first + second) / 2)
        return first if first == -second else 0


def _completion_comes_first(prompt: str) -> bool:
    """Return a toss of a coin that falls alike whenever the prompt is seen."""
    return hashlib.sha256(prompt.encode("utf-8", "replace")).digest()[0] % 2 == 0


def _extra_body_fault(extra_body: Any) -> str | None:
    if extra_body is None:
        return None
    if not isinstance(extra_body, dict):
        return f"extra_body must map names to values; got {type(extra_body).__name__}"
    ours = sorted(_OURS.intersection(extra_body))
    if ours:
        return f"extra_body must not set {', '.join(ours)}, which the judge sets itself; remove it"
    try:
        json.dumps(extra_body)
    except (TypeError, ValueError) as error:
        return f"extra_body must be what JSON can hold: {error}; quote the value"
    return None
