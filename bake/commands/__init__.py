"""The commands, one module each: `add` makes the parser, `run` calls the library and prints.

Options are kept as text here: nothing heavy is imported before a command runs.
"""
