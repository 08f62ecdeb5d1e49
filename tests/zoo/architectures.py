"""Architectures of transformers, built small from configuration by one set of sizes.

Most configurations share their names of sizes, so that a class is given those of `SIZES` that its
configuration has. `OTHERS` says what a class needs beside them.
"""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 384
LAYERS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    *("encoder_layers", "decoder_layers", "num_decoder_layers"),
)
"""The names of the number of layers."""
SIZES: dict[str, Any] = {
    # widths
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "shared_expert_size"), 32),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "mamba_d_head"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 16),
    "embedding_size": 64,
    "hidden_size_per_layer_input": 16,
    "rotary_dim": 8,
    "mamba_d_state": 8,
    # numbers of parts
    **dict.fromkeys(LAYERS, 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "moe_num_experts": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "mamba_n_heads": 8,
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    # texts and images
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    "sliding_window": 16,
    "attention_window": 8,
    "image_size": 32,
    "patch_size": 8,
    # tokens
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_ONLY_IF_SET = frozenset(("sliding_window", "n_inner", "head_dim", "q_lora_rank"))
"""What changes the kind of model where its configuration leaves it out."""

_LATENT = {"num_key_value_heads": 4}
OTHERS: dict[str, dict[str, Any]] = {
    "DeepseekV2ForCausalLM": _LATENT,
    "DeepseekV3ForCausalLM": _LATENT,
    "MiniCPM3ForCausalLM": _LATENT,
    "YoutuForCausalLM": _LATENT,
    "Ernie4_5_MoeForCausalLM": {"moe_k": 2},
    **{
        f"{name}ForConditionalGeneration": {"decoder_start_token_id": 0}
        for name in ("LongT5", "MT5", "PLBart", "SwitchTransformers", "T5")
    },
    # one layer that keeps a state, and one of attention
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["mamba", "attention"]},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Qwen3NextForCausalLM": {"layer_types": ["linear_attention", "full_attention"]},
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 3},
}

DENSE = (
    "Apertus",
    "Arcee",
    "BioGpt",
    "BitNet",
    "Bloom",
    "CodeGen",
    "Cohere",
    "Cohere2",
    "Cwm",
    "DiffLlama",
    "Doge",
    "Ernie4_5",
    "Exaone4",
    "GPTBigCode",
    "GPTJ",
    "GPTNeoX",
    "Gemma",
    "Gemma2",
    "Glm",
    "Glm4",
    "Granite",
    "Helium",
    "HyperCLOVAX",
    "Jais2",
    "Llama",
    "MiniCPM3",
    "Ministral3",
    "Mistral",
    "ModernBertDecoder",
    "Mpt",
    "NanoChat",
    "Nemotron",
    "OPT",
    "Olmo",
    "Olmo2",
    "Olmo3",
    "Persimmon",
    "Phi",
    "Phi3",
    "Qwen2",
    "Qwen3",
    "SeedOss",
    "SmolLM3",
    "StableLm",
    "Starcoder2",
    "VaultGemma",
    "XGLM",
    "Youtu",
)
EXPERTS = (
    "Afmoe",
    "DeepseekV2",
    "DeepseekV3",
    "Dots1",
    "Ernie4_5_Moe",
    "FlexOlmo",
    "Glm4Moe",
    "GptOss",
    "GraniteMoe",
    "JetMoe",
    "Llama4",
    "MiniMaxM2",
    "Mixtral",
    "Olmoe",
    "Phimoe",
    "Qwen2Moe",
    "Qwen3Moe",
)
STATES = (
    "Bamba",
    "FalconMamba",
    "GraniteMoeHybrid",
    "Jamba",
    "Lfm2",
    "Mamba",
    "Qwen3Next",
    "RecurrentGemma",
    "Rwkv",
)
DECODERS = (
    *tuple(f"{name}ForCausalLM" for name in (*DENSE, *EXPERTS, *STATES)),
    "CTRLLMHeadModel",
    "GPT2LMHeadModel",
    "OpenAIGPTLMHeadModel",
)
ENCODER_DECODERS = (
    *tuple(
        f"{name}ForConditionalGeneration"
        for name in [
            "Bart",
            "Blenderbot",
            "LED",
            "LongT5",
            "M2M100",
            "MBart",
            "MT5",
            "NllbMoe",
            "PLBart",
            "Pegasus",
            "SwitchTransformers",
            "T5",
            "Whisper",
        ]
    ),
    "MarianMTModel",
)
ENCODERS = tuple(
    f"{name}ForSequenceClassification"
    for name in [
        "Albert",
        "Bert",
        "Camembert",
        "ConvBert",
        "Deberta",
        "DebertaV2",
        "DistilBert",
        "Electra",
        "Ernie",
        "EuroBert",
        "Gte",
        "Longformer",
        "MPNet",
        "MegatronBert",
        "MobileBert",
        "ModernBert",
        "NomicBert",
        "RemBert",
        "RoFormer",
        "Roberta",
        "SqueezeBert",
        "XLMRoberta",
    ]
)
IMAGES = tuple(f"{name}ForImageClassification" for name in ["Beit", "DeiT", "Dinov2", "ViT"])
SOUNDS = tuple(f"{name}ForSequenceClassification" for name in ["Hubert", "Wav2Vec2", "WavLM"])
WITHOUT_CACHE = (
    *(f"{name}ForCausalLM" for name in STATES),
    "OpenAIGPTLMHeadModel",
    "SwitchTransformersForConditionalGeneration",  # its encoder refuses to be asked for one
)
"""Decoders that keep something else than keys and values, or nothing."""
LOADED_OTHERWISE = {"YoutuForCausalLM": "computes model.embed_tokens.weight in place"}
"""What transformers loads otherwise than it is stored, and the refusal: it zeroes a row."""
ARCHITECTURES = (*DECODERS, *ENCODER_DECODERS, *ENCODERS, *IMAGES, *SOUNDS)


def configuration(name: str, layers: int = 2) -> Any:
    """The small configuration of a class."""
    import transformers

    kind = getattr(transformers, name).config_class
    default, other = kind(), set(kind.attribute_map)
    chosen = {}
    for setting, value in (SIZES | dict.fromkeys(LAYERS, layers)).items():
        if setting in other or not hasattr(default, setting):
            continue
        before = getattr(default, setting)
        if not isinstance(before, (list, dict)) and not (
            before is None and setting in _ONLY_IF_SET
        ):
            chosen[setting] = value
    return kind(**chosen | OTHERS.get(name, {}))


def build(name: str, layers: int = 2) -> Any:
    """The model with random weights, the same in every run, in evaluation mode."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, name)(configuration(name, layers)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)  # a router of zeros finds all experts alike
    return model
