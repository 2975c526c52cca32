"""Our training step against TRL's GRPOTrainer on the same work, in pairs, in one run.

``python -m tests.benchmarks.against_trl --model FOLDER_OR_GGUF [--dialogues HH.jsonl.gz]`` (needs
``grao-lightning[benchmark]``). TRL takes every micro-batch first; its fastest is the one compared
with, and its memory at every micro-batch is printed. Each contender runs in a process of its own,
so that peak memory is its own; the two take turns. The last line printed is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks.workload import Workload, end_never, model_folder, write_rows

Report = dict[str, float]


class Contender:
    """A process of `contenders`, asked for one step at a time."""

    def __init__(self, name: str, work: Workload, *arguments: str) -> None:
        self.name = name
        self.reports: list[Report] = []
        command = [sys.executable, "-m", "tests.benchmarks.contenders", name, work.dumps()]
        self._process = subprocess.Popen(
            [*command, *arguments],
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
        self.reports.append(json.loads(line))
        return self.reports[-1]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def measured(self, name: str) -> float:
        """Return the median of a figure; the first step, which warms up, is left out."""
        return median(report.get(name, 0.0) for report in self.reports[1:])

    @property
    def peak(self) -> float:
        """Return the largest memory of the whole process, in bytes."""
        return max(report["peak_bytes"] for report in self.reports)


def best_micro_batch(work: Workload, sizes: Sequence[int]) -> int:
    """Return TRL's fastest micro-batch and print time and memory of each."""
    seconds: dict[int, float] = {}
    for size in sizes:
        trl = Contender("trl", work, str(size))
        for _ in range(2):
            trl.step()
        trl.close()
        seconds[size] = trl.measured("step")
        print(f"  TRL, micro-batch {size:2}: {seconds[size]:6.1f} s  {trl.peak / 1e6:6.0f} MB")
    return min(seconds, key=lambda size: seconds[size])


def compare(work: Workload, micro_batch: int, pairs: int) -> dict[str, float]:
    """Return time and memory of ours over TRL's after ``pairs`` steps of each, taking turns."""
    ours, trl = Contender("ours", work), Contender("trl", work, str(micro_batch))
    ratios = []
    for number in range(pairs + 1):
        order = (ours, trl) if number % 2 else (trl, ours)
        for contender in order:
            contender.step()
        if number:
            ratios.append(trl.reports[-1]["step"] / ours.reports[-1]["step"])
    for contender in (ours, trl):
        contender.close()
        phases = ("step", "sample", "score", "update", "optimizer")
        parts = "  ".join(f"{name} {contender.measured(name):.2f} s" for name in phases)
        tokens = contender.measured("sampled_tokens")
        print(
            f"  {contender.name:5} {parts}  {tokens:.0f} tokens  "
            f"{tokens / contender.measured('step'):.1f} tokens/s  {contender.peak / 1e6:.0f} MB"
        )
    by_token = [
        contender.measured("step") / contender.measured("sampled_tokens")
        for contender in (trl, ours)
    ]
    return {
        "time_ratio": round(median(ratios), 2),
        "time_ratio_per_token": round(by_token[0] / by_token[1], 2),
        "memory_ratio": round(ours.peak / trl.peak, 3),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison for each precision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="hub name, folder or .gguf file")
    parser.add_argument("--dialogues", help="Anthropic HH file; without it filler text")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--prompt_tokens", type=int, nargs=2, default=[150, 256])
    parser.add_argument("--layers", type=int, help="keep only the first so many")
    parser.add_argument("--stops", action="store_true", help="let end-of-sequence end completions")
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = model_folder(options.model, folder / "model", layers=options.layers)
        from transformers import AutoTokenizer

        lengths = write_rows(
            folder / "rows.jsonl",
            AutoTokenizer.from_pretrained(model),
            options.dialogues,
            options.prompts,
            tuple(options.prompt_tokens),
        )
        if not options.stops:
            end_never(model, folder / "rows.jsonl")
        print(f"prompts of {lengths} tokens, G = {options.group_size}")
        for dtype in options.dtypes:
            print(dtype)
            work = Workload(
                str(model),
                str(folder / "rows.jsonl"),
                options.prompts,
                options.group_size,
                options.max_new_tokens,
                dtype,
            )
            micro_batch = best_micro_batch(work, options.micro_batches)
            figures = compare(work, micro_batch, options.pairs)
            result[dtype] = {"trl_micro_batch": micro_batch, **figures}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
