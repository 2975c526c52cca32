"""Our training step against TRL's GRPOTrainer on the same work, taking turns, in one run.

``python -m tests.benchmarks.against_trl --model FOLDER_OR_GGUF [--dialogues HH.jsonl.gz]`` (needs
``grao-lightning[benchmark]``). TRL takes every micro-batch first; its fastest is the one compared
with, and its leanest takes turns too. ``--front`` adds ours at several ``micro_batch_tokens``,
``--lora RANK`` trains adapters on both sides. On a card: ``--device cuda --shape qwen2.5-1.5b``,
random weights of a published shape (``--device cpu --shape tiny`` rehearses it). Each contender
runs in a process of its own, so that peak memory is its own. ``--curves`` measures along group
size, prompt length and completion length instead. With ``--output`` each result is kept in a file
as it comes, and a run that was cut off goes on. The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks.limit import least_operations, matmul_rate
from tests.benchmarks.report import PHASES, Report
from tests.benchmarks.workload import (
    SHAPES,
    Workload,
    end_never,
    model_folder,
    random_model_folder,
    write_rows,
)

#: Of GRAOModule: recompute activations, and one prompt's pack at a time.
LEAN = {"gradient_checkpointing": True, "micro_batch_tokens": 1024}
FRONT = (256, 512, 1024, 8192)  # micro_batch_tokens
GROUP_SIZES = (2, 4, 8, 16, 32)
PROMPT_TOKENS = (64, 128, 256, 512, 1024)
COMPLETION_TOKENS = (32, 128, 512)
Figures = dict[str, Any]


class Contender:
    """A process of `contenders`, asked for one step at a time."""

    def __init__(self, name: str, work: Workload, settings: dict[str, Any], warmup: int) -> None:
        self.name = name
        self.settings = settings
        self.reports: list[Report] = []
        self._warmup = warmup
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.benchmarks.contenders"),
                *(name, work.dumps(), json.dumps(settings)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def step(self) -> Report:
        """Take one step and return its report."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} stopped: run tests.benchmarks.contenders by hand")
        self.reports.append(Report.loads(line))
        return self.reports[-1]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    @property
    def measured(self) -> list[Report]:
        """Return the reports after the steps that warm up."""
        return self.reports[self._warmup :]

    def figures(self) -> Figures:
        """Return medians of seconds, tokens a step, and the largest memory of the process."""
        names = ("step", *PHASES)
        seconds = {
            name: median(getattr(report, name) for report in self.measured) for name in names
        }
        return {
            "contender": self.name,
            "settings": self.settings,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "tokens": median(sum(report.lengths) for report in self.measured),
            "peak_mb": round(max(report.peak_bytes for report in self.reports) / 1e6),
        }


def sweep(work: Workload, sizes: Sequence[int]) -> list[Figures]:
    """Return TRL's figures at every micro-batch; its fastest and smallest recomputing too."""
    found: list[Figures] = []

    def measure(**settings: Any) -> None:
        trl = Contender("trl", work, settings, warmup=1)
        for _ in range(2):
            trl.step()
        trl.close()
        found.append(trl.figures())
        tell(found[-1])

    for size in sizes:
        measure(per_device_train_batch_size=size)
    for size in sorted({fastest(found), sizes[0]}):
        measure(per_device_train_batch_size=size, gradient_checkpointing=True)
    return found


def front(work: Workload) -> list[Figures]:
    """Return our figures at every budget of a micro-batch, two steps each."""
    found: list[Figures] = []
    for settings in [*({"micro_batch_tokens": size} for size in FRONT), LEAN]:
        ours = Contender("ours", work, settings, warmup=1)
        for _ in range(2):
            ours.step()
        ours.close()
        found.append(ours.figures())
        tell(found[-1])
    return found


def leanest(found: Sequence[Figures]) -> dict[str, Any]:
    """Return the settings of the least memory."""
    settings: dict[str, Any] = min(found, key=lambda figures: figures["peak_mb"])["settings"]
    return settings


