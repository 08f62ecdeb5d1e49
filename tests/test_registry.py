"""Extensions by name: clashes, what installed packages bring, and what is said of broken ones."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import qalora_compile as qc
from qalora_compile import extend
from qalora_compile.cli.main import main
from qalora_compile.errors import ExtensionError, UserInputError
from qalora_compile.passes import available_passes, get_pass
from qalora_compile.quantizers import get_quantizer
from qalora_compile.registry import QUANTIZERS, TARGETS, Registry, scoped

THING = object()


def table() -> Registry:
    return Registry("thing", "qalora_test.things", {"first": "math:pi", "second": "math:tau"})


def test_built_in_ones_are_loaded_by_name() -> None:
    things = table()
    assert things.names() == things.builtin == ("first", "second")
    assert "first" in things
    assert "third" not in things
    assert things.load("first") == pytest.approx(3.14159, rel=1e-5)
    assert things.origin("first") == "qalora-compile"


def test_an_unknown_name_says_how_it_becomes_known() -> None:
    with pytest.raises(UserInputError, match="there is no thing 'firts'") as caught:
        table().load("firts")
    assert "did you mean first? known: first, second" in str(caught.value)
    assert "entry points of qalora_test.things" in str(caught.value)
    assert "extend.register_thing" in str(caught.value)


def test_names_that_clash_are_refused() -> None:
    things = table()
    things.add("third", THING)
    things.add("third", THING)  # the same one
    assert things.names() == ("first", "second", "third")
    for name in ("first", "third"):
        with pytest.raises(ExtensionError, match=f"there is a thing '{name}' already"):
            things.add(name, object())


@pytest.mark.parametrize("name", ["", "Third", "3rd", "a b", "a{b}", None])
def test_what_is_no_name_is_refused(name: Any) -> None:
    with pytest.raises(ExtensionError, match="not a name for a thing"):
        table().add(name, THING)


def test_registrations_end_with_their_block() -> None:
    things = table()
    things.add("outer", THING)
    with scoped():
        things.add("inner", THING)
        with scoped():
            assert "inner" in things
    assert things.names() == ("first", "second", "outer")


# What installed packages bring


Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a distribution with entry points into the path of this process."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(name: str, code: str, **groups: str) -> None:
        (tmp_path / f"{name}.py").write_text(code, "utf-8")
        info = tmp_path / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        entries = [f"[qalora_compile.{group}]\n{line}\n" for group, line in groups.items()]
        (info / "entry_points.txt").write_text("\n".join(entries))

    with scoped():
        yield add


PASS = '''
"""A package with a pass."""
from dataclasses import dataclass
from qalora_compile import extend
from qalora_compile.cli.main import main

@dataclass(frozen=True, kw_only=True)
class Nothing(extend.Pass):
    """Does nothing."""
    name = "nothing"
    consumes = ("float",)
    produces = None
    times: int = 1

    def call(self, program):
        return extend.PassResult(program.evolve(graph=program.copy_graph()))
'''


def test_a_pass_of_a_package_is_found_by_its_name(install: Install) -> None:
    install("nothings", PASS, passes="nothing = nothings:Nothing")
    assert "nothings" not in sys.modules
    assert "nothing" in available_passes()
    assert "nothings" not in sys.modules, "listing names imports nothing"
    (step,) = qc.Pipeline.parse("nothing{times=3}").passes
    assert str(step) == "nothing{times=3}"


BROKEN = {
    "cannot be imported": ("import not_there_at_all", "broken:x"),
    "has no such name": ("", "broken:x"),
    "fails": ("1 / 0", "broken:x"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_package_is_named(fault: str, install: Install) -> None:
    sys.modules.pop("broken", None)
    code, value = BROKEN[fault]
    install("broken", code, passes=f"x = {value}", quantizers=f"x = {value}")
    assert "x" in QUANTIZERS.names()
    for load in (get_pass, get_quantizer):
        with pytest.raises(ExtensionError, match=r"of broken 1\.2 cannot be imported") as caught:
            load("x")
        assert "broken:x, entry point of qalora_compile" in str(caught.value)
        assert "reinstall, upgrade or remove broken 1.2" in str(caught.value)
    assert get_pass("fold-adapters").name == "fold-adapters", "others are not concerned"


def test_a_package_that_brings_something_else_is_named(install: Install) -> None:
    sys.modules.pop("odd", None)
    install("odd", "x = 3", passes="x = odd:x", quantizers="x = odd:x", targets="x = odd:x")
    with pytest.raises(ExtensionError, match="'x' is not a class derived from Pass") as caught:
        get_pass("x")
    assert "it is of odd 1.2" in str(caught.value)
    with pytest.raises(ExtensionError, match="'x' is not a Method"):
        get_quantizer("x")
    with pytest.raises(ExtensionError, match="'y' is not a LoweredTarget or a Format"):
        extend.register_target("y", 3)  # type: ignore[arg-type]


def test_two_packages_with_one_name_are_named(install: Install) -> None:
    install("one", "", targets="same = one:x")
    install("two", "", targets="same = two:x")
    with pytest.raises(ExtensionError, match="(one|two) 1.2 and (one|two) 1.2 both have a target"):
        TARGETS.names()


def test_a_package_with_a_built_in_name_is_named(install: Install) -> None:
    install("thief", "", quantizers="gptq = thief:x")
    assert qc.QuantSpec(method="gptq").method == "gptq", "the built-in one is not asked for"
    with pytest.raises(ExtensionError, match="thief 1.2 and qalora-compile both have a quantizer"):
        QUANTIZERS.names()


def test_the_command_line_says_what_is_wrong_with_a_package(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("thief", "", quantizers="gptq = thief:x")
    assert main(["quantize", "--help"]) == 2
    assert "thief 1.2 and qalora-compile both have a quantizer 'gptq'" in capsys.readouterr().err


def test_what_is_registered_cannot_take_a_name_that_is_installed(install: Install) -> None:
    install("nothings", PASS, quantizers="mine = nothings:x")
    with pytest.raises(ExtensionError, match="already") as caught:
        extend.register_quantizer("mine", extend.Method(quantize=get_quantizer("mse")))
    assert "it is of nothings 1.2" in str(caught.value)


def test_specs_stay_light() -> None:
    code = (
        "from qalora_compile import QuantSpec, ExportSpec; QuantSpec(); ExportSpec(target='gguf')"
    )
    seen = "import sys; print('torch' in sys.modules, 'importlib.metadata' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; {seen}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[0] == "False"
