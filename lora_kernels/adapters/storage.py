"""Files of one folder that change together: whoever reads finds all of one save, whatever becomes
of its writer.

Where the kernel can exchange two folders in one step (Linux, on local file systems), the new files
are made in a folder beside the old one, with links to all else that it holds, and the two change
places. Elsewhere they are made in a folder inside, whose renaming to `_SAVED` is the one step:
from then on a reader takes them from there, and the writer, or the next one, moves them out.
Writers wait for one another on a lock of the folder, which dies with its process.
"""

import ctypes
import errno
import os
import shutil
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"

_OURS = (CONFIG_NAME, WEIGHTS_NAME)
_STAGE, _SAVED, _LOCK = ".lora-stage", ".lora-saved", ".lora-lock"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_BY_FOLDER = os.open in os.supports_dir_fd
_TRIES, _PAUSE = 100, 1e-3
_TRIES_MISSING = 10


class AdapterError(ValueError):
    """An adapter's configuration, files and model do not fit together; nothing was changed."""


def write_together(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Writes files into `folder` as one step; all else in it stays. The last is what tells others
    that the folder holds anything, so it never stands beside a foreign one of the others.

    A process that is killed leaves all old files or all new ones, and at most a hidden folder,
    which the next call takes away.

    Raises:
        OSError: they cannot be written; the old ones are in their places.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    with _locked(folder):
        for name in contents:
            if os.path.isdir(folder / name) and not os.path.islink(folder / name):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(folder / name))
        _move_out(folder)
        for place in (_beside(folder), folder / _STAGE):
            _take_away(place, folder)
        *others, last = contents
        if others and _content(folder / last) == contents[last]:
            contents = {name: contents[name] for name in others}
        if len(contents) == 1 or not _exchange(folder, contents):
            _replace_inside(folder, contents)


@contextmanager
def open_together(folder: Path, names: Sequence[str]) -> Iterator[list[tuple[BufferedReader, int]]]:
    """Opens files of `folder` that belong to one save, for reading; yields each with its size.

    Raises:
        AdapterError: one is missing, is a pipe or device, or cannot be read; the message names it.
    """
    for attempt in range(_TRIES):
        with ExitStack() as stack:
            try:
                files, whole = _open_once(folder, names, stack)
            except FileNotFoundError as error:
                # between two looks at a save that is being moved out, a file may be in neither
                # place
                if attempt < _TRIES_MISSING:
                    time.sleep(_PAUSE)
                    continue
                raise _unreadable(folder / str(error.filename), error) from error
            except OSError as error:
                raise _unreadable(folder / str(error.filename), error) from error
            if whole:
                yield files
                return
    raise AdapterError(f"{folder}: is written again and again; no two looks at it found the same files")


def _unreadable(path: Path, error: OSError) -> AdapterError:
    return AdapterError(f"{path}: cannot be read: {error.strerror or error}")


def _open_once(
    folder: Path, names: Sequence[str], stack: ExitStack
) -> tuple[list[tuple[BufferedReader, int]], bool]:
    """The files, and whether they are of one save: the first is still where it was found once the
    last is open, and no save puts a file back."""
    where: int | None = None
    if _BY_FOLDER:
        where = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, where)
    files = []
    for name in names:
        file = stack.enter_context(_open_file(folder, name, where))
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise AdapterError(f"{folder / name}: must be a regular file")
        files.append((file, found.st_size))
    if len(names) == 1:
        return files, True
    with _open_file(folder, names[0], where) as again:
        return files, os.path.sameopenfile(files[0][0].fileno(), again.fileno())


