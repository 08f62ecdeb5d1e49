"""Exported models in EleutherAI's lm-evaluation-harness, as `--model qalora`.

    python -m qalora_compile.api.lm_eval --model qalora --model_args folder=edge --tasks hellaswag

The harness has no entry points for models, so this module registers the model and then runs the
harness's own command line, with all of its options. In code, call `register()` before
`lm_eval.simple_evaluate(model="qalora", model_args={"folder": "edge"}, …)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from qalora_compile.api.text_model import open_text_model
from qalora_compile.errors import UserInputError
from qalora_compile.optional import require
from qalora_compile.runtime.language_model import Sampling
from qalora_compile.serving.scoring import Scorer
from qalora_compile.serving.text_model import TextModel
from qalora_compile.untrusted.tokenizer import render_chat

NAME = "qalora"
_PURPOSE = "run lm-evaluation-harness"
_LONGEST, _NEW_TOKENS = 2048, 256
"""Tokens of a text if the model has no limit, and of an answer if a task has none."""


class Harness:
    """What the harness asks of a model, with the names that it uses.

    Args:
        folder: An edge folder.
        threads: Number of threads of ONNX Runtime.
        max_length: Largest number of tokens of a text; None: the model's context.
        options: Options that the harness gives to every model (`batch_size`, `device` …), which
            have no effect here.
    """

    backend = "causal"

    def __init__(
        self,
        folder: str,
        threads: int | None = None,
        max_length: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._model: TextModel = open_text_model(Path(folder), threads=threads)
        self.tokenizer = self._model.tokenizer
        self.max_length = max_length or self._model.model.context_length or _LONGEST
        self._scorer = Scorer(self._model, longest=self.max_length)
        self._begin = self._model.encode("") if self._adds_begin() else []

    def _adds_begin(self) -> bool:
        """Whether the tokenizer puts tokens before a text."""
        return bool(self.tokenizer("a").input_ids != self.tok_encode("a", False))

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            UserInputError: there is none.
        """
        end = self.tokenizer.eos_token_id
        if end is None:
            raise UserInputError("the tokenizer names no end token", where=self._model.where)
        return int(end)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """The folder, which names the cache of requests."""
        return self._model.where.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template, if it is asked for."""
        if chat_template is False or not self._model.has_template:
            return None
        template = self.tokenizer.chat_template
        return template if isinstance(template, str) else None

    def apply_chat_template(
        self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text."""
        return render_chat(
            self.tokenizer, chat_history, prompt=add_generation_prompt, where=self._model.where
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        """The tokens of a text, by default after those with which the tokenizer begins texts."""
        tokens = list(self.tokenizer(string, add_special_tokens=False).input_ids)
        begin = [] if add_special_tokens is False else self._begin
        return tokens if tokens[: len(begin)] == begin else [*begin, *tokens]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """For every context and continuation, its log-probability, and whether it is greedy."""
        found: list[tuple[float, bool]] = []
        for texts, before, tokens in _progress(requests, "loglikelihood", disable_tqdm):
            scored = self._scorer.score(before, tokens) if tokens else (0.0, True)
            self._remember("loglikelihood", texts, scored)
            found.append(scored)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of every text, in windows if it exceeds the context."""
        windows = require("lm_eval.utils", extra="lm-eval", purpose=_PURPOSE)
        found = []
        for request in _progress(requests, "loglikelihood_rolling", disable_tqdm):
            (text, *_) = request.args
            tokens = self.tok_encode(text, False)
            parts = map(
                windows.make_disjoint_window,
                windows.get_rolling_token_windows(
                    tokens, self.prefix_token_id, self.max_length, context_len=1
                ),
            )
            total = sum(self._scorer.score(*part)[0] for part in parts)
            self._remember("loglikelihood_rolling", request.args, total)
            found.append(total)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of every text, up to the strings of its task."""
        found = []
        for request in _progress(requests, "generate_until", disable_tqdm):
            text, options = request.args
            until = options.get("until") or []
            made = self._scorer.generate(
                self.tok_encode(text),
                [until] if isinstance(until, str) else list(until),
                most=int(options.get("max_gen_toks") or _NEW_TOKENS),
                sampling=_sampling(options),
            )
            self._remember("generate_until", request.args, made)
            found.append(made)
        return found

    def _remember(self, kind: str, request: Any, result: Any) -> None:
        """Give a result to the harness's cache."""
        hook: Any = getattr(self, "cache_hook")  # noqa: B009 - set by the harness's base class
        hook.add_partial(kind, request, result)


def _sampling(options: dict[str, Any]) -> Sampling:
    """As a task has it; greedy unless it samples."""
    heat = float(options.get("temperature") or 0.0)
    if options.get("do_sample") is False or not heat:
        return Sampling()
    return Sampling(
        temperature=heat,
        top_p=float(options.get("top_p") or 1.0),
        top_k=int(options.get("top_k") or 0),
    )


def _progress(items: Sequence[Any], what: str, hidden: bool) -> Iterator[Any]:
    bar = require("tqdm", extra="lm-eval", purpose=_PURPOSE)
    yield from bar.tqdm(items, desc=what, disable=hidden)


@cache
def register() -> type:
    """Register the model with the harness; returns its class.

    Raises:
        UnsupportedError: the harness is not installed.
    """
    base = require("lm_eval.api.model", extra="lm-eval", purpose=_PURPOSE).TemplateLM
    registry = require("lm_eval.api.registry", extra="lm-eval", purpose=_PURPOSE)
    require("lm_eval.models", extra="lm-eval", purpose=_PURPOSE)  # before one more is added
    made: type = type("QaloraLM", (Harness, base), {})
    registry.register_model(NAME)(made)
    return made


def main() -> None:
    """The harness's command line, which knows the model."""
    register()
    require("lm_eval.__main__", extra="lm-eval", purpose=_PURPOSE).cli_evaluate()


if __name__ == "__main__":
    main()
