"""Which implementation of an operation runs: an explicit choice is binding, None takes the best that can serve."""

from collections.abc import Callable, Mapping


def choose(op: str, implementations: Mapping[str, Callable], implementation: str | None, default: str) -> Callable:
  """Returns the implementation called `implementation`, or `default` for None.

  Args:
    op: the operation's name, for the message.
    implementations: name → function.
    implementation: a key of `implementations`, or None.
    default: the key taken for None.

  Raises:
    ValueError: no implementation has that name. There is no silent fallback.
  """
  name = implementation or default
  if name not in implementations:
    raise ValueError(f"{op}: implementation={name!r} is unknown; there are {', '.join(map(repr, implementations))}")
  return implementations[name]
