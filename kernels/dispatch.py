"""Which implementation of an operation runs: an explicit choice is binding, None takes the best that can serve."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping

import jax

_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform() -> str:
  """The platform that code is traced for, such as "cpu" or "gpu": JAX's default unless `compiling_for` names one."""
  return _PLATFORM.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[None]:
  """Within it, None means what is best on the platform `name`, such as "gpu" on a machine that has none.

  The choice is made where a function is traced, so the tracing must lie within; what `jax.jit` has traced before for
  the same shapes keeps its choice.
  """
  token = _PLATFORM.set(name)
  try:
    yield
  finally:
    _PLATFORM.reset(token)


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
