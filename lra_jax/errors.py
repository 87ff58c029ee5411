"""Errors that a user can cause: one line that says what, where and what to do; exit code 2; no traceback."""

import difflib
import sys
from collections.abc import Callable, Iterable

from absl import app, flags


class UserError(Exception):
  """Something the user can mend. Its text is one line; programmer errors keep their own types and tracebacks."""

  def __init__(self, text: str):
    """Args: text; line ends in it, of a name or value that was given, show as \\n."""
    super().__init__("\\n".join(text.splitlines()))


def unknown(what: str, name: str, known: Iterable[str]) -> str:
  """Returns the line for a name that does not exist, near misses first.

  Args:
    what: what the name stands for, such as "model".
    name: the name as given.
    known: all names there are.
  """
  known = sorted(known)
  near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
  meant = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
  return f"{what} {name!r} does not exist; {meant}known: {', '.join(known)}"


def check_known(what: str, name: str, known: Iterable[str]) -> None:
  """Does nothing where `name` is among `known`; arguments as of `unknown`.

  Raises:
    UserError: it is not.
  """
  if name not in known:
    raise UserError(unknown(what, name, known))


def first_line(error: Exception) -> str:
  """Type and first line of any exception, cut to what fits into a message of ours."""
  lines = str(error).strip().splitlines()
  return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def parse_flags(
  argv: list[str], required: tuple[str, ...], positional: str | None = None, optional: bool = False
) -> list[str]:
  """Parses the command line of a tool; returns what stands there besides flags.

  Args:
    argv: as `sys.argv`.
    required: flags that must be given.
    positional: what the arguments besides flags are, at least one; None where there are none.
    optional: whether there may be none of them.

  Raises:
    UserError: an unknown or missing flag or argument, or a wrong value.
  """
  app.define_help_flags()
  try:
    rest = flags.FLAGS(argv)[1:]
  except flags.Error as error:
    raise UserError(" ".join(str(error).split())) from error
  for name in required:
    if flags.FLAGS[name].value is None:
      raise UserError(f"--{name} is missing: {flags.FLAGS[name].help}")
  if positional and not rest and not optional:
    raise UserError(f"no {positional} given")
  if rest and positional is None:
    raise UserError(f"argument {rest[0]!r} is not understood; flags start with --")
  return rest


def exit_on_user_error(main: Callable[[], None]) -> None:
  """Runs `main`; a `UserError` ends the process with its one line on standard error and exit code 2."""
  try:
    main()
  except UserError as error:
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)
