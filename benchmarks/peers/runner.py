"""The parent: starts one child for each variant, asks them in turn, and keeps their figures."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from benchmarks.machine import available_memory

ROOT = Path(__file__).parents[2]


class PeerError(Exception):
    """A child that failed; the message says what it was asked and what it said."""


class Peer(Protocol):
    """Whoever answers requests; in a run, a `Child`."""

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request of `child`.

        Raises:
            PeerError: there is none.
        """


class Child:
    """One runtime in a process of its own.

    Args:
        python: The Python that has the runtime.
        engine: Module of `engines`.
        threads: For the libraries that read it from the environment.
    """

    def __init__(self, python: Path, engine: str, *, threads: int) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
        }
        self._process = subprocess.Popen(
            [str(python), "-m", "benchmarks.peers.child", engine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            PeerError: the process ended, or answered with an error.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"{request['do']}: the process ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{request['do']}: {answer['error']}")
        return answer


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured.

    Attributes:
        tokens: The text: prompts are its beginning, and it goes on after each.
        prompts: Lengths of prompts.
        decode: Prompts after which steps are timed.
        steps: How many, in each round.
        rounds: Measured rounds; a round of short prompts warms up.
        loads: How often each model is loaded.
        greedy: Greedy tokens compared, after `greedy_prompt` tokens.
        scored: Tokens whose loss is measured.
    """

    tokens: Sequence[int]
    prompts: tuple[int, ...]
    decode: tuple[int, ...]
    steps: int
    rounds: int
    loads: int = 3
    greedy: int = 16
    greedy_prompt: int = 128
    scored: int = 256

    @property
    def context(self) -> int:
        """Tokens that a model must have room for."""
        longest = max(*self.prompts, *self.decode) + self.steps
        return max(longest, self.greedy_prompt + self.greedy, self.scored) + 8

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of prompts, whether timed themselves or only what follows them."""
        return tuple(sorted({*self.prompts, *self.decode}))

    def request(self, length: int) -> dict[str, Any]:
        """A prompt, and the steps that are timed after it."""
        end = length + (self.steps if length in self.decode else 0)
        return {
            "do": "run",
            "prompt": list(self.tokens[:length]),
            "following": list(self.tokens[length:end]),
        }


@dataclass
class Figures:
    """What was measured of one variant: seconds of each round, in the order of rounds."""

    version: str = ""
    loads: list[float] = field(default_factory=list)
    prompts: dict[int, list[float]] = field(default_factory=dict)
    steps: dict[int, list[float]] = field(default_factory=dict)
    memory: int = 0
    loss: float = float("nan")
    greedy: list[int] = field(default_factory=list)
    failed: str = ""


Load = Mapping[str, Any]
"""The `load` request of a variant."""


def measure(
    peers: Mapping[str, Peer],
    loads: Mapping[str, Load],
    plan: Plan,
    say: Callable[[str], None] = lambda _: None,
    needs: Mapping[str, int] | None = None,
) -> dict[str, Figures]:
    """Ask all peers in turn, length by length and round by round.

    `needs` has the bytes that a model, by its path, may take when it is loaded. A peer that fails
    is asked nothing more, and its figures say why.
    """
    figures = {name: Figures() for name in peers}

    def all_of(what: str, act: Callable[[Peer, Figures, Load], None]) -> None:
        say(what)
        for name, peer in peers.items():
            if not figures[name].failed:
                try:
                    act(peer, figures[name], loads[name])
                except PeerError as error:
                    figures[name].failed = str(error)

    all_of("load", partial(_first_load, needs or {}))
    all_of("warm up", partial(_warm_up, plan))
    for number in range(plan.rounds):
        for length in plan.lengths:
            all_of(
                f"round {number + 1} of {plan.rounds}, {length} tokens",
                partial(_time, plan, length),
            )
    all_of("memory", _memory)
    all_of("greedy tokens", partial(_greedy, plan))
    all_of("perplexity", partial(_score, plan))
    for number in range(1, plan.loads):
        all_of(f"load {number + 1} of {plan.loads}", _load)
    return figures


def _first_load(needs: Mapping[str, int], peer: Peer, found: Figures, request: Load) -> None:
    """Load, unless the system would run out of memory and end some process."""
    needed, available = needs.get(request["path"], 0), available_memory()
    if needed > available:
        raise PeerError(
            f"load: may need {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB are available; "
            "use --only for fewer variants at once"
        )
    _load(peer, found, request)


def _load(peer: Peer, found: Figures, request: Load) -> None:
    answer = peer.ask({"do": "load", **request})
    found.version = answer["version"]
    found.loads.append(answer["seconds"])


def _warm_up(plan: Plan, peer: Peer, _: Figures, __: Load) -> None:
    peer.ask(plan.request(min(plan.lengths)))


def _time(plan: Plan, length: int, peer: Peer, found: Figures, _: Load) -> None:
    answer = peer.ask(plan.request(length))
    if length in plan.prompts:
        found.prompts.setdefault(length, []).append(answer["prompt"])
    if length in plan.decode:
        steps = answer["steps"]
        found.steps.setdefault(length, []).append(sum(steps) / len(steps))


def _memory(peer: Peer, found: Figures, _: Load) -> None:
    found.memory = peer.ask({"do": "peak"})["bytes"]


def _greedy(plan: Plan, peer: Peer, found: Figures, _: Load) -> None:
    prompt = list(plan.tokens[: plan.greedy_prompt])
    found.greedy = peer.ask({"do": "greedy", "prompt": prompt, "count": plan.greedy})["tokens"]


def _score(plan: Plan, peer: Peer, found: Figures, _: Load) -> None:
    found.loss = peer.ask({"do": "score", "tokens": list(plan.tokens[: plan.scored])})["loss"]


@contextlib.contextmanager
def children(
    engines: Mapping[str, tuple[Path, str]], *, threads: int
) -> Iterator[dict[str, Child]]:
    """A child for each name, of a Python and an engine; all end with the block."""
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(Child(python, engine, threads=threads))
            for name, (python, engine) in engines.items()
        }
