"""The tokenizer as OpenVINO models, which OpenVINO GenAI runs."""

from __future__ import annotations

from pathlib import Path

from qalora_compile.exporters.openvino.library import openvino
from qalora_compile.optional import require
from qalora_compile.untrusted.tokenizer import load_tokenizer

TOKENIZER_FILE, DETOKENIZER_FILE = "openvino_tokenizer.xml", "openvino_detokenizer.xml"


def write_tokenizers(source: Path, folder: Path) -> str:
    """Write `openvino_tokenizer.xml` and `openvino_detokenizer.xml`, if it is possible.

    Args:
        source: Folder with the tokenizer's files, which may be missing.
        folder: The folder to write to.

    Returns:
        What was written, or why nothing was: the model runs without them, on tokens.
    """
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        return f"no {TOKENIZER_FILE} (no tokenizer)"
    try:
        library = require("openvino_tokenizers", extra="openvino", purpose="convert a tokenizer")
        models = library.convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as error:  # the library raises many types for tokenizers that it lacks
        return f"no {TOKENIZER_FILE} ({type(error).__name__}: {str(error).splitlines()[0][:100]})"
    for model, file in zip(models, (TOKENIZER_FILE, DETOKENIZER_FILE), strict=True):
        openvino().save_model(model, str(folder / file))
    return TOKENIZER_FILE
