"""Writes docs/architectures.md from the tables of the tests.

python -m tests.language_model.architectures_page
"""

from pathlib import Path

from tests.language_model.architectures import ARCHITECTURES, FURTHER
from tests.language_model.test_architectures import FURTHER_REFUSED, REFUSED
from tests.sampling import test_architectures as sampling

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"

#: Heading of each column -> what is said of the architectures that share no prompts there.
COLUMNS = {
    "training": {
        name: f"exact, slower: {reason}" for name, reason in (REFUSED | FURTHER_REFUSED).items()
    },
    "sampling": {name: way.name for way, names in sampling.WAYS.items() for name in names}
    | {name: f"refused: {reason}" for name, reason in sampling.REFUSED.items()}
    | {name: "one at a time, by its own `generate` alone" for name in sampling.TOLD},
}

_INTRODUCTION = """# Architectures

What is read of a prompt that several answers follow, by the model's architecture, as tiny random
models of `transformers` {version} show in the tests. *shared*: it is read once. *exact, slower*:
every answer reads its own copy, for the reason that the log gives. In training either way gives
the log-probabilities and gradients that the model's own forward pass gives for each row alone. In
sampling every way gives the tokens of the model's own `generate` for each row alone; where that
`generate` differs from the forward pass the log says so, and where it fails the model is refused. A
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
        cells = [told.get(name, "shared") for told in COLUMNS.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
