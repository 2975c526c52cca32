"""What the tests of shipped reward functions share: texts of every kind, and a real model."""

import os
import random

import pytest

# Latin with accents apart and together, Chinese, Arabic, emoji of several code points, control
# characters, no-break and zero-width space.
_ALPHABET = [
    *"aA1.,!?-$ \n\t",
    "é",
    "e\u0301",
    "你",
    "م",
    "👩\u200d🔬",
    "\x00",
    "\u00a0",
    "\u200b",
    "ß",
]
ODD = [
    *("", " ", "\n\n", "a", "...", "你好世界", "word " * 300, "x" * 3000),
    *("You stupid idiot.", "Thank you for your help.", "I am glad of it, so glad of it."),
]


def random_texts(number: int) -> list[str]:
    """Return the same texts every time, of 0 to 40 characters."""
    draw = random.Random(0)
    return ["".join(draw.choices(_ALPHABET, k=draw.randrange(41))) for _ in range(number)]


def minilm_folder() -> str:
    """Return the folder of all-MiniLM-L6-v2, or skip the test."""
    pytest.importorskip("sentence_transformers")
    folder = os.environ.get("GRAO_TEST_MINILM")
    if not folder:
        pytest.skip("GRAO_TEST_MINILM is not set: a folder of all-MiniLM-L6-v2")
    return folder
