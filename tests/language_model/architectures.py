"""Tiny random models of many architectures of transformers: the rows of the table of architectures.

`ARCHITECTURES` is in every run of the tests, `FURTHER` behind the marker `exhaustive`.
"""

from typing import Any

import torch

VOCABULARY = 120
#: Padding is the end of sequence, as in many published tokenizers.
END = 2
#: An option of `_SMALL` that a family is to choose for itself.
_ITS_OWN = object()

#: Options of all families; each takes those that its configuration knows.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": END,
    "bos_token_id": 1,
    "eos_token_id": END,
    # experts
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    # latent attention
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    # selected keys
    "index_topk": 8,
    "index_head_dim": 8,
    "index_n_heads": 4,
    # linear attention and recurrence
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "shared_expert_intermediate_size": 16,
}
_FULL = ["full_attention"] * 2
_WINDOW = ["sliding_attention", "full_attention"]
_LINEAR = ["linear_attention", "full_attention"]
_ENCODER_DECODER: dict[str, Any] = {
    "d_model": 32,
    "decoder_layers": 2,
    "encoder_layers": 1,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "is_decoder": True,
    "is_encoder_decoder": False,
    "dropout": 0.0,
}
_GPT2: dict[str, Any] = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_BERT: dict[str, Any] = {
    "is_decoder": True,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
#: From 24 tokens on a row is read with other frequencies.
_LONGROPE: dict[str, Any] = {
    "max_position_embeddings": 96,
    "original_max_position_embeddings": 24,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 3.0, 6.0, 12.0],
        "original_max_position_embeddings": 24,
    },
}
_DYNAMIC: dict[str, Any] = {
    "max_position_embeddings": 16,
    "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
}
_LLAMA4: dict[str, Any] = {
    "intermediate_size_mlp": 48,
    "attention_chunk_size": 8,
    "interleave_moe_layer_step": 2,
}

