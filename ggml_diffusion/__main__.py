"""`python -m ggml_diffusion` and `ggml-diffusion` are the command line.

An interrupt ends the process with 130 and not a word, from the first import on: what is still being imported
can neither be tidied up nor has anything to save. While a command runs, main.py and the command decide.
"""

import os
import signal
import sys
from types import FrameType


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def main() -> None:
    """Run the command line of this process."""
    signal.signal(signal.SIGINT, _leave)
    from ggml_diffusion.app.cli.main import main as run_command

    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run_command()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:  # the interpreter shuts down
        signal.signal(signal.SIGINT, _leave)


if __name__ == "__main__":
    main()
