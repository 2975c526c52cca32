"""A tiny BERT with a tokenizer of whole words, as a folder, for tests of encoders."""

from pathlib import Path
from typing import Any

import torch


def tiny_encoder_folder(folder: Path, **options: Any) -> str:
    """Write a random BERT of the keyword task's words, and return its folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    from grao_lightning.embedded.keywords import FILLERS, KEYWORDS

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = [*special, *KEYWORDS, *FILLERS, "Human", "Assistant", ":"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    sizes = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    }
    torch.manual_seed(0)
    BertModel(BertConfig(**{**sizes, **options})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
