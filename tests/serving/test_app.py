"""The server through OpenAI's client: chats, texts, streams, vectors, limits, hostile input."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from qalora_compile.api.text_model import open_text_model
from qalora_compile.cli.main import main
from qalora_compile.serving.text_model import TextModel
from tests.serving.live import serving

openai = pytest.importorskip("openai", reason="the extra `serve` and the openai client")
httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
ASK = [{"role": "user", "content": "red is a"}]


@pytest.fixture(scope="module")
def model(chat_edge: Path) -> TextModel:
    return open_text_model(chat_edge, threads=1)


@pytest.fixture(scope="module")
def address(chat_edge: Path) -> Iterator[str]:
    limits = {"max_tokens": 40, "max_body": 20_000, "max_inputs": 4}
    with serving(chat_edge, name="tiny", limits=limits) as url:
        yield url


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def greedy(model: TextModel, prompt: list[int], count: int, ends: frozenset[int]) -> list[int]:
    return list(model.model.generate(prompt, max_new_tokens=count, stop=list(ends)))


def written(model: TextModel, tokens: list[int]) -> str:
    return str(model.tokenizer.decode(tokens, skip_special_tokens=True))


@pytest.mark.slow
def test_a_chat_has_the_model_s_own_answer(client: Any, model: TextModel) -> None:
    prompt = model.chat_tokens(ASK)
    expected = greedy(model, prompt, 6, model.turn_ends())
    answer = client.chat.completions.create(model="tiny", messages=ASK, temperature=0, max_tokens=6)
    (choice,) = answer.choices
    assert choice.message.content == written(model, expected)
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(expected) == 6
    assert answer.model == "tiny"


def test_a_stream_is_the_same_text_in_pieces(client: Any) -> None:
    wanted = {"model": "tiny", "messages": ASK, "temperature": 0, "max_completion_tokens": 6}
    complete = client.chat.completions.create(**wanted)
    chunks = list(
        client.chat.completions.create(
            **wanted, stream=True, stream_options={"include_usage": True}
        )
    )
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == complete.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == complete.usage and chunks[-2].choices[0].finish_reason == "length"
    parts = list(client.completions.create(model="tiny", prompt="two", stream=True, max_tokens=3))
    assert parts[-1].choices[0].finish_reason in ("stop", "length")


def test_completions_of_several_texts_and_tokens(client: Any, model: TextModel) -> None:
    prompts = ["red is a", "two is", "one"]
    found = client.completions.create(
        model="tiny", prompt=prompts, max_tokens=5, temperature=0, n=2
    )
    assert [choice.index for choice in found.choices] == list(range(6))
    for index, choice in enumerate(found.choices):
        tokens = greedy(model, model.encode(prompts[index // 2]), 5, model.ends)
        assert choice.text == written(model, tokens)
    given = client.completions.create(
        model="tiny", prompt=model.encode("two is"), max_tokens=5, temperature=0
    )
    assert given.choices[0].text == found.choices[2].text
    assert given.usage.prompt_tokens == 2


def test_the_seed_repeats_an_answer(client: Any) -> None:
    def sample(seed: int | None, **options: Any) -> str:
        answer = client.chat.completions.create(
            model="tiny", messages=ASK, temperature=2, top_p=1, max_tokens=12, seed=seed,
            extra_body={"top_k": 0}, **options,
        )  # fmt: skip
        return str([choice.message.content for choice in answer.choices])

    assert sample(7) == sample(7)
    assert len({sample(seed) for seed in range(5)}) > 1
    assert len({sample(None) for _ in range(5)}) > 1
    several = client.chat.completions.create(
        model="tiny", messages=ASK, temperature=2, max_tokens=12, seed=-1, n=5,
        extra_body={"top_k": 0},
    )  # fmt: skip
    assert len({choice.message.content for choice in several.choices}) > 1


def test_stop_strings_end_a_text_unseen(client: Any) -> None:
    wanted = {"model": "tiny", "prompt": "red is a", "temperature": 0, "max_tokens": 12}
    free = client.completions.create(**wanted).choices[0].text
    stop = free.split()[1]
    cut = client.completions.create(**wanted, stop=[stop, "never"]).choices[0]
    assert (cut.text, cut.finish_reason) == (free[: free.index(stop)], "stop")
    chunks = client.completions.create(**wanted, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == cut.text


def test_logprobs_are_those_of_the_model(client: Any, model: TextModel) -> None:
    prompt = model.encode("red is a")
    logits = model.model.logits(np.array([prompt], np.int64))[0, -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    text = client.completions.create(
        model="tiny", prompt="red is a", max_tokens=2, temperature=0, logprobs=3
    )
    found = text.choices[0].logprobs
    assert found.token_logprobs[0] == pytest.approx(expected.max(), abs=1e-4)
    assert len(found.tokens) == len(found.top_logprobs) == 2
    assert sorted(found.top_logprobs[0].values()) == pytest.approx(sorted(expected)[-3:], abs=1e-4)
    chat = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=2, temperature=0, logprobs=True, top_logprobs=2
    )
    rows = chat.choices[0].logprobs.content
    assert len(rows) == 2 and rows[0].logprob == rows[0].top_logprobs[0].logprob
    assert bytes(rows[0].bytes).decode() == rows[0].token


def test_the_folder_s_sampling_is_the_default(client: Any, model: TextModel) -> None:
    """It samples from five tokens at temperature 0.5; top_p 0 is the likeliest token."""
    wanted = {"model": "tiny", "messages": ASK, "max_tokens": 20}
    answers = {
        client.chat.completions.create(**wanted).choices[0].message.content for _ in range(6)
    }
    assert len(answers) > 1
    likeliest = client.chat.completions.create(**wanted, top_p=0).choices[0].message.content
    tokens = greedy(model, model.chat_tokens(ASK), 20, model.turn_ends())
    assert likeliest == written(model, tokens)


def test_a_hundred_requests_at_once_have_their_own_answers(client: Any, model: TextModel) -> None:
    words = ["red", "green", "blue", "one", "two", "three"]
    prompts = [" ".join(words[(i + j) % 6] for j in range(1 + i % 7)) for i in range(100)]
    expected = [
        written(model, greedy(model, model.encode(text), 3 + i % 20, model.ends))
        for i, text in enumerate(prompts)
    ]

    def ask(index: int) -> str:
        made = client.completions.create(
            model="tiny", prompt=prompts[index], max_tokens=3 + index % 20, temperature=0
        )
        return str(made.choices[0].text)

    with ThreadPoolExecutor(100) as pool:
        assert list(pool.map(ask, range(100))) == expected


def test_models_and_health(client: Any, address: str) -> None:
    assert [each.id for each in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "qalora-compile"
    with pytest.raises(openai.NotFoundError, match="the model of this server is tiny"):
        client.completions.create(model="other", prompt="red")
    health = httpx.get(f"{address}/health").json()
    assert (health["status"], health["batches"]) == ("ok", True)
    lost = httpx.get(f"{address}/v1/nothing")
    assert lost.status_code == 404 and "no such route" in lost.json()["error"]["message"]
    wrong = httpx.get(f"{address}/v1/completions")
    assert wrong.status_code == 405 and "error" in wrong.json()


CHAT, TEXT, VECTORS = "chat/completions", "completions", "embeddings"
REFUSED: dict[str, tuple[str, bytes, int, str]] = {
    "no JSON": (CHAT, b"{", 400, "not valid JSON"),
    "no UTF-8": (CHAT, b'{"messages": "\xff"}', 400, "not valid JSON"),
    "a list": (CHAT, b"[]", 400, "must be a JSON object"),
    "NaN": (TEXT, b'{"prompt": "red", "temperature": NaN}', 400, "NaN"),
    "deep": (TEXT, b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400, "nested"),
    "a surrogate": (TEXT, b'{"prompt": "\\ud800"}', 400, "surrogate"),
    "twice": (TEXT, b'{"prompt": "a", "prompt": "b"}', 400, "twice"),
    "no messages": (CHAT, b"{}", 400, "messages must be a list"),
    "no prompt": (TEXT, b"{}", 400, "prompt is missing"),
    "an empty list": (TEXT, b'{"prompt": []}', 400, "1 to 4 texts"),
    "many texts": (TEXT, b'{"prompt": ["a", "a", "a", "a", "a"]}', 400, "1 to 4 texts"),
    "an unknown token": (TEXT, b'{"prompt": [99999]}', 400, "tokens are 0 to"),
    "mixed": (TEXT, b'{"prompt": [1, "a"]}', 400, "must hold texts"),
    "a truth as token": (TEXT, b'{"prompt": [true]}', 400, "tokens are 0 to"),
    "a number": (TEXT, b'{"prompt": 5}', 400, "must hold texts"),
    "a role": (CHAT, b'{"messages": [{"role": "king", "content": "a"}]}', 400, "the role"),
    "a picture": (
        CHAT,
        b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
        400,
        "parts of type text",
    ),
    "a message": (CHAT, b'{"messages": ["a"]}', 400, "must be an object"),
    "many tokens": (TEXT, b'{"prompt": "red", "max_tokens": 41}', 400, "from 1 to 40"),
    "huge": (TEXT, b'{"prompt": "red", "max_tokens": ' + b"9" * 90 + b"}", 400, "from 1 to 40"),
    "more digits": (TEXT, b'{"prompt": "red", "seed": ' + b"9" * 900 + b"}", 400, "900 digits"),
    "a float": (TEXT, b'{"prompt": "red", "max_tokens": 1.5}', 400, "an integer"),
    "hot": (TEXT, b'{"prompt": "red", "temperature": 1e9}', 400, "from 0 to 2"),
    "a text": (TEXT, b'{"prompt": "red", "temperature": "1"}', 400, "a number"),
    "stops": (TEXT, b'{"prompt": "red", "stop": [""]}', 400, "stop holds"),
    "a stream": (TEXT, b'{"prompt": "red", "stream": 1}', 400, "true or false"),
    "options": (TEXT, b'{"prompt": "red", "stream_options": []}', 400, "must be an object"),
    "top": (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}', 400,
            "needs logprobs"),
    "unknown": (TEXT, b'{"prompt": "red", "prmpt": 1}', 400, "unknown field"),
    "penalty": (TEXT, b'{"prompt": "red", "frequency_penalty": 1}', 400, "not supported"),
    "tools": (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "tools": [{}]}', 400,
              "not supported"),
    "too long": (TEXT, json.dumps({"prompt": "red " * 70}).encode(), 400, "the 64 tokens"),
    "large": (TEXT, json.dumps({"prompt": "red " * 9000}).encode(), 413, "20000 bytes"),
    "vectors": (VECTORS, b'{"input": "red"}', 400, "needs a sentence encoder"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_hostile_bodies_are_refused_with_a_message(kind: str, address: str) -> None:
    route, body, status, message = REFUSED[kind]
    answer = httpx.post(
        f"{address}/v1/{route}", content=body, headers={"content-type": "application/json"}
    )
    error = answer.json()["error"]
    assert (answer.status_code, set(error)) == (status, {"message", "type", "param", "code"})
    assert message in error["message"]
    assert "Traceback" not in answer.text and len(answer.text) < 600


def test_a_large_body_without_a_length_is_refused(address: str) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{address}/v1/completions", content=parts(), headers=headers)
    assert answer.status_code == 413


def test_pages_of_other_sites_are_refused(address: str) -> None:
    plain = httpx.post(f"{address}/v1/completions", content=b"{}")
    assert plain.status_code == 415
    other = httpx.get(f"{address}/v1/models", headers={"host": "evil.example:80"})
    assert other.status_code == 403
    assert httpx.get(f"{address}/v1/models", headers={"host": "localhost:1"}).status_code == 200


def test_a_key_is_asked(chat_edge: Path) -> None:
    with serving(chat_edge, key="sesame") as url:
        right = openai.OpenAI(base_url=f"{url}/v1", api_key="sesame", max_retries=0)
        assert right.models.list().data[0].id == "edge"
        for key in ("sesam", "sesamé", "x"):
            headers = {"authorization": f"Bearer {key}".encode()}
            refused = httpx.get(f"{url}/v1/models", headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200


def waiting(url: str) -> int:
    return int(httpx.get(f"{url}/health").json()["texts"])


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Make every step of the engine take a while."""
    from qalora_compile.serving.engine import Engine

    step = Engine.step

    def slowly(self: Engine) -> None:
        if not self.idle:
            time.sleep(seconds)
        step(self)

    monkeypatch.setattr(Engine, "step", slowly)


