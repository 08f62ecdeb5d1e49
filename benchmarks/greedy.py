"""Greedy tokens of an exported model next to those of torch, on twenty prompts.

python -m benchmarks.greedy FOLDED EDGE [EDGE ...]      # edges of `export FOLDED --preset …`
python -m benchmarks.greedy FOLDED EDGE --tokens 16

The exported model generates on the operator library if it is built, with its cache. torch then
reads each prompt with the answer, in float32 on the folded program, and gives the token that it
would have chosen at each place. An answer is equal if all choices are; otherwise the first other
choice is printed with the distance of the two logits in torch, which shows whether it was a near
tie.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

import qalora_compile as qc
from qalora_compile.runtime import LanguageModel, kernel_level, open_session
from qalora_compile.untrusted.artifacts import model_file
from qalora_compile.untrusted.tokenizer import load_tokenizer

PROMPTS = (
    "The committee met on Tuesday to discuss the plans for a new railway line, and",
    "def fibonacci(n):",
    "Water boils at a lower temperature on a mountain because",
    "1, 2, 3, 4,",
    "The three largest oceans are",
    "Dear Sir or Madam, I am writing to",
    "Once upon a time, in a village by the sea,",
    "import numpy as np\n\nx = np.",
    "The recipe needs flour, eggs,",
    "In 1969 two men walked on",
    "To change a bicycle tyre, first",
    "The patient was given an injection, after which",
    "SELECT name, price FROM",
    "He opened the door slowly, and there",
    "A prime number is a number that",
    "The company said on Thursday that its profit",
    "Plants are green because",
    "The capital of Spain is",
    "for i in range(10):\n    print(",
    "The difference between weather and climate is",
)


@dataclass(frozen=True)
class Difference:
    """The first token of an answer that torch would not have chosen.

    Attributes:
        place: Its number in the answer, from 1.
        distance: Torch's logit of its own choice less that of the token.
    """

    place: int
    distance: float


def main() -> None:
    """Generate and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folded", type=Path, help="a folder of `fold`")
    parser.add_argument("edges", type=Path, nargs="+", help="folders of `export`")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens of an answer")
    options = parser.parse_args()
    program = qc.Program.load(options.folded)
    print(
        f"kernels: {kernel_level() or 'stock'}; {options.tokens} tokens on {len(PROMPTS)} prompts"
    )
    for edge in options.edges:
        model = LanguageModel(open_session(model_file(edge), library=kernel_level() is not None))
        tokenizer, equal = load_tokenizer(edge), 0
        for text in PROMPTS:
            prompt = tokenizer(text).input_ids
            answer = list(model.generate(prompt, max_new_tokens=options.tokens))
            found = first_difference(program, prompt, answer)
            equal += found is None
            if found is not None:
                at = f"token {found.place}, {found.distance:.1e} below torch's choice"
                print(f"  {edge.name}: {text!r}: {at}")
        print(f"{edge.name}: {equal} of {len(PROMPTS)} answers are torch's")


def first_difference(
    program: qc.Program, prompt: list[int], answer: list[int]
) -> Difference | None:
    """Compare an answer with torch's choices, given the prompt and the tokens before each one."""
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        logits = program(ids, torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1]
    for place, (row, token) in enumerate(zip(logits, answer, strict=True), 1):
        if int(row.argmax()) != token:
            return Difference(place, float(row.max() - row[token]))
    return None


if __name__ == "__main__":
    main()
