r"""Regular expressions of strangers, matched in time that grows with the text alone.

Settings of checkpoints name layers by regular expressions. Python's own engine tries all ways to
match one after another, and an expression like `(a+)+$` has exponentially many. Here all ways are
followed at once (Thompson, 1968), for the part of the syntax that names of layers need: literals,
`.`, classes, groups, `|`, `*`, `+`, `?`, `{m,n}`, `^`, `$`, and `\d`, `\w`, `\s`. What cannot be
matched so, backreferences and looking around, is left to Python's engine where it is harmless there
(`is_harmless`), and else refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from qalora_compile.errors import UserInputError
from qalora_compile.untrusted import quoted

MAX_LENGTH, MAX_STATES, MAX_DEPTH = 1_000, 5_000, 30
_CLASSES = {
    "d": str.isdigit,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
    "D": lambda c: not c.isdigit(),
    "W": lambda c: not (c.isalnum() or c == "_"),
    "S": lambda c: not c.isspace(),
}
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r"}
_COUNTS = re.compile(r"\{(\d{1,3})?(,(\d{1,3})?)?\}")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_REPEATED = re.compile(r"[*+]|\{\d*,\d*\}")
_CHOICE = re.compile(r"\||(?<!\()\?")
Test = Callable[[str], bool]


@dataclass
class _State:
    """A place in an expression: what it eats, or where it goes without eating."""

    test: Test | None = None
    at: str = ""
    after: list[int] = field(default_factory=list)


class Expression:
    """A compiled expression; see `compile_expression`."""

    def __init__(self, states: list[_State], start: int, accept: int) -> None:
        self._states, self._start, self._accept = states, start, accept
        self._native: re.Pattern[str] | None = None

    @classmethod
    def native(cls, pattern: re.Pattern[str]) -> Expression:
        """An expression for Python's engine."""
        made = cls([], 0, 0)
        made._native = pattern
        return made

    def matches(self, text: str, *, whole: bool) -> bool:
        """Whether it matches from the beginning of a text, to its end if `whole`."""
        if self._native is not None:
            return (self._native.fullmatch if whole else self._native.match)(text) is not None
        current = self._closure([self._start], 0, text)
        for index, character in enumerate(text):
            if self._accept in current and not whole:
                return True
            eaten = (
                target
                for state in current
                if (test := self._states[state].test) is not None and test(character)
                for target in self._states[state].after
            )
            current = self._closure(eaten, index + 1, text)
            if not current:
                return False
        return self._accept in current

    def _closure(self, found: Iterable[int], index: int, text: str) -> set[int]:
        """These states and what follows them without eating."""
        waiting, seen = list(found), set[int]()
        while waiting:
            number = waiting.pop()
            state = self._states[number]
            barred = (state.at == "^" and index) or (state.at == "$" and index < len(text))
            if number in seen or barred:
                continue
            seen.add(number)
            if state.test is None:
                waiting += state.after
        return seen


@lru_cache(maxsize=256)
def compile_expression(pattern: str) -> Expression:
    """Compile an expression.

    Raises:
        UserInputError: it is no regular expression, one that can be matched neither in linear time
            nor soon, or too large.
    """
    if len(pattern) > MAX_LENGTH:
        raise UserInputError(f"an expression has {len(pattern)} characters, over {MAX_LENGTH}")
    try:
        parser = _Parser(pattern)
        start, end = parser.alternatives(0)
        if parser.at < len(pattern):
            raise parser.bad("a ) closes nothing")
    except UserInputError:
        if not is_harmless(pattern):
            raise
        try:
            return Expression.native(re.compile(pattern))
        except (re.error, OverflowError):
            pass  # it is no expression for Python either
        raise
    return Expression(parser.states, start, end)


def is_harmless(pattern: str) -> bool:
    """Whether Python's own engine matches an expression soon.

    No group of it is repeated, no more than three of its parts are, and it has six choices at most.
    """
    repeated, choices = (len(each.findall(pattern)) for each in (_REPEATED, _CHOICE))
    few = repeated <= 3 and choices <= 6 and pattern.count("(") <= MAX_DEPTH
    return few and _REPEATED_GROUP.search(pattern) is None


