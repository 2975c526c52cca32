"""Regular expressions that cannot hang a training run."""

import warnings
from collections.abc import Callable
from typing import Any

import regex

from grao_lightning.faults import Faults


class Pattern:
    """A regular expression whose search of one text ends after a time.

    ``(a|a)+`` can be read in 2^60 ways on sixty letters a, and where it does not match a policy's
    text in the end, all of them are tried. The package ``regex`` (which transformers brings) reads
    the syntax of ``re``, avoids most of such work and can give up on the rest.

    Args:
        setting: The argument's name, for messages.
        expression: In the syntax of ``re``.
        timeout: Seconds for one text; give many times what the pattern needs, since a result that
            hangs on the machine's speed cannot be repeated.
        faults: Where faults of the two are noted.

    Attributes:
        groups: How many groups the expression has.
    """

    def __init__(self, setting: str, expression: str, timeout: float, faults: Faults) -> None:
        self._setting, self._expression, self._timeout = setting, expression, timeout
        self._warned = False
        self.groups = 0
        if not timeout > 0:
            faults.add(f"timeout must be > 0 seconds; got {timeout}")
        if not expression:
            faults.add(f"{setting} must be a regular expression; got none: it matches every text")
        try:
            self._compiled = regex.compile(expression)
            self.groups = self._compiled.groups
        except regex.error as error:
            faults.add(
                f"{setting} must be a regular expression; got {expression!r}: {error}; a character "
                "that is meant itself, such as ( or +, needs a backslash before it"
            )

    def matches(self, text: str, *, whole: bool) -> bool | None:
        """Return whether the expression matches a text, None if that took too long.

        Args:
            text: What is searched.
            whole: The expression must cover all of it, not a part.
        """
        method = self._compiled.fullmatch if whole else self._compiled.search
        found = self._in_time(lambda: [method(text, timeout=self._timeout)], text)
        return None if found is None else found[0] is not None

    def last_match(self, text: str) -> str | None:
        """Return what the last match covers, or its group if there is one; None if too slow.

        Args:
            text: What is searched.

        Returns:
            An empty text where nothing matches.
        """
        found = self._in_time(
            lambda: list(self._compiled.finditer(text, timeout=self._timeout)), text
        )
        if found is None:
            return None
        return (found[-1].group(min(1, self.groups)) or "") if found else ""

    def _in_time(self, search: Callable[[], list[Any]], text: str) -> list[Any] | None:
        try:
            return search()
        except TimeoutError:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"{self._setting} {self._expression!r} took more than {self._timeout} s on a "
                    f"text of {len(text)} characters, whose score is missing: make sure that it "
                    "can match a text in one way only, unlike (a|a)+",
                    stacklevel=2,
                )
            return None
