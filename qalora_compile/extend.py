"""What registers extensions, and the types to write them with: docs/reference/extending.md.

    from qalora_compile import extend

    extend.register_pass(DropZeroBiases)
    extend.register_quantizer("three-sigma", extend.Method(quantize=quantize_three_sigma))
    extend.register_target("npz", extend.FolderTarget(...))
    extend.register_reader("nibbles", read_nibbles)

An installed package needs no call: its entry points name the same objects, in the groups
`qalora_compile.passes`, `.quantizers`, `.targets` and `.readers`. They are imported when their name
is looked up. `qalora_compile.testing` has a contract suite for each kind.
"""

from __future__ import annotations

from qalora_compile.capture.checkpoints.base import (
    Decoded,
    OpenFolder,
    Reader,
    Tensors,
    affine_of,
    check_matrix,
    read_count,
    section,
    take,
)
from qalora_compile.capture.checkpoints.registry import register_reader
from qalora_compile.errors import ExtensionError, UnsupportedError, UserInputError
from qalora_compile.exporters.capability import (
    EXACT,
    Capability,
    StoredTensor,
    rounds,
    unsupported,
)
from qalora_compile.exporters.checkpoints.registry import Format
from qalora_compile.exporters.targets import FolderTarget, LoweredTarget, Target, register_target
from qalora_compile.ir.affine import GroupAffine
from qalora_compile.ir.checkpoint_codes import CheckpointWeight
from qalora_compile.ir.lazy_tensor import materialize
from qalora_compile.passes.framework.base import Change, Pass, PassResult
from qalora_compile.passes.framework.registry import register_pass
from qalora_compile.quantizers.base import Method, QuantizedWeight, Quantizer
from qalora_compile.quantizers.registry import register_quantizer
from qalora_compile.quantizers.statistics import ActivationStatistics
from qalora_compile.registry import scoped

__all__ = [
    "EXACT",
    "ActivationStatistics",
    "Capability",
    "Change",
    "CheckpointWeight",
    "Decoded",
    "ExtensionError",
    "FolderTarget",
    "Format",
    "GroupAffine",
    "LoweredTarget",
    "Method",
    "OpenFolder",
    "Pass",
    "PassResult",
    "QuantizedWeight",
    "Quantizer",
    "Reader",
    "StoredTensor",
    "Target",
    "Tensors",
    "UnsupportedError",
    "UserInputError",
    "affine_of",
    "check_matrix",
    "materialize",
    "read_count",
    "register_pass",
    "register_quantizer",
    "register_reader",
    "register_target",
    "rounds",
    "scoped",
    "section",
    "take",
    "unsupported",
]
