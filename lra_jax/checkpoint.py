"""Checkpoints by Orbax: written in the background, the newest few and the best kept, verified when read."""

import collections
import concurrent.futures
import contextlib
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lra_jax import agreement, errors

_PROBE = 2**12  # bytes written to see whether there is room


class Restored(NamedTuple):
  """Step of a checkpoint, its state, and what the host keeps beside it."""

  step: int
  state: Any
  host: dict[str, Any]


class Checkpoints:
  """The checkpoints of one workdir, `<workdir>/checkpoints/<step>`."""

  def __init__(self, workdir: pathlib.Path, keep: int = 1):
    """Opens them; the folder is made where it is missing. `keep` newest ones stay, and the best one.

    Raises:
      UserError: the folder cannot be made.
    """
    logging.getLogger("absl").addFilter(_not_of_orbax)
    logging.getLogger("asyncio").addFilter(_not_of_orbax)
    if sys.unraisablehook is sys.__unraisablehook__:
      sys.unraisablehook = _raise_in_vain
    self._workdir = pathlib.Path(workdir)
    self._folder = self._workdir.absolute() / "checkpoints"
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise errors.UserError(f"{self._folder} cannot be made ({error.strerror}); take another --workdir") from error
    self._policy, self._saving = _NewestAndBest(keep), None
    self._attempt, self._visits = agreement.unique("checkpoint"), collections.Counter()
    options = ocp.CheckpointManagerOptions(
      preservation_policy=self._policy,
      cleanup_tmp_directories=True,
      async_options=ocp.AsyncOptions(barrier_sync_fn=self._meet) if jax.process_count() > 1 else None,
    )
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=options,
      item_handlers={"state": ocp.StandardCheckpointHandler(), "host": ocp.JsonCheckpointHandler()},
    )

  def save(self, step: int, state: Any, host: dict[str, Any]) -> str | None:
    """Copies the state to the host and writes it in the background, every process what its devices have.

    Args:
      step: number of the checkpoint.
      state: pytree of arrays; may be donated as soon as this returns.
      host: JSON-compatible values; its "best_step" names the checkpoint to be kept beside the newest.

    Returns:
      What was wrong, with this one or in the background with the one before, in one line that names the step and, of
      several, the process; None where nothing was.
    """
    self._policy.best = host["best_step"]
    before = self.wait()
    # Orbax's threads, and other processes, would wait for minutes for what cannot be written.
    problem = agreement.first_problem(self._problem(state))
    if problem:
      return _join(before, f"no checkpoint at step {step}: {problem}")
    agreement.forget(self._attempt)
    if agreement.is_main():
      self._remove_unfinished()  # of threads that wrote on when the checkpoint before had failed
    if any(not (self._folder / str(old)).is_dir() for old in self._manager.all_steps()):
      self._manager.reload()
    self._saving, self._attempt, self._visits = step, agreement.unique("checkpoint"), collections.Counter()
    host = host | {"checksum": _seal(state, host)}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host))
    try:
      self._manager.save(step, args=args)
    except Exception as error:  # a full disk, a folder that is gone: Orbax passes on dozens of types
      return _join(before, self._failed(error))
    return before

  def _problem(self, state: Any) -> str | None:
    """Why this process cannot write its part of a state, where that is so; makes the folder where it is gone."""
    probe = self._folder / f".writable-{jax.process_index()}"
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      try:
        with open(probe, "wb") as file:
          file.write(bytes(_PROBE))
          file.flush()
          os.fsync(file.fileno())
      finally:
        probe.unlink(missing_ok=True)
      disk = os.statvfs(self._folder)
    except OSError as error:
      return f"{error.strerror}: {self._folder}"
    needed, free = _PROBE + _bytes_here(state), disk.f_bavail * disk.f_frsize
    if free < needed:
      return f"{needed / 2**20:,.0f} MiB needed, {free / 2**20:,.0f} MiB free: {self._folder}"
    return None

  def _meet(self, *, key: str, timeout_ms: int) -> None:
    """Orbax's barrier for what it does in the background; its own waits 20 minutes for one whose writes have failed."""
    error = sys.exception()
    if error is None:
      self._visits[key] += 1
      agreement.meet(self._attempt, f"{key}/{self._visits[key]}", timeout_ms / 1000)
    else:  # Orbax comes by after a failure as well, in a finally clause
      agreement.give_up(self._attempt, _reason(error))

  def _failed(self, error: Exception) -> str:
    """The line of a checkpoint that could not be written; what there is of it is removed, as the disk may be full."""
    step, self._saving, reason = self._saving, None, _reason(error)
    agreement.give_up(self._attempt, reason)
    if agreement.is_main():
      self._remove_unfinished()
    return f"no checkpoint at step {step}: {reason}"

  def _remove_unfinished(self):
    """Removes what there is of checkpoints that failed, for up to a second: threads may still write into them."""
    for turn in range(20):
      parts = list(self._folder.glob("*.orbax-checkpoint-tmp"))
      if not parts:
        return
      if turn:
        time.sleep(0.05)
      for part in parts:
        shutil.rmtree(part, ignore_errors=True)

  def restore(self, step: int, like: Any | None = None) -> Restored:
    """Reads and verifies one checkpoint.

    Args:
      step: which.
      like: a pytree of arrays or `jax.ShapeDtypeStruct` with the structure, shapes and dtypes expected. Where these
        have shardings the result has them, whatever the devices that wrote it; else it is of NumPy arrays. None takes
        nested dicts and lists as they were written, of NumPy arrays.

    Raises:
      Exception: of any type, where the files are damaged.
    """
    if like is None:
      like = self._manager.item_metadata(step)["state"]
      like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
    else:
      like = jax.tree.map(_abstract, like)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(like), host=ocp.args.JsonRestore())
    result = self._manager.restore(step, args=args)
    host = dict(result["host"])
    if host.pop("checksum") != _seal(result["state"], host):
      raise ValueError("its checksum does not match its content")
    return Restored(step, result["state"], host)

  def restore_newest(self, like: Any, say: Callable[[str], None]) -> Restored | None:
    """The newest checkpoint that can be read; damaged ones are moved to `<workdir>/damaged` and named by `say`.

    Raises:
      UserError: there are checkpoints, and all are damaged. With several processes: the newest is, as what one cannot
        read the others may be able to; the next start finds the one before.
    """
    steps = self.steps()
    for step in reversed(steps):
      try:
        return self.restore(step, like)
      except Exception as error:  # damage shows as dozens of types of error
        target = self._workdir / "damaged" / str(step)
        if (self._folder / str(step)).exists():
          shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process was faster
          (self._folder / str(step)).rename(target)
        line = f"checkpoint {step} is damaged ({errors.first_line(error)}); moved to {target}"
        if jax.process_count() > 1:
          raise errors.UserError(f"{line}; the same command goes on from the one before") from error
        self._manager.reload()
        say(f"{line}, trying the one before")
    if steps:
      raise errors.UserError(f"{self._folder}: all checkpoints ({', '.join(map(str, steps))}) are damaged; start anew")
    return None

  def steps(self) -> list[int]:
    """Steps of the complete checkpoints there are, ascending."""
    return sorted(step for step in self._manager.all_steps() if (self._folder / str(step)).is_dir())

  def wait(self) -> str | None:
    """Returns when what was saved is on disk: None, or what went wrong in the background, in one line."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      return self._failed(error)
    return None

  def close(self) -> None:
    """Waits, then ends the background threads."""
    self.wait()
    with contextlib.suppress(Exception):
      self._manager.close()


class _NewestAndBest:
  """Orbax's protocol for what is kept."""

  def __init__(self, keep: int):
    self.keep = keep
    self.best: int | None = None

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    del context
    newest = {info.step for info in checkpoints[-self.keep :]}
    return [info.step in newest or info.step == self.best for info in checkpoints]


