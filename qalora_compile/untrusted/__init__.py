"""Reading what others wrote: within limits, without running it, and never outside its folder.

Model folders, adapters and exported files come from strangers. Every reader of this package opens
them through this room: a folder is checked with `check_folder` before anything in it is read, a
file that another file names is found with `member`, and JSON is read with `read_json`. What a
library reads is looked at first: `safetensors_header`, `gguf_header`, `onnx_file`; tokenizers and
chat templates are loaded and rendered by `tokenizer`, and expressions matched by `patterns`.
"""

from qalora_compile.untrusted.fields import check_fields, quoted
from qalora_compile.untrusted.json_text import parse_json, read_json, read_object
from qalora_compile.untrusted.paths import (
    check_folder,
    check_link,
    check_regular,
    member,
    read_bytes,
)

__all__ = [
    "check_fields",
    "check_folder",
    "check_link",
    "check_regular",
    "member",
    "parse_json",
    "quoted",
    "read_bytes",
    "read_json",
    "read_object",
]
