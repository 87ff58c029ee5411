"""What a task is, and the registry of tasks. A new task is one entry of `REGISTRY`."""

import dataclasses
from collections.abc import Callable

import numpy as np

from lra_jax import errors
from lra_jax.data import sources
from lra_jax.data.sources import Split


@dataclasses.dataclass(frozen=True)
class Task:
  """A classification task on images.

  Attributes:
    name: its key in `REGISTRY`.
    input_shape: (H, W, C) of one example.
    class_names: names of the S classes, in the order of the labels.
    mean, std: per channel, of pixels in 0 … 1, measured on the training split; the model sees (x − mean) / std.
    load: reads splits "train" and "test"; its argument is the data folder from the config, or None.
  """

  name: str
  input_shape: tuple[int, int, int]
  class_names: tuple[str, ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  load: Callable[[str | None], dict[str, Split]]


REGISTRY = {
  task.name: task
  for task in (
    Task(
      name="digits",
      input_shape=(8, 8, 1),
      class_names=tuple("0123456789"),
      mean=(0.3055,),
      std=(0.3761,),
      load=sources.digits,
    ),
    Task(
      name="cifar10",
      input_shape=(32, 32, 3),
      class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
      mean=(0.4914, 0.4822, 0.4465),
      std=(0.2470, 0.2435, 0.2616),
      load=sources.cifar10,
    ),
  )
}


def get(name: str) -> Task:
  """The task of that name.

  Raises:
    UserError: there is none; near misses are named.
  """
  if name not in REGISTRY:
    raise errors.UserError(errors.unknown("config.task.name:", name, REGISTRY))
  return REGISTRY[name]


def load(name: str, *, data_dir: str | None, validation_fraction: float, split_seed: int) -> dict[str, Split]:
  """Reads a task and carves its validation split from the training examples.

  Args:
    name: of the task.
    data_dir: folder of the data, None or "" for the default of its source.
    validation_fraction: share of every class's training examples that goes to validation, 0 < f < 1.
    split_seed: which ones; the same for all runs that shall be compared.

  Returns:
    "train", "validation" and "test": disjoint, the test split as its source defines it.

  Raises:
    UserError: unknown task, data not found or not readable, a fraction that leaves a split empty.
  """
  splits = get(name).load(data_dir or None)
  train, validation = stratified_split(splits["train"].labels, validation_fraction, split_seed)
  if not len(train) or not len(validation):
    raise errors.UserError(
      f"config.task.validation_fraction={validation_fraction} of {len(train) + len(validation)} training examples "
      f"leaves {len(train)} for training and {len(validation)} for validation; take a value between 0.01 and 0.5"
    )
  inputs, labels = splits["train"]
  return {
    "train": Split(inputs[train], labels[train]),
    "validation": Split(inputs[validation], labels[validation]),
    "test": splits["test"],
  }


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Indices of the kept and of the carved examples, both ascending; `fraction` of every class is carved, rounded."""
  random = np.random.RandomState(seed)
  carved = []
  for label in np.unique(labels):
    members = np.flatnonzero(labels == label)
    carved.append(random.permutation(members)[: round(fraction * len(members))])
  carved = np.sort(np.concatenate(carved)) if carved else np.zeros(0, int)
  return np.setdiff1d(np.arange(len(labels)), carved), carved
