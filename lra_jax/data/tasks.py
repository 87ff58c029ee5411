"""What a task is, and the registry of tasks. A new task is one entry of `REGISTRY`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lra_jax import errors
from lra_jax.data import folders, listops, names, pathfinder, retrieval, sources, streams, text
from lra_jax.data.sources import Split
from lra_jax.data.stream import Streamed

# What the published runs of the Long Range Arena do besides what is right; `config.task.quirks` names those wanted.
QUIRKS = {
  "mask_zeros": "pixels of value 0, black, are masked as if they were padding",
  "drop_remainder": "evaluation leaves out the examples that do not fill the last batch",
  "test_for_validation": "the test split chooses the checkpoint",
  "shuffled_vocabulary": "token ids in an order drawn by the seed, as by the hash seed of a Python process",
}
# Fields of `config.task` that only some tasks have, and what their sources call them.
_OPTIONS = {name: name for name in ("max_corrupt", "contour_length")} | {"length": "max_length", "image_size": "size"}


@dataclasses.dataclass(frozen=True)
class Task:
  """A classification task: on images, seen as images, sequences of pixels or integer tokens; or on texts of tokens.

  Examples with an `image_shape` are stored and augmented as images whatever the view; `augment.view` gives the model's
  form of them. Accuracies of different views are not comparable with each other.

  Attributes:
    name: its key in `REGISTRY`, or "folder:PATH".
    image_shape: (H, W, C) of one stored example; None for texts.
    class_names: names of the S classes, in the order of the labels.
    mean, std: per channel, of pixels in 0 … 1; the model sees (x − mean) / std.
    load: reads splits "train", "test" and perhaps "validation"; its argument is the data folder, or None.
    stream: finds the same splits, to be read as they are needed (`stream.Streamed`); None where a task always fits.
    view: "image" (H, W, C); "sequence" (L, C), all pixels in raster order, L = H·W; or "tokens" (L,), grey pixels in
      raster order as integers 0 … 255. Of texts always "tokens".
    permutation_seed: of the fixed order that the positions of a sequence are brought into; None for raster order.
    validation: how it is carved from the training examples where `load` gives none: "class", a share of every class
      drawn by `split_seed`; or "last", the last ones in the order of the files.
    token_shape: (L,) of one text, (2, L) of a pair; None for images.
    vocab_size: number of different tokens, padding included; None where the inputs are real numbers.
    names: where classes depend on the data: their names, of the data folder; it replaces `class_names`.
    options: fields of `config.task` that this task has: of "length", "image_size", "max_corrupt", "contour_length".
    allows: which of `QUIRKS` it has.
    quirks: which of them are wanted.
    encode: (texts, L) to tokens (N, L) and lengths (N,); of texts alone. Raises ValueError where one is no such text.
    decode: tokens (L,) to text; of texts alone.
  """

  name: str
  image_shape: tuple[int, int, int] | None
  class_names: tuple[str, ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  load: Callable[..., dict[str, Split]]
  view: str = "image"
  permutation_seed: int | None = None
  validation: str = "class"
  token_shape: tuple[int, ...] | None = None
  vocab_size: int | None = None
  names: Callable[[str | None], tuple[str, ...]] | None = None
  stream: Callable[..., dict[str, Streamed]] | None = None
  options: tuple[str, ...] = ()
  allows: tuple[str, ...] = ("drop_remainder",)
  quirks: tuple[str, ...] = ()
  encode: Callable[[Sequence[bytes], int], tuple[np.ndarray, np.ndarray]] | None = None
  decode: Callable[[np.ndarray], str] | None = None

  @property
  def stored_shape(self) -> tuple[int, ...]:
    """Of one example as it is stored."""
    return self.image_shape or self.token_shape

  @property
  def stored_dtype(self) -> np.dtype:
    """uint8, or uint16 where there are more than 256 tokens."""
    return np.dtype(np.uint8 if self.vocab_size is None or self.vocab_size <= 256 else np.uint16)

  @property
  def input_shape(self) -> tuple[int, ...]:
    """Of one example as the model gets it."""
    if self.image_shape is None:
      return self.token_shape
    height, width, channels = self.image_shape
    return {"image": self.image_shape, "sequence": (height * width, channels), "tokens": (height * width,)}[self.view]

  @property
  def permutation(self) -> np.ndarray | None:
    """(L,) indices: position i of the permuted sequence shows pixel permutation[i]; None for raster order."""
    if self.permutation_seed is None:
      return None
    height, width, _ = self.image_shape
    return np.random.RandomState(self.permutation_seed).permutation(height * width)


_DIGITS = dict(image_shape=(8, 8, 1), class_names=names.DIGITS, mean=(0.3055,), std=(0.3761,), load=sources.digits)
_CIFAR10 = dict(
  image_shape=(32, 32, 3),
  class_names=names.CIFAR10,
  mean=(0.4914, 0.4822, 0.4465),
  std=(0.2470, 0.2435, 0.2616),
  load=sources.cifar10,
  options=("image_size",),
)
_CIFAR100 = _CIFAR10 | dict(
  class_names=names.CIFAR100, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762), load=sources.cifar100
)
_MNIST = dict(image_shape=(28, 28, 1), class_names=names.DIGITS, mean=(0.1307,), std=(0.3081,), load=sources.mnist)
_FASHION_MNIST = _MNIST | dict(
  class_names=names.FASHION_MNIST, mean=(0.2860,), std=(0.3530,), load=sources.fashion_mnist
)
# ImageNet's mean and deviation, as all of its parts and most people's own pictures are normalised with.
_IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), options=("image_size",))
_SEQUENCE = dict(view="sequence")
_PERMUTED = dict(view="sequence", permutation_seed=0)
# The mean and deviation that make a normalised token its own number: nothing is lost on the way through augmentation.
_TOKENS = dict(view="tokens", mean=(0.0,), std=(1 / 255,), vocab_size=256, allows=("drop_remainder", "mask_zeros"))
# The Image task of the Long Range Arena (Tay et al. 2021): grey CIFAR-10, the last 5,000 training images for
# validation; and two that it draws. "_real": the same as one real channel, as S4, S5 and LRU read them.
_LRA_IMAGE = _CIFAR10 | dict(image_shape=(32, 32, 1), load=sources.cifar10_grey, validation="last", options=())
_PATHFINDER = dict(
  image_shape=(32, 32, 1), class_names=pathfinder.CLASS_NAMES, options=("max_corrupt", "contour_length")
)
_PATH_X = _PATHFINDER | dict(image_shape=(128, 128, 1), load=functools.partial(pathfinder.load, size=128))
_PATHFINDER |= dict(load=functools.partial(pathfinder.load, size=32))
_HALF = dict(mean=(0.5,), std=(0.5,))  # what S4 and S5 normalise these with
_TEXT = dict(image_shape=None, mean=(), std=(), view="tokens", encode=text.encode, decode=text.decode)


def _imagenette(variant, size):
  load, stream = (functools.partial(f, variant=variant, size=size) for f in (sources.imagenette, streams.imagenette))
  return _IMAGENET | dict(image_shape=(size, size, 3), class_names=names.IMAGENETTE, load=load, stream=stream)


REGISTRY: Mapping[str, Task] = {
  name: Task(name, **fields)
  for name, fields in {
    "digits": _DIGITS,
    "digits_sequence": _DIGITS | _SEQUENCE,
    "digits_permuted": _DIGITS | _PERMUTED,
    "digits_tokens": _DIGITS | _TOKENS,
    "mnist": _MNIST,
    "mnist_sequence": _MNIST | _SEQUENCE,
    "mnist_permuted": _MNIST | _PERMUTED,
    "fashion_mnist": _FASHION_MNIST,
    "fashion_mnist_sequence": _FASHION_MNIST | _SEQUENCE,
    "fashion_mnist_permuted": _FASHION_MNIST | _PERMUTED,
    "cifar10": _CIFAR10,
    "cifar10_sequence": _CIFAR10 | _SEQUENCE,  # sequential CIFAR: one RGB pixel a step
    "cifar10_permuted": _CIFAR10 | _PERMUTED,
    "cifar100": _CIFAR100,
    "cifar100_coarse": _CIFAR100
    | dict(class_names=names.CIFAR100_COARSE, load=functools.partial(sources.cifar100, labels="coarse")),
    "tiny_imagenet": _IMAGENET
    | dict(
      image_shape=(64, 64, 3),
      class_names=tuple(map(str, range(200))),
      load=sources.tiny_imagenet,
      stream=streams.tiny_imagenet,
      names=sources.tiny_imagenet_names,
      options=("image_size", "max_corrupt"),
    ),
    "imagenette": _imagenette("160px-v2", 160),
    "imagenette_320": _imagenette("320px-v2", 224),
    "imagenette_full": _imagenette("full-size-v2", 224),
    "imagenet2012": _IMAGENET
    | dict(
      image_shape=(224, 224, 3),
      class_names=tuple(map(str, range(1000))),
      load=sources.imagenet2012,
      stream=streams.imagenet2012,
      names=sources.imagenet2012_names,
    ),
    "listops": _TEXT
    | dict(
      class_names=names.DIGITS,
      load=listops.load,
      token_shape=(listops.MAX_LENGTH,),
      vocab_size=len(listops.TOKENS),
      allows=("drop_remainder", "shuffled_vocabulary"),
      encode=listops.encode,
      decode=listops.decode,
    ),
    "text": _TEXT
    | dict(
      class_names=text.CLASS_NAMES,
      load=text.load,
      token_shape=(4096,),
      vocab_size=text.VOCAB_SIZE,
      options=("length",),
      allows=("drop_remainder", "test_for_validation"),
    ),
    "retrieval": _TEXT
    | dict(
      class_names=retrieval.CLASS_NAMES,
      load=retrieval.load,
      token_shape=(2, 4000),
      vocab_size=text.VOCAB_SIZE,
      options=("length",),
    ),
    "lra_image": _LRA_IMAGE | _TOKENS,
    "lra_image_real": _LRA_IMAGE | _SEQUENCE | dict(mean=(0.4799,), std=(0.2396,)),
    "pathfinder_image": _PATHFINDER | _HALF,
    "pathfinder": _PATHFINDER | _TOKENS,
    "pathfinder_real": _PATHFINDER | _SEQUENCE | _HALF,
    "path_x": _PATH_X | _TOKENS,
    "path_x_real": _PATH_X | _SEQUENCE | _HALF,
  }.items()
}
_FOLDER = "folder:"


def get(name: str, class_names: tuple[str, ...] | None = None) -> Task:
  """The task of that name, with its defaults; see `of`.

  Args:
    name: a key of `REGISTRY`, or "folder:PATH" for pictures of one's own as `folders.list_files` describes, 224 px.
    class_names: of a folder; None to look there.

  Raises:
    UserError: there is none; near misses are named. Or there is no such folder.
  """
  if name.startswith(_FOLDER):
    path = name.removeprefix(_FOLDER)
    load = lambda data_dir, size=224, **options: folders.folder(path, size, **options)
    stream = lambda data_dir, size=224, **options: streams.folder(path, size, **options)
    options = ("image_size", "max_corrupt")
    fields = _IMAGENET | dict(
      class_names=class_names or folders.class_names(path), load=load, stream=stream, options=options
    )
    return Task(name, image_shape=(224, 224, 3), **fields)
  errors.check_known("config.task.name:", name, (*REGISTRY, "folder:PATH"))
  return REGISTRY[name]


def of(settings: Mapping[str, Any], class_names: tuple[str, ...] | None = None) -> Task:
  """The task that a run is configured for.

  Args:
    settings: `config.task`.
    class_names: as an earlier start of the run found them; None to look at the data where they depend on these.

  Raises:
    UserError: an unknown task, or an option or quirk that it does not have.
  """
  task = get(settings["name"], class_names)
  keywords, changes = {}, {}
  for field, keyword in _OPTIONS.items():
    value = settings.get(field, 0)
    if not value:
      continue
    if field not in task.options or value < 0:
      what = (
        "expected a number above 0" if field in task.options else f"task {task.name} has no such choice; leave it 0"
      )
      raise errors.UserError(f"config.task.{field}={value}: {what}")
    keywords[keyword] = value
    if field == "length":
      changes["token_shape"] = (*task.token_shape[:-1], value)
    elif field == "image_size":
      changes["image_shape"] = (value, value, task.image_shape[-1])
  quirks = tuple(settings.get("quirks", ()))
  for quirk in quirks:
    errors.check_known("config.task.quirks:", quirk, QUIRKS)
    if quirk not in task.allows:
      raise errors.UserError(f"config.task.quirks={quirk!r}: task {task.name} has {', '.join(task.allows)} only")
  if "test_for_validation" in quirks:
    keywords["validation"] = "test"
  if class_names is None and task.names is not None:
    class_names = task.names(settings.get("data_dir") or None)
  if class_names is not None:
    changes["class_names"] = tuple(class_names)
  if task.stream is not None:
    changes["stream"] = functools.partial(task.stream, **keywords)
  return dataclasses.replace(task, load=functools.partial(task.load, **keywords), quirks=quirks, **changes)


def load(
  task: Task,
  *,
  data_dir: str | None = None,
  validation_fraction: float = 0.1,
  split_seed: int = 0,
  seed: int = 0,
  streamed: bool = False,
) -> dict[str, Split] | dict[str, Streamed]:
  """Reads a task and, where its source has none, carves a validation split from the training examples.

  Args:
    task: what to read.
    data_dir: folder of the data, None or "" for the default of its source.
    validation_fraction: share of the training examples (of every class) that goes to validation, 0 < f < 1.
    split_seed: which ones, where they are drawn; the same for all runs that shall be compared.
    seed: of the run; of a shuffled vocabulary.
    streamed: whether images are only found, to be read when they are needed; of a task with `stream`.

  Returns:
    "train", "validation" and "test": disjoint (but for `test_for_validation`), the test split as its source defines it.

  Raises:
    UserError: data not found or not readable, a label that is no class, a fraction that leaves a split empty.
  """
  splits = (task.stream if streamed else task.load)(data_dir or None)
  for name, split in splits.items():
    bad = np.flatnonzero((split.labels < 0) | (split.labels >= len(task.class_names)))
    if len(bad):
      raise errors.UserError(
        f"{task.name}: example {bad[0]} of split {name!r} has label {split.labels[bad[0]]}, expected 0 to "
        f"{len(task.class_names) - 1}; prepare the data anew"
      )
  if "validation" not in splits:
    splits |= carve(splits["train"], task.validation, validation_fraction, split_seed)
  if "shuffled_vocabulary" in task.quirks:
    ids = np.r_[0, 1 + np.random.RandomState(seed).permutation(task.vocab_size - 1)].astype(task.stored_dtype)
    splits = {name: split._replace(inputs=ids[split.inputs]) for name, split in splits.items()}
  return {name: splits[name] for name in ("train", "validation", "test")}


def carve(train: Split | Streamed, how: str, fraction: float, seed: int) -> dict[str, Split]:
  """Splits training examples into "train" and "validation"; arguments as of `load` and `Task.validation`.

  Raises:
    UserError: a fraction that leaves one of them empty.
  """
  count = len(train.labels)
  if how == "last":
    kept, carved = np.split(np.arange(count), [count - round(fraction * count)])
  else:
    kept, carved = stratified_split(train.labels, fraction, seed)
  if not len(kept) or not len(carved):
    raise errors.UserError(
      f"config.task.validation_fraction={fraction} of {count} training examples leaves {len(kept)} for training and "
      f"{len(carved)} for validation; take a value between 0.01 and 0.5"
    )
  return {"train": train.take(kept), "validation": train.take(carved)}


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Indices of the kept and of the carved examples, both ascending; `fraction` of every class is carved, rounded."""
  random = np.random.RandomState(seed)
  carved = []
  for label in np.unique(labels):
    members = np.flatnonzero(labels == label)
    carved.append(random.permutation(members)[: round(fraction * len(members))])
  carved = np.sort(np.concatenate(carved)) if carved else np.zeros(0, int)
  return np.setdiff1d(np.arange(len(labels)), carved), carved
