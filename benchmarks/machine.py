"""What the system says of the machine that a benchmark runs on."""

from __future__ import annotations

import platform
from pathlib import Path

MEGABYTE = 1 << 20


def cache_size() -> int:
    """Bytes of the last-level cache, 32 MiB where the system does not say."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text("ascii").strip()
    except OSError:
        return 32 * MEGABYTE
    return int(text.rstrip("KM")) * (MEGABYTE if text.endswith("M") else 1 << 10)


def processor() -> str:
    """The CPU's name, as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def available_memory() -> int:
    """Bytes of memory that the system says are available; 8 GiB where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        kilobytes = next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 8192 * MEGABYTE
    return kilobytes * 1024
