"""One contender in a process of its own: takes a step whenever it reads a line, and reports it.

``python -m tests.benchmarks.contenders ours|trl WORKLOAD SETTINGS``, both JSON; settings are those
of `GRAOModule` or of ``GRPOConfig``. Every line written to standard output is a `Report`.
"""

import hashlib
import json
import os
import sys
import tempfile
import time
from typing import Any, TextIO

from tests.benchmarks.report import PHASES, Report
from tests.benchmarks.workload import Workload


class Reporter:
    """Waits for the word, then tells how long the step took."""

    def __init__(self, device: str) -> None:
        self._device = device
        # Libraries print; the pipe is for reports alone.
        self._pipe: TextIO = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._started = 0.0

    def wait(self) -> None:
        """Block until the next step is asked for; end the process if none is."""
        if not sys.stdin.readline():
            os._exit(0)
        self._started = self.now()

    def now(self) -> float:
        """Return the time once the device has done what it was given."""
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def tell(self, phases: dict[str, float], lengths: list[int], prompts: list[list[int]]) -> None:
        """Report the step that `wait` began.

        Args:
            phases: Seconds of each of `PHASES`.
            lengths: Tokens of each completion.
            prompts: Token ids of the prompts, in any order, repeated or not.
        """
        seconds = self.now() - self._started
        distinct = sorted(set(map(tuple, prompts)))
        report = Report(
            step=seconds,
            **{name: phases[name] for name in PHASES},
            lengths=lengths,
            prompts=hashlib.sha256(repr(distinct).encode()).hexdigest()[:16],
            peak_bytes=_peak_bytes(self._device),
        )
        print(report.dumps(), file=self._pipe, flush=True)


def variety(completions: list[Any], **_: Any) -> list[float]:
    """Return a reward that costs nothing and rarely ties: no group is left without signal.

    Args:
        completions: Texts, or the lists of one message that TRL makes of them.
    """
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [len(set(text)) / (1 + len(text)) + len(text) / 1000 for text in texts]


def run_ours(work: Workload, settings: dict[str, Any]) -> None:
    """Train with GRAOModule in a Lightning Trainer.

    Args:
        work: The work.
        settings: Of the module.
    """
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

    reporter = Reporter(work.device)

    class First(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            reporter.wait()

    class Last(Callback):
        before_optimizer = 0.0

        def on_before_optimizer_step(self, *_: Any) -> None:
            self.before_optimizer = reporter.now()

        def on_train_batch_end(
            self, trainer: Trainer, module: Any, outputs: Any, batch: Any, *_: Any
        ) -> None:
            optimizer = reporter.now() - self.before_optimizer
            phases = dict(batch.seconds)
            phases["update"] -= optimizer
            lengths = batch.completions.lengths.tolist()
            reporter.tell({**phases, "optimizer": optimizer}, lengths, batch.prompt_ids)

    if work.lora:
        settings = {**settings, "lora": {"rank": work.lora}}
    module = GRAOModule(policy=work.model, reference_model=None, learning_rate=1e-6, **settings)
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
            accelerator=work.device,
            devices=1,
            precision="32-true" if work.dtype == "fp32" else "bf16-true",
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


def run_trl(work: Workload, settings: dict[str, Any]) -> None:
    """Train with TRL's GRPOTrainer: no reference model (beta 0), one update a rollout.

    Args:
        work: The work.
        settings: Of GRPOConfig; with ``per_device_train_batch_size``, the micro-batch.
    """
    import datasets
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    reporter = Reporter(work.device)
    phases: dict[str, float] = {}
    lengths: list[int] = []
    prompts: list[list[int]] = []

    class Clock(TrainerCallback):
        before_optimizer = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            phases.clear()
            lengths.clear()
            prompts.clear()
            reporter.wait()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            self.before_optimizer = reporter.now()

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            phases["optimizer"] = reporter.now() - self.before_optimizer

        def on_step_end(self, *_: Any, **__: Any) -> None:
            both = phases.pop("sample_and_score")
            phases["score"] = both - phases["sample"]
            reporter.tell(phases, lengths, prompts)

    def reward(completion_ids: Any, completions: Any, **_: Any) -> list[float | None]:
        lengths.extend(len(ids) for ids in completion_ids)
        return [*variety(completions)]

    def timed(owner: Any, name: str, phase: str) -> None:
        function = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            if phase == "sample":
                prompts.extend(args[0])
            started = reporter.now()
            result = function(*args, **options)
            phases[phase] = phases.get(phase, 0.0) + reporter.now() - started
            return result

        setattr(owner, name, wrapped)

    model = AutoModelForCausalLM.from_pretrained(
        work.model,
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[work.dtype],
        attn_implementation="sdpa",
    )
    with open(work.rows) as lines:
        dialogues = [{"prompt": json.loads(line)["prompt"]} for line in lines]
    rows = work.num_prompts * work.group_size
    adapters = None
    if work.lora:  # as ours: alpha twice the rank, all linear modules but the head
        adapters = LoraConfig(
            r=work.lora,
            lora_alpha=2 * work.lora,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            processing_class=AutoTokenizer.from_pretrained(work.model, padding_side="left"),
            train_dataset=datasets.Dataset.from_list(dialogues * 50),
            callbacks=[Clock()],
            peft_config=adapters,
            args=GRPOConfig(
                output_dir=folder,
                gradient_accumulation_steps=rows // settings["per_device_train_batch_size"],
                num_generations=work.group_size,
                max_completion_length=work.max_new_tokens,
                beta=0.0,
                temperature=1.0,
                learning_rate=1e-6,
                bf16=False,
                optim="adamw_torch_fused",  # ours too
                max_steps=1_000_000,
                save_strategy="no",
                report_to=[],
                logging_steps=1_000_000,
                shuffle_dataset=False,
                use_cpu=work.device == "cpu",
                disable_tqdm=True,
                seed=0,
                **{"gradient_checkpointing": False, **settings},
            ),
        )
        timed(trainer, "_generate_single_turn", "sample")
        timed(trainer, "_generate_and_score_completions", "sample_and_score")
        timed(trainer, "_compute_loss", "update")
        timed(trainer.accelerator, "backward", "update")
        trainer.train()


def _peak_bytes(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


if __name__ == "__main__":
    contender, workload, settings = sys.argv[1:]
    run = {"ours": run_ours, "trl": run_trl}[contender]
    run(Workload.loads(workload), json.loads(settings))
