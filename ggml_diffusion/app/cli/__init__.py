"""The command line: a file a command, and main.py, which puts them together.

A command's file turns flags into settings, calls the library and shows what comes back. What only one command
needs is imported when it runs, so that `--help` and short commands stay quick.
"""
