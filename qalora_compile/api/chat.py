"""`chat`: a conversation with an exported language model."""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass
from pathlib import Path

from qalora_compile.api.text_model import open_text_model, say_ignored
from qalora_compile.errors import UserInputError
from qalora_compile.runtime.language_model import Sampling
from qalora_compile.serving.conversation import Conversation


@dataclass(frozen=True, kw_only=True)
class ChatSpec:
    """A conversation.

    Attributes:
        folder: A folder written by `export_folder` or `quantize_folder`.
        system: Instructions at its beginning.
        raw: Let the model continue plain text, without a chat template.
        max_new_tokens: Largest number of tokens of an answer; None: what the context has left.
        temperature, top_p, top_k: See `runtime.Sampling`; None: as the folder's
            `generation_config.json` has it, and greedy if it does not say.
        seed: Seed of the sampling; None: another one each time.
        threads: Number of threads of ONNX Runtime.
    """

    folder: Path
    system: str | None = None
    raw: bool = False
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserInputError(f"--max-new-tokens is {self.max_new_tokens}", hint="use 1 or more")
        if self.raw and self.system is not None:
            raise UserInputError(
                "--raw has no place for --system", hint="write the instructions in the first line"
            )
        self.sampling(Sampling())

    def sampling(self, known: Sampling) -> Sampling:
        """How tokens are chosen, where `known` is the folder's choice."""
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}
        seed = secrets.randbits(32) if self.seed is None else self.seed
        chosen = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(known, **chosen, seed=seed)


def open_chat(spec: ChatSpec) -> Conversation:
    """Open a model for a conversation.

    Raises:
        UserInputError: a value is out of range, a file is missing or broken, the folder holds no
            tokenizer, or no chat template and `raw` is not set.
        UnsupportedError: the folder holds a model of another kind.
    """
    model = open_text_model(spec.folder, threads=spec.threads)
    say_ignored(model)
    return Conversation(
        model,
        system=spec.system,
        raw=spec.raw,
        sampling=spec.sampling(model.sampling),
        max_new_tokens=spec.max_new_tokens,
    )
