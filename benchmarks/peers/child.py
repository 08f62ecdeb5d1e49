"""The process that holds one runtime: it answers requests in JSON, one a line.

`python -m benchmarks.peers.child ENGINE` imports `benchmarks.peers.engines.ENGINE` and nothing of
this package, unless that engine does: it also runs in a runtime's own environment. Requests, by
their field `do`:

* `load` with `path`, `threads`, `context` and the engine's `options`: seconds and version
* `run` with `prompt` and `following`, token numbers: seconds for the prompt, and for each of the
  tokens that follow it, which are read one by one
* `greedy` with `prompt` and `count`: the likeliest tokens
* `score` with `tokens`: the mean loss of each but the first, read one by one
* `peak`: resident bytes added since the process began

An answer with `error` says why a request failed; the process goes on.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from numpy.typing import NDArray


class Engine(Protocol):
    """A loaded model; made with `(path, *, threads, context, **options)`."""

    version: str

    def reset(self) -> None:
        """Forget what was read."""

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Read tokens; logits `[V]` of the one that follows, valid until the next call."""


class Server:
    """Answers requests with one engine.

    Args:
        make: Makes the engine.
    """

    def __init__(self, make: Callable[..., Engine]) -> None:
        self._make = make
        self._engine: Engine | None = None
        self._before = resident("VmRSS")

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What a request asks for, or the error that it met."""
        actions: dict[str, Callable[..., dict[str, Any]]] = {
            "load": self.load,
            "run": self.run,
            "greedy": self.greedy,
            "score": self.score,
            "peak": self.peak,
        }
        arguments = {name: value for name, value in request.items() if name != "do"}
        try:
            return actions[request["do"]](**arguments)
        except Exception as error:  # each runtime has exceptions of its own
            return {"error": f"{type(error).__name__}: {error}"}

    @property
    def engine(self) -> Engine:
        """The loaded model."""
        if self._engine is None:
            raise RuntimeError("nothing is loaded")
        return self._engine

    def load(
        self, path: str, threads: int, context: int, options: dict[str, Any]
    ) -> dict[str, Any]:
        """Load a model in place of the one before."""
        close = getattr(self._engine, "close", None)
        if close is not None:
            close()
        self._engine = None
        gc.collect()
        begin = time.perf_counter()
        self._engine = self._make(path, threads=threads, context=context, **options)
        return {"seconds": time.perf_counter() - begin, "version": self._engine.version}

    def run(self, prompt: Sequence[int], following: Sequence[int]) -> dict[str, Any]:
        """Time a prompt and the steps after it."""
        self.engine.reset()
        steps = [_seconds(self.engine, part) for part in (prompt, *([t] for t in following))]
        return {"prompt": steps[0], "steps": steps[1:]}

    def greedy(self, prompt: Sequence[int], count: int) -> dict[str, Any]:
        """The likeliest tokens after a prompt."""
        self.engine.reset()
        tokens = [int(self.engine.feed(prompt).argmax())]
        while len(tokens) < count:
            tokens.append(int(self.engine.feed(tokens[-1:]).argmax()))
        return {"tokens": tokens}

    def score(self, tokens: Sequence[int]) -> dict[str, Any]:
        """The mean loss of each token after those before it, in nats."""
        self.engine.reset()
        losses = [
            _loss(self.engine.feed([token]), following)
            for token, following in itertools.pairwise(tokens)
        ]
        return {"loss": sum(losses) / len(losses)}

    def peak(self) -> dict[str, Any]:
        """Peak resident bytes, less those of the process before it imported a runtime."""
        return {"bytes": resident("VmHWM") - self._before}


def _seconds(engine: Engine, tokens: Sequence[int]) -> float:
    """Wall time of reading tokens and choosing the next, as generation does."""
    begin = time.perf_counter()
    engine.feed(tokens).argmax()
    return time.perf_counter() - begin


def _loss(logits: NDArray[np.float32], token: int) -> float:
    """Minus the logarithm of a token's probability."""
    values = logits.astype(np.float64)
    top = values.max()
    return float(np.log(np.exp(values - top).sum()) + top - values[token])


def resident(field: str) -> int:
    """Resident bytes of this process now (`VmRSS`) or at most (`VmHWM`), as Linux counts them."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def private_output() -> TextIO:
    """Standard output for answers alone: what libraries print there goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def main() -> None:
    """Answer until standard input ends."""
    answers = private_output()

    def make(path: str, **options: Any) -> Engine:
        engine: Engine = module.Engine(path, **options)
        return engine

    server = Server(make)
    module: Any = importlib.import_module(f"benchmarks.peers.engines.{sys.argv[1]}")
    for line in sys.stdin:
        print(json.dumps(server.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
