"""Write docs/reference/known_problems.md: problems of public trackers and their tests.

The tests run first; if one fails, nothing is written.

    python -m scripts.write_known_problems          # or: make known-problems
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tomllib

from qalora_compile.files import write_text

ROOT = Path(__file__).parent.parent
DATA, PAGE = (
    ROOT / "tests" / "known_problems.toml",
    ROOT / "docs" / "reference" / "known_problems.md",
)
INTRODUCTION = """# Known problems of the field

This page lists problems that users of similar tools reported on public trackers, and what this
package does in each case. Each problem was reproduced with a small model. The reference for the
right result is transformers, PEFT or the format's own library, and a test checks it. `make
known-problems` runs the tests and then writes this page; do not edit it by hand.

A number refers to an issue or a pull request of the named project.
"""


@dataclass(frozen=True)
class Problem:
    """One kind of problem.

    Attributes:
        area: The heading it belongs to.
        issues: Tracker and number of each report.
        seen: The reported problem.
        verdict: What this package does: handle it correctly, or refuse it with a named error.
        tests: Node identifiers of pytest.
    """

    area: str
    issues: tuple[str, ...]
    seen: str
    verdict: str
    tests: tuple[str, ...]


def read_problems() -> list[Problem]:
    """The problems, in the order of the file."""
    rows = tomllib.loads(DATA.read_text("utf-8"))["problem"]
    return [
        Problem(
            area=row["area"],
            issues=tuple(row["issues"]),
            seen=row["seen"],
            verdict=row["verdict"],
            tests=tuple(row["tests"]),
        )
        for row in rows
    ]


def page(problems: list[Problem]) -> str:
    """The page as Markdown."""
    parts = [INTRODUCTION]
    for area in dict.fromkeys(problem.area for problem in problems):
        parts.append(
            f"\n## {area}\n\n| reported as | problem | here | tests |\n|---|---|---|---|\n"
        )
        for problem in problems:
            if problem.area == area:
                cells = (
                    ", ".join(problem.issues),
                    problem.seen.replace("|", "\\|"),
                    problem.verdict,
                    "<br>".join(f"`{test}`" for test in problem.tests),
                )
                parts.append(f"| {' | '.join(cells)} |\n")
    return "".join(parts)


def main() -> int:
    """Run the tests, and write the page if all pass."""
    problems = read_problems()
    tests = sorted({test for problem in problems for test in problem.tests})
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", *tests]
    if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
        print("a test failed: nothing was written", file=sys.stderr)
        return code
    write_text(PAGE, page(problems))
    print(f"{PAGE.relative_to(ROOT)}: {len(problems)} problems, {len(tests)} tests")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
