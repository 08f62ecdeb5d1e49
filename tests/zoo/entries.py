"""The zoo: models built from configuration with random weights, and inputs of any size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tests.zoo import modules
from tests.zoo.architectures import LAYERS

VOCABULARY = 128
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes:
        name: Of the architecture.
        build: Makes the model, in evaluation mode; one of `transformers` with `layers`, if given.
        inputs: Makes arguments and keyword arguments for a batch, a sequence length and a seed.
        fixed: Axes that the model itself fixes: `batch`, `sequence`; a reason each.
    """

    name: str
    build: Callable[..., nn.Module]
    inputs: Callable[[int, int, int], Inputs]
    fixed: dict[str, str] | None = None


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _ids(batch: int, sequence: int, seed: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, sequence), generator=_generator(seed))


def _tokens(batch: int, sequence: int, seed: int) -> Inputs:
    mask = torch.ones(batch, sequence, dtype=torch.long)
    return (), {"input_ids": _ids(batch, sequence, seed), "attention_mask": mask}


def _pair(batch: int, sequence: int, seed: int) -> Inputs:
    args, kwargs = _tokens(batch, sequence, seed)
    return args, kwargs | {"decoder_input_ids": _ids(batch, sequence + 1, seed + 1)}


def _image(batch: int, seed: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=_generator(seed))


def _pixels(batch: int, sequence: int, seed: int) -> Inputs:
    return (), {"pixel_values": _image(batch, seed)}


def _text_and_image(batch: int, sequence: int, seed: int) -> Inputs:
    args, kwargs = _tokens(batch, sequence, seed)
    return args, kwargs | {"pixel_values": _image(batch, seed)}


def _image_prompt(batch: int, sequence: int, seed: int) -> Inputs:
    """Sixteen image tokens (number 1) stand before the text."""
    ids = torch.cat([torch.ones(batch, 16, dtype=torch.long), _ids(batch, sequence, seed)], dim=1)
    return (), {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": _image(batch, seed),
    }


def _mel(batch: int, sequence: int, seed: int) -> Inputs:
    features = torch.randn(batch, 16, 100, generator=_generator(seed))
    return (), {"input_features": features, "decoder_input_ids": _ids(batch, sequence, seed)}


def _wave(batch: int, sequence: int, seed: int) -> Inputs:
    return (), {"input_values": torch.randn(batch, 40 * sequence, generator=_generator(seed))}


def _vectors(batch: int, sequence: int, seed: int) -> Inputs:
    return (torch.randn(batch, sequence, modules.WIDTH, generator=_generator(seed)),), {}


def _two_vectors(batch: int, sequence: int, seed: int) -> Inputs:
    (x,), _ = _vectors(batch, sequence, seed)
    (memory,), _ = _vectors(batch, sequence + 3, seed + 1)
    return (x, memory), {}


def _images(batch: int, sequence: int, seed: int) -> Inputs:
    return (_image(batch, seed),), {}


def _only_ids(batch: int, sequence: int, seed: int) -> Inputs:
    return (_ids(batch, sequence, seed),), {}


def _structured(batch: int, sequence: int, seed: int) -> Inputs:
    (text,), _ = _vectors(batch, sequence, seed)
    image = torch.randn(batch, 32, generator=_generator(seed + 1))
    return (), {"text": text, "features": {"image": image}, "normalize": True}


_LM = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "use_cache": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}


def _hf(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """Builds a transformers model from a configuration class and its options."""

    def build(layers: int | None = None) -> nn.Module:
        import transformers

        chosen = {k: layers or v if k in LAYERS else v for k, v in options.items()}
        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**chosen))
        return made.eval()

    return build


def _clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    text = _ENCODER | {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=32)).eval()


def _llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    vision = CLIPVisionConfig(**_VISION)
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**_LM),
        image_token_index=1,
        image_seq_length=16,
    )
    return Llava(config).eval()


