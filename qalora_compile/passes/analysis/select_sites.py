"""Selection of sites by name, dotted suffix, glob or regular expression."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence

from qalora_compile.errors import UserInputError
from qalora_compile.ir.site_plan import SitePlan

ALL_LINEAR = "all-linear"
_REGEX = "re:"
_GLOB_CHARACTERS = frozenset("*?[")


def as_patterns(value: object, option: str) -> tuple[str, ...]:
    """One pattern or several as a tuple of texts; a number names a layer of `nn.Sequential`.

    Raises:
        UserInputError: a pattern is neither text nor an integer.
    """
    items = value if isinstance(value, (tuple, list)) else (value,)
    for item in items:
        if not isinstance(item, (str, int)) or isinstance(item, bool):
            raise UserInputError(f"{option} holds {item!r}", hint="give names of layers as text")
    return tuple(str(item) for item in items)


def match_patterns(
    patterns: Iterable[str],
    names: Mapping[str, Sequence[str]],
    option: str,
    what: str = "linear layer",
) -> set[str]:
    """Keys of `names` of which one alias matches one pattern.

    A pattern is an exact path, a dotted suffix (`q_proj` takes `model.layers.0.self_attn.q_proj`),
    a glob over the full path (`*.mlp.*`), or `re:` and a regular expression searched in it. `what`
    says in messages what the names stand for.

    Raises:
        UserInputError: a pattern matches nothing (the message lists similar names), or is not a
            valid regular expression.
    """
    matched: set[str] = set()
    for pattern in patterns:
        hits = {key for key, aliases in names.items() if any(_fits(pattern, a) for a in aliases)}
        if not hits:
            raise UserInputError(
                f"the pattern {pattern!r} matches no {what}",
                where=option,
                hint=_near(pattern, names, what),
            )
        matched |= hits
    return matched


def _fits(pattern: str, path: str) -> bool:
    if pattern.startswith(_REGEX):
        try:
            return re.search(pattern.removeprefix(_REGEX), path) is not None
        except re.error as error:
            raise UserInputError(f"{pattern!r} is not a regular expression: {error}") from error
    if _GLOB_CHARACTERS & set(pattern):
        return fnmatch.fnmatchcase(path, pattern)
    return path == pattern or path.endswith(f".{pattern}")


def _near(pattern: str, names: Mapping[str, Sequence[str]], what: str) -> str:
    """The names most like a pattern, or the first few."""
    paths = sorted({alias for aliases in names.values() for alias in aliases})
    tails = sorted({path.rpartition(".")[2] for path in paths})
    near = difflib.get_close_matches(pattern, [*tails, *paths], n=5, cutoff=0.4) or paths[:5]
    near = list(dict.fromkeys(near))
    return f"near names: {', '.join(near)}" if near else f"the model has no {what}"


def format_choices(choices: Mapping[str, str | int]) -> tuple[str, ...]:
    """Format choices by path as texts `path=value`."""
    return tuple(f"{path}={value}" for path, value in choices.items())


def parse_choices(texts: tuple[str, ...], option: str) -> Mapping[str, str]:
    """Undo `format_choices`; the values stay text.

    Raises:
        UserInputError: a text has no path or no value, or a path occurs twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        path, _, value = str(text).rpartition("=")
        if not path or not value or path in found:
            raise UserInputError(
                f"{option} holds {text!r}", hint="write path=value, once for each path"
            )
        found[path] = value
    return found


def parse_ranks(texts: tuple[str, ...]) -> Mapping[str, int]:
    """Ranks by path.

    Raises:
        UserInputError: a text is not of the form `path=rank`, with a rank of 1 or more.
    """
    choices = parse_choices(texts, "ranks")
    for path, value in choices.items():
        if not value.isdecimal() or int(value) < 1:
            raise UserInputError(
                f"ranks gives {path} the rank {value!r}", hint="use an integer, 1 or more"
            )
    return {path: int(value) for path, value in choices.items()}


def check_paths(choices: Mapping[str, object], plan: SitePlan, option: str) -> None:
    """Check that every path is of a weight that the plan quantizes.

    Raises:
        UserInputError: one is not; the message names similar ones.
    """
    known = {site.path for site in plan.to_quantize()}
    for path in choices:
        if path not in known:
            near = difflib.get_close_matches(path, sorted(known), n=3) or sorted(known)[:3]
            raise UserInputError(
                f"{option} names {path!r}, which is not a quantized weight",
                hint=f"near ones: {', '.join(near)}",
            )
