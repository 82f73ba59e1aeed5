"""Where the files of each data set lie, and how they are stored. What the modules share: finding a set in a folder."""

import csv
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from data import is_hidden


class MissingSet(FileNotFoundError):
    """A data set that is not in the folder at all, unlike one of which a part is missing."""


def visible_glob(root: Path, pattern: str) -> list[Path]:
    """The paths below `root` that match the pattern, sorted, without hidden ones."""
    return sorted(path for path in root.glob(pattern) if not any(map(is_hidden, path.relative_to(root).parts)))


def set_folders(root: Path) -> list[Path]:
    """Where a data set may lie: the root itself and its direct subfolders. FileNotFoundError if root is no folder."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; check the path")
    # Not lost+found of a data disk, which only root may enter.
    return [root, *(path for path in visible_glob(root, "*") if path.is_dir() and os.access(path, os.X_OK))]


def find_set(
    root: Path, known: dict[str, tuple[str, Callable[[Path], Iterable]]], name: str | None, part: str
) -> tuple[str, list]:
    """The data set in `root` or a folder in it, by its name or as the only one: its name and its files.

    `known` has for each set its layout, for messages, and what lists its files in its own folder.
    """
    wanted, found = [name] if name else list(known), {}
    for folder in set_folders(root):
        for each in wanted:
            if each not in found and (files := list(known[each][1](folder))):
                found[each] = files
    if not found:
        expected = "; or ".join(known[each][0] for each in wanted)
        raise MissingSet(f"{root}: no {part} of {name or 'a data set'} in it; expected {expected}")
    if len(found) > 1:
        raise ValueError(f"{root}: holds {', '.join(found)}; choose one with --benchmark")
    return next(iter(found.items()))


def split_number(path: Path) -> tuple[str, str]:
    """The name of a frame before the digits at its end, and these digits."""
    before = path.stem.rstrip("0123456789")
    if before == path.stem:
        raise ValueError(f"{path}: its name does not end in the number of the frame; rename or remove it")
    return before, path.stem.removeprefix(before)


def read_lines(path: Path) -> list[str]:
    """The lines of a list that are not empty, whatever its byte order mark; other bytes than UTF-8 as in file names."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; it lists the images of the {path.stem} part, a name in each row")
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return [line.strip() for line in content.decode(encoding, "surrogateescape").splitlines() if line.strip()]


def read_table(name: str) -> list[dict[str, str]]:
    """The rows of a table beside this file."""
    return list(csv.DictReader(Path(__file__).with_name(name).read_text().splitlines()))
