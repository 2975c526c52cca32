"""Gradients and samples of sharded models, against whole ones on the same rank; in float64.

Arguments: the folder for what is found, then folders of models. Each rank has rows of its own.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import DeepseekV3Config

from grao_lightning.batch import TokenRow
from grao_lightning.language_model.frozen import inside
from grao_lightning.language_model.loading import load_model
from grao_lightning.language_model.logprobs import (
    evened_out,
    frozen_logprobs,
    split_by_tokens,
    token_logprobs,
)
from grao_lightning.language_model.sharded import Sharding
from grao_lightning.language_model.sharing import share_prompts, shares_prompts
from grao_lightning.sampling.completions import sample_completions
from grao_lightning.sampling.draw import SamplingSettings, row_uniforms

BUDGET = 40
SETTINGS = SamplingSettings(max_new_tokens=8, temperature=0.9)


class Texts:
    """Stands in for a tokenizer."""

    def batch_decode(self, ids: Any, **_: Any) -> list[str]:
        return ["" for _ in ids]


def rows_of(rank: int) -> list[TokenRow]:
    """Return rows, more of them on the second rank, so that its passes are more."""
    generator = torch.Generator().manual_seed(rank)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 90, (length,), generator=generator).tolist()

    prompts = [ids(4, 12) for _ in range(1 + 2 * rank)]
    return [TokenRow(prompt, ids(1, 9)) for prompt in prompts for _ in range(3)]


def coefficients(rows: list[TokenRow]) -> torch.Tensor:
    """Return one weight a row; some are 0."""
    return torch.tensor([(-1.0) ** n * (n % 4) for n in range(len(rows))], dtype=torch.double)


def ascend(model: Any, rows: list[TokenRow]) -> None:
    """Add the gradient of the weighted log-probabilities, in small micro-batches."""
    weights = coefficients(rows)
    parts = split_by_tokens(model, rows, (weights != 0).tolist(), BUDGET)
    for part in evened_out(model, parts):
        by_token = [weights[n].repeat(len(rows[n].answer_ids)) for n in part.numbers]
        flat = torch.cat(by_token) if by_token else None
        with torch.set_grad_enabled(part.needs_gradient):
            computed = token_logprobs(
                model,
                [rows[n] for n in part.numbers],
                weigh=(lambda at, _, flat=flat: flat[at]) if by_token else None,
            )
        if part.needs_gradient:
            (computed.loss * dist.get_world_size()).backward()


def sampled(model: Any, rank: int) -> list[list[int]]:
    prompts = [row.prompt_ids for row in rows_of(rank)[::3]]
    uniforms = [row_uniforms(0, "train", 0, 10 * rank + n, 2, 8) for n in range(len(prompts))]
    return sample_completions(model, Texts(), prompts, uniforms, SETTINGS, rows_at_once=64).ids


@dataclass(frozen=True)
class Case:
    folder: str
    checkpointing: bool
    shares: bool = True
    one_by_one: bool = False
    replicas: int = 1


def made(case: Case, sharding: Sharding | None) -> Any:
    options = {} if sharding else {"dtype": torch.double}
    model = load_model("model.policy", case.folder, sharding, **options)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product has no form in float64
    if case.shares:
        with torch.no_grad():
            inside(model, share_prompts)
        assert shares_prompts(model)
    if case.one_by_one:
        model._grao_padding = (type(model), False)
    with torch.no_grad():
        token_logprobs(model, [])
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def differences(case: Case) -> dict[str, float]:
    """Return how far a sharded model's gradients, log-probabilities and samples are off."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole = made(case, None)
    for of_rank in range(ranks):
        rows = rows_of(of_rank)
        weights = coefficients(rows)
        lengths = [len(row.answer_ids) for row in rows]
        flat = weights.repeat_interleave(torch.tensor(lengths))
        token_logprobs(whole, rows, weigh=lambda part, _, flat=flat: flat[part]).loss.backward()
    expected = {name: p.grad for name, p in whole.named_parameters()}

    sharding = Sharding(ranks // case.replicas, replicas=case.replicas, dtype=torch.double)
    model = made(case, sharding)
    found: dict[str, float] = {}
    for when in ("first", "after sampling"):
        model.zero_grad(set_to_none=True)
        ascend(model, rows_of(rank))
        parts = dict(model.named_parameters())
        assert all(isinstance(p, DTensor) for p in parts.values()), "parts alone are trained"
        sizes = {name: (g.norm() if g is not None else 0.0) for name, g in expected.items()}
        total = torch.stack([size for size in sizes.values() if size != 0.0]).norm()
        off = [
            (parts[name].grad.full_tensor() - gradient).norm() / max(sizes[name], 1e-3 * total)
            for name, gradient in expected.items()
            if gradient is not None
        ]
        found[f"gradients, {when}"] = float(max(off))
        if when == "first":
            found["other tokens"] = float(sampled(model, rank) != sampled(whole, rank))
    rows = rows_of(rank)[: 6 * rank]  # none on the first rank
    ours, theirs = (frozen_logprobs(part, rows, BUDGET) for part in (model, whole))
    pairs = zip(ours, theirs, strict=True)
    found["log-probabilities"] = max([float((a - b).abs().max()) for a, b in pairs], default=0.0)
    own = sum(p.to_local().numel() for p in model.parameters())
    found["share"] = own / sum(p.numel() for p in model.parameters())
    return found


def anonymous_bytes() -> int:
    """Return this process's memory without the pages of files, which the system takes back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


@contextmanager
def most_memory() -> Iterator[list[int]]:
    """Give what the body added to memory at its most, loading threads included; Linux alone."""
    before, found, over = anonymous_bytes(), [0], Event()

    def look() -> None:
        while not over.wait(0.002):
            found[0] = max(found[0], anonymous_bytes() - before)

    watcher = Thread(target=look)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def loaded(path: str) -> dict[str, float]:
    """Return the most memory while a model is loaded and what is kept, by the bytes of its file."""
    size = sum(file.stat().st_size for file in Path(path).iterdir())
    with torch.no_grad(), most_memory() as loading:
        model = load_model("model.policy", path, Sharding(dist.get_world_size()))
    # What is kept may lie in the file's own pages, which do not count above.
    kept = sum(p.to_local().nbytes for p in model.parameters())
    with torch.no_grad():
        inside(model, share_prompts)
    assert shares_prompts(model)
    return {"loading": (kept + loading[0]) / size}


def main(folder: Path, models: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    # Its gate stays float32, and FSDP wants one precision a group; transformers knows of bfloat16.
    plan = DeepseekV3Config.base_model_fsdp_plan
    DeepseekV3Config.base_model_fsdp_plan = {**plan, "layers.*.mlp.gate": "free_full_weight"}
    told: dict[str, Any] = {}
    for path in models:
        name = Path(path).name
        if name == "large":
            told[name] = [None] * dist.get_world_size()
            dist.all_gather_object(told[name], loaded(path))
            continue
        cases = {name: Case(path, False), f"{name}, checkpointing": Case(path, True)}
        if name == "untied":
            cases[f"{name}, padded"] = Case(path, False, shares=False)
            cases[f"{name}, one by one"] = Case(path, True, shares=False, one_by_one=True)
            cases[f"{name}, two copies"] = Case(path, False, replicas=2)
        for label, case in cases.items():
            ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, differences(case))
            told[label] = {key: max(found[key] for found in ranks) for key in ranks[0]}
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
