"""Writes docs/architectures.md from the tables of the tests.

python -m tests.language_model.architectures_page
"""

from pathlib import Path

from tests.language_model.architectures import ARCHITECTURES, FURTHER
from tests.language_model.test_architectures import FURTHER_REFUSED, REFUSED

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"

#: Heading of each column -> the architectures that share no prompts there, and why.
COLUMNS = {"training": REFUSED | FURTHER_REFUSED}

_INTRODUCTION = """# Architectures

What is read of a prompt that several answers follow, by the model's architecture, as tiny random
models of `transformers` {version} show in the tests. *shared*: it is read once. *exact, slower*:
every answer reads its own copy, for the reason that the log gives. In training either way gives
the log-probabilities and gradients that the model's own forward pass gives for each row alone. A
name with a comma is a family with a setting of its own: windows that a published model has, long
texts, all layers full. A setting decides for every family: a sliding window, dropout of attention,
another `attn_implementation` or an adapter on the head make it slower, and the log says so.

Written by `python -m tests.language_model.architectures_page`.
"""


def page() -> str:
    """Return the page."""
    import transformers

    lines = [
        _INTRODUCTION.format(version=".".join(transformers.__version__.split(".")[:2])),
        f"| architecture | {' | '.join(COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
    ]
    for name in sorted(ARCHITECTURES | FURTHER):
        told = [refused.get(name) for refused in COLUMNS.values()]
        cells = ["shared" if reason is None else f"exact, slower: {reason}" for reason in told]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
