"""The keyword task: repeat four words in order, add nothing, stop.

Reference answers are imperfect on purpose (mean score about .71, best .93), so that a policy can
exceed them: they drop a word, swap neighbours and add fillers.
"""

import random
from typing import Any

from grao_lightning.faults import UserError

KEYWORDS = [
    "apple",
    "bridge",
    "candle",
    "desert",
    "engine",
    "forest",
    "garden",
    "harbor",
    "island",
    "jacket",
    "kettle",
    "lantern",
    "meadow",
    "needle",
    "orchard",
    "pepper",
    "quarry",
    "river",
    "saddle",
    "temple",
    "umbrella",
    "valley",
    "window",
    "yarn",
]
FILLERS = ["well", "please", "kindly", "perhaps", "really", "indeed", "sure", "okay"]
KEYWORDS_PER_PROMPT = 4
MAX_ANSWER_TOKENS = 12  # the end-of-sequence token included

_SPLITS = {"train": (4096, 1), "validation": (256, 9999)}  # rows, seed


def keyword_rows(split: str) -> list[dict[str, Any]]:
    """Return the rows of a split as conversational preference data with a ``keywords`` column.

    Args:
        split: "train" (4096 rows) or "validation" (256 rows); a pure function of its name.

    Raises:
        UserError: There is no such split.
    """
    if split not in _SPLITS:
        raise UserError(f"embedded:keywords has splits {', '.join(_SPLITS)}; got {split!r}")
    num_rows, seed = _SPLITS[split]
    rng = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        keywords = rng.sample(KEYWORDS, KEYWORDS_PER_PROMPT)
        rows.append(
            {
                "prompt": [{"role": "user", "content": " ".join(keywords)}],
                "chosen": [{"role": "assistant", "content": _answer(keywords, rng)}],
                "rejected": [{"role": "assistant", "content": _bad_answer(keywords, rng)}],
                "keywords": " ".join(keywords),
            }
        )
    return rows


def keyword_score(
    completions: list[str], truncated: list[bool], keywords: list[str], **_: Any
) -> list[float]:
    """Return the score of each completion in [0, 1].

    .4 share of keywords present + .3 longest common subsequence with the keywords / 4 + .3
    max(0, 1 - extra words / 4), the last only for an answer that ended by itself and has a keyword.

    Args:
        completions: n texts of words.
        truncated: n flags, True where the length limit ended the completion.
        keywords: n texts of the wanted words.

    Example:
        All there, in order, one filler too many: .4 + .3 + .3 * .75.

        >>> round(*keyword_score(["well river desert"], [False], ["river desert"]), 6)
        0.925
    """
    return [
        _score(completion.split(), wanted.split(), not cut)
        for completion, cut, wanted in zip(completions, truncated, keywords, strict=True)
    ]


def _score(words: list[str], wanted: list[str], ended: bool) -> float:
    num_hits = len(set(words) & set(wanted))
    brevity = max(0.0, 1 - 0.25 * (len(words) - num_hits)) if ended and num_hits else 0.0
    coverage, order = num_hits / len(wanted), _longest_common_subsequence(words, wanted)
    return 0.4 * coverage + 0.3 * order / len(wanted) + 0.3 * brevity


def _longest_common_subsequence(left: list[str], right: list[str]) -> int:
    best = [0] * (len(right) + 1)
    for word in left:
        previous = best[:]
        for position, other in enumerate(right):
            best[position + 1] = (
                previous[position] + 1
                if word == other
                else max(previous[position + 1], best[position])
            )
    return best[-1]


def _answer(keywords: list[str], rng: random.Random) -> str:
    words = keywords[:]
    if rng.random() < 0.6:
        words.pop(rng.randrange(len(words)))
    return _disturbed(words, rng, swap_probability=0.5, num_fillers=rng.choice([1, 2, 3]))


def _bad_answer(keywords: list[str], rng: random.Random) -> str:
    words = keywords[:]
    for _ in range(rng.choice([1, 2, 2, 3])):
        words.pop(rng.randrange(len(words)))
    return _disturbed(words, rng, swap_probability=0.7, num_fillers=rng.choice([2, 3, 4]))


def _disturbed(
    words: list[str], rng: random.Random, *, swap_probability: float, num_fillers: int
) -> str:
    if len(words) > 1 and rng.random() < swap_probability:
        left = rng.randrange(len(words) - 1)
        words[left], words[left + 1] = words[left + 1], words[left]
    for _ in range(num_fillers):
        words.insert(rng.randrange(len(words) + 1), rng.choice(FILLERS))
    return " ".join(words)
