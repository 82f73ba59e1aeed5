"""Files that are whole or not there, and the checkpoints of a run: written, found again, compared.

save_checkpoint(folder / "checkpoint.pt", state)                   # the one before stays as checkpoint.1.pt
checkpoint, warnings = newest_checkpoint(folder, load_checkpoint)   # None in an empty folder
"""

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch


def cannot_write(path: Path, reason: str = "is the disk full?") -> OSError:
    """The error for a file that cannot be written."""
    return OSError(f"{path}: cannot be written ({reason}); make room, or name another folder. What was there is intact")


@contextmanager
def replacing(path: Path, former: Path | None = None) -> Iterator[Path]:
    """Yields a temporary path that replaces `path` once it is whole; OSError, and no change, if writing fails.

    Its folder is made if it is missing. The file that was there is moved to `former`, if that is given.
    """
    temporary = path.with_name(f".partial-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "r+b") as file:  # Windows flushes only files that are open for writing
            os.fsync(file.fileno())  # otherwise the new name could reach the disk before the content
        if former and path.exists():
            os.replace(path, former)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None:  # raised by cannot_write, whose message is complete
            raise
        raise cannot_write(path, error.strerror) from error
    finally:
        with suppress(OSError):  # the folder may have disappeared
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def save_checkpoint(path: Path, state: dict[str, Any], best: bool = False) -> None:
    """Writes a checkpoint, whole or not at all; the one before stays as checkpoint.1.pt, the `best` one as best.pt.

    `state` holds only tensors and plain types, so that torch can read it with `weights_only=True`.
    """
    with replacing(path, former=path.with_suffix(f".1{path.suffix}")) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # how torch's writer reports a full disk
            raise cannot_write(path) from error
        if best:  # before `path` changes: a run that is killed here takes these steps again and writes the same best.pt
            with replacing(path.with_name("best.pt")) as copy:
                shutil.copyfile(temporary, copy)


def newest_checkpoint(folder: Path, load: Callable[[Path], dict]) -> tuple[dict | None, list[str]]:
    """The newest checkpoint in a folder that `load` can read, and a warning for a damaged one that was passed over.

    None if there is none; ValueError if all are damaged (`load` raises ValueError for such a file).
    """
    damaged = []
    for path in (folder / "checkpoint.pt", folder / "checkpoint.1.pt"):
        if path.exists():
            try:
                return load(path), [f"warning: {sentence}; continuing from {path.name}" for sentence in damaged]
            except ValueError as error:
                damaged.append(str(error))
    if damaged:
        raise ValueError("; ".join(damaged))
    return None, []


def as_json(config: Any) -> dict:
    """A configuration (a dataclass) in JSON's own types, as checkpoints and config.json hold it."""
    return json.loads(json.dumps(asdict(config), default=str))


def read_config(path: Path, kind: type) -> Any:
    """The inverse of `as_json`: a configuration (a dataclass `kind`) from config.json; ValueError for another file."""

    def build(kind: Any, value: Any) -> Any:
        if is_dataclass(kind):
            hints = get_type_hints(kind)
            if hints.keys() != value.keys():
                raise ValueError(f"fields that differ: {', '.join(sorted(hints.keys() ^ value.keys()))}")
            return kind(**{name: build(hints[name], value[name]) for name in hints})
        if value is not None and Path in (kind, *get_args(kind)):
            return Path(value)
        return tuple(value) if isinstance(value, list) else value

    try:
        return build(kind, json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the config.json of a run of this version ({error!r})") from error


def flatten(tree: dict, prefix: str = "") -> dict:
    """A tree of dictionaries as one dictionary, whose keys are paths: {"repeats.chairs": 5}."""
    leaves = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def check_same_run(path: Path, there: dict, here: dict, may_differ: Collection[str] = ()) -> None:
    """ValueError, with the fields that differ, if the checkpoint at `path` has another configuration than this run."""
    old, new = flatten(there), flatten(here)
    names = [name for name in sorted(old | new) if name not in may_differ and old.get(name) != new.get(name)]
    if names:
        fields = "; ".join(f"{name}: {old.get(name)} there, {new.get(name)} here" for name in names)
        raise ValueError(f"{path} belongs to a run with another configuration ({fields}); give another --output-dir")
