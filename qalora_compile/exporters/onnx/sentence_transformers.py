"""The files that sentence-transformers needs to run an exported encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qalora_compile.files import write_json
from qalora_compile.untrusted.artifacts import MODEL_FILE

_KINDS = "sentence_transformers.models"
SETTINGS_FILE = "sentence_bert_config.json"
_POOLING, _NORMALIZE = "1_Pooling", "2_Normalize"


def write_sentence_files(
    folder: Path,
    config: Mapping[str, Any],
    *,
    pooling: str,
    normalize: bool,
    settings: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write `modules.json`, the pooling, and the settings of sentence-transformers.

    The layout is that of versions before 6, which later versions read as well.

    Args:
        folder: Holds the model's `config.json` and the tokenizer.
        config: `config.json` of the encoder.
        pooling: `mean` or `cls`.
        normalize: Whether embeddings are divided by their norm.
        settings: File name → contents, as in the model's own folder.
    """
    parts = [("", "Transformer"), (_POOLING, "Pooling")]
    parts += [(_NORMALIZE, "Normalize")] if normalize else []
    rows = [
        {"idx": index, "name": str(index), "path": path, "type": f"{_KINDS}.{kind}"}
        for index, (path, kind) in enumerate(parts)
    ]
    write_json(folder / "modules.json", rows)
    for path, _ in parts[1:]:
        (folder / path).mkdir()
    width = config.get("hidden_size") or config.get("dim") or config.get("d_model")
    value = {
        "word_embedding_dimension": width,
        "pooling_mode_cls_token": pooling == "cls",
        "pooling_mode_mean_tokens": pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    write_json(folder / _POOLING / "config.json", value)
    if normalize:
        write_json(folder / _NORMALIZE / "config.json", {})
    # Without the name of the file sentence-transformers looks for model.onnx.
    opened = {SETTINGS_FILE: {"model_args": {"file_name": Path(MODEL_FILE).name}}}
    for name in {**settings, **opened}:
        write_json(folder / name, {**settings.get(name, {}), **opened.get(name, {})})