def fastest(found: Sequence[Figures]) -> int:
    """Return the micro-batch of the least step time."""
    kept = [figures for figures in found if "gradient_checkpointing" not in figures["settings"]]
    best = min(kept, key=lambda figures: figures["seconds"]["step"])
    size: int = best["settings"]["per_device_train_batch_size"]
    return size


def compare(
    work: Workload,
    prompts: Sequence[int],
    settings: Sequence[tuple[str, dict[str, Any]]],
    *,
    warmup: int,
    pairs: int,
    full_length: bool,
) -> list[Figures]:
    """Return the figures of contenders that took turns, TRL's fastest first.

    Args:
        work: The work.
        prompts: Tokens of each prompt.
        settings: (contender, its settings) of each.
        warmup: Steps of each before those that count.
        pairs: Steps of each that count.
        full_length: Whether every completion must be of full length.

    Raises:
        SystemExit: They read other prompts than each other, or a completion was not of full length.
    """
    import torch

    contenders = [Contender(name, work, chosen, warmup) for name, chosen in settings]
    for number in range(warmup + pairs):
        shift = number % len(contenders)
        for contender in contenders[shift:] + contenders[:shift]:
            contender.step()
        if len({contender.reports[-1].prompts for contender in contenders}) > 1:
            raise SystemExit("the contenders read different prompts")
    lengths = [length for one in contenders for report in one.reports for length in report.lengths]
    if full_length and set(lengths) != {work.max_new_tokens}:
        raise SystemExit(f"a completion of {min(lengths)} tokens, not {work.max_new_tokens}")
    for contender in contenders:
        contender.close()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[work.dtype]
    rate = matmul_rate(dtype, work.device)
    rows = []
    trl = min((one for one in contenders if one.name == "trl"), key=_median_step)
    for contender in [trl, *(one for one in contenders if one is not trl)]:
        shares = [
            least_operations(work.model, prompts, report.lengths) / rate / report.step
            for report in contender.measured
        ]
        both = list(zip(trl.measured, contender.measured, strict=True))
        figures = {
            **contender.figures(),
            "gflops": round(rate / 1e9),
            "share_of_limit": round(median(shares), 3),
            "time_ratio": round(median(a.step / b.step for a, b in both), 2),
            "time_ratio_per_token": round(
                median(a.step / sum(a.lengths) / (b.step / sum(b.lengths)) for a, b in both), 2
            ),
        }
        figures["memory_ratio"] = round(figures["peak_mb"] / trl.figures()["peak_mb"], 3)
        rows.append(figures)
        tell(figures)
    return rows


def tell(figures: Figures) -> None:
    """Print a line of figures."""
    seconds = figures["seconds"]
    parts = "  ".join(f"{name} {value:.2f}" for name, value in seconds.items())
    rest = "  ".join(
        f"{name} {figures[name]}"
        for name in ("time_ratio", "time_ratio_per_token", "memory_ratio", "share_of_limit")
        if name in figures
    )
    print(
        f"  {figures['contender']} {figures['settings']}: {parts} s  "
        f"{figures['tokens']:.0f} tokens  {figures['tokens'] / seconds['step']:.1f} tokens/s  "
        f"{figures['peak_mb']} MB  {rest}",
        flush=True,
    )


