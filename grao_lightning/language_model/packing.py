"""Rows that share prompts -> one sequence in which every prompt stands once. Pure: torch only.

A pack is ``[prompt, branch_1 .. branch_n, next prompt, ...]``. A branch is an answer without its
last token, which predicts nothing; positions restart after the prompt for each of them. Shapes: S
tokens of the pack, K answer tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from grao_lightning.batch import TokenIds, TokenRow


@dataclass(frozen=True)
class Segment:
    """One prompt and its branches in a pack.

    Attributes:
        start: Position of the prompt's first token.
        prompt_length: Tokens of the prompt.
        branch_lengths: Tokens of each branch; none is 0.
    """

    start: int
    prompt_length: int
    branch_lengths: tuple[int, ...]

    @property
    def branches_start(self) -> int:
        """Return the position of the first branch's first token."""
        return self.start + self.prompt_length

    @property
    def end(self) -> int:
        """Return the position behind the last branch."""
        return self.branches_start + sum(self.branch_lengths)


@dataclass(frozen=True)
class Pack:
    """Rows packed by prompt.

    Attributes:
        ids: [S] tokens.
        positions: [S] position of each token in its own row.
        segments: One a prompt.
        sources: [K] position in the pack that predicts each answer token, row by row.
        targets: [K] the answer tokens, row by row.
        rows: [K] number of the row each answer token belongs to, in the order of the rows given.
        lengths: [R] answer tokens of each row.
        weights: [S] of each token where prompts have weights: of a prompt the sum of its rows', of
            an answer 1, 0 for a row's last token.
    """

    ids: Tensor
    positions: Tensor
    segments: tuple[Segment, ...]
    sources: Tensor
    targets: Tensor
    rows: Tensor
    lengths: Tensor
    weights: Tensor

    def mask(self) -> Tensor:
        """Return who sees whom, [S, S] bool, True = sees: the tree as a dense mask."""
        mask = torch.zeros(len(self.ids), len(self.ids), dtype=torch.bool)
        for segment in self.segments:
            start, first = segment.start, segment.branches_start
            mask[start : segment.end, start:first] = True
            mask[start:first, start:first].tril_()
            for length in segment.branch_lengths:
                mask[first : first + length, first : first + length] = torch.ones(
                    length, length, dtype=torch.bool
                ).tril()
                first += length
        return mask

    def padded(self, multiple: int) -> "Pack":
        """Return the pack with so many tokens more that S is a multiple; they predict nothing.

        They are a prompt of their own, so that no other token sees them.
        """
        room = -len(self.ids) % multiple
        if not room:
            return self
        return replace(
            self,
            ids=F.pad(self.ids, (0, room)),
            positions=F.pad(self.positions, (0, room)),
            weights=F.pad(self.weights, (0, room)),
            segments=(*self.segments, Segment(len(self.ids), room, ())),
        )

    def labels(self) -> tuple[Tensor, Tensor]:
        """Return of every token its segment and its branch, [S] long; 0 is the prompt's branch.

        A token sees those at or before it in its segment that are of the prompt or its own branch.
        """
        lengths = [(part.prompt_length, *part.branch_lengths) for part in self.segments]
        segment = torch.arange(len(lengths)).repeat_interleave(
            torch.tensor([sum(parts) for parts in lengths])
        )
        branch = torch.tensor([number for parts in lengths for number in range(len(parts))])
        sizes = torch.tensor([length for parts in lengths for length in parts])
        return segment, branch.repeat_interleave(sizes)


