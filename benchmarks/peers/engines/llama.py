"""llama.cpp through the C interface of its shared libraries.

Only the leading fields of its parameter structures are set, and threads by their own function:
these have kept their places over releases. The rest of a structure is passed on as llama.cpp's own
defaults, in a block that is larger than any release's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FILE_TYPES = {"q4_0": 2, "q4_1": 3, "q4_k_m": 15}
"""Of `enum llama_ftype`."""
_BATCH = 2048
_POINTER = ctypes.c_void_p


class _Parameters(ctypes.Structure):
    """A structure of parameters, as 32-bit words."""

    _fields_ = (("words", ctypes.c_uint32 * 128),)


class _Batch(ctypes.Structure):
    """`llama_batch`, whose fields after the tokens stay null: consecutive, last logits only."""

    _fields_ = (
        ("count", ctypes.c_int32),
        ("tokens", ctypes.POINTER(ctypes.c_int32)),
        ("rest", _POINTER * 5),
    )


_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _POINTER)


class Library:
    """The functions of llama.cpp in a folder of shared libraries.

    Raises:
        OSError: a library is missing, or cannot be loaded.
    """

    def __init__(self, folder: Path) -> None:
        self._loaded = [_load(folder, name) for name in ("libggml-base", "libggml", "libllama")]
        base, ggml, llama = self._loaded
        self._quiet = _LogCallback(lambda *_: None)
        llama.llama_log_set(self._quiet, None)
        base.ggml_log_set(self._quiet, None)
        ggml.ggml_backend_load_all_from_path(str(folder).encode())
        for name in ("model", "context", "model_quantize"):
            getattr(llama, f"llama_{name}_default_params").restype = _Parameters
        for name in ("model_load_from_file", "init_from_model", "model_get_vocab", "get_memory"):
            getattr(llama, f"llama_{name}").restype = _POINTER
        llama.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
        self.functions = llama
        name = next(folder.glob("libllama.*so")).name
        self.version = f"llama.cpp {name.removeprefix('libllama.').removesuffix('.so')}"

    def quantize(self, source: Path, target: Path, file_type: str) -> None:
        """Write a GGUF file in another type; quantized tensors are dequantized first.

        Raises:
            OSError: llama.cpp refuses.
        """
        parameters = self.functions.llama_model_quantize_default_params()
        parameters.words[1] = FILE_TYPES[file_type]
        parameters.words[4] |= 1  # allow_requantize, the first of the flags
        code = self.functions.llama_model_quantize(
            str(source).encode(), str(target).encode(), ctypes.byref(parameters)
        )
        if code:
            raise OSError(f"llama_model_quantize gave {code} for {source.name} as {file_type}")


def _load(folder: Path, name: str) -> Any:
    """A shared library by the beginning of its name, which may have a version."""
    found = [path for path in folder.glob(f"{name}*.so") if path.name[len(name)] == "."]
    if not found:
        raise OSError(f"{folder} has no {name}")
    return ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)


class Engine:
    """A GGUF file and one context."""

    def __init__(self, path: str, *, threads: int, context: int, folder: str, **_: Any) -> None:
        self._library = Library(Path(folder))  # kept: llama.cpp logs into it
        self._llama = self._library.functions
        self.version = self._library.version
        self._model = _POINTER(
            self._llama.llama_model_load_from_file(
                path.encode(), self._llama.llama_model_default_params()
            )
        )
        if not self._model:
            raise OSError(f"llama.cpp cannot load {path}")
        parameters = self._llama.llama_context_default_params()
        parameters.words[0], parameters.words[1] = context, _BATCH
        self._context = _POINTER(self._llama.llama_init_from_model(self._model, parameters))
        self._llama.llama_set_n_threads(self._context, threads, threads)
        self.vocabulary = _POINTER(self._llama.llama_model_get_vocab(self._model))
        self._size = self._llama.llama_vocab_n_tokens(self.vocabulary)

    def reset(self) -> None:
        """Forget what was read."""
        memory = _POINTER(self._llama.llama_get_memory(self._context))
        self._llama.llama_memory_clear(memory, ctypes.c_bool(False))

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Read tokens; logits `[V]` of the one that follows.

        Raises:
            OSError: llama.cpp refuses.
        """
        for start in range(0, len(tokens), _BATCH):
            part = tokens[start : start + _BATCH]
            code = self._llama.llama_decode(
                self._context, _Batch(len(part), (ctypes.c_int32 * len(part))(*part))
            )
            if code:
                raise OSError(f"llama_decode gave {code}")
        pointer = self._llama.llama_get_logits_ith(self._context, ctypes.c_int32(-1))
        return np.ctypeslib.as_array(pointer, (self._size,))

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text, special ones read as such, none added."""
        written = text.encode()
        room = (ctypes.c_int32 * (len(written) + 8))()
        count = self._llama.llama_tokenize(
            self.vocabulary,
            written,
            len(written),
            room,
            len(room),
            ctypes.c_bool(False),
            ctypes.c_bool(True),
        )
        return list(room[:count])

    def close(self) -> None:
        """Free context and model."""
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)
