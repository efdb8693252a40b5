"""Files, written beside their place and renamed: a stop halfway leaves the old one."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

_LONGEST = 300  # characters of a reason: a file may hold anything


@contextlib.contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to, beside `path` and with its suffix; renamed at the end."""
    place = Path(os.path.realpath(path))  # a link stays a link
    if place.exists() and not place.is_file():  # a pipe or a terminal cannot be replaced
        yield place
        return
    if not place.parent.is_dir():  # the error of the temporary file would name that
        raise FileNotFoundError(errno.ENOENT, f"no folder {place.parent} to write to", str(path))
    temporary = place.with_name(f".{place.stem}.{os.getpid()}{place.suffix}")
    try:
        yield temporary
        if place.exists():
            shutil.copymode(place, temporary)
        os.replace(temporary, place)
    except OSError as error:
        if error.filename != str(temporary):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # by the name asked for
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: str | PathLike[str]) -> None:
    """Fail before long work whose result could not be written to `folder`."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:  # its own name is the temporary file's
        raise OSError(error.errno, error.strerror, str(folder)) from error


def write_text(path: str | PathLike[str], text: str) -> Path:
    """Write a text file whole, or leave the old one."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def append_line(path: str | PathLike[str], line: str) -> None:
    """Add a line to a log that several processes may write: all of it in one write, or none.

    Not renamed, which would lose what another process adds at the same time. A line that was cut,
    as by a full disk, is ended first, so that only that one is lost.
    """
    with open(path, "ab+", buffering=0) as file:
        with contextlib.suppress(ImportError, OSError):  # no locks here: one write is still whole
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END) if file.seekable() else 0
        if end:
            file.seek(end - 1)
        cut = end > 0 and file.read(1) != b"\n"
        file.write(("\n" * cut + line + "\n").encode("utf-8"))


def read_json(path: str | PathLike[str], way_out: str) -> Any:
    """Read JSON; whatever is wrong with the file is one line, with the way out behind it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"no file {path}; {way_out}") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; {way_out}") from error
    except RecursionError as error:
        raise ValueError(
            f"{path} is no JSON that can be read: nested too deep; {way_out}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {one_line(error)}; {way_out}") from error


def one_line(error: object) -> str:
    """What an error says, on one line of bounded length."""
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