def pack_rows(
    rows: Sequence[TokenRow],
    *,
    longest_whole: bool = False,
    shares: Sequence[float] | None = None,
) -> Pack:
    """Return the pack of rows, those with equal prompts behind one copy of it.

    Args:
        rows: Prompts with their answers.
        longest_whole: Whether the longest row keeps its last token, so that a model that goes by
            the longest text of a pass sees how long it is.
        shares: [R] weight of each row's prompt; None: 1.
    """
    shares = [1.0] * len(rows) if shares is None else shares
    whole = max(range(len(rows)), key=lambda number: len(rows[number])) if longest_whole else None
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(rows):
        by_prompt.setdefault(tuple(row.prompt_ids), []).append(number)
    ids: TokenIds = []
    positions: list[int] = []
    weights: list[float] = []
    segments: list[Segment] = []
    sources: list[list[int]] = [[] for _ in rows]
    for prompt, numbers in by_prompt.items():
        start, length = len(ids), len(prompt)
        ids += prompt
        positions += range(length)
        weights += [sum(shares[number] for number in numbers)] * length
        lengths = []
        for number in numbers:
            answer = rows[number].answer_ids
            branch = answer if number == whole else answer[:-1]
            sources[number] = [start + length - 1, *range(len(ids), len(ids) + len(answer) - 1)]
            ids += branch
            positions += range(length, length + len(branch))
            weights += [float(at < len(answer) - 1) for at in range(len(branch))]
            lengths.append(len(branch))
        segments.append(Segment(start, length, tuple(n for n in lengths if n)))
    row_lengths = torch.tensor([len(row.answer_ids) for row in rows])
    return Pack(
        ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        segments=tuple(segments),
        sources=torch.tensor([position for part in sources for position in part]),
        targets=torch.tensor([token for row in rows for token in row.answer_ids]),
        rows=torch.arange(len(rows)).repeat_interleave(row_lengths),
        lengths=row_lengths,
        weights=torch.tensor(weights),
    )


def split_into_packs(
    rows: Sequence[TokenRow], numbers: Sequence[int], budget: int
) -> list[list[int]]:
    """Return row numbers in packs of at most ``budget`` tokens, rows of one prompt side by side.

    A group larger than the budget is spread over several packs, each with its own copy of the
    prompt; a row larger than the budget makes a pack of its own.

    Args:
        rows: All rows.
        numbers: Those that are wanted.
        budget: Most tokens of a pack.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for number in numbers:
        by_prompt.setdefault(tuple(rows[number].prompt_ids), []).append(number)
    packs: list[list[int]] = []
    free = 0
    for prompt, members in by_prompt.items():
        whole = len(prompt) + sum(len(rows[number].answer_ids) - 1 for number in members)
        fresh = whole > free  # a prompt is not paid for twice where a new pack spares that
        for number in members:
            branch = len(rows[number].answer_ids) - 1
            prompt_here = (
                bool(packs) and not fresh and rows[packs[-1][-1]].prompt_ids == list(prompt)
            )
            needed = branch + (0 if prompt_here else len(prompt))
            if fresh or not packs or needed > free:
                packs.append([])
                free = budget
                needed = branch + len(prompt)
            packs[-1].append(number)
            free -= needed
            fresh = False
    return packs


def own_budget(longest: int, device_type: str) -> int:
    """Return the most tokens of a micro-batch where none is asked for.

    On a CPU 1,024 tokens are nearly as fast as more (measured, see docs/benchmarks.md); other
    devices are busy only with many (not measured). Twice the longest row, since in packs shorter
    than that most of what is read is prompts, read over and over.

    Args:
        longest: Tokens of the longest row.
        device_type: Such as "cpu".
    """
    return max(1024 if device_type == "cpu" else 8192, 2 * longest)


def riders(rows: Sequence[TokenRow], needs_gradient: Sequence[bool]) -> set[int]:
    """Return the rows without gradient that are cheaper in the pack of their prompt's other rows.

    In there a token costs a backward pass, twice a forward pass, which it does not need; apart,
    the prompt is read once more.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(rows):
        by_prompt.setdefault(tuple(row.prompt_ids), []).append(number)
    carried: set[int] = set()
    for prompt, members in by_prompt.items():
        without = [number for number in members if not needs_gradient[number]]
        extra = 2 * sum(len(rows[number].answer_ids) - 1 for number in without)
        if len(without) < len(members) and extra < len(prompt):
            carried.update(without)
    return carried
