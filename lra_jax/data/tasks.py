"""What a task is, and the registry of tasks. A new task is one entry of `REGISTRY`."""

import dataclasses
from collections.abc import Callable

import numpy as np

from lra_jax import errors
from lra_jax.data import sources
from lra_jax.data.sources import Split


@dataclasses.dataclass(frozen=True)
class Task:
  """A classification task on images, seen as images, as sequences of pixels or as sequences of integer tokens.

  Examples are stored and augmented as images whatever the view; `augment.view` gives the model's form of them.
  Accuracies of different views are not comparable with each other.

  Attributes:
    name: its key in `REGISTRY`.
    image_shape: (H, W, C) of one stored example.
    class_names: names of the S classes, in the order of the labels.
    mean, std: per channel, of pixels in 0 … 1, measured on the training split; the model sees (x − mean) / std.
    load: reads splits "train" and "test"; its argument is the data folder from the config, or None.
    view: "image" (H, W, C); "sequence" (L, C), all pixels in raster order, L = H·W; or "tokens" (L,), grey pixels in
      raster order as integers 0 … 255.
    permutation_seed: of the fixed order that the positions of a sequence are brought into; None for raster order.
    validation: "class", a share of every class drawn by `split_seed`, or "last", the last ones in the order of the
    files.
  """

  name: str
  image_shape: tuple[int, int, int]
  class_names: tuple[str, ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  load: Callable[[str | None], dict[str, Split]]
  view: str = "image"
  permutation_seed: int | None = None
  validation: str = "class"

  @property
  def input_shape(self) -> tuple[int, ...]:
    """Of one example as the model gets it."""
    height, width, channels = self.image_shape
    return {"image": self.image_shape, "sequence": (height * width, channels), "tokens": (height * width,)}[self.view]

  @property
  def vocab_size(self) -> int | None:
    """Number of tokens; None where the inputs are real numbers."""
    return 256 if self.view == "tokens" else None

  @property
  def permutation(self) -> np.ndarray | None:
    """(L,) indices: position i of the permuted sequence shows pixel permutation[i]; None for raster order."""
    if self.permutation_seed is None:
      return None
    height, width, _ = self.image_shape
    return np.random.RandomState(self.permutation_seed).permutation(height * width)


_DIGITS = dict(
  image_shape=(8, 8, 1), class_names=tuple("0123456789"), mean=(0.3055,), std=(0.3761,), load=sources.digits
)
_CIFAR10 = dict(
  image_shape=(32, 32, 3),
  class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
  mean=(0.4914, 0.4822, 0.4465),
  std=(0.2470, 0.2435, 0.2616),
  load=sources.cifar10,
)
# The Image task of the Long Range Arena (Tay et al. 2021): grey CIFAR-10, the last 5,000 training images for
# validation.
_LRA_IMAGE = _CIFAR10 | dict(image_shape=(32, 32, 1), load=sources.cifar10_grey, validation="last")
# The mean and deviation that make a normalised token its own number: nothing is lost on the way through augmentation.
_TOKENS = dict(view="tokens", mean=(0.0,), std=(1 / 255,))

REGISTRY = {
  name: Task(name, **fields)
  for name, fields in {
    "digits": _DIGITS,
    "digits_sequence": _DIGITS | dict(view="sequence"),
    "digits_permuted": _DIGITS | dict(view="sequence", permutation_seed=0),
    "digits_tokens": _DIGITS | _TOKENS,
    "cifar10": _CIFAR10,
    "cifar10_sequence": _CIFAR10 | dict(view="sequence"),  # sequential CIFAR: one RGB pixel a step
    "cifar10_permuted": _CIFAR10 | dict(view="sequence", permutation_seed=0),
    "lra_image": _LRA_IMAGE | _TOKENS,
    # The same examples as one real channel, as S4, S5 and LRU read the task.
    "lra_image_real": _LRA_IMAGE | dict(view="sequence", mean=(0.4799,), std=(0.2396,)),
  }.items()
}


def get(name: str) -> Task:
  """The task of that name.

  Raises:
    UserError: there is none; near misses are named.
  """
  errors.check_known("config.task.name:", name, REGISTRY)
  return REGISTRY[name]


def load(name: str, *, data_dir: str | None, validation_fraction: float, split_seed: int) -> dict[str, Split]:
  """Reads a task and carves its validation split from the training examples, as `Task.validation` says.

  Args:
    name: of the task.
    data_dir: folder of the data, None or "" for the default of its source.
    validation_fraction: share of the training examples (of every class) that goes to validation, 0 < f < 1.
    split_seed: which ones, where they are drawn; the same for all runs that shall be compared.

  Returns:
    "train", "validation" and "test": disjoint, the test split as its source defines it.

  Raises:
    UserError: unknown task, data not found or not readable, a fraction that leaves a split empty.
  """
  task = get(name)
  splits = task.load(data_dir or None)
  if task.validation == "last":
    count = len(splits["train"].labels)
    train, validation = np.split(np.arange(count), [count - round(validation_fraction * count)])
  else:
    train, validation = stratified_split(splits["train"].labels, validation_fraction, split_seed)
  if not len(train) or not len(validation):
    raise errors.UserError(
      f"config.task.validation_fraction={validation_fraction} of {len(train) + len(validation)} training examples "
      f"leaves {len(train)} for training and {len(validation)} for validation; take a value between 0.01 and 0.5"
    )
  return {
    "train": splits["train"].take(train),
    "validation": splits["train"].take(validation),
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
