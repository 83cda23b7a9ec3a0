"""How commands end: a user's error is one message and exit code 2, a fault of the code a traceback."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
USER_ERRORS = (ValueError, OSError, ModuleNotFoundError)
# Their ValueErrors are about names, files and settings; those of torch or numpy are faults of the code.
LIBRARIES = {"transformers", "sentence_transformers", "huggingface_hub", "datasets", "accelerate", "peft", "mteb"}
LIBRARIES |= {"transformers_modules"}  # the code of a repository, which is this package's


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command and exits with its code; prints an error that says what to do without its traceback."""
    try:
        code = main()
    except USER_ERRORS as error:
        if not is_for_users(error):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    sys.exit(code)


def is_for_users(error: BaseException) -> bool:
    """Returns whether this package, the system, or a library that was given something wrong raised an error."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, OSError) or not frames:
        return True
    file, line = Path(frames[-1].filename).resolve(), frames[-1].line or "raise"
    inside = file.is_relative_to(PACKAGE) and "site-packages" not in file.relative_to(PACKAGE).parts
    return line.startswith("raise") and (inside or bool(LIBRARIES & set(file.parts)))
