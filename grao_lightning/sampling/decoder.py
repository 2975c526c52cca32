"""What a way of decoding takes and gives: the one contract of both paths."""

from collections.abc import Sequence
from typing import Any, Protocol

from grao_lightning.batch import TokenIds
from grao_lightning.sampling.draw import Draw, Ended, Progress


class Decoder(Protocol):
    """Completes groups; see `shared_prompt.decode_groups` and `generate.generate_rows`."""

    def __call__(
        self,
        model: Any,
        prompts: Sequence[TokenIds],
        group_size: int,
        max_new_tokens: int,
        draw: Draw,
        ended: Ended,
        report: Progress,
    ) -> list[TokenIds]:
        """Return G completions of every prompt, prompt-major, without gradients.

        Args:
            model: In evaluation mode.
            prompts: B prompts, none of them empty.
            group_size: G.
            max_new_tokens: Longest completion.
            draw: (row numbers [N], position, logits [N, V]) -> tokens [N].
            ended: (row number, its tokens) -> whether it is over after its newest token.
            report: Told after each position; no row runs on after the last.
        """
        ...
