"""Each private or undocumented name of transformers is there and does what this package needs.

There is one case a name. When an upgrade of transformers breaks one, the failing case has its name.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qalora_compile.capture import transformers_internals as internals
from tests.ground.private_names import ENVIRONMENT, UNDOCUMENTED, Cases
from tests.models import llama

CASES = case = Cases()
SEAM = Path(internals.__file__)


def some_llama(**attributes: Any) -> Any:
    """A llama of a class with these attributes."""
    model: Any = llama()
    return type("Some", (type(model),), attributes)(model.config)


def pairs(layers: int = 2, length: int = 3) -> list[dict[str, Tensor]]:
    """Keys and values of a past, `[1, 2, length, 16]`."""
    return [
        {part: torch.rand(1, 2, length, 16) for part in ("key", "value")} for _ in "ab"[:layers]
    ]


@case("transformers.PreTrainedModel._from_config")
def from_config() -> None:
    given: Any = llama()
    made = internals.new_model(type(given), given.config, torch.bfloat16)
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert made.state_dict().keys() == given.state_dict().keys()


@case("transformers.PreTrainedModel._get_dtype_plan")
def dtype_plan() -> None:
    names = {"_keep_in_fp32_modules_strict": ["mlp"], "_keep_in_fp32_modules": ["layers.*.norm"]}
    model = some_llama(**names)
    assert set(internals.kept_in_float32(model, torch.float16)) == {"mlp", "layers.*.norm"}
    assert set(internals.kept_in_float32(model, torch.bfloat16)) == {"mlp"}
    assert not any(internals.kept_in_float32(model, dtype) for dtype in (torch.float32, None))


@case("transformers.PreTrainedModel._keys_to_ignore_on_load_unexpected")
def ignored() -> None:
    model = some_llama(_keys_to_ignore_on_load_unexpected=[r"mtp\.\d+"])
    assert set(internals.ignored_keys(model)) == {r"mtp\.\d+"}
    assert not list(internals.ignored_keys(llama()))


@case("transformers.PreTrainedModel.get_expanded_tied_weights_keys")
def expected_ties() -> None:
    model: Any = llama()
    assert internals.untied_weights(model) == {}
    model.all_tied_weights_keys.clear()
    assert internals.untied_weights(model) == {"lm_head.weight": "model.embed_tokens.weight"}


@case("transformers.PreTrainedModel.all_tied_weights_keys")
def found_ties() -> None:
    model: Any = llama()
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    model.lm_head.weight = torch.nn.Parameter(torch.rand_like(model.lm_head.weight))
    apart = dict(model.state_dict())
    loaded, report = type(model).from_pretrained(
        None, config=model.config, state_dict=apart, output_loading_info=True
    )
    assert report["missing_keys"] == set()
    assert list(internals.untied_weights(loaded)) == ["lm_head.weight"]


@case("transformers.modeling_gguf_pytorch_utils")
@case("transformers.modeling_gguf_pytorch_utils.get_gguf_hf_weights_map")
def gguf_weights() -> None:
    names = internals.gguf_names(llama())
    assert {"token_embd.weight", "blk.1.attn_q.weight", "output_norm.weight"} <= names


@case("transformers.modeling_gguf_pytorch_utils.TENSOR_PROCESSORS")
@case("transformers.modeling_gguf_pytorch_utils.TensorProcessor")
def gguf_processors() -> None:
    from transformers import modeling_gguf_pytorch_utils as files

    assert issubclass(files.TENSOR_PROCESSORS["llama"], files.TensorProcessor)


@case("HF_DEACTIVATE_ASYNC_LOAD")
def one_thread() -> None:
    model: Any = llama()
    threads = set()

    class Lazy:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

        def __getattr__(self, name: str) -> Any:
            return getattr(self.tensor, name)

        def __getitem__(self, index: Any) -> Tensor:
            threads.add(threading.current_thread())
            return self.tensor[index]

    state = {name: Lazy(tensor) for name, tensor in model.state_dict().items()}
    with internals.load_in_one_thread():
        type(model).from_pretrained(None, config=model.config, state_dict=state)
    assert threads == {threading.current_thread()}


@case("transformers.PreTrainedConfig._experts_implementation")
def experts() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    model = MixtralForCausalLM(config).eval()
    before = config._experts_implementation
    assert before not in (None, "batched_mm")
    with internals.batched_experts(model), torch.no_grad(), torch.profiler.profile() as profile:
        assert config._experts_implementation == "batched_mm"
        model(input_ids=torch.ones((1, 2), dtype=torch.int64))
    names = [event.key for event in profile.key_averages()]
    assert "aten::bmm" in names and not any("grouped" in name for name in names)
    assert config._experts_implementation == before


@case("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS")
def attention() -> None:
    calls = []

    def counted(plain: Any) -> Any:
        def attend(*args: Any, **options: Any) -> Any:
            calls.append(args)
            return plain(*args, **options)

        return attend

    model: Any = llama()
    assert model.config._attn_implementation == "sdpa"
    with internals.replaced_attention("sdpa", counted):
        model(input_ids=torch.ones((1, 3), dtype=torch.int64))
    model(input_ids=torch.ones((1, 3), dtype=torch.int64))
    assert len(calls) == 2
    module, query, key = calls[0][:3]
    assert type(module).__name__ == "LlamaAttention"
    assert (query.shape, key.shape) == ((1, 4, 3, 16), (1, 2, 3, 16))


@case("transformers.cache_utils.DynamicLayer")
@case("transformers.cache_utils.DynamicLayer.lazy_initialization")
def cache_of_tensors() -> None:
    past, model = pairs(), llama()
    cache = internals.filled_cache(past)
    assert cache.get_seq_length() == 3
    ids, mask = torch.ones((1, 1), dtype=torch.int64), torch.ones((1, 4), dtype=torch.int64)
    output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    layer = output.past_key_values.layers[1]
    assert layer.keys.shape == layer.values.shape == (1, 2, 4, 16)
    assert torch.equal(layer.keys[:, :, :3], past[1]["key"])


@case("transformers.cache_utils.DynamicLayer.is_initialized")
def cache_that_records() -> None:
    cache, (first, second) = internals.recording_cache(2), pairs()
    for part in (cache.self_attention_cache, cache.cross_attention_cache):
        found = part.update(first["key"], first["value"], 1)
        assert found[0] is first["key"] and part.layers[1].keys is first["key"]
        assert part.layers[1].values is first["value"] and part.layers[1].is_initialized
        assert part.get_seq_length(1) == 3 and part.get_seq_length(0) == 0
    assert (
        cache.self_attention_cache.update(second["key"], second["value"], 0)[1] is second["value"]
    )


def rotary(kind: str) -> Any:
    """The rotary embedding of a llama; its frequencies follow the length of the text."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    model: Any = llama(rope_parameters=rope)
    return model.model.rotary_emb


