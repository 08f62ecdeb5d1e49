"""A conversation: its history, its end, and the cache that its turns share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qalora_compile.api.chat import ChatSpec, open_chat
from qalora_compile.api.text_model import folder_sampling, open_text_model
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.runtime.language_model import Context, LanguageModel, Sampling
from qalora_compile.serving.conversation import Conversation
from qalora_compile.serving.text_model import TextModel


@pytest.fixture(scope="module")
def model(chat_edge: Path) -> TextModel:
    return open_text_model(chat_edge, threads=1)


def conversation(model: TextModel, **options: Any) -> Conversation:
    given: dict[str, Any] = {"system": None, "raw": False, "sampling": Sampling()}
    return Conversation(model, **{"max_new_tokens": 6} | given | options)


def fresh(model: TextModel, prompt: list[int], count: int, stop: frozenset[int]) -> list[int]:
    """What the model generates after a prompt that it reads from the start."""
    return list(model.model.generate(prompt, max_new_tokens=count, stop=list(stop)))


def test_the_history_is_read_once_and_the_answers_are_the_same(model: TextModel) -> None:
    talk = conversation(model, system="blue")
    messages, before = [{"role": "system", "content": "blue"}], 0
    for turn, text in enumerate(["red is a", "two", "one is"]):
        messages.append({"role": "user", "content": text})
        prompt = model.chat_tokens(messages)
        answer = talk.ask(text)
        said = "".join(answer.pieces)
        tokens = fresh(model, prompt, 6, model.turn_ends())
        assert said == model.tokenizer.decode(tokens, skip_special_tokens=True)
        assert (answer.prompt, answer.tokens) == (len(prompt), len(tokens))
        assert (answer.reused > 0) == (turn > 0)
        assert answer.reused >= before
        before = answer.prompt
        messages.append({"role": "assistant", "content": said})


def test_the_template_s_own_token_ends_an_answer(model: TextModel, plain_edge: Path) -> None:
    turn = model.tokenizer.convert_tokens_to_ids("number")
    assert turn not in model.ends
    assert model.turn_ends() == model.ends | {turn}
    plain = open_text_model(plain_edge, threads=1)
    assert plain.turn_ends() == plain.ends == frozenset({1})


def test_an_answer_that_is_stopped_stays_in_the_history(model: TextModel) -> None:
    talk = conversation(model)
    answer = talk.ask("red is a")
    said = next(answer.pieces)
    answer.pieces.close()
    assert answer.tokens == 1
    messages = [("user", "red is a"), ("assistant", said), ("user", "two")]
    prompt = model.chat_tokens([{"role": role, "content": text} for role, text in messages])
    assert talk.ask("two").prompt == len(prompt)
    talk.reset()
    assert talk.ask("two").prompt == len(model.chat_tokens([{"role": "user", "content": "two"}]))


def test_a_history_that_is_too_long_is_refused_and_kept(model: TextModel) -> None:
    talk = conversation(model)
    list(talk.ask("red").pieces)
    with pytest.raises(UserInputError, match="more than the 64 tokens of the model's context"):
        talk.ask("red " * 70)
    list(talk.ask("two").pieces)
    everything = conversation(model, max_new_tokens=None, raw=True)
    answer = everything.ask("red is")
    list(answer.pieces)
    assert answer.tokens <= 62


def test_plain_text_goes_on_without_a_template(plain_edge: Path) -> None:
    with pytest.raises(UserInputError, match="no chat template") as caught:
        open_chat(ChatSpec(folder=plain_edge))
    assert "--raw" in str(caught.value.hint)
    talk = open_chat(ChatSpec(folder=plain_edge, raw=True, max_new_tokens=3, threads=1))
    first = talk.ask("red is a")
    said = "".join(first.pieces)
    second = talk.ask(" two")
    encoded = open_text_model(plain_edge).encode(f"red is a{said} two")
    assert (second.prompt, first.prompt) == (len(encoded), 3)


def test_sampling_is_the_folder_s_unless_it_is_given(model: TextModel) -> None:
    assert model.sampling == Sampling(temperature=0.5, top_k=5)
    assert model.ignored == ("min_p 0.0625",)
    spec = ChatSpec(folder=Path("edge"), temperature=0.0, seed=3)
    assert spec.sampling(model.sampling) == Sampling(temperature=0.0, top_k=5, seed=3)
    free = ChatSpec(folder=Path("edge"))
    assert free.sampling(model.sampling).seed != free.sampling(model.sampling).seed
    assert folder_sampling({"temperature": 0.3}, "edge") == (Sampling(), ())
    greedy = folder_sampling({"repetition_penalty": 1.1, "top_k": "x"}, "edge")
    assert greedy == (Sampling(repetition_penalty=1.1), ())
    with pytest.raises(UserInputError, match="top_k is 'x'|top_k is x|top_k is \"x\""):
        folder_sampling({"do_sample": True, "top_k": "x"}, "edge")


@pytest.mark.parametrize(
    "options",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"raw": True, "system": "a"}],
)
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserInputError):
        ChatSpec(folder=Path("edge"), **options)


def test_models_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "encoder_model.onnx").touch()
    with pytest.raises(UnsupportedError, match="generate runs it|decoder alone"):
        open_text_model(tmp_path)
    (tmp_path / "encoder_model.onnx").rename(tmp_path / "openvino_model.xml")
    with pytest.raises(UnsupportedError, match="OpenVINO"):
        open_text_model(tmp_path)


def test_a_context_forgets_what_a_prompt_does_not_begin_with(model: TextModel) -> None:
    context = Context(model.model)
    assert context.rest([2, 3, 4]) == [2, 3, 4]
    context.read([2, 3, 4])
    assert context.rest([2, 3, 4]) == [4]
    assert context.tokens == [2, 3]
    assert {value.shape()[2] for value in context.cache.values()} == {2}
    context.read([4, 5])
    assert context.rest([2, 9, 4, 5]) == [9, 4, 5]
    found = context.read([9, 4, 5])
    again = Context(model.model).read([2, 9, 4, 5])
    assert abs(found - again).max() < 1e-5


def test_a_cache_with_fewer_tokens_is_not_cut(model: TextModel) -> None:
    """As layers with a sliding window may keep them."""
    context = Context(model.model)
    context.read([2, 3, 4])
    context.tokens.append(7)
    assert context.rest([2, 3, 5]) == [2, 3, 5]
    assert context.tokens == []


def test_a_model_without_a_cache_reads_everything(chat_edge: Path) -> None:
    class Uncached(LanguageModel):
        @property
        def cached(self) -> bool:
            return False

        def empty_cache(self, batch: int = 1) -> dict[str, Any]:
            return {}

        def step(self, input_ids: Any, attention_mask: Any, cache: Any) -> Any:
            empty = LanguageModel.empty_cache(self, len(input_ids))
            return LanguageModel.step(self, input_ids, attention_mask, empty)[0], {}

    cached = open_text_model(chat_edge, threads=1).model
    context = Context(Uncached(cached.session))
    prompt = [2, 8, 9]
    expected = list(cached.generate(prompt, max_new_tokens=5))
    found = list(context.model.generate(prompt, max_new_tokens=5, context=context))
    assert found == expected
    more = [*prompt, *found[:2]]
    assert context.rest([*more, 4]) == [4]
