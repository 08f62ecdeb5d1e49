"""Models in: `torch.export` to a `Program`, and readers of foreign checkpoints.

Everything odd about foreign formats ends here; inside there is one convention.
"""

from __future__ import annotations

from qalora_compile.capture.model import capture_model

__all__ = ["capture_model"]