class Kept:
    """Results by name, in a file as they come; those found in it are not measured again."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self.results: dict[str, Any] = {}
        if file is not None and file.exists():
            self.results = json.loads(file.read_text())

    def __contains__(self, name: str) -> bool:
        return name in self.results

    def keep(self, name: str, result: Any) -> None:
        """Note a result."""
        self.results[name] = result
        if self._file is not None:
            self._file.write_text(json.dumps(self.results, indent=1) + "\n")


def curve_points(work: Workload) -> Iterator[tuple[str, Workload, tuple[int, int]]]:
    """Yield (name, work, fewest and most tokens of its prompt), one prompt a step."""
    one = replace(work, num_prompts=1)
    around = (150, 256)
    for size in GROUP_SIZES:
        yield f"group size {size}", replace(one, group_size=size), around
    for tokens in PROMPT_TOKENS:
        yield f"prompt tokens {tokens}", one, (int(tokens * 0.8), int(tokens * 1.2))
    for tokens in COMPLETION_TOKENS:
        yield f"completion tokens {tokens}", replace(one, max_new_tokens=tokens), around


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison for each precision."""
    parser = argparse.ArgumentParser(description=__doc__)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--model", help="hub name, folder or .gguf file")
    chosen.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train adapters")
    parser.add_argument("--front", action="store_true", help="ours at every micro_batch_tokens too")
    parser.add_argument("--dialogues", help="Anthropic HH file; without it filler text")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--prompt_tokens", type=int, nargs=2, default=[150, 256])
    parser.add_argument("--layers", type=int, help="keep only the first so many")
    parser.add_argument("--stops", action="store_true", help="let end-of-sequence end completions")
    parser.add_argument("--curves", action="store_true", help="along sizes, of the first dtype")
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument(
        "--no_sweep", action="store_true", help="TRL's micro-batches take turns too, none ahead"
    )
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file of results, kept as they come")
    options = parser.parse_args(arguments)
    kept = Kept(options.output)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = (
            random_model_folder(options.shape, folder / "model")
            if options.shape
            else model_folder(options.model, folder / "model", layers=options.layers)
        )
        rows = folder / "rows.jsonl"
        work = Workload(
            str(model),
            str(rows),
            options.prompts,
            options.group_size,
            options.max_new_tokens,
            options.dtypes[0],
            options.device,
            options.lora,
        )
        if options.curves:
            points = list(curve_points(work))
        else:
            kind = "natural" if options.stops else "fixed"
            kind += " lora" if options.lora else ""
            span = tuple(options.prompt_tokens)
            points = [
                (f"{kind} {name}", replace(work, dtype=name), span) for name in options.dtypes
            ]
        for name, chosen, span in points:
            if name not in kept:
                print(name, flush=True)
                kept.keep(name, measure_point(chosen, rows, span, options))
    print(json.dumps({name: _ratios(result["ours"]) for name, result in kept.results.items()}))


def measure_point(work: Workload, rows: Path, span: tuple[int, int], options: Any) -> Figures:
    """Return what one point of the comparison came to."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work.model)
    prompts = write_rows(rows, tokenizer, options.dialogues, work.num_prompts, span)
    if not options.stops:
        end_never(Path(work.model), rows, options.device)
    completions = work.num_prompts * work.group_size
    sizes = [size for size in options.micro_batches if completions % size == 0]
    print(f"  prompts of {prompts} tokens, G = {work.group_size}", flush=True)
    swept = []
    settings: list[tuple[str, dict[str, Any]]]
    if options.curves or options.no_sweep or len(sizes) == 1:
        settings = [("trl", {"per_device_train_batch_size": size}) for size in sizes]
    else:
        swept = sweep(work, sizes)
        settings = [("trl", {"per_device_train_batch_size": fastest(swept)})]
        if leanest(swept) != settings[0][1]:
            settings.append(("trl", leanest(swept)))
    fronted = front(work) if options.front else []
    settings.append(("ours", {}))
    if not options.curves:
        settings.append(("ours", LEAN))
    trl, *others = compare(
        work,
        prompts,
        settings,
        warmup=options.warmup,
        pairs=options.pairs,
        full_length=not options.stops,
    )
    slower = [figures for figures in others if figures["contender"] == "trl"]
    lean = sorted([*slower, trl], key=lambda figures: figures["peak_mb"])
    ours = [figures for figures in others if figures["contender"] == "ours"]
    return {
        "prompts": prompts,
        "sweep": swept,
        "front": fronted,
        "trl": trl,
        "trl_slower": slower,
        "trl_lean": lean[0],
        "ours": ours,
    }


def _ratios(rows: Sequence[Figures]) -> Figures:
    names = ("time_ratio", "memory_ratio", "share_of_limit")
    first, *lean = ({name: row[name] for name in names} for row in rows)
    return {**first, "lean": lean[0]} if lean else first


def _median_step(contender: Contender) -> float:
    return median(report.step for report in contender.measured)


if __name__ == "__main__":
    main()
