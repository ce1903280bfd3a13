"""The errors that the command line turns into a single line."""


class InputError(Exception):
    """Something that the user gave is wrong; the message names it, what was found and what was expected (exit 2)."""


class WorkError(Exception):
    """The input was right and the work failed; the message says what is kept and how to go on (exit 1)."""


def choices(kind: str, found: str, available: object) -> InputError:
    """The error for a name that does not exist, listing (sorted) the names that do."""
    names = ", ".join(sorted(map(str, available)))  # type: ignore[call-overload]
    return InputError(f"unknown {kind} {found!r}; available: {names}")
