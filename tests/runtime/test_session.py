"""Generation with an exported language model in ONNX Runtime."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import qalora_compile as qc
from qalora_compile.errors import UnsupportedError, UserInputError
from qalora_compile.runtime import LanguageModel, Sampling, open_session
from qalora_compile.runtime.language_model import choose_token, continue_tokens
from tests.models import MLP, adapted, llama, token_ids


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[qc.Program, Path]:
    torch.manual_seed(0)
    ids = token_ids(2, 16)
    folded = qc.fold_adapters(adapted(llama(), (ids, torch.ones_like(ids))))
    path = tmp_path_factory.mktemp("edge") / "model.onnx"
    qc.export_model(folded, path)
    return folded, path


def test_greedy_tokens_equal_those_of_torch(exported: tuple[qc.Program, Path]) -> None:
    folded, path = exported
    prompt = [5, 17, 40]
    expected = list(prompt)
    for _ in range(12):
        ids = torch.tensor([expected])
        with torch.no_grad():
            expected.append(int(folded(ids, torch.ones_like(ids)).logits[0, -1].argmax()))
    model = LanguageModel(open_session(path, threads=1))
    assert list(model.generate(prompt, max_new_tokens=12)) == expected[3:]


def test_a_stop_token_ends_generation_unseen(exported: tuple[qc.Program, Path]) -> None:
    model = LanguageModel(open_session(exported[1]))
    free = list(model.generate([5, 17], max_new_tokens=8))
    stopped = list(model.generate([5, 17], max_new_tokens=8, stop=[free[3]]))
    assert stopped == free[: free.index(free[3])]


def test_sampling_follows_the_seed(exported: tuple[qc.Program, Path]) -> None:
    model = LanguageModel(open_session(exported[1]))

    def sample(seed: int) -> list[int]:
        hot = Sampling(temperature=5.0, seed=seed)
        return list(model.generate([3], max_new_tokens=10, sampling=hot))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_sampled_tokens_have_their_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    generator = np.random.default_rng(0)
    counts = Counter(
        choose_token(logits, Sampling(temperature=1.0), generator) for _ in range(4000)
    )
    assert counts[0] / 4000 == pytest.approx(0.5, abs=0.04)
    assert counts[3] / 4000 == pytest.approx(0.05, abs=0.02)
    nucleus = Sampling(temperature=1.0, top_p=0.6)
    cut = Counter(choose_token(logits, nucleus, generator) for _ in range(4000))
    assert set(cut) == {0, 1}
    assert cut[0] / 4000 == pytest.approx(0.5 / 0.8, abs=0.04)


def test_the_likeliest_tokens_are_kept_in_any_heat() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.3, 0.1], dtype=np.float32))
    generator = np.random.default_rng(0)
    hot = Sampling(temperature=5.0, top_k=2)
    counts = Counter(choose_token(logits, hot, generator) for _ in range(1000))
    assert set(counts) == {1, 2}
    assert counts[1] / 1000 == pytest.approx(0.5**0.2 / (0.5**0.2 + 0.3**0.2), abs=0.05)
    for heat in (1e-300, 1e300):
        one = Sampling(temperature=heat, top_k=1)
        assert choose_token(logits, one, generator) == 1


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetitions_are_penalized_as_by_transformers(penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    generator = np.random.default_rng(0)
    logits = generator.standard_normal(50).astype(np.float32)
    text = [3, 7, 7, int(logits.argmax()), int(logits.argmin())]
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([text]), torch.from_numpy(logits.copy())[None]
    )
    before = logits.copy()
    chosen = Sampling(repetition_penalty=penalty)
    assert choose_token(logits, chosen, generator, set(text)) == int(wanted.argmax())
    assert np.array_equal(logits, before)


def test_new_tokens_are_penalized_too() -> None:
    logits = np.array([2.0, 1.9, 1.0], np.float32)
    chosen = Sampling(repetition_penalty=1.5)
    assert list(continue_tokens(lambda _: logits, [2], 4, [], chosen)) == [0, 1, 0, 0]
    assert list(continue_tokens(lambda _: logits, [2], 2, [], chosen, text=[0, 2])) == [1, 0]
    assert list(continue_tokens(lambda _: logits, [2], 2, [], Sampling())) == [0, 0]


@pytest.mark.parametrize(
    "values",
    [
        *({"repetition_penalty": 0.0}, {"repetition_penalty": math.inf}),
        *({"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}),
        *({"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"seed": -1}),
    ],
)
def test_sampling_out_of_range_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(UserInputError):
        Sampling(**values)  # type: ignore[arg-type]


def test_an_empty_prompt_is_refused(exported: tuple[qc.Program, Path]) -> None:
    model = LanguageModel(open_session(exported[1]))
    with pytest.raises(UserInputError, match="no token"):
        list(model.generate([], max_new_tokens=1))


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    program = qc.quantize_groups(qc.capture_model(MLP(16, 8).eval(), (torch.randn(2, 16),)))
    qc.export_model(program, tmp_path / "mlp.onnx")
    with pytest.raises(UnsupportedError, match="not a causal language model"):
        LanguageModel(open_session(tmp_path / "mlp.onnx"))


def test_missing_and_truncated_files_are_refused(
    exported: tuple[qc.Program, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserInputError, match="no file"):
        open_session(tmp_path / "model.onnx")
    content = exported[1].read_bytes()
    (tmp_path / "half.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserInputError, match="cannot load|read as an ONNX model"):
        open_session(tmp_path / "half.onnx")