def test_a_full_queue_is_said(chat_edge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, 0.05)
    body = {"prompt": "red is a", "max_tokens": 20, "temperature": 2, "seed": 1, "n": 2}
    with serving(chat_edge, limits={"max_queue": 3, "max_rows": 1}) as url:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60)
            while waiting(url) < 2:
                time.sleep(0.01)
            for stream in (False, True):
                full = httpx.post(f"{url}/v1/completions", json=body | {"stream": stream})
                assert full.status_code == 429
                assert full.json()["error"]["code"] == "queue_full"
            assert first.result().status_code == 200
        assert waiting(url) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_lost_client_ends_the_generation(
    stream: bool, chat_edge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, 0.1)
    body = {"prompt": [2, 8, 9], "max_tokens": 50, "temperature": 0, "stream": stream}
    text = json.dumps(body).encode()
    with serving(chat_edge) as url:
        place = urlsplit(url)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(text)}"
        with socket.create_connection((place.hostname or "", place.port or 0)) as lost:
            lost.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + text)
            while waiting(url) < 1:
                time.sleep(0.01)
        begin = time.monotonic()
        while waiting(url) and time.monotonic() - begin < 4:
            time.sleep(0.02)
        assert waiting(url) == 0 and time.monotonic() - begin < 3, "50 tokens take 5 s"
        assert httpx.post(f"{url}/v1/completions", json=body | {"max_tokens": 2}).is_success


