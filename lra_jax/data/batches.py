"""From stored examples to what a model reads: the arguments of its call, and the targets.

Axes: B batch, H rows, W columns, C channels, L tokens, S classes.
"""

import itertools

import jax
import jax.numpy as jnp
import ml_collections
import optax

from lra_jax import errors, models, parallel
from lra_jax.data import augment, resident, tasks

# Fields of `config.augment` that change images, where they are neither 0 nor empty.
AUGMENTATION = ("crop_pad", "crop_scale", "rotate", "translate", "zoom", "shear", "flip", "flip_vertical", "policy",
                "jitter", "erase_probability", "cutout")  # fmt: skip


def take(
  data: resident.Resident | None,
  chosen: jax.Array | resident.Resident,
  mesh: jax.sharding.Mesh,
  length: int | None = None,
) -> resident.Resident:
  """A batch, split over the devices; texts cut to `length` tokens.

  Args:
    data: what lies on the devices; None where nothing does.
    chosen: indices (B,) into it, or the examples themselves.
    mesh: of the run.
    length: L; None for whole texts.
  """
  if isinstance(chosen, resident.Resident):
    return chosen._replace(inputs=chosen.inputs if length is None else chosen.inputs[..., :length])
  rows = data.inputs if length is None else data.inputs[..., :length]
  if isinstance(data, resident.Parts):
    inputs = _take_from_parts(rows, chosen, mesh)
  else:
    inputs = jax.lax.with_sharding_constraint(rows[chosen], parallel.sharded(mesh))
  lengths = None if data.lengths is None else data.lengths[chosen]
  return resident.Resident(inputs, data.labels[chosen], lengths)


def _take_from_parts(rows, indices_B, mesh):
  """Every device picks its own rows of the whole batch, and the batch is scattered over the devices."""

  def pick(rows, indices_B):
    places_B = indices_B - jax.lax.axis_index(parallel.AXES) * len(rows)
    ours_B = (places_B >= 0) & (places_B < len(rows))
    picked = rows[jnp.clip(places_B, 0, len(rows) - 1)]
    picked = jnp.where(ours_B.reshape(-1, *[1] * (rows.ndim - 1)), picked, 0)
    wide = picked if picked.dtype == jnp.uint8 else picked.astype(jnp.uint32)  # NCCL adds no 16 bits
    return jax.lax.psum_scatter(wide, parallel.AXES, scatter_dimension=0, tiled=True).astype(rows.dtype)

  split, whole = jax.sharding.PartitionSpec(parallel.AXES), jax.sharding.PartitionSpec()
  return jax.shard_map(pick, mesh=mesh, in_specs=(split, whole), out_specs=split)(rows, indices_B)


def check(config: ml_collections.ConfigDict, task: tasks.Task) -> None:
  """Refuses settings that a task's examples cannot be subjected to.

  Raises:
    UserError: augmentation or mixing where there are no images.
  """
  if task.image_shape is not None:
    return
  for group, names in (("augment", AUGMENTATION), ("train", ("mixup", "cutmix"))):
    for name in names:
      if value := config[group][name]:
        raise errors.UserError(
          f"config.{group}.{name}={value!r}: task {task.name} has no images to augment; leave it off"
        )


def buckets(config: ml_collections.ConfigDict, task: tasks.Task) -> tuple[int, ...]:
  """The lengths that batches of texts are cut to, ascending, the task's own last; () where they are not.

  Raises:
    UserError: buckets of a task without lengths or of a model that must see the padding, or no ascending lengths.
  """
  lengths = tuple(config.train.length_buckets)
  if not lengths:
    return ()
  where = f"config.train.length_buckets={lengths}"
  if task.token_shape is None:
    raise errors.UserError(f"{where}: examples of task {task.name} all have one length; leave it off")
  if not models.reads_shorter(config.model.name):
    raise errors.UserError(f"{where}: for model {config.model.name} the padding counts; leave it off")
  lengths = (*lengths, task.token_shape[-1])
  if lengths[0] < 1 or any(a >= b for a, b in itertools.pairwise(lengths)):
    raise errors.UserError(f"{where}: expected ascending lengths from 1 to below {lengths[-1]}")
  return lengths


def training(
  config: ml_collections.ConfigDict,
  task: tasks.Task,
  examples: resident.Resident,
  augment_key: jax.Array,
  mix_key: jax.Array,
  mesh: jax.sharding.Mesh,
) -> tuple[tuple[jax.Array, dict[str, jax.Array]], jax.Array]:
  """Examples augmented and mixed as `config.augment` and `config.train` say.

  Args:
    config: of the run.
    task: of the examples.
    examples: a batch, as stored.
    augment_key, mix_key: of this step.
    mesh: of the run.

  Returns:
    (x, further keyword arguments) of the model's call; and the class probabilities (B, S).
  """
  targets_BS = jax.nn.one_hot(examples.labels, len(task.class_names))
  targets_BS = optax.smooth_labels(targets_BS, config.train.label_smoothing)
  if task.image_shape is None:
    return tokens(examples), targets_BS
  x_BHWC = augment.augment(augment_key, examples.inputs, config.augment, task)
  mixing = config.train.mixup, config.train.cutmix, config.train.mix_probability, config.train.mix_per
  x_BHWC, targets_BS = augment.mix(mix_key, x_BHWC, targets_BS, *mixing, mesh)
  return _with_mask(augment.view(x_BHWC, task), task), targets_BS


def evaluation(
  config: ml_collections.ConfigDict, task: tasks.Task, examples: resident.Resident
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """(x, further keyword arguments) of the model's call, nothing in them random."""
  if task.image_shape is None:
    return tokens(examples)
  return _with_mask(augment.prepare(examples.inputs, task, config.augment.eval_crop_share), task)


def _with_mask(x, task):
  return x, {"mask_BL": x > 0} if "mask_zeros" in task.quirks else {}


def tokens(examples: resident.Resident) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Token ids int32 (B, L), of pairs (B, 2, L); and "mask_BL", of that shape, False at padding, if there is any."""
  x = examples.inputs.astype(jnp.int32)
  if examples.lengths is None:
    return x, {}
  places_L = jnp.arange(x.shape[-1]).reshape((1,) * (x.ndim - 1) + (-1,))
  return x, {"mask_BL": places_L < examples.lengths[..., None]}
