"""Checkpoints by Orbax: written in the background, the newest few and the best kept, verified when read."""

import concurrent.futures
import hashlib
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lra_jax import errors


class Restored(NamedTuple):
  """Step of a checkpoint, its state, and what the host keeps beside it."""

  step: int
  state: Any
  host: dict[str, Any]


class Checkpoints:
  """The checkpoints of one workdir, `<workdir>/checkpoints/<step>`."""

  def __init__(self, workdir: pathlib.Path, keep: int = 1):
    """Opens them; the folder is made where it is missing. `keep` newest ones stay, and the best one."""
    self._workdir = pathlib.Path(workdir)
    self._folder = self._workdir.absolute() / "checkpoints"
    self._policy = _NewestAndBest(keep)
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(preservation_policy=self._policy, cleanup_tmp_directories=True),
      item_handlers={"state": ocp.StandardCheckpointHandler(), "host": ocp.JsonCheckpointHandler()},
    )

  def save(self, step: int, state: Any, host: dict[str, Any]) -> str | None:
    """Copies the state to the host and writes it in the background, every process what its devices have.

    Args:
      step: number of the checkpoint.
      state: pytree of arrays; may be donated as soon as this returns.
      host: JSON-compatible values; its "best_step" names the checkpoint to be kept beside the newest.

    Returns:
      What was wrong, with this one or in the background with the one before, in one line; None where nothing was.
    """
    self._policy.best = host["best_step"]
    host = host | {"checksum": checksum(state)}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host))
    try:
      self._manager.save(step, args=args)
    except Exception as error:  # a full disk, a folder that is gone: Orbax passes on dozens of types
      return errors.first_line(error)
    return None

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
    if host.pop("checksum") != checksum(result["state"]):
      raise ValueError("its checksum does not match its content")
    return Restored(step, result["state"], host)

  def restore_newest(self, like: Any, say: Callable[[str], None]) -> Restored | None:
    """The newest checkpoint that can be read; damaged ones are moved to `<workdir>/damaged` and named by `say`.

    Raises:
      UserError: there are checkpoints, and all are damaged.
    """
    steps = self.steps()
    for step in reversed(steps):
      try:
        return self.restore(step, like)
      except Exception as error:  # damage shows as dozens of types of error
        target = self._workdir / "damaged" / str(step)
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        shutil.move(self._folder / str(step), target)
        self._manager.reload()
        say(f"checkpoint {step} is damaged ({errors.first_line(error)}); moved to {target}, trying the one before")
    if steps:
      raise errors.UserError(f"{self._folder}: all checkpoints ({', '.join(map(str, steps))}) are damaged; start anew")
    return None

  def steps(self) -> list[int]:
    """Steps of the complete checkpoints there are, ascending."""
    return sorted(self._manager.all_steps())

  def wait(self) -> None:
    """Returns when what was saved is on disk; raises what went wrong in the background."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then ends the background threads."""
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


def _abstract(leaf):
  sharding = getattr(leaf, "sharding", None)
  if sharding is None:
    return np.empty(leaf.shape, leaf.dtype)
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def checksum(tree: Any) -> str:
  """32 hexadecimal digits that depend on every bit of all arrays, and on nothing else: not on where the arrays lie.

  On the devices every element is mixed with its position, by the finaliser of MurmurHash3 (Appleby 2011), and all are
  added up in integers, so that parts can be added in any order.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  named = sorted((jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves)
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
    name, leaf = item
    head = f"{name} {leaf.dtype} {leaf.shape}\n".encode()
    return hashlib.sha256(head + np.ascontiguousarray(leaf).tobytes()).digest()

  leaves = jax.tree_util.tree_leaves_with_path(tree)
  named = [(jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(leaf)) for path, leaf in leaves]
  named.sort(key=lambda item: item[0])  # a checkpoint read without its structure has dicts for named tuples
  with concurrent.futures.ThreadPoolExecutor() as pool:  # hashlib releases the interpreter's lock
    return hashlib.sha256(b"".join(pool.map(one, named))).hexdigest()
