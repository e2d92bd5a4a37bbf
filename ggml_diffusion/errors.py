"""The one class of error that is the user's to mend.

Deliberately not here: exit codes and printing. The command line turns a `UserError` into one line on stderr
and exit code 2; anything else that escapes is a defect of the program and keeps its traceback.
"""


class UserError(Exception):
    """Something the user can put right: a bad file, setting or text.

    Its whole message is one line that names what is wrong, where, and, if it is not obvious, what to do.
    """