def _not_of_orbax(record: logging.LogRecord) -> bool:
  """Of an error Orbax logs a traceback from every thread and asyncio one of every write; `Checkpoints` says it once."""
  given_up = record.name == "asyncio" and "exception was never retrieved" in record.getMessage()
  return record.levelno < logging.ERROR or not (given_up or f"{os.sep}orbax{os.sep}" in record.pathname)


def _raise_in_vain(unraisable) -> None:
  """Writes that TensorStore goes on with when Orbax has given a checkpoint up end without a word."""
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


def _join(*lines: str | None) -> str:
  return "; ".join(filter(None, lines))


def _reason(error: Exception) -> str:
  """The system's own words, also where TensorStore hides them at the end of a long line."""
  if isinstance(error, agreement.GivenUp):
    return str(error)
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  code = re.search(r"os_error_code='(\d+)'", str(error))
  return os.strerror(int(code[1])) if code else errors.first_line(error)


def _abstract(leaf):
  sharding = getattr(leaf, "sharding", None)
  if sharding is None:
    return np.empty(leaf.shape, leaf.dtype)
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _bytes_here(state):
  """Of the parts of a state that this process writes."""
  shards = [shard for leaf in jax.tree.leaves(state) for shard in jnp.asarray(leaf).addressable_shards]
  return sum(shard.data.nbytes for shard in shards if shard.replica_id == 0)


def _seal(state, host):
  """32 hexadecimal digits that depend on the state and on what the host keeps beside it."""
  return hashlib.sha256(f"{checksum(state)} {json.dumps(host, sort_keys=True)}".encode()).hexdigest()[:32]


def checksum(tree: Any) -> str:
  """32 hexadecimal digits that depend on every bit of all arrays, and on nothing else: not on where the arrays lie.

  On the devices every element is mixed with its position, by the finaliser of MurmurHash3 (Appleby 2011), and all are
  added up in integers, so that parts can be added in any order.
  """
  named = _named(tree)
  sums = jax.device_get(_sums([leaf for _, leaf in named]))
  digest = hashlib.sha256()
  for (name, leaf), pair in zip(named, sums, strict=True):
    digest.update(f"{name} {leaf.dtype} {leaf.shape} {pair.tolist()}\n".encode())
  return digest.hexdigest()[:32]


@jax.jit
def _sums(leaves):
  def mix(x):
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
      x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)

  def one(leaf):
    leaf = jnp.asarray(leaf)
    if leaf.dtype == jnp.bool:
      leaf = leaf.astype(jnp.uint8)
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32)
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):  # its number in C order, without an array that XLA could not split
      place = place * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return jnp.stack([mix(bits ^ mix(place + jnp.uint32(seed))).sum(dtype=jnp.uint32) for seed in (1, 0x9E3779B9)])

  return [one(leaf) for leaf in leaves]


def sha256(tree: Any) -> str:
  """SHA-256 over names, dtypes, shapes and bytes of all arrays of a tree: equal for equal trees, bit for bit."""

  def one(item):
    name, leaf = item[0], np.asarray(item[1])
    head = f"{name} {leaf.dtype} {leaf.shape}\n".encode()
    return hashlib.sha256(head + np.ascontiguousarray(leaf).tobytes()).digest()

  with concurrent.futures.ThreadPoolExecutor() as pool:  # hashlib releases the interpreter's lock
    return hashlib.sha256(b"".join(pool.map(one, _named(tree)))).hexdigest()


def _named(tree):
  """(name, leaf) by name: a checkpoint read without its structure has dicts for named tuples, in another order."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  named = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]
  return sorted(named, key=lambda item: item[0])
