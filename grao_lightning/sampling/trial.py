"""Which way of decoding is exact for a model: found by trial, the fastest that is.

Exact means: every token is drawn from the logits that the model's own forward pass gives for the
row by itself. Padding, a cache or a batch may change them in ways no configuration tells.
"""

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grao_lightning.batch import TokenIds
from grao_lightning.faults import UserError
from grao_lightning.language_model.attention import watched
from grao_lightning.language_model.head import head_obstacle
from grao_lightning.language_model.positions import (
    counts_positions_itself,
    forget_frequencies,
    frequencies_of,
)
from grao_lightning.language_model.sharded import device_of
from grao_lightning.language_model.sharing import (
    handed_wrongly,
    may_share,
    narrows,
    obstacle,
    our_attention,
    own_attention,
    shares_prompts,
)
from grao_lightning.sampling.ways import PADDED, SHARED, SINGLE, WAYS, Way, batches

log = logging.getLogger(__name__)

# After a longer prompt one of one token, which some models take for a step of decoding.
_PROMPT_LENGTHS = (7, 1)
_GROUP = 2
# Of the rows of both groups: one leaves after its first token, so that the groups become uneven.
_COMPLETION_LENGTHS = (1, 3, 3, 2)
#: Kinds of layers that count from a row's first token in blocks longer than the trial's rows
_COUNTING_LAYERS = {
    "compressed_sparse_attention",
    "heavily_compressed_attention",
    "indexed_attention",
    "minimax_m3_sparse",
    "reference_sliding_attention",
}


def way_of(model: Any, fastest: Way = SHARED) -> Way:
    """Return the fastest way of decoding that is exact for a model.

    Tried once a model, and again when its class, attention, head or device has changed.

    Args:
        model: In `completions.generation_mode`.
        fastest: Ways before this one are not considered.

    Raises:
        UserError: The model cannot be sampled from in any way.
    """
    device = device_of(model).type
    shares = may_share(model) and head_obstacle(model) is None
    key = (type(model), model.config._attn_implementation, device, shares, fastest.name)
    if not hasattr(model, "_grao_ways"):
        model._grao_ways = {}
    found: dict[Any, Way] = model._grao_ways
    if key not in found:
        found[key] = _try_ways(model, fastest)
    return found[key]


def decide_alike(model: Any, copy: Any) -> None:
    """Let what a trial finds for a model hold for its copy too, and the other way round.

    Args:
        model: As it was copied.
        copy: Of its class, with its weights.
    """
    model._grao_ways = copy._grao_ways = {}


def attention_of(model: Any, way: Way) -> AbstractContextManager[None]:
    """Give a model the attention of a way: ours where prompts are shared, else its own."""
    return our_attention(model) if way == SHARED else own_attention(model)


def forget_rows(model: Any, way: Way) -> None:
    """Make a model forget the rows before, as far as it remembers them outside of a cache."""
    forget_frequencies(model)
    if not way.mixes_lengths:  # RecurrentGemma keeps its state in its layers, and there too long
        one = torch.zeros(1, 1, dtype=torch.long, device=device_of(model))
        model(input_ids=one, use_cache=False)


@torch.no_grad()
def _try_ways(model: Any, fastest: Way) -> Way:
    # In full precision where the weights are; a run's autocast would hide a fault as rounding.
    with torch.autocast(device_of(model).type, enabled=False):
        rows = _rows_of_trial(model)
        reasons = []
        for way in WAYS[WAYS.index(fastest) :]:
            reason = _obstacle(model, way) or _disagreement(model, way, rows)
            if reason is None:
                break
            reasons.append(f"{way.name}: {reason}")
    _tell(model, fastest, way, reasons)
    return way


@dataclass(frozen=True)
class _Rows:
    """What a trial reads.

    Attributes:
        prompts: Two.
        completions: To be forced on the four rows.
        logits: [T, V] of each row, that its tokens are drawn from when it is read by itself.
    """

    prompts: list[TokenIds]
    completions: list[TokenIds]
    logits: list[Tensor]


