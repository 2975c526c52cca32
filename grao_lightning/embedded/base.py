"""The base model of the keyword task: made here in seconds by supervised fine-tuning, then kept.

A Llama of 85k parameters and a tokenizer of one token a word, both plain Hugging Face objects, so
that everything downstream treats them like any other model.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from grao_lightning.embedded.keywords import (
    FILLERS,
    KEYWORDS,
    MAX_ANSWER_TOKENS,
    keyword_rows,
)
from grao_lightning.faults import UserError
from grao_lightning.files import cache_folder

# Steps of supervised fine-tuning that a base has seen.
BASES = {"keywords": 400, "keywords-weak": 60, "keywords-random": 0}
_RECIPE_VERSION = 1  # part of the cache's name: raise it when anything below changes

_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{{ ' <sep>' if message['role'] == 'user' else eos_token }}{% endfor %}"
)


def base_folder(name: str) -> Path:
    """Return the Hugging Face folder of an embedded base, made on first use.

    The folder lies in ``$GRAO_CACHE``, by default ``~/.cache/grao_lightning``. Several processes
    may make it at once: each writes its own and one of them is kept whole.

    Args:
        name: One of ``BASES``.

    Raises:
        UserError: There is no such base.
    """
    if name not in BASES:
        raise UserError(
            f"model.policy: embedded models are {', '.join(f'embedded:{known}' for known in BASES)}"
            f"; got 'embedded:{name}'"
        )
    cache = cache_folder()
    folder = cache / f"{name}-v{_RECIPE_VERSION}"
    if not (folder / "config.json").exists():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=cache))
        try:
            model, tokenizer = make_base(num_steps=BASES[name])
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            try:
                os.replace(unfinished, folder)
            except OSError:
                assert (folder / "config.json").exists(), f"cannot write {folder}"
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def keyword_tokenizer() -> Any:
    """Return a tokenizer with one token a word and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<bos>", "<sep>", "<eos>", *KEYWORDS, *FILLERS]
    ids = {word: number for number, word in enumerate(vocabulary)}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<sep>"],
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def make_base(num_steps: int, seed: int = 0) -> tuple[Any, Any]:
    """Return a model fine-tuned for ``num_steps`` on the train split's reference answers, and its
    tokenizer.

    The recipe: batches of 64, AdamW at 3e-3, mean cross-entropy over answer tokens.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = keyword_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=64,
                initializer_range=0.08,
                tie_word_embeddings=True,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        ids, labels = _training_tensors(tokenizer)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
        for _ in range(num_steps):
            rows = torch.randint(len(ids), (64,))
            optimizer.zero_grad()
            model(input_ids=ids[rows], labels=labels[rows]).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model.eval(), tokenizer


def _training_tensors(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and labels of the train split; -100 marks tokens that are not learned."""
    pad = tokenizer.pad_token_id
    ids, labels = [], []
    for row in keyword_rows("train"):
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False)
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        answer_ids = tokenizer(row["chosen"][0]["content"], add_special_tokens=False).input_ids
        answer_ids.append(tokenizer.eos_token_id)
        padding = MAX_ANSWER_TOKENS - len(answer_ids)
        ids.append(prompt_ids + answer_ids + [pad] * padding)
        labels.append([-100] * len(prompt_ids) + answer_ids + [-100] * padding)
    return torch.tensor(ids), torch.tensor(labels)
