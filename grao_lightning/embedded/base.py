"""The embedded base models: made here in seconds by supervised fine-tuning, then kept.

Llamas of about 100k parameters and their tokenizers, all plain Hugging Face objects, so that
everything downstream treats them like any other model. That of the keyword task knows its 36 words;
that of the phrases reads any text, and has read next to none.
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
from grao_lightning.embedded.phrases import phrase_rows
from grao_lightning.faults import UserError
from grao_lightning.files import cache_folder

# Steps of supervised fine-tuning that a base has seen.
BASES = {"keywords": 400, "keywords-weak": 60, "keywords-random": 0, "phrases": 100}
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
            model, tokenizer = make_base(BASES[name], task=name.partition("-")[0])
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


def phrase_tokenizer() -> Any:
    """Return a byte-pair tokenizer of 512 tokens, learned from the phrases, for any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<sep>", "<eos>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for row in phrase_rows("train") for text in row.values())
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<sep>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE.replace("' <sep>'", "'<sep>'")
    return tokenizer


def make_base(num_steps: int, seed: int = 0, task: str = "keywords") -> tuple[Any, Any]:
    """Return a model fine-tuned for ``num_steps`` on the train split's reference answers, and its
    tokenizer.

    The recipe: batches of 64, AdamW at 3e-3, mean cross-entropy over answer tokens.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = phrase_tokenizer() if task == "phrases" else keyword_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=2048 if task == "phrases" else 64,
                initializer_range=0.08,
                tie_word_embeddings=True,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        ids, labels = _training_tensors(tokenizer, task)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
        for _ in range(num_steps):
            rows = torch.randint(len(ids), (64,))
            optimizer.zero_grad()
            model(input_ids=ids[rows], labels=labels[rows]).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model.eval(), tokenizer


def _training_tensors(tokenizer: Any, task: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and labels of the train split; -100 marks tokens that are not learned."""
    ids, labels = [], []
    for question, answer in _phrase_pairs() if task == "phrases" else _keyword_pairs():
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        answer_ids = tokenizer(answer, add_special_tokens=False).input_ids
        answer_ids.append(tokenizer.eos_token_id)
        ids.append(prompt_ids + answer_ids)
        labels.append([-100] * len(prompt_ids) + answer_ids)
    longest = max(map(len, ids))
    if task == "keywords":  # the width is a part of its recipe: sums of floats depend on it
        longest = len(prompt_ids) + MAX_ANSWER_TOKENS
    return (
        torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in ids]),
        torch.tensor([row + [-100] * (longest - len(row)) for row in labels]),
    )


def _keyword_pairs() -> list[tuple[str, str]]:
    rows = keyword_rows("train")
    return [(row["prompt"][0]["content"], row["chosen"][0]["content"]) for row in rows]


def _phrase_pairs() -> list[tuple[str, str]]:
    """Return each answer to many questions, so that the base has something left to learn."""
    rows = phrase_rows("train")
    return [
        (row["prompt"], rows[(number + shift) % len(rows)]["completion"])
        for shift in range(0, len(rows), 5)
        for number, row in enumerate(rows)
    ]
