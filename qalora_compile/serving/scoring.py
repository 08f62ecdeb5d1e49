"""Probabilities of texts, and texts up to a string: what evaluation harnesses ask of a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qalora_compile.runtime.language_model import Context, Sampling
from qalora_compile.serving.text_model import TextModel
from qalora_compile.serving.text_stream import StopStrings


class Scorer:
    """Scores continuations, and generates them.

    Texts that follow one another with the same beginning, such as the choices of one question,
    read it once.

    Args:
        model: The model.
        longest: Largest number of tokens of a text; longer ones lose their beginning.
    """

    def __init__(self, model: TextModel, *, longest: int) -> None:
        self._model, self.longest = model, longest
        self._context = Context(model.model)

    def score(self, before: Sequence[int], tokens: Sequence[int]) -> tuple[float, bool]:
        """The logarithmic probability of tokens, and whether each of them is the likeliest.

        Args:
            before: The tokens before them, at least one.
            tokens: At least one token, of which at most `longest` are scored.
        """
        tokens = list(tokens)[-self.longest :]
        before = list(before)[-max(1, self.longest + 1 - len(tokens)) :]
        logits = [self._context.read(self._context.rest(before))]
        if len(tokens) > 1:
            logits += list(self._context.read_each(tokens[:-1]))
        total, greedy = 0.0, True
        for row, token in zip(logits, tokens, strict=True):
            exact = row.astype(np.float64)
            largest = exact.max()
            total += float(exact[token] - largest - np.log(np.exp(exact - largest).sum()))
            greedy &= int(row.argmax()) == token
        return total, greedy

    def generate(
        self, prompt: Sequence[int], stop: Sequence[str], *, most: int, sampling: Sampling
    ) -> str:
        """The continuation of a prompt, up to the first of several strings.

        Args:
            prompt: Its tokens; the beginning of a long one is left out.
            stop: The strings, which are not part of the text.
            most: Largest number of new tokens.
            sampling: How they are chosen.
        """
        most = min(most, self.longest - 1)
        tokens = self._model.model.generate(
            list(prompt)[-(self.longest - most) :],
            max_new_tokens=most,
            stop=list(self._model.ends),
            sampling=sampling,
            context=self._context,
        )
        stream, strings = self._model.stream(), StopStrings([each for each in stop if each])
        text = ""
        for token in tokens:
            text += strings.add(stream.add(token))
            if strings.found:
                return text
        return text + strings.rest()
