"""Texts whose quality is written in them, and a judge that reads it: what is true is known."""

import asyncio
import random
import re
from typing import Any

from grao_lightning.rewards.judge import PairwiseJudge
from tests.rewards.judge.scripted_server import Question, Reply, ScriptedServer

Pair = tuple[str, str, str]  # prompt, completion, reference answer


def quality(text: str) -> int:
    """Return the number after the word quality."""
    found = re.search(r"quality (\d+)", text)
    assert found, text
    return int(found[1])


def better(left: str, right: str) -> int:
    """Return 1, 0 or -1: the left text is better, equal or worse."""
    return (quality(left) > quality(right)) - (quality(left) < quality(right))


def honest(question: Question) -> Reply:
    """Reply what is true."""
    return Reply({1: "1 > 2", 0: "1 = 2", -1: "1 < 2"}[better(*question.texts)])


def pairs(number: int, seed: int = 0) -> list[Pair]:
    """Return pairs of different texts."""
    draw = random.Random(seed)
    return [
        (
            f"\n\nHuman: question {i} of {seed}\n\nAssistant:",
            f" completion {i} of quality {draw.randrange(4)}",
            f" answer {i} of quality {draw.randrange(4)}",
        )
        for i in range(number)
    ]


def judge_of(server: ScriptedServer, **arguments: Any) -> PairwiseJudge:
    """Return a judge that asks a server and keeps nothing, if not told otherwise."""
    return PairwiseJudge(
        **{"model": "scripted", "base_url": server.base_url, "cache": None, **arguments}
    )


def judged(judge: PairwiseJudge, asked: list[Pair]) -> list[float | None]:
    """Return the verdicts on pairs."""
    prompts, completions, answers = (list(column) for column in zip(*asked, strict=True))
    return asyncio.run(judge(prompts=prompts, completions=completions, reference_answers=answers))
