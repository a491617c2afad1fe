"""What the command lines share: verbs, their list, and errors in one line."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable, Sequence

from polyglot_jax.config import InputError

Verbs = dict[str, tuple[Callable[[Sequence[str]], None], str]]
"""Verb -> the function that takes its arguments, and what it does in a few words."""

EXPECTED = (InputError, OSError, KeyboardInterrupt)
"""What is said in one line; anything else is a fault of the program, and keeps its traceback."""


def run(verbs: Verbs, program: str, arguments: Sequence[str]) -> int:
    """Run a verb; returns the exit status. What the user can mend is said in one line, without a traceback."""
    if not arguments or arguments[0] not in verbs:
        lines = [f"usage: {program} VERB [options]", ""]
        lines += [f"  {name:<14}{text}" for name, (_, text) in verbs.items()]
        lines += ["", f"{program} VERB --help tells more."]
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        _refuse_other_encodings(arguments[1:])
        _refuse_repeats(arguments[1:])
        verbs[arguments[0]][0](arguments[1:])
    except EXPECTED as error:
        return say(error)
    return 0


def say(error: BaseException) -> int:
    """Print what an error of `EXPECTED` means to the user; returns the exit status."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = " (make room and run the same command again)" if is_full else ""
    print(f"error: {' '.join(str(error).splitlines())}{hint}", file=sys.stderr)
    return 1


def _refuse_other_encodings(arguments: Sequence[str]) -> None:
    """The libraries below take paths in UTF-8 only."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{argument!r}: is not UTF-8; rename it") from error


def _refuse_repeats(arguments: Sequence[str]) -> None:
    """argparse takes the last of a repeated flag and drops the others in silence: a corpus, a prompt."""
    flags = [argument.partition("=")[0] for argument in arguments if re.match(r"--[a-z]", argument)]
    for flag in flags:
        if flags.count(flag) > 1:
            raise InputError(f"{flag}: given {flags.count(flag)} times; give several values after one: {flag} A B")
