"""What the configs share: every field there is, with unit and reason, and the part after the colon.

Imports ml_collections alone, so that a config can be read without JAX.
"""

import difflib
from typing import Any, NamedTuple

from ml_collections import ConfigDict, config_dict


def parse(argument: str | None, tasks: tuple[str, ...], **options: tuple[str, ...]) -> tuple[str, dict[str, str]]:
  """Parses what follows the colon of `--config file.py:task,option=value`.

  Args:
    argument: such as "cifar10,variant=s"; None or "" takes the first task.
    tasks: allowed tasks, default first.
    **options: allowed values of every option, default first.

  Returns:
    The task, and every option's value ("" where it was not given).

  Raises:
    ValueError: a task, option or value that there is not; near misses are named.
  """
  task, values = tasks[0], dict.fromkeys(options, "")
  for index, part in enumerate(filter(None, (argument or "").split(","))):
    name, equals, value = part.partition("=")
    if index == 0 and part.startswith("folder:") and FOLDER in tasks:
      task = part
    elif equals:
      _check("option", name, options)
      _check(f"{name} =", value, options[name])
      values[name] = value
    elif index == 0:
      _check("task", name, tasks)
      if name == FOLDER:
        raise ValueError(f"task {name!r} stands for a folder of pictures; name it, as in folder:/data/birds")
      task = name
    else:
      raise ValueError(f"{part!r} after the colon: options are written name=value; known options: {', '.join(options)}")
  return task, values


def _check(what, name, known):
  if name not in known:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"{what} {name!r} does not exist here; {meant}known: {', '.join(known)}")


FOLDER = "folder:PATH"  # pictures of one's own
# All tasks of lra_jax/data/tasks.py, by what a model must be able to read.
SMALL_IMAGE_TASKS = ("cifar10", "cifar100", "cifar100_coarse", "mnist", "fashion_mnist")
LARGE_IMAGE_TASKS = ("tiny_imagenet", "imagenette", "imagenette_320", "imagenette_full", "imagenet2012", FOLDER)
IMAGE_TASKS = (*SMALL_IMAGE_TASKS, *LARGE_IMAGE_TASKS, "digits")
SEQUENCE_TASKS = (
  "cifar10_sequence", "cifar10_permuted", "mnist_sequence", "mnist_permuted", "fashion_mnist_sequence",
  "fashion_mnist_permuted", "lra_image", "lra_image_real", "pathfinder", "pathfinder_real", "path_x", "path_x_real",
  "digits_sequence", "digits_permuted", "digits_tokens",
)  # fmt: skip
WHOLE = "pathfinder_image"  # pictures of which nothing may be cut off or erased: it could be a dot
TEXT_TASKS = ("listops", "text", "retrieval")
PIXELS = 32  # side that models of single pixels read large images at: 1,024 steps


class Budget(NamedTuple):
  """What the Long Range Arena (Tay et al. 2021) grants to every model of a task, in examples and optimizer steps."""

  examples: int  # of the training split
  batch_size: int
  steps: int
  eval_every: int
  warmup: int  # of the learning rate of its Transformer
  eval_batch_size: int  # ours: what fits with attention of all tokens to all


# lra_benchmarks/*/configs/base_*_config.py of google-research/long-range-arena. Of the 25,000 reviews of text a tenth
# is for validation here; there the test split is.
LRA = {
  "listops": Budget(96_000, 32, 5_000, 50, 1_000, 50),
  "text": Budget(22_500, 32, 20_000, 100, 8_000, 50),
  "retrieval": Budget(147_086, 32, 5_000, 100, 8_000, 25),
  "lra_image": Budget(45_000, 256, 35_000, 175, 175, 250),
  "pathfinder": Budget(160_000, 512, 62_400, 312, 312, 250),
  "path_x": Budget(160_000, 64, 500_000, 2_500, 2_500, 10),
}


def lra(task: str) -> str | None:
  """The task of the Long Range Arena that this one is, pixels as tokens or as real numbers; None for others."""
  name = task.removesuffix("_real")
  return name if name in LRA else None


def lra_epochs(task: str, batch_size: int, steps: int) -> float:
  """So many optimizer steps in epochs of a task of the Long Range Arena."""
  return steps * batch_size / LRA[lra(task)].examples


