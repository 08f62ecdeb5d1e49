"""docs/reference/known_problems.md is what the file says, and every test in it exists."""

from __future__ import annotations

import ast

from scripts.write_known_problems import PAGE, ROOT, page, read_problems


def functions_of(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == page(read_problems()), "run `make known-problems`"


def test_every_test_exists() -> None:
    for problem in read_problems():
        assert problem.issues and problem.tests
        for test in problem.tests:
            path, _, name = test.partition("::")
            assert name.partition("[")[0] in functions_of(path), test


def test_every_report_has_a_number() -> None:
    for problem in read_problems():
        for issue in problem.issues:
            project, _, number = issue.rpartition(" #")
            assert project and number.isdigit(), issue