#: name -> (type of the model, options); the name is the type unless given.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    # dense decoders
    "llama": ("llama", {}),
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "bitnet": ("bitnet", {}),
    "cohere": ("cohere", {}),
    "diffllama": ("diffllama", {}),
    "ernie4_5": ("ernie4_5", {}),
    "falcon": ("falcon", {"head_dim": _ITS_OWN, "multi_query": False}),
    "gemma": ("gemma", {}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "gpt2": ("gpt2", _GPT2),
    "gpt_bigcode": ("gpt_bigcode", _GPT2),
    "gpt_neo": ("gpt_neo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]],
                            "window_size": 8}),
    "gpt_neox": ("gpt_neox", {}),
    "gptj": ("gptj", {"rotary_dim": 4, **_GPT2}),
    "granite": ("granite", {"logits_scaling": 3.0}),
    "helium": ("helium", {}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {}),
    "minicpm3": ("minicpm3", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mpt": ("mpt", {"d_model": 32, "expansion_ratio": 2, "max_seq_len": 128}),
    "bloom": ("bloom", {}),
    "nanochat": ("nanochat", {}),
    "nemotron": ("nemotron", {}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "opt": ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.0}),
    "biogpt": ("biogpt", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "persimmon": ("persimmon", {}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "seed_oss": ("seed_oss", {"attention_dropout": 0.0, "residual_dropout": 0.0}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "xglm": ("xglm", {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4,
                      "dropout": 0.0, "attention_dropout": 0.0}),
    # experts
    "deepseek_v2": ("deepseek_v2", {"num_key_value_heads": 4, "first_k_dense_replace": 1}),
    "deepseek_v3": ("deepseek_v3", {"num_key_value_heads": 4, "first_k_dense_replace": 1,
                                    "head_dim": _ITS_OWN}),
    "ernie4_5_moe": ("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2}),
    "glm4_moe": ("glm4_moe", {"first_k_dense_replace": 1}),
    "glm4_moe_lite": ("glm4_moe_lite", {"num_key_value_heads": 4}),
    "granitemoe": ("granitemoe", {"logits_scaling": 3.0}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"moe_topk": 2}),
    "jetmoe": ("jetmoe", {"num_attention_heads": _ITS_OWN, "kv_channels": 8}),
    "mixtral": ("mixtral", {}),
    "olmoe": ("olmoe", {}),
    "phimoe": ("phimoe", {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    # windows, caps, chunks
    "cohere2": ("cohere2", {"layer_types": _WINDOW, "sliding_window": 8}),
    "exaone4": ("exaone4", {"layer_types": _WINDOW, "sliding_window": 8}),
    "gemma2": ("gemma2", {"sliding_window": 8}),
    "gemma3_text": ("gemma3_text", {"layer_types": _WINDOW, "sliding_window": 8}),
    "gpt_oss": ("gpt_oss", {"sliding_window": 8}),
    "llama4_text": ("llama4_text", _LLAMA4),
    "mistral, window": ("mistral", {"sliding_window": 8}),
    "olmo3": ("olmo3", {"layer_types": _WINDOW, "sliding_window": 8}),
    "vaultgemma": ("vaultgemma", {"sliding_window": 8}),
    # recurrent and mixed
    "falcon_mamba": ("falcon_mamba", {"state_size": 8, "expand": 2}),
    "jamba": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1,
                        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_dt_rank": 4,
                        "mamba_d_state": 8, "use_mamba_kernels": False}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "mamba": ("mamba", {"state_size": 8}),
    "minimax": ("minimax", {"block_size": 16}),
    "qwen3_next": ("qwen3_next", {"layer_types": _LINEAR}),
    "recurrent_gemma": ("recurrent_gemma", {"num_hidden_layers": 3, "lru_width": 32,
                                            "attention_window_size": 8}),
    "rwkv": ("rwkv", {"attention_hidden_size": 32}),
    # decoders of other designs
    "bart": ("bart", _ENCODER_DECODER),
    "bert": ("bert", _BERT),
    "xlm": ("xlm", {"n_words": VOCABULARY, "emb_dim": 32, "n_layers": 2, "n_heads": 4,
                    "causal": True, "dropout": 0.0, "attention_dropout": 0.0}),
    # what one family does by its configuration
    "phi3, longrope": ("phi3", _LONGROPE),
    "phi3, longrope and window": ("phi3", {**_LONGROPE, "sliding_window": 90}),
    "minicpm3, longrope": ("minicpm3", {**_LONGROPE, "num_key_value_heads": 4,
                                        "head_dim": _ITS_OWN, "qk_rope_head_dim": 8}),
    "llama, dynamic NTK": ("llama", _DYNAMIC),
    "gpt_oss, full layers": ("gpt_oss", {"layer_types": _FULL, "sliding_window": 0}),
    "glm_moe_dsa, full layers": ("glm_moe_dsa", {"layer_types": _FULL, "num_key_value_heads": 4}),
    "deepseek_v32, full layers": ("deepseek_v32", {"layer_types": _FULL,
                                                   "num_key_value_heads": 4}),
    "llama4_text, full layers": ("llama4_text", {**_LLAMA4, "layer_types": _FULL}),
    "cohere, logit scale": ("cohere", {"logit_scale": 0.3}),
    "hrm_text": ("hrm_text", {}),
    "dory": ("dory", {"layer_types": _FULL}),
    "gpt2, positions of 64": ("gpt2", {**_GPT2, "max_position_embeddings": 64}),
}  # fmt: skip

_OTHERS = """
afmoe apertus1p5_text aria_text bailing_hybrid beam cohere2_moe cpmant ctrl cwm deepseek_v4 doge
exaone exaone_moe flex_olmo flint granite_swa granitemoe_swa granitemoeshared hy_v3 hy_v4
hyperclovax inkling_text internlm3 iquestcoder jais2 kolibri1 laguna lara_mini lfm3 mellum
mimo_v2_flash minimax_m2 minimax_m3_vl_text ministral ministral3 modernbert-decoder olmo_hybrid
qwen3_5_moe_text qwen3_5_text qwen4_exp_text sarvam_mla sarvam_moe solar_open
"""
_ENCODERS = """
bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta
roberta-prelayernorm roformer xlm-roberta xlm-roberta-xl
"""
#: Whatever else transformers knows as a causal language model and builds small from such options.
FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in _OTHERS.split()},
    **{kind: (kind, _BERT) for kind in _ENCODERS.split()},
    **{kind: (kind, _GPT2) for kind in ("gpt-sw3", "openai-gpt")},
    **{kind: (kind, {"dropout": 0.0}) for kind in ("blenderbot-small", "trocr")},
    "gpt_neox_japanese": ("gpt_neox_japanese", {"attention_dropout": 0.0, "hidden_dropout": 0.0}),
}


def config_of(name: str, **options: Any) -> Any:
    """Return the configuration of an architecture, ``options`` over those of the table."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, own = (ARCHITECTURES | FURTHER)[name]
    family = CONFIG_MAPPING[kind]
    known = family()
    small = {option: value for option, value in _SMALL.items() if hasattr(known, option)}
    chosen = {key: value for key, value in (small | own).items() if value is not _ITS_OWN}
    return family(**(chosen | options))


def build(name: str, std: float = 0.2, **options: Any) -> Any:
    """Return an architecture's model in evaluation mode with random matrices of this spread."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, std)
    return model.eval()