def _open_file(folder: Path, name: str, where: int | None) -> BufferedReader:
    # without O_NONBLOCK the opening of a pipe waits for its writer
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    for place in (os.path.join(_SAVED, name), name):
        try:
            return os.fdopen(os.open(place if _BY_FOLDER else folder / place, flags, dir_fd=where), "rb")
        except FileNotFoundError:
            continue
        except OSError as error:
            error.filename = name
            raise
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other writers of the folder waiting, in this process and in others."""
    if fcntl is None:
        yield
        return
    while True:
        place = folder
        held = _Descriptor(os.open(place, os.O_RDONLY | os.O_DIRECTORY))
        try:
            fcntl.flock(held.number, fcntl.LOCK_EX)
        except OSError:
            # NFS locks files alone
            place = folder / _LOCK
            held = _Descriptor(os.open(place, os.O_RDWR | os.O_CREAT, 0o600))
            fcntl.flock(held.number, fcntl.LOCK_EX)
        # what was locked may have been replaced by the writer that had the lock before
        if _is_at(held.number, place):
            try:
                yield
            finally:
                if place is not folder:
                    place.unlink(missing_ok=True)
                held.close()
            return


class _Descriptor:
    """An open file, closed at the latest with its last reference: Ctrl-C in a `finally` must not
    leave a lock behind."""

    number = -1

    def __init__(self, number: int) -> None:
        self.number = number

    def close(self) -> None:
        number, self.number = self.number, -1
        if number >= 0:
            os.close(number)

    __del__ = close


def _is_at(opened: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened), os.stat(path))
    except FileNotFoundError:
        return False


def _beside(folder: Path) -> Path:
    return folder.parent / f".{folder.name}{_STAGE}"


def _exchange(folder: Path, contents: Mapping[str, bytes]) -> bool:
    """Whether the folder was exchanged for one with the new files; False where that cannot be, or
    would disturb more than the files."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    old, stage = folder.stat(), _beside(folder)
    kept = [entry for entry in os.scandir(folder) if entry.name not in contents]
    links = all(entry.is_symlink() or entry.is_file() for entry in kept)
    # a process whose working folder it is would stay in the old one
    if rename is None or not links or old.st_uid != os.geteuid() or os.path.samefile(folder, "."):
        return False
    try:
        stage.mkdir()
    except OSError:
        return False
    try:
        _write_files(stage, contents)
        try:
            shutil.copystat(folder, stage)
            os.chown(stage, -1, old.st_gid)
            for entry in kept:
                os.link(entry.path, stage / entry.name, follow_symlinks=False)
        except OSError:
            return False
        with _locked(stage):
            paths = os.fsencode(stage), os.fsencode(folder)
            if rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE):
                return False
            _sync_folder(folder.parent)
            # while the new folder is locked too: whoever comes now must not find the stage
            _take_away(stage, folder)
    finally:
        _take_away(stage, folder)
    return True


def _replace_inside(folder: Path, contents: Mapping[str, bytes]) -> None:
    stage = folder / _STAGE
    try:
        stage.mkdir()
        _write_files(stage, contents)
        stage.rename(folder / _SAVED)
    finally:
        _take_away(stage, folder)
    _sync_folder(folder)
    _move_out(folder)


def _move_out(folder: Path) -> None:
    """Puts the files of a complete save in their places. It may be cut short anywhere, and done
    again."""
    saved = folder / _SAVED
    if not saved.is_dir():
        return
    # the configuration last: PEFT, which does not look into `saved`, must not find a foreign one
    names = sorted(os.listdir(saved), reverse=True)
    if len(names) > 1:
        (folder / names[-1]).unlink(missing_ok=True)
    for name in names:
        (saved / name).replace(folder / name)
    saved.rmdir()


def _take_away(stage: Path, folder: Path) -> None:
    """Removes a stage. What is not in `folder` as well came while the two changed places, and goes
    there."""
    if not os.path.isdir(stage) or stage.is_symlink() or (os.name == "posix" and stage.stat().st_uid != os.geteuid()):
        return
    for name in os.listdir(stage):
        if name in _OURS or os.path.lexists(folder / name):
            (stage / name).unlink()
        else:
            (stage / name).rename(folder / name)
    stage.rmdir()


def _write_files(stage: Path, contents: Mapping[str, bytes]) -> None:
    for name, content in contents.items():
        with (stage / name).open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    _sync_folder(stage)


def _sync_folder(folder: Path) -> None:
    if _BY_FOLDER:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if path.is_file() and not path.is_symlink() else None
    except OSError:
        return None
