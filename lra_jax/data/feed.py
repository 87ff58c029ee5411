"""What each call to the device trains on, and what is evaluated on.

A feed has the examples that stay on the devices (`data`), the lengths that batches may be cut to (`lengths`; None for
whole ones), the `shardings` of both arguments, and gives for every step what the call from there on takes
(`feed(step)`).
"""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from lra_jax import errors, parallel
from lra_jax.data import batches, resident, stream, tasks
from lra_jax.data.sources import Split
from lra_jax.data.stream import Streamed


def load(
  config: ml_collections.ConfigDict, task: tasks.Task, mesh: jax.sharding.Mesh, **settings
) -> dict[str, Split] | dict[str, Streamed]:
  """The splits of a task, read whole where they fit into memory, else only found.

  What fits takes at most `config.task.memory_share` of the memory of a device, or, of several processes, of all.

  Args:
    config: of the run; `config.task.input` is "resident", "stream", or "" for what fits.
    task: of the run.
    mesh: of the run.
    **settings: of `tasks.load`.

  Raises:
    UserError: as of `tasks.load`, or a task that cannot be streamed shall be.
  """
  errors.check_known("config.task.input:", config.task.input, ("", "resident", "stream"))
  if config.task.input == "stream" and task.stream is None:
    raise errors.UserError(f"config.task.input='stream': task {task.name} is never too large; leave it off")
  if task.stream is None or config.task.input == "resident":
    return tasks.load(task, **settings)
  splits = tasks.load(task, streamed=True, **settings)
  needed = sum(split.nbytes for split in splits.values()) // (mesh.size if jax.process_count() > 1 else 1)
  if config.task.input == "stream" or not stream.fits(needed, mesh.local_devices[0], config.task.memory_share):
    return splits
  return tasks.load(task, **settings)


class ResidentFeed:
  """The whole split lies on the devices; a call takes indices into it.

  Attributes:
    data: the split.
    lengths: programs that are needed, the last the longest.
    abstract: shape and type of what a call takes.
    shardings: of `data` and of what a call takes.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    task: tasks.Task,
    split: Split,
    batch_size: int,
    steps: int,
    mesh: jax.sharding.Mesh,
    in_parts: bool = False,
  ):
    """Copies the split to the devices.

    Args:
      config: of the run.
      task: of the run.
      split: the training examples.
      batch_size: B.
      steps: M, of a call.
      mesh: of the run.
      in_parts: as of `resident.put`.

    Raises:
      UserError: as of `batches.buckets`.
    """
    self.data = resident.put(split, mesh, in_parts)
    bounds = batches.buckets(config, task)
    self.lengths = bounds or (None,)
    self.abstract = jax.ShapeDtypeStruct((steps, batch_size), jnp.int32)
    self._bucket = resident.bucket_of(split.lengths, bounds) if bounds else np.zeros(len(split.labels), int)
    self._order = batch_size, steps, config.seed, config.augment.repeats
    self.shardings = resident.data_sharding(self.data, mesh), resident.chosen_sharding(self.data, mesh, 1)

  def __call__(self, step: int) -> tuple[int | None, jax.Array]:
    """The length of the call that starts at `step`, and its indices (M, B).

    Raises:
      UserError: as of `resident.train_indices`.
    """
    batch_size, steps, seed, repeats = self._order
    if len(self.lengths) == 1:
      indices, bucket = resident.train_indices(len(self._bucket), batch_size, step, steps, seed, repeats), 0
    else:
      indices, bucket = resident.bucketed_indices(self._bucket, batch_size, step, steps, seed)
    return self.lengths[bucket], parallel.put(indices, self.shardings[1])

  def close(self) -> None:
    """Nothing is open."""


class StreamFeed:
  """Nothing lies on the devices; a call takes its examples, which threads prepare. Attributes as of `ResidentFeed`."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    split: Streamed,
    batch_size: int,
    steps: int,
    last_step: int,
    mesh: jax.sharding.Mesh,
  ):
    """Reads nothing yet.

    Args:
      config: of the run.
      split: the training examples.
      batch_size: B.
      steps: M, of a call.
      last_step: of the training.
      mesh: of the run.
    """
    if config.train.length_buckets:
      raise errors.UserError("config.train.length_buckets: images all have one length; leave it off")
    self.data, self.lengths = None, (None,)
    images = jax.ShapeDtypeStruct((steps, batch_size, *split.shape), jnp.uint8)
    self.abstract = resident.Resident(images, jax.ShapeDtypeStruct((steps, batch_size), jnp.int32))
    self.shardings = None, parallel.sharded(mesh, 1)
    self._arguments = split, mesh, batch_size, steps
    self._order = last_step, config.seed, config.augment.repeats
    self._stream = None

  def __call__(self, step: int) -> tuple[None, resident.Resident]:
    """None, and the examples (M, B, …) of the call that starts at `step`; calls must follow each other.

    Raises:
      UserError: as of `stream.TrainStream`.
    """
    if self._stream is None:
      self._stream = stream.TrainStream(*self._arguments, step, *self._order)
    return None, next(self._stream)

  def close(self) -> None:
    """Ends the threads."""
    if self._stream is not None:
      self._stream.close()


Feed = ResidentFeed | StreamFeed


def make(
  config: ml_collections.ConfigDict,
  task: tasks.Task,
  split: Split | Streamed,
  batch_size: int,
  steps: int,
  last_step: int,
  mesh: jax.sharding.Mesh,
) -> Feed:
  """The feed of a split; arguments as of `ResidentFeed` and `StreamFeed`."""
  if isinstance(split, Streamed):
    return StreamFeed(config, split, batch_size, steps, last_step, mesh)
  return ResidentFeed(config, task, split, batch_size, steps, mesh, in_parts=jax.process_count() > 1)


def held_out(split: Split | Streamed, mesh: jax.sharding.Mesh) -> resident.Resident | Streamed:
  """What `step.evaluate` reads of a split."""
  return split if isinstance(split, Streamed) else resident.put(split, mesh, in_parts=jax.process_count() > 1)