def test_an_error_of_the_model_is_no_traceback(
    chat_edge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qalora_compile.serving.job import Job

    take = Job.take

    def fails(self: Job, logits: Any) -> None:
        if len(self.order.prompt) == 1:
            raise RuntimeError("secret")
        take(self, logits)

    monkeypatch.setattr(Job, "take", fails)
    with serving(chat_edge) as url:
        for stream in (False, True):
            body = {"prompt": [2], "stream": stream}
            answer = httpx.post(f"{url}/v1/completions", json=body)
            assert "secret" not in answer.text and "the server failed" in answer.text
            assert answer.status_code == 500
        good = httpx.post(f"{url}/v1/completions", json={"prompt": [2, 3], "temperature": 0})
        assert good.status_code == 200


def test_a_slow_body_is_not_waited_for(chat_edge: Path) -> None:
    with serving(chat_edge, limits={"body_seconds": 1}) as url:
        place = urlsplit(url)
        with socket.create_connection((place.hostname or "", place.port or 0)) as slow_one:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n"
            slow_one.sendall(f"{head}Content-Type: application/json\r\n\r\n{{".encode())
            slow_one.settimeout(10)
            assert b" 408 " in slow_one.recv(1000)


@pytest.mark.parametrize("in_graph", [False, True])
def test_vectors_of_a_sentence_encoder(
    in_graph: bool, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import torch
    from torch.nn import functional

    from tests.cli.test_encoders import TEXTS, run, sentence_folder, states
    from tests.cli.tiny import write_encoder

    plain = write_encoder(tmp_path / "plain")
    edge = str(tmp_path / "edge")
    source, options = plain, ["--pooling", "mean", "--normalize"]
    if not in_graph:
        source, options = sentence_folder(plain, tmp_path / "source"), []
    words = ["quantize", str(source), "--out", edge, "--bits", "8", "--group-size", "8"]
    assert main([*words, *options]) == 0
    encoded, _, mask = states(plain)
    hidden = run(Path(edge), encoded)["last_hidden_state"]
    expected = functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    with serving(Path(edge)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        found = client.embeddings.create(model="edge", input=TEXTS)
        vectors = torch.tensor([row.embedding for row in found.data])
        assert torch.allclose(vectors, expected, atol=1e-5)
        assert found.usage.prompt_tokens == int(mask.sum())
        one = client.embeddings.create(model="edge", input=TEXTS[0], encoding_format="float")
        assert one.data[0].embedding == pytest.approx(expected[0].tolist(), abs=1e-5)
        for options_, message in (
            ({"dimensions": 5}, "32 dimensions"),
            ({"input": "film " * 40}, "the model takes 32"),
            ({"input": [[]]}, "must hold texts"),
        ):
            with pytest.raises(openai.BadRequestError, match=message):
                client.embeddings.create(**{"model": "edge", "input": "film"} | options_)
        with pytest.raises(openai.BadRequestError, match="sentence encoder"):
            client.completions.create(model="edge", prompt="film")


def test_a_model_without_a_template_has_no_chats(plain_edge: Path) -> None:
    with serving(plain_edge) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            client.chat.completions.create(model="edge", messages=ASK)
        assert client.completions.create(model="edge", prompt="red").choices


def test_stopping_ends_what_is_generated(chat_edge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, 0.2)
    body = {"prompt": [2, 8, 9], "max_tokens": 50, "temperature": 0}
    answers: list[Any] = []
    with serving(chat_edge) as url:

        def ask() -> None:
            try:
                answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60))
            except httpx.HTTPError as error:
                answers.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        while waiting(url) < 1:
            time.sleep(0.01)
        begin = time.monotonic()
    assert time.monotonic() - begin < 9, "50 tokens take 10 s"
    thread.join()
    assert answers
