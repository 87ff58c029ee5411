"""A data set in device memory, and the order in which its examples are taken."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from lra_jax import errors, parallel
from lra_jax.data.sources import Split


class Resident(NamedTuple):
  """One split on the device, a copy on each; as `sources.Split`."""

  inputs: jax.Array
  labels: jax.Array
  lengths: jax.Array | None = None


class Parts(Resident):
  """One split, its inputs cut into as many parts as there are devices; their number is filled up to a multiple."""

  __slots__ = ()


def put(split: Split, mesh: jax.sharding.Mesh, in_parts: bool = False) -> Resident:
  """Copies a split to the devices of a mesh.

  Args:
    split: the same in every process.
    mesh: of the run.
    in_parts: whether every device gets a part of the inputs (`Parts`), not a copy; labels and lengths are small.
  """
  whole = parallel.replicated(mesh)
  labels, lengths = parallel.put((split.labels, split.lengths), whole)
  if not in_parts:
    return Resident(parallel.put(split.inputs, whole), labels, lengths)
  rows = -(-len(split.inputs) // mesh.size)
  sharding = parallel.sharded(mesh)

  def part(index):
    start, stop, _ = index[0].indices(rows * mesh.size)
    found = np.asarray(split.inputs[start:stop])
    return np.pad(found, [(0, stop - start - len(found))] + [(0, 0)] * (found.ndim - 1))

  shape = (rows * mesh.size, *split.inputs.shape[1:])
  return Parts(jax.make_array_from_callback(shape, sharding, part), labels, lengths)


def data_sharding(data: Resident, mesh: jax.sharding.Mesh) -> Resident:
  """Where the arrays of a split lie."""
  whole = parallel.replicated(mesh)
  lengths = None if data.lengths is None else whole
  return type(data)(parallel.sharded(mesh) if isinstance(data, Parts) else whole, whole, lengths)


def chosen_sharding(data: Resident, mesh: jax.sharding.Mesh, axis: int = 0) -> jax.sharding.Sharding:
  """Where indices into a split lie, whose axis `axis` is the batch: every device must know those of its rows."""
  return parallel.replicated(mesh) if isinstance(data, Parts) else parallel.sharded(mesh, axis)


def train_indices(
  examples: int, batch_size: int, first_step: int, steps: int, seed: int, repeats: int = 1
) -> np.ndarray:
  """Examples of training steps `first_step` … `first_step + steps − 1`.

  Training reads one endless stream: epoch after epoch, each a permutation of all examples drawn from (seed, epoch). A
  batch may hold the end of one epoch and the start of the next, so every example is seen exactly once an epoch. With
  repeated augmentation (Hoffer et al. 2020) a batch takes its next B / repeats examples, then the same ones again:
  N / B steps see the data set's 1 / repeats-th part, as in timm, and `repeats` times as many steps all of it.

  Args:
    examples: N, size of the training split.
    batch_size: B.
    first_step: counted from 0 at the start of training.
    steps: number of batches.
    seed: of the run.
    repeats: of each example within a batch.

  Returns:
    (steps, B) int32 indices into the split.

  Raises:
    UserError: B is no multiple of `repeats`.
  """
  if repeats < 1 or batch_size % repeats:
    raise errors.UserError(
      f"config.augment.repeats={repeats}: expected 1 or more, of which config.train.batch_size={batch_size} is a "
      "multiple"
    )
  batch_size //= repeats
  start, stop = first_step * batch_size, (first_step + steps) * batch_size
  position, parts = start, []
  while position < stop:
    epoch, offset = divmod(position, examples)
    part = _permutation(examples, epoch, seed)[offset : offset + stop - position]
    parts.append(part)
    position += len(part)
  return np.tile(np.concatenate(parts).reshape(steps, batch_size), (1, repeats))


_WINDOW = 16  # calls whose examples are put into the order of their lengths together


def bucket_of(lengths: np.ndarray, bounds: tuple[int, ...]) -> np.ndarray:
  """(N,) number of the shortest of the ascending `bounds` that holds each example, of a pair the longer one."""
  return np.searchsorted(bounds, lengths.reshape(len(lengths), -1).max(1))


def bucketed_indices(
  bucket_N: np.ndarray, batch_size: int, first_step: int, steps: int, seed: int
) -> tuple[np.ndarray, int]:
  """As `train_indices`, the examples of one call being alike in length.

  The stream of examples is cut into windows of 16 calls. Within a window examples are sorted by bucket, given out to
  the calls in that order, and the calls shuffled, and the examples of each. So every example is still seen once an
  epoch, and the order is a function of seed and step.

  Args:
    bucket_N: as of `bucket_of`.
    batch_size, seed: as of `train_indices`.
    first_step: of the call, a multiple of `steps`.
    steps: of a call.

  Returns:
    (steps, B) int32 indices, and the highest bucket among them.
  """
  window, place = divmod(first_step // steps, _WINDOW)
  indices = train_indices(len(bucket_N), batch_size, window * _WINDOW * steps, _WINDOW * steps, seed).reshape(-1)
  indices = indices[np.argsort(bucket_N[indices], kind="stable")].reshape(_WINDOW, -1)
  call = np.random.RandomState([seed, window, 0]).permutation(_WINDOW)[place]
  indices = np.random.RandomState([seed, window, 1 + place]).permutation(indices[call])
  return indices.reshape(steps, batch_size), int(bucket_N[indices].max())


@functools.lru_cache(maxsize=2)
def _permutation(examples, epoch, seed):
  # RandomState's stream is frozen by NumPy's policy (NEP 19), so the order does not depend on the NumPy version.
  return np.random.RandomState([seed, epoch]).permutation(examples).astype(np.int32)


def eval_batches(examples: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
  """All examples in order, the last batch filled up with example 0.

  Returns:
    indices (batches, B) int32 and mask (batches, B) float32, which is 0 where an entry is filling.
  """
  batches = -(-examples // batch_size)
  positions = np.arange(batches * batch_size, dtype=np.int32).reshape(batches, batch_size)
  mask = positions < examples
  return np.where(mask, positions, 0), mask.astype(np.float32)
