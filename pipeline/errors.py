"""The one error that a user can mend: the command line turns it into a single line and exit code 2."""


class InputError(Exception):
    """Something that the user gave is wrong; the message names it, what was found and what was expected."""


def choices(kind: str, found: str, available: object) -> InputError:
    """The error for a name that does not exist, listing (sorted) the names that do."""
    names = ", ".join(sorted(map(str, available)))  # type: ignore[call-overload]
    return InputError(f"unknown {kind} {found!r}; available: {names}")
