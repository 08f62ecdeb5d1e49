"""Rows of the table in docs/reference/clients.md, recorded by the tests that ran the client.

With `QALORA_CLIENTS` set to a folder, each test that calls `record_client` writes its row there;
`scripts/write_clients.py` (`make clients-table`) puts the rows into the page.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = "QALORA_CLIENTS"
TOY = "not measured: toy sizes"
"""In the column speed: what is compared is tokens, of a model whose time is the client's own."""
_UNSAFE = re.compile(r"[^A-Za-z0-9]+")


@dataclass(frozen=True, kw_only=True)
class ClientRow:
    """One test of one client.

    Attributes:
        client, version: The program that opened the folder.
        target: The export target, with options that matter.
        model: What was exported.
        result: What was compared and how well it agreed; the test has passed.
        speed: Speed in this client, next to float in it where that was measured; or empty.
        test: The test, as pytest names it.
    """

    client: str
    version: str
    target: str
    model: str
    result: str
    speed: str
    test: str


def record_client(
    client: str, version: str, target: str, model: str, result: str, *, speed: str = ""
) -> None:
    """Write the row of the running test, if a folder is given for it; call it after the asserts."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return
    test = os.environ["PYTEST_CURRENT_TEST"].partition(" ")[0].partition("[")[0]
    row = ClientRow(
        client=client,
        version=version,
        target=target,
        model=model,
        result=result,
        speed=speed,
        test=test,
    )
    name = _UNSAFE.sub("-", f"{test} {client} {target} {model}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, f"{name}.json").write_text(json.dumps(asdict(row), indent=1), "utf-8")
