"""Write docs/cli.md from the command line itself, so that the two cannot differ.

It takes commands, flags and help texts from the program; it does not run any command.

usage: make_cli_docs.py [--check]   (--check writes nothing and fails if docs/cli.md is not up to date)
"""

import sys
from pathlib import Path
from typing import Any

from ggml_diffusion.app.cli.main import click_group

TARGET = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
HEAD = """# Command line

<!-- written by tools/make_cli_docs.py: change the help texts in ggml_diffusion/ and run it again -->

Exit codes: 0 done; 1 `verify` found an export that differs; 2 something to put right, in one line on stderr;
130 or 143 stopped by SIGINT or SIGTERM, with everything saved.
"""


def cli_docs() -> str:
    """The whole page."""
    group = click_group()
    parts = [HEAD, f"{group.help}\n"]
    for name, command in sorted(group.commands.items()):
        parts.append(_command_docs(name, command))
    return "\n".join(parts)


def _command_docs(name: str, command: Any) -> str:
    if hasattr(command, "commands"):  # a group
        return "\n".join(_command_docs(f"{name} {one}", command.commands[one]) for one in command.commands)
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option"]
    usage = " ".join(f"[{one.metavar}]" if not one.required else str(one.metavar) for one in arguments)
    lines = [f"## ggml-diffusion {name}", "", _one_paragraph_each(command.help), ""]
    lines += ["```", f"ggml-diffusion {name} [OPTIONS] {usage}".rstrip(), "```", ""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| `{one.metavar}` | {one.help} |" for one in arguments]
    lines += [f"| `{one.opts[0]}{'' if one.is_flag else ' VALUE'}` | {one.help} |" for one in options]
    lines += ["", f"Example: `{command.epilog.removeprefix('Example: ')}`", ""]
    return "\n".join(lines)


def _one_paragraph_each(text: str) -> str:
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def main() -> int:
    """Write the page, or compare it."""
    page = cli_docs()
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(page, encoding="utf-8")
        return 0
    if TARGET.exists() and TARGET.read_text(encoding="utf-8") == page:
        return 0
    print(f"{TARGET} is not up to date: run `python tools/make_cli_docs.py`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
