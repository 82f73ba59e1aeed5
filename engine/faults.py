"""What goes wrong in a run and need not end it."""

import re


def one_line(error: Exception) -> str:
    """What an error says, in one line; of an error in a loader's worker process, without that worker's traceback."""
    if isinstance(error, (NotADirectoryError, FileExistsError)) and error.filename:
        return f"{error.filename}: a file is in the way of this folder; name another"
    text = str(error).strip()
    if "Original Traceback" in text:
        text = re.sub(r"^[\w.]+: ", "", text.splitlines()[-1])
    return " ".join(text.split())
