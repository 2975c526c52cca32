"""What the commands print of the many things that libraries log."""

import logging
import textwrap


def configure_logging() -> None:
    """Print our own notes plainly, and of other libraries what a user can do something about."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "datasets", "transformers", "absl"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it prints its warnings itself
    drop_needless_notes()


def show_notes() -> None:
    """Print our own notes in a program that has set up no logging, as Lightning does with its own.

    Such as how prompts become tokens, which nothing else tells.
    """
    ours = logging.getLogger(__name__.partition(".")[0])
    if not ours.hasHandlers():
        ours.addHandler(logging.StreamHandler())
        ours.setLevel(logging.INFO)
        ours.propagate = False  # a later `basicConfig` would print them twice


def drop_needless_notes() -> None:
    """Leave out an advertisement, and in the middle of the bar what the table says too."""
    needless = ("Tip: For seamless", "`Trainer.fit` stopped: `max_steps=")
    notes = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if not notes.filters:
        notes.addFilter(lambda record: not any(part in record.getMessage() for part in needless))


def wrapped(text: str) -> str:
    """Return a sentence in lines that fit a terminal of 80 columns."""
    return textwrap.fill(text, 79, break_long_words=False, break_on_hyphens=False)


def quoted(label: str, text: str) -> str:
    """Return a text to the letter, below its label, in lines that fit a terminal of 80 columns.

    What cannot be seen, such as a line break, is written as Python writes it; marks show spaces at
    its ends.

    >>> print(quoted("answer", "Yes.\\n"))
      answer: "Yes.\\n"
    """
    shown, indent = f'"{_visible(text)}"', "    "
    if len(shown) < 74 - len(label):
        return f"  {label}: {shown}"
    wrapper = textwrap.TextWrapper(
        width=79,
        initial_indent=indent,
        subsequent_indent=indent,
        # Also the spaces at the end of a line are part of the text.
        drop_whitespace=False,
        replace_whitespace=False,
        expand_tabs=False,
        break_on_hyphens=False,
    )
    return "\n".join([f"  {label}:", *wrapper.wrap(shown)])


def _visible(text: str) -> str:
    return "".join(
        part if part.isprintable() and part != "\\" else part.encode("unicode_escape").decode()
        for part in text
    )