@case("rotary_emb.rope_type")
def types_of_rope() -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    assert internals.rope_types(rotary("dynamic")) == {None: "dynamic"}
    assert internals.rope_types(torch.nn.Linear(1, 1)) == {}
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    model: Any = Gemma3ForCausalLM(config)
    types = internals.rope_types(model.model.rotary_emb)
    assert types == {"sliding_attention": "default", "full_attention": "default"}


@case("transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS")
def frequencies() -> None:
    module = rotary("dynamic")
    cpu = torch.device("cpu")
    short, long = (
        internals.rope_frequencies(module.config, "dynamic", cpu, seq_len=torch.tensor(length))
        for length in (8, 4 * module.config.max_position_embeddings)
    )
    assert torch.equal(short, module.inv_freq) and bool((long[1:] < short[1:]).all())


@case("rotary_emb.original_inv_freq")
def original_frequencies() -> None:
    module = rotary("dynamic")
    assert torch.equal(internals.first_frequencies(module, None), module.inv_freq)


@case("rotary_emb.inv_freq")
def other_frequencies() -> None:
    module = rotary("linear")
    other: Any = internals.with_frequencies(module, None, torch.zeros_like(module.inv_freq))
    x, positions = torch.rand(1, 4, 64), torch.arange(4)[None]
    cos, sin = other(x, positions)
    assert bool((cos == 1).all()) and bool((sin == 0).all())
    assert bool((module(x, positions)[1] != 0).any())


@pytest.mark.parametrize("name", CASES)
def test_private_name(name: str) -> None:
    CASES[name]()


def test_every_private_name_has_a_case() -> None:
    assert CASES.without_case(SEAM) == []
    # Names of buffers, of which the seam makes the texts.
    assert CASES.without_use(SEAM) == ["rotary_emb.inv_freq", "rotary_emb.original_inv_freq"]
    known = {name.rpartition(".")[2] for name in CASES}
    assert known >= UNDOCUMENTED | ENVIRONMENT
