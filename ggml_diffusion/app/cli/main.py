"""Entry point: the commands, and what their errors become.

Exit codes: 0 done; 1 `verify` found an export that differs; 2 something the user can correct, in one line on
stderr; 129, 130 or 143 stopped by SIGHUP, SIGINT or SIGTERM with everything saved. Deliberately not here: any
work, and the commands themselves.
"""

import contextlib
import signal
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from typing import Any, NoReturn

import typer

from ggml_diffusion.app.lasting_output import discard
from ggml_diffusion.errors import UserError, escaped

# click's UsageError, of whichever click it is that typer works with.
_UsageError: Any = typer.BadParameter.__bases__[0]

# Name, what the list of commands says of it (the first sentence of its own help), and an example; a group's
# commands have examples of their own.
_COMMANDS = {
    "convert": (
        "Convert a GGUF model: train its adapter on text and export it.",
        "convert model.gguf --data books/ --output run --preset laptop",
    ),
    "estimate": (
        "Say what a conversion would need of memory, disk and time, and what would need less.",
        "estimate model.gguf --data books/ --preset laptop",
    ),
    "generate": (
        "Write text by denoising.",
        'generate model.gguf run --prompt "Once upon a time" --length 32',
    ),
    "infill": (
        "Fill the marked holes of a text, and leave every other byte as it is.",
        "infill model.gguf run notes.md --diff",
    ),
    "serve": (
        "Answer completions, chats and infilling over HTTP, with a page to fill holes at /.",
        "serve model.gguf run",
    ),
    "evaluate": (
        "Measure a conversion on held-out text, beside the base and the base before the first step.",
        "evaluate model.gguf run --output run/evaluation",
    ),
    "export": ("Write a conversion in the form that another program takes.", ""),
    "verify": (
        "Compare what a run exported with the engine, in the programs that will load it.",
        "verify model.gguf run --diffusion-cli build/bin/llama-diffusion-cli",
    ),
    "inspect": (
        "Show what a file holds: sizes, types, settings, and whether it can be converted.",
        "inspect model.gguf",
    ),
    "devices": (
        "Show what this installation can compute on, and how to install more.",
        "devices --report",
    ),
    "demo": (
        "Convert SmolLM2-135M on Python's own help texts, show figures before and after, and write a sample.",
        "demo --output demo-run",
    ),
}


def _app(wanted: Collection[str]) -> typer.Typer:
    """The command line. Commands that are not wanted are names in a list: importing all takes time."""
    app = typer.Typer(
        name="ggml-diffusion",
        help="Turn an autoregressive GGUF language model into a masked-diffusion one, on the CPU.",
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for name, (summary, example) in _COMMANDS.items():
        command = _imported(name) if name in wanted else _listed
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, help=summary)
            continue
        help_text = None if name in wanted else summary
        app.command(name, help=help_text, epilog=f"Example: ggml-diffusion {example}")(command)
    return app


def _imported(name: str) -> Callable[..., None] | typer.Typer:
    """A command, or a group of them."""
    command: Callable[..., None] | typer.Typer = getattr(
        import_module(f"ggml_diffusion.app.cli.{name}"), name
    )
    return command


def _listed() -> None:
    """Stand in the list for a command that is not run."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line and exit the process; None = this process's own arguments."""
    # NumPy says so when a number overflows; what comes of it is checked where it matters.
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a stream that a test put there
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        given = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
        try:
            app = _app([name for name in _COMMANDS if name in given])
            code = app(args=given, prog_name="ggml-diffusion", standalone_mode=False)
        finally:
            sys.stdout.flush()
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "ggml-diffusion"
        said = " ".join(error.format_message().split()).rstrip(".")
        print(f"error: {escaped(said)}; see {command} --help", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        print(f"error: {escaped(str(error))}", file=sys.stderr)
        sys.exit(2)
    except MemoryError as error:  # where nothing said so before
        print(f"error: not enough memory: {str(error) or 'ask for less at a time'}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read has enough
        discard(sys.stdout)
        sys.exit(1)
    except OSError as error:  # where nothing said so before: the disk behind standard output is full
        discard(sys.stdout)
        place = "" if error.filename is None else f"{error.filename!r}: "
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except typer.Abort:  # what typer makes of an EOFError
        print("error: the input ended too early", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    if arguments is None:  # all is done; what is left is the interpreter's end
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code or 0)


def click_group() -> Any:
    """The commands as click sees them, with their parameters; docs/cli.md is made from them."""
    return typer.main.get_command(_app(_COMMANDS))