def lra_budget(c: ConfigDict, task: str, **changes: int) -> None:
  """Steps, batch size and how often is evaluated, as the Long Range Arena has them.

  Args:
    c: changed in place.
    task: one of the Long Range Arena's.
    **changes: fields of `Budget` that a publication has otherwise.
  """
  budget = LRA[lra(task)]._replace(**changes)
  c.train.batch_size = budget.batch_size
  c.train.steps = budget.steps
  c.eval.every_epochs = lra_epochs(task, budget.batch_size, budget.eval_every)
  c.eval.batch_size = budget.eval_batch_size


def lra_recipe(c: ConfigDict, task: str, learning_rate: float = 1e-3) -> None:
  """Ours, where nothing is published: the budget, AdamW, a twentieth of the steps warm-up, cosine, no augmentation."""
  lra_budget(c, task)
  c.optim.learning_rate = learning_rate
  c.optim.weight_decay = 0.05
  c.optim.schedule.warmup_epochs = lra_epochs(task, c.train.batch_size, c.train.steps // 20)
  c.optim.schedule.final_rate = 0.0


def tasks_with(default: str) -> tuple[str, ...]:
  """Every task, for models that can read them all: `default` first, then sequences, texts and images."""
  return (default, *(task for task in (*SEQUENCE_TASKS, *TEXT_TASKS, *IMAGE_TASKS) if task != default))


def start(
  argument: str | None,
  tasks: tuple[str, ...],
  variants: dict[str, str],
  *,
  digits: str,
  per_task: dict[str, dict[str, Any]] | None = None,
  recipes: tuple[str, ...] = (),
  **fields: type,
) -> tuple[ConfigDict, str, str]:
  """A config with all fields at their defaults, and the rest of what most configs begin with.

  Args:
    argument: what follows the colon: task, `variant=` and `recipe=`.
    tasks: that the models can read, default first.
    variants: value of the option `variant` → name of the model, default first.
    digits: the variant that is default on the digits tasks.
    per_task: what the model of a task is unless a variant is given: "variant" and fields of `config.model`.
    recipes: values of the option `recipe`.
    **fields: of `config.model`, with their types; None until overridden: the preset holds.

  Returns:
    The config, the name of its task, and the recipe, "" for the default one.

  Raises:
    ValueError: a task, option or value that there is not.
  """
  more = {"recipe": recipes} if recipes else {}
  task, options = parse(argument, tasks, variant=tuple(variants), **more)
  key = FOLDER if task.startswith("folder:") else lra(task) or task
  own = {"variant": digits if task.startswith("digits") else next(iter(variants))} | (per_task or {}).get(key, {})
  if options["variant"]:
    own = {"variant": options["variant"]}
  c = base(variants[own.pop("variant")], task)
  for name, kind in fields.items():
    c.model[name] = optional(kind)
  c.model.update(own)
  recipe = options.get("recipe", "")
  if recipe and key not in IMAGE_TASKS:
    raise ValueError(f"recipe = {recipe!r} is for pictures; task {task!r} has none")
  if "patch_size" in fields and task in (*SEQUENCE_TASKS, *TEXT_TASKS):
    c.model.patch_size = 1
  if task.startswith("digits"):
    digits_recipe(c)
  elif task in SEQUENCE_TASKS or task in TEXT_TASKS:
    c.eval.batch_size = 250  # divides 5,000 and 10,000; long sequences need memory
  elif key in LARGE_IMAGE_TASKS:
    c.eval.batch_size = 250
  else:
    c.eval.batch_size = 1000
  return c, task, recipe


def digits_recipe(c: ConfigDict) -> None:
  """Ours, for scikit-learn's digits, where nothing is published: what trains most models to 98 % in a minute or two."""
  c.train.batch_size = 64
  c.train.epochs = 60.0
  c.train.label_smoothing = 0.1
  c.train.cutmix = 1.0
  c.train.mix_probability = 0.5
  c.augment.crop_pad = 1
  c.optim.learning_rate = 2e-3
  c.optim.weight_decay = 0.05
  c.optim.schedule.warmup_epochs = 2.0
  c.optim.ema_decay = 0.99
  c.eval.every_epochs = 2.0


def attention_digits_recipe(c: ConfigDict) -> None:
  """`digits_recipe` for models that find out from learned positions where a token is: more steps at a higher rate.

  Positions start from N(0, 0.02), far below the tokens; with CutMix and 1,200 steps these models end at 90 %.
  """
  digits_recipe(c)
  c.train.batch_size = 32
  c.train.epochs = 80.0
  c.train.cutmix = 0.0
  c.optim.learning_rate = 4e-3


def recurrent_digits_recipe(c: ConfigDict) -> None:
  """`digits_recipe` for models that read the class from their last step: no CutMix, no decay, a higher rate."""
  digits_recipe(c)
  c.train.cutmix = 0.0
  c.optim.learning_rate = 4e-3
  c.optim.weight_decay = 0.0


def is_large(task: str) -> bool:
  """Whether a task has pictures larger than CIFAR's."""
  return task in LARGE_IMAGE_TASKS or task.startswith("folder:")


def flips(task: str) -> bool:
  """Whether a mirrored picture keeps its class: not a digit; nor, to be safe, clothes and shoes that all look left."""
  return "mnist" not in task


def image_recipe(c: ConfigDict) -> None:
  """`imagenet_recipe` for large pictures, else `small_image_recipe`."""
  if is_large(c.task.name):
    imagenet_recipe(c)
  else:
    small_image_recipe(c)


def imagenet_recipe(c: ConfigDict) -> None:
  """That of Sequencer's ImageNet training (Tatsunami & Taki 2022), with the batch of 256 of one device.

  310 epochs, 20 of them warm-up and the last 10 at the lowest rate; AdamW 2e-3, decay 0.05, cosine to 1e-6, smoothing,
  MixUp, CutMix, erasing, RandAugment, random resized crop, flip, bfloat16. Clipping at 1 is ours: the paper's batch is
  2048 at this rate.
  """
  c.model.dtype = "bfloat16"
  c.train.batch_size = 256
  c.train.epochs = 310.0
  c.train.label_smoothing = 0.1
  c.train.mixup = 0.8
  c.train.cutmix = 1.0
  c.augment.crop_scale = (0.08, 1.0)
  c.augment.crop_ratio = (0.75, 1.33)
  c.augment.flip = flips(c.task.name)
  c.augment.policy = "rand-m9-mstd0.5-inc1"
  c.augment.erase_probability = 0.25
  c.augment.erase_mode = "pixel"
  c.augment.eval_crop_share = 0.875
  c.optim.learning_rate = 2e-3
  c.optim.weight_decay = 0.05
  c.optim.schedule.warmup_epochs = 20.0
  c.optim.schedule.warmup_rate = 1e-6
  c.optim.schedule.cooldown_epochs = 10.0
  c.optim.schedule.final_rate = 1e-6
  c.eval.batch_size = 250


def keras_recipe(c: ConfigDict) -> None:
  """That of the Keras example "Image classification with modern MLP models" for CIFAR-100: pictures at 64 × 64.

  AdamW 5e-3, decay 1e-4, 50 epochs at batch 128; half the rate after 5 evaluations without a lower loss, the end after
  10 without a better accuracy; flip, zoom by a fifth.
  """
  c.task.image_size = 64
  c.model.patch_size = 8
  c.model.width = 256
  c.model.depth = 4
  c.train.batch_size = 128
  c.train.epochs = 50.0
  c.augment.flip = flips(c.task.name)
  c.augment.zoom = (0.8, 1.2)
  c.optim.learning_rate = 5e-3
  c.optim.weight_decay = 1e-4
  c.optim.clip_norm = 0.0
  c.optim.schedule.name = "plateau"
  c.optim.schedule.factor = 0.5
  c.optim.schedule.patience = 5
  c.eval.early_stop_patience = 10


def patches_recipe(c: ConfigDict) -> None:
  """For comparing ConvMixer, ViT and ResNet on one budget: 30 epochs, one-cycle AdamW, flip, random resized crop.

  Pictures have 160 × 160 pixels, and 30 % of the training examples are for validation. Batch, rate and decay are ours.
  """
  if c.task.name != "imagenette":
    c.task.image_size = 160
  c.task.validation_fraction = 0.3
  c.train.batch_size = 64
  c.train.epochs = 30.0
  c.augment.crop_scale = (0.08, 1.0)
  c.augment.flip = flips(c.task.name)
  c.optim.learning_rate = 2e-3
  c.optim.weight_decay = 0.05
  c.optim.schedule.name = "one_cycle"
  c.eval.batch_size = 250


def as_pixels(c: ConfigDict) -> None:
  """Brings large pictures to `PIXELS` × `PIXELS`, for models that read them pixel by pixel."""
  if is_large(c.task.name):
    c.task.image_size = PIXELS


def small_image_recipe(c: ConfigDict) -> None:
  """Ours, for CIFAR-10 where the paper has none: AdamW, cosine, flip and shifts, MixUp, CutMix, erasing.

  No flip of MNIST's pictures. Without the last three, and with smaller batches, where the model gets its 1024 pixels
  one by one.
  """
  c.train.batch_size = 256
  c.train.epochs = 200.0
  c.train.label_smoothing = 0.1
  c.train.mixup = 0.8
  c.train.cutmix = 1.0
  c.augment.crop_pad = 4
  c.augment.flip = flips(c.task.name)
  c.augment.erase_probability = 0.25
  c.optim.learning_rate = 1e-3
  c.optim.weight_decay = 0.05
  c.optim.schedule.warmup_epochs = 10.0
  c.optim.schedule.cooldown_epochs = 5.0
  c.optim.ema_decay = 0.9998
  if c.task.name in SEQUENCE_TASKS:
    c.train.mixup = c.train.cutmix = c.augment.erase_probability = 0.0
    c.train.batch_size = 128


def base(model: str, task: str) -> ConfigDict:
  """All fields with their defaults; a config overrides what its recipe says."""
  c = ConfigDict()
  c.seed = 0  # of initialisation, order of the data, augmentation and dropout

  c.deterministic = False  # on a GPU: the same bits in every run, slower; on a CPU they always are

  c.model = ConfigDict()  # arguments of lra_jax.models.create
  c.model.name = model
  c.model.init = "paper"  # or "xavier", "he": what the weight matrices are drawn from
  c.model.dtype = "float32"  # of the products; "bfloat16" on a GPU. Parameters and carries are float32
  c.model.remat = False  # recompute every block in the backward pass: less memory, a third more time

  c.task = ConfigDict()
  c.task.name = task
  c.task.data_dir = ""  # TFDS folder; "" for $TFDS_DATA_DIR or ~/tensorflow_datasets. Not part of a run's identity
  c.task.validation_fraction = 0.1  # share of the training examples, by class or, in LRA Image, the last ones; not
  # used where the data have a validation split
  c.task.split_seed = 0  # which examples these are; apart from `seed`, so that seeds can be compared

  c.task.length = 0  # tokens of one text, the rest is cut off; of text (4096) and retrieval (4000); 0 for these
  c.task.image_size = 0  # pixels of each side that stored images are brought to; 0 for the task's own
  c.task.contour_length = 0  # dashes of Pathfinder's curves: 6 (easy), 9, or 14 (hard), the benchmark's, as 0 is
  c.task.max_corrupt = 0  # pictures that may be left out because they cannot be read; each is named
  c.task.input = ""  # "resident" in device memory, "stream" from disk; "" for the first where the data fit
  c.task.memory_share = 0.4  # of a device's memory that data may take
  c.task.quirks = ()  # of the benchmark's published runs; see QUIRKS in lra_jax/data/tasks.py

  c.train = ConfigDict()
  c.train.batch_size = 64  # examples per optimizer step, over all devices
  c.train.epochs = 1.0
  c.train.steps = 0  # optimizer steps; 0 for what `epochs` says
  c.train.accumulate = 1  # parts of a batch whose gradients are added up one after the other, to save memory
  c.train.steps_per_call = 0  # steps in one call to the device; 0 for 1 on CPU and up to 100 elsewhere
  c.train.length_buckets = ()  # tokens; batches of texts of like length, cut to the next of these; () for off
  c.train.label_smoothing = 0.0
  c.train.mixup = 0.0  # α of Beta(α, α); 0 for off
  c.train.cutmix = 0.0  # likewise
  c.train.mix_probability = 1.0  # that an example is mixed at all
  c.train.mix_per = "example"  # what share, place and choice of MixUp or CutMix are drawn for; or "batch", as timm's

  c.augment = ConfigDict()  # of training images; see lra_jax/data/augment.py
  c.augment.crop_pad = 0  # pixels; pad, then crop to the original size
  c.augment.crop_scale = ()  # (smallest, largest) share of the area of random resized crop; () for off
  c.augment.crop_ratio = (3 / 4, 4 / 3)  # its width / height
  c.augment.rotate = 0.0  # largest turn either way, degrees
  c.augment.translate = 0.0  # largest shift either way along each axis, share of the size
  c.augment.zoom = ()  # (smallest, largest) factor of size; () for off
  c.augment.shear = 0.0  # largest shear along rows either way, degrees
  c.augment.flip = False  # left-right
  c.augment.flip_vertical = False  # top-bottom
  c.augment.policy = ""  # "rand-m9-mstd0.5-inc1" and the like, "cifar_autoaugment", "trivial"; "" for none
  c.augment.jitter = ()  # of brightness, contrast, saturation (factor 1 ± a) and hue (± a of the circle); () for off
  c.augment.erase_probability = 0.0  # of random erasing
  c.augment.erase_mode = "pixel"  # or "constant"
  c.augment.cutout = 0  # pixels; side of a square set to the mean
  c.augment.repeats = 1  # of each example within a batch, augmented anew each time
  c.augment.eval_crop_share = 1.0  # of evaluation images' sides: resized to size / share, middle cut out

  c.optim = ConfigDict()
  c.optim.name = "adamw"  # or "adam", "sgd", "lion"
  c.optim.learning_rate = 1e-3  # its peak
  c.optim.weight_decay = 0.05  # of weight matrices; not of biases, norms, embeddings
  c.optim.no_decay = ()  # names of weight matrices that are not decayed either
  c.optim.recurrence_rate = 1.0  # factor on the rate of linear recurrences' eigenvalues and steps (S5, LRU)
  c.optim.recurrence = ()  # names of the parameters it is for instead
  c.optim.b1 = 0.9
  c.optim.b2 = 0.999
  c.optim.eps = 1e-8
  c.optim.momentum = 0.9  # of sgd
  c.optim.nesterov = True  # of sgd
  c.optim.clip_norm = 1.0  # global norm of the gradient; 0 for off
  c.optim.skip_limit = 0  # steps in a row that may be skipped for a loss or gradient that is not finite; 0: none is
  c.optim.skip_above = 0.0  # norm of the gradient above which they are skipped as well; 0 for off
  c.optim.ema_decay = 0.0  # moving average of the parameters, used for evaluation; 0 for off

  c.optim.schedule = ConfigDict()
  c.optim.schedule.name = "cosine"  # or "one_cycle", "piecewise", "linear", "rsqrt", "plateau", "constant"
  c.optim.schedule.warmup_epochs = 0.0  # linear, from warmup_rate to the peak
  c.optim.schedule.warmup_rate = 1e-6
  c.optim.schedule.cooldown_epochs = 0.0  # at final_rate, at the end of cosine
  c.optim.schedule.final_rate = 1e-6  # of cosine
  c.optim.schedule.cycles = 1  # of cosine
  c.optim.schedule.cycle_decay = 0.5  # of the peak from cycle to cycle
  c.optim.schedule.peak_at = 0.3  # one_cycle: share of the training before the peak
  c.optim.schedule.start_divisor = 25.0  # one_cycle: peak / first rate
  c.optim.schedule.end_divisor = 1e4  # one_cycle: peak / last rate
  c.optim.schedule.boundaries_epochs = ()  # piecewise: where the rate is multiplied by `factor`
  c.optim.schedule.factor = 0.1  # piecewise and plateau
  c.optim.schedule.shares = (0.0, 1.0)  # linear: corners, as shares of the training, from 0 to 1
  c.optim.schedule.factors = (1.0, 0.0)  # linear: rate / peak at the corners
  c.optim.schedule.patience = 5  # plateau: evaluations without a lower validation loss before the rate falls

  c.eval = ConfigDict()
  c.eval.every_epochs = 1.0
  c.eval.batch_size = 256
  c.eval.early_stop_patience = 0  # evaluations without a better validation accuracy before training ends; 0 for never

  c.checkpoint = ConfigDict()
  c.checkpoint.every_seconds = 60.0  # between checkpoints; the best one is always written
  c.checkpoint.keep = 2  # newest ones; the best is kept besides

  c.parallel = ConfigDict()
  c.parallel.data = -1  # groups of devices the batch is split over; -1 for all there are
  c.parallel.fsdp = 1  # devices of a group: each has a part of parameters, optimizer state and averages
  c.parallel.watchdog_seconds = 0.0  # without progress until every process shows its stacks and ends; 0 for never
  return c


def optional(kind: type):
  """A field that is None until it is overridden: the model's own preset holds."""
  return config_dict.placeholder(kind)
