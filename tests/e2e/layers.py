"""SmolLM2-135M with few of its layers, where the later ones have the same nodes again."""

from __future__ import annotations

import copy
import os
from typing import Any

from tests.clients.record import FOLDER


def keep_layers(model: Any, count: int) -> None:
    """Keep the first layers of a model, in place; all of them while the table of clients is made.

    The table (`make clients-table`) is about the complete model, as is tests/e2e/test_smollm2.py.
    """
    if not os.environ.get(FOLDER):
        model.model.layers = model.model.layers[:count]
        model.config.num_hidden_layers = count


def first_layers(model: Any, count: int) -> Any:
    """A copy of a model with its first layers alone."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = count
    few = type(model)(config).eval()
    few.load_state_dict(model.state_dict(), strict=False)
    return few
