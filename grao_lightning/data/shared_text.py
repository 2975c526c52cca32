"""Two texts that begin alike -> the question they share, and the answer of each."""

from __future__ import annotations

import re

from grao_lightning.data.turns import DropError

PROMPTS_DIFFER = "prompts differ between chosen and rejected"
CHOSEN_EQUALS_REJECTED = "chosen equals rejected"
NO_BOUNDARY = (
    "nothing tells where the texts' shared question ends and the answers begin (add a column "
    "prompt, or a line break between them)"
)
CUT_AT_A_TURN = "question cut from texts at the last marker of an answer they share"
CUT_AT_A_LINE = "question cut from texts at the last line break they share"

#: What a writer puts before an answer, such as "A:" or "### Response:".
_ANSWER = re.compile(
    r"(?:^|(?<=\s))(?:#+[ ]*)?(?:a|ans|answer|assistant|response|reply|bot|ai|output|gpt|model)"
    r"[ ]*:(?=\s|\Z)",
    re.IGNORECASE,
)


def split_shared(oddities: set[str], chosen: str, rejected: str) -> tuple[str, str, str]:
    """Returns the question two texts share at their start, and what follows in each.

    Answers may begin alike too, so the question ends at the last boundary within what is shared:
    the marker of an answer, or else a line break.

    Raises:
        DropError: The texts are equal, share nothing, or share no boundary.
    """
    if chosen == rejected:
        raise DropError(CHOSEN_EQUALS_REJECTED)
    pairs = enumerate(zip(chosen, rejected, strict=False))
    end = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    shared = chosen[:end]
    if not shared.strip():
        raise DropError(PROMPTS_DIFFER)
    # A marker must be whole in both texts: what follows it is looked at too.
    markers = [m for m in _ANSWER.finditer(chosen) if m.end() <= end]
    markers = [m for m in markers if not rejected[m.end() : m.end() + 1].strip()]
    if markers:
        oddities.add(CUT_AT_A_TURN)
        cut = markers[-1].end()
    elif shared[: shared.rfind("\n") + 1].strip():
        oddities.add(CUT_AT_A_LINE)
        cut = len(shared[: shared.rindex("\n")].rstrip())
    else:
        raise DropError(NO_BOUNDARY)
    return chosen[:cut], chosen[cut:], rejected[cut:]
