"""Errors that the command line prints as one line."""


class InputError(Exception):
    """Wrong input; the message names it, what was found and what was expected (exit code 2)."""


class WorkError(Exception):
    """The work failed on right input; the message says what is kept and how to continue (exit code 1)."""


def choices(kind: str, found: str, available: object) -> InputError:
    """The error for an unknown name, with the sorted list of known names."""
    names = ", ".join(sorted(map(str, available)))  # type: ignore[call-overload]
    return InputError(f"unknown {kind} {found!r}; available: {names}")
