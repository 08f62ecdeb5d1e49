"""Read files of unknown origin: within limits, without running code, never outside their folder.

Model folders, adapters and exported files may come from anyone, so every reader of this package
opens them through this subpackage. `check_folder` checks a folder before anything in it is read,
`member` finds a file that another file names, and `read_json` reads JSON. `safetensors_header`,
`gguf_header` and `onnx_file` check files before a library reads them. `tokenizer` loads tokenizers
and renders chat templates, and `patterns` matches regular expressions.
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
