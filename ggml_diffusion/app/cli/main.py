"""Entry point: the commands, and what their errors become.

Exit codes: 0 done; 2 something the user can correct, in one line on stderr; 130 or 143 stopped by SIGINT or
SIGTERM with everything saved. Deliberately not here: any work, and the commands themselves.
"""

import contextlib
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import typer

from ggml_diffusion.app.cli.convert import convert
from ggml_diffusion.app.cli.demo import demo
from ggml_diffusion.app.cli.evaluate import evaluate
from ggml_diffusion.app.cli.export import export
from ggml_diffusion.app.cli.generate import generate
from ggml_diffusion.app.cli.inspect import inspect
from ggml_diffusion.errors import UserError

app = typer.Typer(
    name="ggml-diffusion",
    help="Turn an autoregressive GGUF language model into a masked-diffusion one, on the CPU.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_EXAMPLES: dict[Callable[..., None], str] = {
    convert: "convert model.gguf --data books/ --output run --preset laptop",
    generate: 'generate model.gguf run --prompt "Once upon a time" --length 32',
    evaluate: "evaluate model.gguf run --output run/evaluation",
    export: "export run my-adapter.gguf",
    inspect: "inspect model.gguf",
    demo: "demo --output demo-run",
}
for _command, _example in _EXAMPLES.items():
    app.command(epilog=f"Example: ggml-diffusion {_example}")(_command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line and exit the process; None = this process's own arguments."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a stream that a test put there
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        app(args=None if arguments is None else list(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    sys.exit(0)


def click_group() -> Any:
    """The commands as click sees them, with their parameters; docs/cli.md is made from them."""
    return typer.main.get_command(app)
