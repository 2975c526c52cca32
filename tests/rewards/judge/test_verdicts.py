import html
import re

import pytest

from grao_lightning.rewards.judge.prompts import CRITERIA, TEMPLATE, render
from grao_lightning.rewards.judge.verdicts import read_verdict

FIRST = [
    "1 > 2",
    "1>2",
    "2 < 1",
    "  1 > 2 \n",
    '"1 > 2"',
    "'1 > 2'.",
    "“1 > 2”",
    "`1 > 2`",
    "```\n1 > 2\n```",
    "**1 > 2**",
    "**Answer:** 1 > 2.",
    "Answer: 1 > 2.",
    "The final answer is: 1 > 2",
    "\\boxed{1 > 2}",
    "$1 > 2$",
    "\uff11 \uff1e \uff12",
    "1 &gt; 2",
    "2 &lt; 1",
    "Text 1 > Text 2",
    "1 > 2 (text 1 is better)",
    "- 1 > 2",
    '{"verdict": "1 > 2"}',
    "<answer>1 > 2</answer>",
    "1 > 2</s>",
    "1 > 2<|im_end|>",
    "<think>1 < 2? No.</think>1 > 2",
    "1 < 2, I thought at first.</think>\n\n1 > 2",
    "<thinking>\n1 = 2\n</thinking>\n1 > 2",
    "At first I thought that 1 < 2 was right.\nBut text 2 is rude.\n\n1 > 2",
    "Text 1 declines, text 2 has 2 < 3 reasons.\n\nVerdict: 1 > 2",
    "1 > 2\n\nText 1 is kinder.",
    "1 > 2, because text 1 is kinder.",
    "1 > 2 — text 1 is kinder.",
    "1 > 2\n1 > 2",
]
UNREADABLE = [
    "",
    " \n ",
    "Text 1 is better.",
    "1",
    "1 > ",
    "> 2",
    "1 > 1",
    "1 >= 2",
    "1 >> 2",
    "1 <> 2",
    "1 > 2 > 3",
    "1 > 2 = 1",
    "1 > 2.5",
    "1 > 25",
    "11 > 2",
    "3.1 > 2",
    "1 > 2 or 1 < 2",
    "1 > 2\n1 = 2\n1 < 2",
    "1 > 2\nNo, wait:\n1 < 2",
    "1 > 2\n\nOn reflection 1 < 2.",
    "1 > 2. That said, 1 = 2 is fair too.",
    "1 > 2 (text 2 is better)",
    "1 > 2 is wrong",
    "1 > 2?",
    "I cannot say that 1 > 2",
    "My answer is not 1 > 2",
    "Some would say:\n1 > 2\nbut I do not judge.",
    'I was asked for one of "1 > 2", "1 = 2", "1 < 2".',
    "<think>so 1 > 2",
    "1 > 2 <think> or is it",
    "<think>1 > 2</think>",
    "<think>a</think><think>1 > 2",
    "\x00\xff\ufffd",
    "<html><body>502 Bad Gateway</body></html>",
]


@pytest.mark.parametrize("answer", FIRST)
def test_a_stated_verdict_is_read_whatever_its_dress(answer):
    assert read_verdict(answer) == 1


@pytest.mark.parametrize("answer", [answer for answer in FIRST if not re.search("</|<.*>", answer)])
def test_the_mirrored_answer_is_read_as_the_opposite(answer):
    text = html.unescape(answer).replace("text 1 is", "text 2 is")
    assert read_verdict(text.translate(str.maketrans("<>\uff1e", "><\uff1c"))) == -1


@pytest.mark.parametrize("answer", ["1 = 2", "2 = 1", "1 == 2", "**1\uff1d2**", "Answer: 1 = 2."])
def test_a_tie_is_read(answer):
    assert read_verdict(answer) == 0


@pytest.mark.parametrize("answer", UNREADABLE)
def test_what_states_none_or_two_is_unreadable(answer):
    assert read_verdict(answer) is None


def test_no_question_reads_as_a_verdict():
    # A judge that repeats what it was asked has not judged.
    for criterion in CRITERIA.values():
        question = render(TEMPLATE, criterion, "Human: hi", "1 > 2", "Answer: 1 > 2")
        assert read_verdict(question) is None


def test_a_long_answer_is_read_in_no_time():
    for filler in ("1 > ", "<think>", "</think>", "answer ", "< ", "(", "the final "):
        assert read_verdict(filler * 20_000) is None
