"""One contender in a process of its own: takes a step whenever it reads a line, and reports it.

``python -m tests.benchmarks.contenders ours|trl WORKLOAD [micro-batch]``. Every line written to
standard output is the JSON of a `Report`.
"""

import json
import os
import sys
import tempfile
import time
from typing import Any, TextIO

from tests.benchmarks.workload import Workload


class Reporter:
    """Waits for the word, then tells how long the step took."""

    def __init__(self) -> None:
        # Libraries print; the pipe is for reports alone.
        self._pipe: TextIO = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._started = 0.0

    def wait(self) -> None:
        """Block until the next step is asked for; end the process if none is."""
        if not sys.stdin.readline():
            os._exit(0)
        self._started = time.perf_counter()

    def tell(self, phases: dict[str, float], lengths: list[int]) -> None:
        """Report the step that `wait` began.

        Args:
            phases: Seconds by phase: sample, score, update, optimizer.
            lengths: Tokens of each completion.
        """
        report = {
            "step": time.perf_counter() - self._started,
            **phases,
            "sampled_tokens": sum(lengths),
            "longest": max(lengths),
            "peak_bytes": _peak_bytes(),
        }
        print(json.dumps(report), file=self._pipe, flush=True)


def variety(completions: list[Any], **_: Any) -> list[float]:
    """Return a reward that costs nothing and rarely ties: no group is left without signal.

    Args:
        completions: Texts, or the lists of one message that TRL makes of them.
    """
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [len(set(text)) / (1 + len(text)) + len(text) / 1000 for text in texts]


def run_ours(work: Workload) -> None:
    """Train with GRAOModule in a Lightning Trainer."""
    import torch
    from lightning.pytorch import Callback, Trainer

    from grao_lightning import (
        GRAOModule,
        GroupSampling,
        GroupScoring,
        PromptDataModule,
        ReferenceAwareClipping,
    )
    from grao_lightning.rewards.protocol import RewardSpec

    reporter = Reporter()

    class First(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            reporter.wait()

    class Last(Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            self.before_optimizer = time.perf_counter()

        def on_train_batch_end(
            self, trainer: Trainer, module: Any, outputs: Any, batch: Any, *_: Any
        ) -> None:
            optimizer = time.perf_counter() - self.before_optimizer
            phases = dict(batch.seconds)
            phases["update"] -= optimizer
            reporter.tell({**phases, "optimizer": optimizer}, batch.completions.lengths.tolist())

    module = GRAOModule(policy=work.model, reference_model=None, learning_rate=1e-6)
    data = PromptDataModule(
        train=work.rows,
        tokenizer=work.model,
        prompts_per_step=work.num_prompts,
        max_prompt_tokens=None,
    )
    stages = [
        GroupSampling(
            group_size=work.group_size,
            temperature=1.0,
            max_new_tokens=work.max_new_tokens,
            rows_at_once=work.num_prompts * work.group_size,
        ),
        GroupScoring(rewards=[RewardSpec("tests.benchmarks.contenders.variety")], comparison="raw"),
        ReferenceAwareClipping(),
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            default_root_dir=folder,
            accelerator="auto",
            devices=1,
            precision={"fp32": "32-true", "bf16": "bf16-true"}[work.dtype],
            max_epochs=-1,
            max_steps=1_000_000,
            limit_val_batches=0,
            callbacks=[First(), *stages, Last()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        torch.manual_seed(0)
        trainer.fit(module, datamodule=data)


def run_trl(work: Workload, micro_batch: int) -> None:
    """Train with TRL's GRPOTrainer: no reference model (beta 0), one update a rollout.

    Args:
        work: The work.
        micro_batch: Completions of one forward and backward pass.
    """
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    reporter = Reporter()
    phases: dict[str, float] = {}
    lengths: list[int] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            phases.clear()
            lengths.clear()
            reporter.wait()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            self.before_optimizer = time.perf_counter()

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            phases["optimizer"] = time.perf_counter() - self.before_optimizer

        def on_step_end(self, *_: Any, **__: Any) -> None:
            both = phases.pop("sample_and_score")
            phases["score"] = both - phases["sample"]
            reporter.tell(phases, lengths)

    def reward(completion_ids: Any, completions: Any, **_: Any) -> list[float]:
        lengths.extend(len(ids) for ids in completion_ids)
        return variety(completions)

    def timed(owner: Any, name: str, phase: str) -> None:
        function = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **options)
            phases[phase] = phases.get(phase, 0.0) + time.perf_counter() - started
            return result

        setattr(owner, name, wrapped)

    model = AutoModelForCausalLM.from_pretrained(
        work.model,
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[work.dtype],
        attn_implementation="sdpa",
    )
    with open(work.rows) as lines:
        prompts = [{"prompt": json.loads(line)["prompt"]} for line in lines]
    rows = work.num_prompts * work.group_size
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            processing_class=AutoTokenizer.from_pretrained(work.model, padding_side="left"),
            train_dataset=datasets.Dataset.from_list(prompts * 50),
            callbacks=[Clock()],
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=rows // micro_batch,
                num_generations=work.group_size,
                max_completion_length=work.max_new_tokens,
                beta=0.0,
                temperature=1.0,
                learning_rate=1e-6,
                bf16=False,
                gradient_checkpointing=False,
                max_steps=1_000_000,
                save_strategy="no",
                report_to=[],
                logging_steps=1_000_000,
                shuffle_dataset=False,
                use_cpu=not torch.cuda.is_available(),
                disable_tqdm=True,
                seed=0,
            ),
        )
        timed(trainer, "_generate_single_turn", "sample")
        timed(trainer, "_generate_and_score_completions", "sample_and_score")
        timed(trainer, "_compute_loss", "update")
        timed(trainer.accelerator, "backward", "update")
        trainer.train()


def _peak_bytes() -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


if __name__ == "__main__":
    contender, workload, *micro_batch = sys.argv[1:]
    if contender == "ours":
        run_ours(Workload.loads(workload))
    else:
        run_trl(Workload.loads(workload), int(micro_batch[0]))