def _rows_of_trial(model: Any) -> _Rows:
    """Return rows of ids from all over the vocabulary, and the logits of the model itself."""
    long, short = _PROMPT_LENGTHS
    # Both prompts ask for the same frequencies, where the limit of a tiny model is that low.
    while long > 2 and frequencies_of(model, long + 2) != frequencies_of(model, 1):
        long -= 1
    config = model.config.get_text_config().to_dict()
    size = model.get_input_embeddings().weight.shape[0]
    size = min(size, config.get("vocab_size") or size)  # some embed more than they predict
    special = {value for name, value in config.items() if name.endswith("token_id")}
    ordinary = [token for token in range(size) if token not in special] or list(range(size))
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> TokenIds:
        chosen = torch.randint(len(ordinary), (length,), generator=generator)
        return [ordinary[number] for number in chosen.tolist()]

    prompts = [draw(long), draw(short)]
    completions = [draw(length) for length in _COMPLETION_LENGTHS]
    with attention_of(model, SINGLE):
        logits = [
            _logits_by_itself(model, prompts[number // _GROUP], completion)
            for number, completion in enumerate(completions)
            if number
        ]
    # The first row's only token is drawn where the second row's first one is.
    return _Rows(prompts, completions, [logits[0][:1], *logits])


def _logits_by_itself(model: Any, prompt: TokenIds, completion: TokenIds) -> Tensor:
    """Return the logits [T, V] that a completion's tokens are drawn from, read without a cache."""
    forget_frequencies(model)
    row = torch.tensor([prompt + completion[:-1]], device=device_of(model))
    logits: Tensor = model(input_ids=row, use_cache=False).logits[0, -len(completion) :]
    return logits.cpu()


def _obstacle(model: Any, way: Way) -> str | None:
    """Return what is known to be in the way; rows as short as the trial's may not show it."""
    if way == SHARED:
        if not may_share(model):
            return "it was not asked for"
        if device_of(model).type != "cpu":
            return "its attention is for CPU, and none was checked on other devices"
        # Training has looked at the rest where it shares prompts.
        return head_obstacle(model) or (None if shares_prompts(model) else obstacle(model))
    config = model.config.get_text_config()
    counting = _COUNTING_LAYERS & set(getattr(config, "layer_types", None) or ())
    if way == PADDED and counting:
        return f"layers of {', '.join(sorted(counting))} count padding"
    if way == PADDED and counts_positions_itself(model):
        return "its layers count padding as positions (attn_temperature_tuning)"
    if way == PADDED and getattr(config, "index_topk", None):
        return "it selects keys, and ties among them fall otherwise beside padding"
    return None


def _disagreement(model: Any, way: Way, rows: _Rows) -> str | None:
    """Return how a way's logits differ from those of rows by themselves, None if they do not."""
    try:
        if way == SHARED and (fault := _fault_of_structure(model, rows)):
            return fault
        found = _logits_of_way(model, way, rows)
    except Exception as error:  # a model may fail in many ways, and every one means: not this way
        return f"{type(error).__name__} ({(str(error).strip() or '?').splitlines()[0]})"
    distances = [_distances(own, logits) for own, logits in zip(rows.logits, found, strict=True)]
    on_cpu = device_of(model).type == "cpu"
    if rows.logits[0].dtype in (torch.float32, torch.double):
        # Elsewhere products may be taken in lower precision (TF32).
        distance, allowed = float(torch.cat(distances).max()), 2e-4 if on_cpu else 1e-2
    else:
        # Rounding, which may send a token to another expert, is told from a fault by the mean.
        of_prompts = [distances[n : n + _GROUP] for n in range(0, len(distances), _GROUP)]
        distance, allowed = max(float(torch.cat(part).mean()) for part in of_prompts), 0.15
    if distance <= allowed:
        return None
    return f"its logits differ from those of each row by itself, by {distance:.2g} of their spread"


def _fault_of_structure(model: Any, rows: _Rows) -> str | None:
    """Return what our attention does not heed in a model, though it may be without effect now."""
    if shares_prompts(model):
        return None
    with our_attention(model), watched() as calls:
        if narrows(model):
            return "it attends in a sliding window"
        del calls[:]
        _logits_of_way(model, SHARED, rows)
        return handed_wrongly(model, calls)


def _logits_of_way(model: Any, way: Way, trial: _Rows) -> list[Tensor]:
    """Return of every row the logits [T, V] that a way draws its forced tokens from."""
    prompts, completions = trial.prompts, trial.completions
    lengths = [len(prompt) for prompt in prompts]
    found: list[list[Tensor]] = [[] for _ in completions]
    for batch in batches(way, range(len(prompts)), lengths, _GROUP, len(completions)):
        rows = batch.rows(_GROUP).tolist()

        def draw(numbers: Tensor, position: int, logits: Tensor, rows: Any = rows) -> Tensor:
            tokens = []
            for number, of_row in zip(numbers.tolist(), logits.cpu(), strict=True):
                completion = completions[rows[number]]
                tokens.append(completion[min(position, len(completion) - 1)])
                if position < len(completion):
                    found[rows[number]].append(of_row.clone())
            return torch.tensor(tokens, device=logits.device)

        def ended(number: int, ids: TokenIds, rows: Any = rows) -> bool:
            return len(ids) == len(completions[rows[number]])

        with attention_of(model, way):
            forget_rows(model, way)
            way.decode(
                model, [prompts[number] for number in batch.prompts], len(batch.members),
                max(map(len, completions)), draw, ended, lambda tokens, running: None,
            )  # fmt: skip
    return [torch.stack(logits) for logits in found]


def _distances(expected: Tensor, found: Tensor) -> Tensor:
    """Return how far apart two rows of logits [T, V] are, [T], in units of the first's spread."""
    expected, found = expected.double(), found.double()
    apart = torch.where(expected == found, 0.0, expected - found).norm(dim=-1)
    usual = expected.masked_fill(expected.isinf(), 0.0)
    spread = (usual - usual.mean(dim=-1, keepdim=True)).norm(dim=-1)
    # Logits that are all the same tell nothing, so they prove nothing either.
    return (apart / spread).nan_to_num(torch.inf)


def _tell(model: Any, fastest: Way, way: Way, reasons: list[str]) -> None:
    """Log which way was taken and why, where it is not the one to be expected.

    Raises:
        UserError: None of them works.
    """
    name, told = type(model).__name__, "; not ".join(reasons)
    if len(reasons) < len(WAYS[WAYS.index(fastest) :]):
        usual = SHARED if may_share(model) else PADDED
        if way is not usual and way is not fastest:
            log.warning(
                "completions of %s are sampled %s, which is exact but slower; not %s",
                name, way.name, told,
            )  # fmt: skip
        return
    if "its logits differ" not in reasons[-1]:
        raise UserError(f"{name} cannot be sampled from: {told}")
    log.warning(
        "completions of %s are sampled one at a time by its own generate, whose logits are not "
        "those of its forward pass: training sees other probabilities than sampling (%s)",
        name, told,
    )  # fmt: skip
