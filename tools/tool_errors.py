"""How the tools of this folder end when the user has something to correct: one line, exit code 2."""

import sys
from collections.abc import Callable

from ggml_diffusion.errors import UserError


def run_tool(main: Callable[[], None]) -> None:
    """Run a tool's `main`; what is wrong with files and arguments is said in one line, no traceback."""
    try:
        main()
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        _fail(f"{where}{error.strerror or error}")
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
