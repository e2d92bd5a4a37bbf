"""The one class of errors that the user can correct, and how foreign text is put into its message.

Deliberately not here: exit codes and printing. The command line turns a `UserError` into one line on
stderr and exit code 2; anything else that escapes is a defect of the program and keeps its traceback.
"""


class UserError(Exception):
    """Something the user can put right: a bad file, setting or text.

    Its whole message is one line that names what is wrong, where, and, if it is not obvious, what to do.
    """


def quoted(name: str) -> str:
    """A name out of a file, safe to print: in quotes, control characters escaped, length limited."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


def one_line(text: str) -> str:
    """A message of another program, safe to print: on one line, no control characters, length limited."""
    line = " ".join(text.split())
    return "".join(letter if letter.isprintable() else "?" for letter in line[:200])


def escaped(line: str) -> str:
    """A line of ours with names of files in it, safe to print: what would not be seen, or would do something
    to a terminal, is escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
