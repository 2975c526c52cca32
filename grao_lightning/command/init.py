"""``grao init``: a config, data and a reward to start from, as files that are the user's."""

import argparse
import json
from pathlib import Path

from grao_lightning.command.help import OneLine
from grao_lightning.embedded.phrases import phrase_rows
from grao_lightning.faults import Faults, UserError

_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_OFFLINE = "embedded:phrases"

_CONFIG = """\
# grao fit --config my.yaml
# Needs {needs}
#
# `grao fit --help` tells what else can be set. Any setting can also be given on the command line:
#   grao fit --config my.yaml --sampling.group_size 16
seed_everything: 0
model:
  class_path: GRAOModule # or GRPOModule, PPOModule, DPOModule, SFTModule, RewardModule
  init_args:
    policy: {policy} # the model to train: hub name, folder or .gguf file
    learning_rate: {learning_rate} # the larger the model, the smaller
    warmup_steps: 2
data:
  # One JSON object a line; columns besides these are given to your reward by their name:
  #   {{"prompt": "...", "completion": "..."}}                    completion: the reference answer
  #   {{"prompt": "...", "chosen": "...", "rejected": "..."}}     for DPOModule and RewardModule
  #   {{"messages": [{{"role": "user", "content": "..."}}, ...]}}   reference answer: the last one
  # Columns of other names: rename: {{question: prompt, answer: completion}}
  train: my_data.jsonl
  validation: my_held_out.jsonl # rows that are not trained on: RAS and NAG are measured on them
  as_chat: true # a prompt that is plain text becomes a user's turn in the model's chat template
  max_prompt_tokens: 256 # longer prompts lose their oldest turns
  prompts_per_step: 4
sampling:
  group_size: 8 # completions a prompt
  temperature: 0.7
  max_new_tokens: {max_new_tokens} # longest completion
scoring:
  rewards: # one or more; their sum by weight is what the policy is trained to raise
    - function: my_rewards.kindness
      weight: 1.0
  comparison: raw # or pairwise: better, equal or worse than the reference answer is all that counts
clipping:
  max_norm: 1.0
trainer:
  accelerator: {accelerator} # auto takes a GPU where there is one
  max_steps: {max_steps}
  val_check_interval: {interval} # steps between validations; the last step is always validated
"""

_REWARD = '''\
"""Rewards of your own: each scores what you like to see more of."""

KIND_WORDS = ("please", "thank", "gladly", "sorry", "enjoy", "wonderful", "nice")


def kindness(completions, **others):
    """Return a score for each completion: higher is better, in a unit of your choice.

    Ask by name for whatever else you need, a list as long as ``completions``:
      prompts, reference_answers    texts
      truncated                     True where the length limit ended the completion
      any column of your data       by its name, such as ``topic``
    ``**others`` takes the rest. A score of None means: none could be found. It is left out, not 0.
    The reference answers are scored by the same function.
    """
    return [score(completion) for completion in completions]


def score(text):
    """Return up to 1 for kind words, less where the text grows long."""
    words = text.lower().split()
    kind = sum(word.startswith(KIND_WORDS) for word in words)
    too_long = max(0, len(words) - 30)  # or length alone would raise the reward
    return min(kind, 2) / 2 - too_long / 30
'''


def init_command(arguments: list[str]) -> None:
    """Run ``grao init`` with its arguments."""
    parser = argparse.ArgumentParser(
        prog="grao init",
        formatter_class=OneLine,
        description="Write my.yaml, my_rewards.py, my_data.jsonl and my_held_out.jsonl: a run with "
        "data and a reward of its own, to be replaced by yours. Files that are there stay.",
    )
    parser.add_argument(
        "folder", nargs="?", default=".", help="made if need be (default: this one)"
    )
    parser.add_argument(
        "--policy",
        default=_HUB,
        help=f"model to train: hub name, folder, .gguf file, or {_OFFLINE}, a toy that needs no "
        f"download (default: {_HUB})",
    )
    options = parser.parse_args(arguments)
    paths = write_project(Path(options.folder).expanduser(), options.policy)
    print("written:", *paths)
    inside = "" if options.folder == "." else f"cd {options.folder} && "
    print(f"next:    {inside}grao fit --config my.yaml")


def write_project(folder: Path, policy: str) -> list[Path]:
    """Write the four files and return their paths.

    Args:
        folder: Made if need be.
        policy: Source of the model to train.

    Raises:
        UserError: A file is there already, none is written then; or the folder cannot be made.
    """
    contents = {
        "my.yaml": config_text(policy),
        "my_rewards.py": _REWARD,
        "my_data.jsonl": _lines("train"),
        "my_held_out.jsonl": _lines("validation"),
    }
    faults = Faults()
    for name in contents:
        if (folder / name).exists():
            faults.add(f"{folder / name} is there already and stays: remove it or name a folder")
    faults.raise_if_any("of grao init, which has written nothing")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            with (folder / name).open("x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise UserError(f"grao init: cannot write to {folder}: {error.strerror}") from None
    return [folder / name for name in contents]


def config_text(policy: str) -> str:
    """Return the config for a policy; an embedded toy learns faster than a grown model."""
    if policy.startswith("embedded:"):
        return _CONFIG.format(
            needs="nothing but this package; a quarter of a minute on a CPU core.",
            policy=policy,
            learning_rate="3.0e-4",
            max_new_tokens=24,
            accelerator="cpu",
            max_steps=40,
            interval=20,
        )
    return _CONFIG.format(
        needs=f"{policy} (from the hub once); SmolLM2-135M takes 8 minutes on a CPU core.",
        policy=json.dumps(policy) if policy != _HUB else policy,
        learning_rate="1.0e-5",
        max_new_tokens=48,
        accelerator="auto",
        max_steps=20,
        interval=10,
    )


def _lines(split: str) -> str:
    return "".join(json.dumps(row) + "\n" for row in phrase_rows(split))
