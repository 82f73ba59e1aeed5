"""Files that are whole or not there, and the checkpoints of a run."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import torch


def cannot_write(path: Path, reason: str | None = None) -> OSError:
    """The error of a file that could not be written, with what to do."""
    if not path.parent.is_dir():
        remedy = "its folder has vanished: bring it back, or name another"
    elif not os.access(path.parent, os.W_OK):
        remedy = "its folder is read-only: mend that, or name another"
    else:
        remedy = "is the disk full? Make room"
    return OSError(f"{path}: cannot be written{f' ({reason})' if reason else ''}; {remedy}. What was there is kept")


@contextmanager
def replacing(path: Path, keep: int = 1) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place once it is whole, and vanishes where writing fails.

    Args:
        keep: so many stay, with the one before as NAME.1.SUFFIX and so on.
    """
    temporary = path.with_name(f".partial-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # else the new name could reach the disk before the content
        names = generations(path, keep)
        for newer, older in reversed([*pairwise(names[1:])]):
            if newer.exists():
                os.replace(newer, older)
        if keep > 1 and path.exists():  # under two names for a moment, so that it is never without one
            keep_copy(path, names[1])
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None:  # told already
            raise
        raise cannot_write(path, error.strerror) from error
    finally:
        with suppress(OSError):  # of a folder that has vanished or is read-only
            temporary.unlink(missing_ok=True)


def generations(path: Path, keep: int) -> list[Path]:
    """checkpoint.pt, then the names of its older generations: checkpoint.1.pt, checkpoint.2.pt, ..."""
    return [path, *(path.with_suffix(f".{age}{path.suffix}") for age in range(1, keep))]


def as_json(config: object) -> dict:
    """A configuration in JSON's own types, as it stands in checkpoints and config.json."""
    return json.loads(json.dumps(asdict(config), default=str))


def write_report(path: Path, report: dict) -> None:
    """A JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")


def save_checkpoint(path: Path, state: dict, keep: int = 1) -> None:
    """Writes a checkpoint whole, or leaves the last one; see `replacing`."""
    with replacing(path, keep) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # what torch's writer makes of a full disk
            raise cannot_write(path) from error


def keep_copy(path: Path, copy: Path) -> None:
    """The same content under another name, which stays when `path` is replaced; a link where the disk knows them."""
    with replacing(copy) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
