"""Local paths, and URLs of other file systems, which fsspec reads and writes as in Lightning."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from fsspec.core import url_to_fs

Location = str | os.PathLike[str]


def is_url(location: Location) -> bool:
    """Returns whether a location is a URL.

    Examples:
        >>> is_url("s3://bucket/merged.ckpt"), is_url("runs/merged.ckpt"), is_url(Path("a", "b"))
        (True, False, False)
    """
    return isinstance(location, str) and "://" in location


def local_path(argument: str, location: Location) -> Path:
    """Returns a location as a path on this machine.

    Raises:
        ValueError: If the location is a URL, or a path that was made from one.
    """
    if is_url(location):
        raise ValueError(f"{argument} must be a path on this machine, not a URL, got {location!r}")
    if isinstance(location, os.PathLike) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(location)):
        raise ValueError(f"{argument} was a URL and is one no more as {location!r}; give it as a str")
    return Path(location)


@contextmanager
def written_locally(argument: str, location: Location) -> Iterator[Path]:
    """Yields a local path to write a file to. For a URL it is a temporary one, whose content is then uploaded.

    Raises:
        ValueError: If the location is a path that was made from a URL.
        ImportError: If fsspec needs another package for this kind of URL.
    """
    if not is_url(location):
        path = local_path(argument, location)
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path
        return
    system, name = url_to_fs(location)
    with TemporaryDirectory() as folder:
        path = Path(folder, Path(name).name)
        yield path
        system.makedirs(os.path.dirname(name), exist_ok=True)  # noqa: PTH120 (not a local path)
        # As Lightning does, so that the file appears only when it is complete.
        with system.transaction, path.open("rb") as content, system.open(name, "wb") as target:
            shutil.copyfileobj(content, target, 2**24)
