"""GRPOModule against TRL's trainer and against itself cut up otherwise."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from grao_lightning import GroupSampling, GRPOModule
from grao_lightning.batch import Completions
from grao_lightning.embedded.base import base_folder, keyword_tokenizer
from grao_lightning.rewards.protocol import RewardSpec
from tests.runs import fit, largest_difference, stages, weights

STEPS, PROMPTS, GROUP_SIZE, LIMIT = 20, 4, 4, 12
LEARNING_RATE = 3e-4


def grpo(**options) -> GRPOModule:
    settings = {"learning_rate": LEARNING_RATE, "weight_decay": 0.0, **options}
    return GRPOModule(policy="embedded:keywords-weak", **settings)


def fixed_completions(prompt_ids: list[int]) -> list[list[int]]:
    """Return completions of different lengths, the last one cut off; a function of the prompt."""
    random = torch.Generator().manual_seed(hash(tuple(prompt_ids)) % 2**31)
    completions = []
    for length in (3, 7, 5, LIMIT):
        words = torch.randint(4, 36, (length,), generator=random).tolist()
        completions.append(words if length == LIMIT else [*words[:-1], 3])  # 3 ends it
    return completions


def score_ids(ids: list[int]) -> float:
    return sum(ids) % 11 / 10


def reward(completions: list[str], **_) -> list[float]:
    """Return a score of the words' ids; texts of other answers than the fixed ones get one too."""
    tokenizer = keyword_tokenizer()
    return [score_ids(tokenizer(text, add_special_tokens=False).input_ids) for text in completions]


class FixedSampling(GroupSampling):
    """Gives the fixed completions and keeps the prompts of every step."""

    def __init__(self) -> None:
        super().__init__(group_size=GROUP_SIZE, max_new_tokens=LIMIT, temperature=1.0)
        self.prompts: list[list[list[int]]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.prompts.append(batch.prompt_ids)
        ids = [row for prompt in batch.prompt_ids for row in fixed_completions(prompt)]
        batch.completions = Completions(
            ids=ids,
            texts=pl_module.tokenizer.batch_decode(ids, skip_special_tokens=True),
            truncated=[len(row) == LIMIT for row in ids],
            group_size=GROUP_SIZE,
            max_tokens=LIMIT,
        )


def train_with_trl(
    folder: Path, prompts: list[list[list[int]]], options: dict, *, model=None, steps=STEPS
):
    import datasets
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    source = base_folder("keywords-weak")
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = [tokenizer.decode(ids) for step in prompts for ids in step]
    trainer = GRPOTrainer(
        model=model or AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: reward(completions),
        train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in texts]),
        args=GRPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=PROMPTS * GROUP_SIZE,
            num_generations=GROUP_SIZE,
            max_completion_length=LIMIT,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            temperature=1.0,
            max_steps=steps * options.get("num_iterations", 1),
            shuffle_dataset=False,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_bias_correction_kl=False,
            **options,
        ),
    )
    read: list[list[int]] = []

    def generate(prompt_ids, images, multimodal_fields, num_generations, **_):
        repeats = PROMPTS * GROUP_SIZE // len(prompt_ids)
        distinct = prompt_ids if repeats == GROUP_SIZE else prompt_ids[::GROUP_SIZE]
        read.extend(distinct)
        return [row for prompt in distinct for row in fixed_completions(prompt)], None

    trainer._generate_single_turn = generate
    trainer.train()
    assert read == [ids for step in prompts for ids in step], "TRL read other prompts"
    return trainer.model.state_dict()


@pytest.mark.parametrize(
    ("ours", "theirs", "scoring"),
    [
        ({}, {"loss_type": "grpo", "beta": 0.0}, {}),
        (
            {"aggregation": "tokens", "kl_weight": 0.1, "updates_per_rollout": 2},
            {"loss_type": "dapo", "beta": 0.1, "num_iterations": 2},
            {},
        ),
        (
            {"aggregation": "max_tokens", "ratio": "sequence", "updates_per_rollout": 2},
            {
                "loss_type": "dr_grpo",
                "importance_sampling_level": "sequence",
                "num_iterations": 2,
                "beta": 0.0,
                "scale_rewards": "none",
            },
            {"scale": "none"},
        ),
    ],
    ids=["grpo", "dapo with KL, two updates", "dr_grpo by sequence, two updates"],
)
def test_twenty_steps_on_fixed_completions_give_the_weights_of_trls_trainer(
    tmp_path, ours, theirs, scoring
):
    sampling = FixedSampling()
    rewards = [RewardSpec(f"{__name__}.reward")]
    _, score, clip = stages(scoring={"rewards": rewards, "comparison": "raw", **scoring})
    module = grpo(**ours)
    data = {"prompts_per_step": PROMPTS}
    fit(tmp_path, module=module, data=data, callbacks=[sampling, score, clip], max_steps=STEPS)
    before = weights(fit(tmp_path, module=grpo(), max_steps=0))
    expected = train_with_trl(tmp_path / "trl", sampling.prompts, theirs)
    ours_now = weights(module)
    assert largest_difference(before, ours_now) > 2e-3
    assert largest_difference(dict(expected), ours_now) < 1e-4


def test_three_steps_on_an_adapter_give_the_adapter_of_trls_trainer(tmp_path):
    """The adapter begins as ours did; the reference model is the model below on both sides."""
    from peft import PeftModel, get_peft_model_state_dict

    def adapted():
        return grpo(lora={"rank": 4}, kl_weight=0.1, updates_per_rollout=2, aggregation="tokens")

    sampling, start = FixedSampling(), adapted()
    rewards = [RewardSpec(f"{__name__}.reward")]
    _, score, clip = stages(scoring={"rewards": rewards, "comparison": "raw"})
    fit(tmp_path, module=start, max_steps=0)
    start.adapters.save(tmp_path / "start", None)
    module = adapted()
    data = {"prompts_per_step": PROMPTS}
    fit(tmp_path, module=module, data=data, callbacks=[sampling, score, clip], max_steps=3)
    source = base_folder("keywords-weak")
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(tmp_path / "start"), is_trainable=True)
    options = {"loss_type": "dapo", "beta": 0.1, "num_iterations": 2}
    train_with_trl(tmp_path / "trl", sampling.prompts, options, model=model, steps=3)
    expected = get_peft_model_state_dict(model, adapter_name="default")
    before, found = (get_peft_model_state_dict(part.adapters.peft) for part in (start, module))
    assert largest_difference(before, found) > 1e-3
    assert largest_difference(expected, found) < 1e-4