class _Parser:
    """Builds states while it reads; a part of an expression is its first state and its last."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.at, self.states = pattern, 0, list[_State]()

    def bad(self, what: str) -> UserInputError:
        return UserInputError(
            f"the expression {quoted(self.pattern)} cannot be read: {what}",
            hint="write the names out, without backreferences, (?=…), (?!…) and (?<…)",
        )

    def state(self, test: Test | None = None, at: str = "") -> int:
        if len(self.states) >= MAX_STATES:
            raise self.bad("it is too large")
        self.states.append(_State(test, at))
        return len(self.states) - 1

    def link(self, start: int, *targets: int) -> None:
        self.states[start].after += targets

    def peek(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def next(self) -> str:
        self.at += 1
        return self.pattern[self.at - 1]

    def alternatives(self, depth: int) -> tuple[int, int]:
        if depth > MAX_DEPTH:
            raise self.bad("it is nested too deep")
        start, end = self.state(), self.state()
        while True:
            first, last = self.sequence(depth)
            self.link(start, first)
            self.link(last, end)
            if self.peek() != "|":
                return start, end
            self.at += 1

    def sequence(self, depth: int) -> tuple[int, int]:
        start = last = self.state()
        while self.peek() not in ("", "|", ")"):
            began = self.at
            part = self.atom(depth)
            first, end = self.repeated(part, began, depth)
            self.link(last, first)
            last = end
        return start, last

    def atom(self, depth: int) -> tuple[int, int]:
        character = self.next()
        if character == "(":
            if self.pattern.startswith("?:", self.at):
                self.at += 2
            elif self.peek() == "?":
                raise self.bad("(? is not supported")
            part = self.alternatives(depth + 1)
            if self.peek() != ")":
                raise self.bad("a ( is not closed")
            self.at += 1
            return part
        if character in "*+?":
            raise self.bad(f"{character} repeats nothing")
        if character in "^$":
            return self.single(None, character)
        if character == ".":
            return self.single(lambda c: c != "\n")
        if character == "[":
            return self.single(self.members())
        if character == "\\":
            return self.single(self.escaped())
        return self.single(_equals(character))

    def single(self, test: Test | None, at: str = "") -> tuple[int, int]:
        start, end = self.state(test, at), self.state()
        self.link(start, end)
        return start, end

    def escaped(self) -> Test:
        if not self.peek():
            raise self.bad("it ends with \\")
        character = self.next()
        if character in _CLASSES:
            return _CLASSES[character]
        if character.isalnum() and character not in _CONTROLS:
            raise self.bad(f"\\{character} is not supported")
        return _equals(_CONTROLS.get(character, character))

    def members(self) -> Test:
        """The rest of a class in square brackets."""
        tests: list[Test] = []
        negative = self.peek() == "^"
        self.at += negative
        first = True
        while first or self.peek() != "]":
            first = False
            if not self.peek():
                raise self.bad("a [ is not closed")
            character = self.next()
            if character == "\\":
                tests.append(self.escaped())
                continue
            if self.peek() == "-" and self.pattern[self.at + 1 : self.at + 2] not in ("", "]"):
                self.at += 1
                tests.append(_between(character, self.next()))
            else:
                tests.append(_equals(character))
        self.at += 1
        return lambda c: any(test(c) for test in tests) != negative

    def repeated(self, part: tuple[int, int], began: int, depth: int) -> tuple[int, int]:
        """A part as often as what stands behind it says; it began at `began`."""
        least, most = self.counts()
        if (least, most) == (1, 1):
            return part
        if self.peek() == "?":
            self.at += 1  # lazy: it matches the same texts
        if self.peek() in ("*", "+", "?"):
            raise self.bad("a repetition is repeated")
        start = last = self.state()
        for index in range(least if most is None else most):
            first, end = part if index == 0 else self.copy(began, depth)
            if index >= least:
                self.link(last, first, skip := self.state())
                self.link(end, skip)
                last = skip
            else:
                self.link(last, first)
                last = end
        if most is None:
            first, end = self.copy(began, depth) if least else part
            self.link(last, first, skip := self.state())
            self.link(end, first, skip)
            last = skip
        return start, last

    def copy(self, began: int, depth: int) -> tuple[int, int]:
        """The part that begins there, once more."""
        self.at, behind = began, self.at
        part = self.atom(depth)
        self.at = behind
        return part

    def counts(self) -> tuple[int, int | None]:
        character = self.peek()
        if character and character in "*+?":
            self.at += 1
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[character]
        found = _COUNTS.match(self.pattern, self.at)
        if found is None or found.group() == "{}":
            return 1, 1
        self.at = found.end()
        least = int(found[1] or 0)
        most = least if found[2] is None else None if found[3] is None else int(found[3])
        if most is not None and most < least:
            raise self.bad("a repetition ends before it begins")
        return least, most


def _equals(wanted: str) -> Test:
    return lambda c: c == wanted


def _between(low: str, high: str) -> Test:
    return lambda c: low <= c <= high
