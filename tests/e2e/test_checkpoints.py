"""SmolLM2-135M from its GGUF file, adapted and folded, back to GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import qalora_compile as qc
from qalora_compile.capture.load_source import load_source
from qalora_compile.files.marks import GGUF_KEY
from tests.models import randomize_adapters, scale_of, worst

EXAMPLES = str(Path(__file__).parents[2] / "examples")
BLOCK_BYTES = 20


@pytest.mark.slow
def test_a_real_model_goes_from_gguf_to_gguf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    from assets import model_path
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    base, path = model_path(), tmp_path / "model.gguf"
    source = load_source(str(base))
    program = qc.quantize_groups(source.capture(), stored=source.stored()[0])
    adapters = randomize_adapters(qc.insert_adapters(program, qc.AdapterSpec(rank=4)), size=0.003)
    folded = qc.fold_adapters(adapters)
    report = qc.export_model(folded, path, qc.ExportSpec(target="gguf"), model=base)
    assert max(row.relative_error for row in report.stored) < 1e-3

    first, second = gguf.GGUFReader(str(base)), gguf.GGUFReader(str(path))
    before, after = (
        {n: f.contents() for n, f in reader.fields.items() if n != "GGUF.kv_count"}
        for reader in (first, second)
    )
    assert after.pop(GGUF_KEY).startswith("qalora-compile ")  # who wrote it
    assert after == before
    written = {tensor.name: tensor for tensor in second.tensors}
    assert len(written) == len(first.tensors)
    on_codes = 0
    for old in first.tensors:
        new = written[old.name]
        assert old.tensor_type == new.tensor_type
        if old.tensor_type == gguf.GGMLQuantizationType.Q4_1:
            a, b = (t.data.reshape(-1, BLOCK_BYTES) for t in (old, new))
            assert np.array_equal(a[:, 4:], b[:, 4:]), f"{old.name}: a code changed"
            assert np.array_equal(a[:, :2], b[:, :2]), f"{old.name}: a scale changed"
            assert not np.array_equal(a[:, 2:4], b[:, 2:4]), f"{old.name}: nothing was folded"
            on_codes += 1
        else:
            assert np.array_equal(old.data, new.data), old.name
    assert on_codes == 210

    again: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    ids = torch.tensor([source.tokenizer("The committee met on Tuesday to").input_ids])
    with torch.no_grad():
        logits = folded(ids, torch.ones_like(ids)).logits
        found = again(ids).logits
        before = source.model(ids).logits
    assert worst(found, logits) <= 1e-2 * scale_of(logits)
    assert torch.equal(found.argmax(-1), logits.argmax(-1))
    assert worst(before, logits) > 1e-2 * scale_of(logits)
    print(f"{worst(found, logits):.3g} of {scale_of(logits):.3g}")
