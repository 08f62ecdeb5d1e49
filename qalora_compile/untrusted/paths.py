"""Files of unknown origin: they must be regular files and stay inside their folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath

from qalora_compile.errors import UserInputError

_HUB_BLOBS, _HUB_SNAPSHOTS = "blobs", "snapshots"


def read_bytes(path: Path, *, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        UserInputError: the file is missing, is a pipe, device or folder, or is too large.
    """
    check_regular(path)
    size = path.stat().st_size
    if size > limit:
        raise UserInputError(
            f"{path.name} has {size} bytes, more than the {limit} that such a file may have",
            where=str(path),
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserInputError(
            f"cannot read {path.name}: {error.strerror}", where=str(path)
        ) from None


def check_regular(path: Path) -> None:
    """Refuse a path that is not a regular file: reading a pipe or a device may never end.

    Raises:
        UserInputError: it is not, or it is missing.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UserInputError(f"the file {path.name} is missing", where=str(path)) from None
    except (OSError, ValueError) as error:
        raise UserInputError(f"cannot read {path.name!r}: {error}", where=str(path)) from None
    if not stat.S_ISREG(mode):
        raise UserInputError(f"{path.name} is not a regular file", where=str(path))


def member(folder: Path, name: object) -> Path:
    """The file of `folder` that another file in it names.

    Raises:
        UserInputError: the name is not a text, is absolute, or leaves the folder by `..` or by a
            link; or the file is missing or not a regular file.
    """
    path = folder / check_name(name, folder)
    check_regular(path)
    check_link(path, folder)
    return path


def check_name(name: object, folder: Path) -> str:
    """Refuse a name that leads out of a folder; returns it.

    Raises:
        UserInputError: it is not a text, is absolute, or contains `..`.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise UserInputError(f"{name!r} is not a file name", where=str(folder))
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if (
        posix.is_absolute()
        or windows.drive
        or windows.root
        or ".." in {*posix.parts, *windows.parts}
    ):
        raise UserInputError(
            f"the file name {name!r} leads out of the folder",
            where=str(folder),
            hint="a folder may refer only to its own files: get it from a source that you trust",
        )
    return name


def check_folder(folder: Path) -> None:
    """Refuse a folder with links that lead out of it, or with pipes, sockets or devices.

    Hidden files and folders are not checked, since no reader opens them. Snapshots in the cache of
    the Hugging Face hub, whose files are links to the `blobs` of the same model, are accepted.

    Raises:
        UserInputError: it has; the entry is named.
    """
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*folders, *files):
            if not name.startswith("."):
                check_link(Path(root, name), folder)


def check_link(path: Path, folder: Path) -> None:
    """Refuse `path`, an entry of `folder`, if it leads out of it or is neither file nor folder.

    Raises:
        UserInputError: it is a symbolic link to something outside, a hard link to a file with a
            name outside, or a pipe, socket or device.
    """
    try:
        resolved, info = path.resolve(), path.stat()
    except (OSError, RuntimeError):
        raise UserInputError(f"{path.name} is a link to nothing", where=str(path)) from None
    home = folder.resolve()
    if not resolved.is_relative_to(home) and not _is_hub_blob(resolved, folder):
        raise UserInputError(
            f"{path.name} is a link that leads out of the folder",
            where=str(path),
            hint="copy the file into the folder if you trust what the link points to",
        )
    if stat.S_ISDIR(info.st_mode):
        return
    if not stat.S_ISREG(info.st_mode):
        raise UserInputError(f"{path.name} is not a regular file", where=str(path))
    if info.st_nlink > 1 and resolved.is_relative_to(home):
        _check_hard_link(path, info, home)


def _check_hard_link(path: Path, info: os.stat_result, home: Path) -> None:
    key = (info.st_dev, info.st_ino)
    inside = 0
    for root, _, files in os.walk(home):
        for name in files:
            other = os.lstat(os.path.join(root, name))
            inside += (other.st_dev, other.st_ino) == key
    if inside < info.st_nlink:
        raise UserInputError(
            f"{path.name} is a hard link to a file that has another name outside the folder",
            where=str(path),
            hint="copy the folder (cp -r) if you trust it",
        )


def _is_hub_blob(resolved: Path, folder: Path) -> bool:
    """Whether a link in a hub snapshot leads to the blobs of the same model."""
    absolute = Path(os.path.abspath(folder))
    for parent in (absolute, *absolute.parents):
        if parent.parent.name == _HUB_SNAPSHOTS:
            return resolved.parent == parent.parent.parent.resolve() / _HUB_BLOBS
    return False
