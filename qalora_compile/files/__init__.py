"""Atomic outputs: a file or folder appears under its final name completely or not at all.

A command first calls `reserve`: it refuses an output that may not be replaced, and locks it until
the command ends. `atomic_folder` and `atomic_files` then write it. `write_json`, `write_text` and
`scratch_file` write single files inside a folder that belongs to the writer. `recover` restores
what a killed process had moved aside.
"""

from qalora_compile.files.faults import fault_of, reporting_faults
from qalora_compile.files.outputs import atomic_files, atomic_folder, check_output, reserve
from qalora_compile.files.replacing import keep_parts, recover
from qalora_compile.files.single import scratch_file, write_json, write_text

__all__ = [
    "atomic_files",
    "atomic_folder",
    "check_output",
    "fault_of",
    "keep_parts",
    "recover",
    "reporting_faults",
    "reserve",
    "scratch_file",
    "write_json",
    "write_text",
]
