"""What the processes of a run tell each other: results of process 0, problems, whether to stop.

Texts go by the key-value store of JAX's distributed runtime, flags of every turn of the loop by the devices.
"""

import hashlib
import itertools
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import distributed

from lra_jax import errors, parallel

_names = itertools.count()
_PATIENCE_MS = 24 * 3600 * 1000  # for what another process tells; one that is lost ends the others long before


def is_main() -> bool:
  """Whether this process speaks and writes for all."""
  return jax.process_index() == 0


def _here():
  return f"process {jax.process_index()} on {socket.gethostname()}"


def on_main(function: Callable[[], Any]) -> Any:
  """The JSON-compatible result of `function`, run in process 0 alone, in every process; likewise a `UserError`.

  All processes must call it, in the same order.
  """
  if jax.process_count() == 1:
    return function()
  key, client = unique("on_main"), distributed.global_state.client
  if is_main():
    try:
      answer = {"result": function()}
    except errors.UserError as error:
      answer = {"error": str(error)}
    client.key_value_set(key, json.dumps(answer))
  else:
    answer = json.loads(client.blocking_key_value_get(key, _PATIENCE_MS))
  if "error" in answer:
    raise errors.UserError(answer["error"])
  return answer["result"]


def first_problem(problem: str | None) -> str | None:
  """Of what is wrong in the processes, the first; of several with the process and its host. All must call it."""
  if jax.process_count() == 1:
    return problem
  key, client = unique("problem"), distributed.global_state.client
  mine = f"{_here()}: {problem}" if problem else ""
  client.key_value_set(f"{key}/{jax.process_index()}", mine)

  def first():
    texts = [client.blocking_key_value_get(f"{key}/{i}", _PATIENCE_MS) for i in range(jax.process_count())]
    forget(key)
    forget("lra_jax/on_main")  # all are here, so each has read the answers before this one
    return next(filter(None, texts), None)

  return on_main(first)


def unique(name: str) -> str:
  """A name that is new; the same in all processes where these call it in the same order."""
  return f"lra_jax/{name}/{next(_names)}"


class GivenUp(Exception):
  """What several processes do together cannot succeed."""


def meet(undertaking: str, place: str, seconds: float) -> None:
  """Waits, in any thread, until all processes are here, or one has given the undertaking up.

  Args:
    undertaking: its name, of `unique`.
    place: where in it; a process comes to each once.
    seconds: to wait.

  Raises:
    GivenUp: one gave it up; the text says which, and why. Or the time is over.
  """
  client, deadline = distributed.global_state.client, time.monotonic() + seconds
  here = f"{undertaking}/at/{place}"
  client.key_value_increment(here, 1)
  for turn in itertools.count():
    if int(client.key_value_try_get(here)) == jax.process_count():
      return
    given_up = _try_get(client, f"{undertaking}/given up")
    if given_up:
      raise GivenUp(given_up)
    if time.monotonic() > deadline:
      raise GivenUp(f"the others did not come to {place} within {seconds:.0f} s")
    time.sleep(min(0.01 * 1.1**turn, 1))


def give_up(undertaking: str, reason: str) -> None:
  """Tells those who wait in `meet`, where there are others."""
  if jax.process_count() > 1:
    key, client = f"{undertaking}/given up", distributed.global_state.client
    if not _try_get(client, key):
      client.key_value_set(key, f"{_here()}: {reason}", allow_overwrite=True)


def forget(undertaking: str) -> None:
  """Removes what is kept of an undertaking that no process is busy with any more; process 0 does."""
  if jax.process_count() > 1 and is_main():
    distributed.global_state.client.key_value_delete(f"{undertaking}/")


def _try_get(client, key):
  try:
    return client.key_value_try_get(key)
  except Exception as error:  # JAX's own type
    if "NOT_FOUND" not in str(error):
      raise
    return ""


def check_same(what: str, digest: str) -> None:
  """Compares a text of every process with that of process 0.

  Raises:
    UserError: this process has another one. The others end with it.
  """
  first = on_main(lambda: digest)
  if digest != first:
    raise errors.UserError(
      f"{what} of {_here()} differ from those of process 0 ({digest[:12]} and {first[:12]}); give both the same files"
    )


def digest_of(arrays: Any) -> str:
  """SHA-256 over the bytes of NumPy arrays."""
  digest = hashlib.sha256()
  for array in arrays:
    digest.update(f"{array.dtype} {array.shape}".encode())
    for start in range(0, len(array), 4096):  # parts of what may be mapped from a file
      digest.update(array[start : start + 4096].tobytes())
  return digest.hexdigest()


class Agreement:
  """Flags that are set in any process, known to all of them in the same turn of their loops.

  The question of a turn travels with its call to the devices, so its answer is that of the turn before: reading it
  does not wait for the call that the devices are busy with. With one process there is nothing to wait for.
  """

  def __init__(self, mesh: jax.sharding.Mesh):
    """Args: mesh, of the run."""
    self._split = parallel.sharded(mesh, 1)
    self._any = jax.jit(lambda flags: flags.max(1), out_shardings=parallel.replicated(mesh))
    self._size = mesh.size
    self._asked = None

  def __call__(self, *flags: bool) -> tuple[bool, ...]:
    """Asks for these flags; the answer to the flags of the call before, at first False. All processes call it."""
    if jax.process_count() == 1:
      return flags
    asked, values = self._asked, np.array(flags, np.int32)[:, None]
    part = lambda index: np.broadcast_to(values, (len(flags), self._size))[index]
    self._asked = self._any(jax.make_array_from_callback((len(flags), self._size), self._split, part))
    return (False,) * len(flags) if asked is None else tuple(bool(flag) for flag in jax.device_get(asked))
