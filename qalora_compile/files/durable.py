"""Flush files to the disk, and give them the permissions of the user's umask."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def settle(path: Path, mode: int) -> None:
    """Give a file the permissions `mode`, and flush it to the disk.

    An executable file stays executable for those who may read it.
    """
    found = stat.S_IMODE(path.stat().st_mode)
    wanted = mode | ((mode & 0o444) >> 2 if found & 0o100 else 0)
    if found != wanted:
        path.chmod(wanted)
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def settle_folder(folder: Path) -> None:
    """Settle everything in a folder that was created by `Path.mkdir`, and the folder itself.

    Libraries write files that only their owner can read, and copies keep the permissions of the
    original. Here they all get those of a new file.
    """
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o777
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            settle(Path(root, name), mode & 0o666)
        if Path(root) != folder:
            os.chmod(root, mode)
        sync_folder(Path(root))


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, if the system can."""
    if os.name == "nt":  # pragma: no cover
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
