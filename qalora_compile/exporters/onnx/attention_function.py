"""The function of CachedAttention: ONNX's Attention, for runtimes without the operator library."""

from __future__ import annotations

from typing import Any

from qalora_compile.exporters.onnx.functions import QALORA
from qalora_compile.optional import require

CACHED_ATTENTION = "CachedAttention"

_TEXT = """
<domain: "{domain}", opset_import: ["" : {opset}]>
CachedAttention <q_num_heads, kv_num_heads, scale>
(q, k, v, mask, past_key, past_value) => (y, present_key, present_value)
{{
   y, present_key, present_value = Attention <q_num_heads: int = @q_num_heads,
      kv_num_heads: int = @kv_num_heads, scale: float = @scale>
      (q, k, v, mask, past_key, past_value)
}}
"""


def attention_function(opset: int) -> Any:
    """The function of CachedAttention as `onnx.FunctionProto`.

    Args:
        opset: Version of the standard operators that the model imports; 23 or newer.
    """
    parser = require("onnx", extra="onnx", purpose="export to ONNX").parser
    return parser.parse_function(_TEXT.format(domain=QALORA, opset=opset))
