"""Writes docs/memory.md by `grao memory`'s own arithmetic, from the shapes of published models.

python -m tests.command.memory_page
"""

from pathlib import Path
from typing import Any

from grao_lightning.command.memory import planned
from grao_lightning.language_model import footprint

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
SHAPES = Path(__file__).parents[1] / "shapes"

_LORA: dict[str, Any] = {"lora": {"rank": 16}}
_ATTENTION = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
_OF_ATTENTION: dict[str, Any] = {"lora": {"rank": 16, "target_modules": _ATTENTION}}
_QLORA: dict[str, Any] = {"lora": {"rank": 16, "quantize": "nf4"}}
_FULL = {"precision": "bf16-mixed"}
_BF16 = {"precision": "bf16-true"}
_RECOMPUTED = {"gradient_checkpointing": True}

#: (model, method, what is trained, settings of the model, of the trainer)
ROWS: list[tuple[str, str, str, dict[str, Any], dict[str, Any]]] = [
    ("smollm2_135m", "GRAOModule", "all", {}, {"precision": "32-true"}),
    ("smollm2_135m", "GRAOModule", "adapters", _LORA, _BF16),
    ("smollm2_135m", "GRAOModule", "adapters, 4 bits", _QLORA, _BF16),
    *(
        (model, method, trained, {**_RECOMPUTED, **options}, {**trainer, "devices": devices})
        for model in ("qwen2.5_7b", "moonlight_16b_a3b")
        for method, trained, options, trainer, counts in (
            ("GRAOModule", "all", {}, {**_FULL, "strategy": "fsdp2"}, (8, 16, 64)),
            ("SFTModule", "all", {}, {**_FULL, "strategy": "fsdp2"}, (8,)),
            ("DPOModule", "all", {}, {**_FULL, "strategy": "fsdp2"}, (8,)),
        )
        for devices in counts
    ),
    *(
        ("qwen2.5_7b", "GRAOModule", "adapters", {**_RECOMPUTED, **_LORA}, {**_BF16, "devices": n})
        for n in (1, 8)
    ),
    ("qwen2.5_7b", "GRAOModule", "adapters, 4 bits", {**_RECOMPUTED, **_QLORA}, _BF16),
    ("moonlight_16b_a3b", "GRAOModule", "adapters", {**_RECOMPUTED, **_OF_ATTENTION}, _BF16),
]

_INTRODUCTION = """# Memory

What `grao memory --config ...` computes for some models, methods and numbers of cards, in GiB.
AdamW, micro-batches of 8,192 packed tokens, gradients recomputed from the layers' inputs (but for
SmolLM2), groups of 8 completions of at most 512 tokens on prompts of at most 1,024, adapters of
rank 16 on all linear modules (Moonlight: on its attention). SmolLM2 whole in float32 on one card;
the other models whole by `--trainer.strategy fsdp2` in bf16-mixed; adapters in bf16-true, on
several cards by ddp.

*card*: the most on one card at one time, without CUDA's context and what the allocator keeps in
reserve: leave 10 to 20 %. *sampling*: the same while completions are sampled, which takes turns
with the update; with fsdp2 every card gathers all weights for it. *host*: while models are read, on
a node of up to 8 cards.

Weights, gradients, moments and the reference model are arithmetic, and those of a run to the byte.
What layers keep of a token is counted on the model's own code without its weights, and within 10 %
of a real pass. The head and the cache of sampling are bounds. {measured}No card has seen these
figures.

Written by `python -m tests.command.memory_page`.

{heading}
"""
_COLUMNS = (
    "model", "method", "trained", "cards", "weights", "reference model", "gradients", "optimiser",
    "activations, head, copies", "card", "sampling", "host", "checkpoint",
)  # fmt: skip
_MEASURED = ""


def page() -> str:
    """Return the page."""
    heading = f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}"
    return _INTRODUCTION.format(measured=_MEASURED, heading=heading) + "".join(
        f"| {' | '.join(_cells(*row))} |\n" for row in ROWS
    )


def _cells(
    model: str, method: str, trained: str, options: dict[str, Any], trainer: dict[str, Any]
) -> list[str]:
    devices = trainer.get("devices", 1)
    nodes = max(1, devices // 8)
    plan = planned(
        {
            "model": {
                "class_path": method,
                "init_args": {"policy": str(SHAPES / f"{model}.json"), **options},
            },
            "trainer": {**trainer, "devices": devices // nodes, "num_nodes": nodes},
            "data": {"max_prompt_tokens": 1024},
            "sampling": {"max_new_tokens": 512},
        }
    )
    parts, most = footprint.device(plan.size, plan.run, plan.reference_model)
    lasting = parts["weights"] + parts["reference model"] + parts["optimiser"]
    sampling = parts["cache of sampling"] + parts["gathered to sample"]
    sizes = [
        parts["weights"], parts["reference model"], parts["gradients"], parts["optimiser"],
        parts["activations"] + parts["head"] + parts["copies"], most, lasting + sampling,
        plan.host, footprint.checkpoint(plan.size, plan.run),
    ]  # fmt: skip
    shown = [f"{size / 2**30:.1f}" if size >= 2**30 else f"{size / 2**30:.2f}" for size in sizes]
    return [model, method.removesuffix("Module"), trained, str(devices), *shown]


if __name__ == "__main__":
    PAGE.write_text(page())