def _plain(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: build().eval()


def _symbolic_trace() -> nn.Module:
    """A graph that the user holds already."""
    return fx.symbolic_trace(modules.Looped()).eval()


_WAV2VEC2 = {
    **{k: v for k, v in _ENCODER.items() if k != "max_position_embeddings"},
    "conv_dim": (32, 32),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
}
_MOE = {"num_experts_per_tok": 2, "output_router_logits": False}

_UNROLLED = {"sequence": "torch.export unrolls its loop over time"}

ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("llama", _hf("LlamaForCausalLM", "LlamaConfig", **_LM), _tokens),
        Entry("qwen2", _hf("Qwen2ForCausalLM", "Qwen2Config", **_LM), _tokens),
        Entry("qwen3", _hf("Qwen3ForCausalLM", "Qwen3Config", **_LM, head_dim=16), _tokens),
        Entry(
            "gemma3",
            _hf("Gemma3ForCausalLM", "Gemma3TextConfig", **_LM, head_dim=16, sliding_window=8),
            _tokens,
        ),
        Entry("phi3", _hf("Phi3ForCausalLM", "Phi3Config", **_LM), _tokens),
        Entry(
            "gpt2",
            _hf(
                "GPT2LMHeadModel",
                "GPT2Config",
                vocab_size=VOCABULARY,
                n_embd=64,
                n_layer=2,
                n_head=4,
                n_positions=128,
                use_cache=False,
                bos_token_id=0,
                eos_token_id=0,
            ),
            _tokens,
        ),
        Entry(
            "gpt-neox",
            _hf(
                "GPTNeoXForCausalLM",
                "GPTNeoXConfig",
                **{k: v for k, v in _LM.items() if k != "num_key_value_heads"},
            ),
            _tokens,
        ),
        Entry(
            "mixtral",
            _hf("MixtralForCausalLM", "MixtralConfig", **_LM, **_MOE, num_local_experts=4),
            _tokens,
        ),
        Entry(
            "qwen3-moe",
            _hf(
                "Qwen3MoeForCausalLM",
                "Qwen3MoeConfig",
                **_LM,
                **_MOE,
                head_dim=16,
                num_experts=4,
                moe_intermediate_size=32,
                decoder_sparse_step=1,
            ),
            _tokens,
        ),
        Entry(
            "mamba",
            _hf(
                "MambaForCausalLM",
                "MambaConfig",
                vocab_size=VOCABULARY,
                hidden_size=64,
                num_hidden_layers=2,
                state_size=8,
                use_cache=False,
            ),
            _tokens,
            _UNROLLED,
        ),
        Entry("bert", _hf("BertForSequenceClassification", "BertConfig", **_ENCODER), _tokens),
        Entry(
            "roberta",
            _hf("RobertaForMaskedLM", "RobertaConfig", **_ENCODER, pad_token_id=1),
            _tokens,
        ),
        Entry(
            "deberta",
            _hf(
                "DebertaV2Model",
                "DebertaV2Config",
                **_ENCODER,
                relative_attention=True,
                pos_att_type=["p2c", "c2p"],
                max_relative_positions=-1,
                position_buckets=16,
                norm_rel_ebd="layer_norm",
                share_att_key=True,
            ),
            _tokens,
        ),
        Entry("albert", _hf("AlbertModel", "AlbertConfig", **_ENCODER, embedding_size=32), _tokens),
        Entry(
            "t5",
            _hf(
                "T5ForConditionalGeneration",
                "T5Config",
                vocab_size=VOCABULARY,
                d_model=64,
                d_kv=16,
                d_ff=96,
                num_layers=2,
                num_heads=4,
                use_cache=False,
                decoder_start_token_id=0,
            ),
            _pair,
        ),
        Entry("bart", _hf("BartForConditionalGeneration", "BartConfig", **_SEQ2SEQ), _pair),
        Entry(
            "whisper",
            _hf(
                "WhisperForConditionalGeneration",
                "WhisperConfig",
                **_SEQ2SEQ,
                num_mel_bins=16,
                max_source_positions=50,
                max_target_positions=64,
            ),
            _mel,
        ),
        Entry("wav2vec2", _hf("Wav2Vec2ForCTC", "Wav2Vec2Config", **_WAV2VEC2), _wave),
        Entry(
            "vit",
            _hf("ViTForImageClassification", "ViTConfig", **_VISION, num_labels=5),
            _pixels,
        ),
        Entry("clip", _clip, _text_and_image),
        Entry("llava", _llava, _image_prompt, {"batch": "its image features are split by image"}),
        Entry("sequential", _plain(modules.sequential), _vectors),
        Entry("resnet", _plain(modules.ConvNet), _images),
        Entry("conv1d", _plain(modules.Pointwise), _vectors),
        Entry("self-attention", _plain(modules.SelfAttention), _vectors),
        Entry("cross-attention", _plain(modules.CrossAttention), _two_vectors),
        Entry("transformer-encoder", _plain(modules.Encoder), _vectors),
        Entry("lstm", _plain(lambda: modules.Recurrent(nn.LSTM)), _vectors, _UNROLLED),
        Entry("gru", _plain(lambda: modules.Recurrent(nn.GRU)), _vectors, _UNROLLED),
        Entry("tied", _plain(modules.Tied), _only_ids),
        Entry("looped", _plain(modules.Looped), _vectors),
        Entry("structured", _plain(modules.Structured), _structured),
        Entry("odd-readings", _plain(modules.OddReadings), _vectors),
        Entry("batched-experts", _plain(modules.BatchedExperts), _vectors),
        Entry("symbolic-trace", _symbolic_trace, _vectors),
    )
}
