"""What each call to the device trains on.

A feed has the examples that stay on the devices (`data`), the lengths that batches may be cut to (`lengths`; None for
whole ones), the `shardings` of both arguments, and gives for every step what the call from there on takes
(`feed(step)`).
"""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from lra_jax import parallel
from lra_jax.data import batches, resident, tasks
from lra_jax.data.sources import Split


class ResidentFeed:
  """The whole split lies on the devices; a call takes indices into it.

  Attributes:
    data: the split.
    lengths: programs that are needed, the last the longest.
    abstract: shape and type of what a call takes.
    shardings: of `data` and of what a call takes.
    waited_seconds: how long calls waited for input: 0.
  """

  waited_seconds = 0.0

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
