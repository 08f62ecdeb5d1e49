"""Captures models as `Program`s by `torch.export`, and reads checkpoints of other tools.

Differences between formats are resolved here; the rest of the package has one convention.
"""

from __future__ import annotations

from qalora_compile.capture.model import capture_model

__all__ = ["capture_model"]
