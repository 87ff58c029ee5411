"""What training sees: `python -m lra_jax.data.show TASK [--config FILE] [--out sheet.png]`.

Writes a sheet of training examples, each beside several draws of the config's augmentation and mixing, with labels.
Sequences are brought back to images from what the model reads. Of tasks without images it prints examples as text.
Overrides work as in training: `--config.augment.policy=trivial`.
"""

import os
import pathlib
import sys
from collections.abc import Callable, Sequence

import ml_collections
import numpy as np
from absl import flags

from lra_jax import config as config_lib
from lra_jax import errors
from lra_jax.data import tasks
from lra_jax.data.sources import Split

DEFAULT_CONFIG = "configs/vit.py"  # reads every image task
CELL = 112  # pixels of the sheet for one image, at least


def draws(
  task: tasks.Task, examples: Split, config: ml_collections.ConfigDict, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Augments and mixes a batch several times, and brings what the model would read back to images.

  Args:
    task: with images, in any view.
    examples: the batch.
    config: of a run; its `augment` and `train` are used.
    count: of draws.
    seed: of the draws.

  Returns:
    Images (count, B, H, W, C) uint8 and class probabilities (count, B, S) float32, without label smoothing.
  """
  import jax

  from lra_jax.data import augment

  targets_BS = jax.nn.one_hot(examples.labels, len(task.class_names))
  mixing = config.train.mixup, config.train.cutmix, config.train.mix_probability, config.train.mix_per

  @jax.jit
  def draw(key):
    x_BHWC = augment.augment(jax.random.fold_in(key, 0), examples.inputs, config.augment, task)
    x_BHWC, mixed_BS = augment.mix(jax.random.fold_in(key, 1), x_BHWC, targets_BS, *mixing)
    return augment.view(x_BHWC, task), mixed_BS

  root = jax.random.key(seed)
  seen, targets = zip(*(jax.device_get(draw(jax.random.fold_in(root, i))) for i in range(count)), strict=True)
  return images_of(np.stack(seen), task), np.stack(targets)


def images_of(seen: np.ndarray, task: tasks.Task) -> np.ndarray:
  """The inverse of normalisation and `augment.view`, rounded.

  Args:
    seen: (count, B, …), what a model reads of `count` batches.
    task: of the model.

  Returns:
    (count, B, H, W, C) uint8.
  """
  height, width, channels = task.image_shape
  if task.view != "image":
    pixels = seen.reshape(*seen.shape[:2], height * width, channels).astype(np.float32)
    if task.permutation is not None:
      pixels = pixels[:, :, np.argsort(task.permutation)]
    seen = pixels.reshape(*seen.shape[:2], height, width, channels)
  return np.clip(np.round((seen * np.array(task.std) + np.array(task.mean)) * 255), 0, 255).astype(np.uint8)


def label(probabilities: np.ndarray, names: Sequence[str]) -> str:
  """The class, or both classes of a mixed example with their shares."""
  first, second = np.argsort(-probabilities, kind="stable")[:2]
  if probabilities[second] < 0.005:
    return names[first]
  return f"{names[first]} {probabilities[first]:.2f}, {names[second]} {probabilities[second]:.2f}"


def sheet(originals: np.ndarray, drawn: np.ndarray, labels: list[list[str]], title: str):
  """Draws the sheet: a row for each example, the original first.

  Args:
    originals: (B, H, W, C) uint8.
    drawn: (columns, B, H, W, C) uint8.
    labels: B rows of 1 + columns texts.
    title: one line above.

  Returns:
    A Pillow image.
  """
  from PIL import Image, ImageDraw, ImageFont

  rows = np.concatenate([originals[None], drawn]).swapaxes(0, 1)
  height, width = rows.shape[2:4]
  factor = max(-(-CELL // width), 1)
  cell_width, cell_height, margin, line = width * factor + 6, height * factor + 20, 8, 14
  size = margin * 2 + cell_width * rows.shape[1], margin * 2 + line * 2 + cell_height * len(rows)
  font = ImageFont.load_default(11)
  picture = Image.new("RGB", size, "white")
  canvas = ImageDraw.Draw(picture)
  canvas.text((margin, margin), title, "black", font=font)
  for i, row in enumerate(rows):
    for j, image in enumerate(row):
      left, top = margin + j * cell_width, margin + 2 * line + i * cell_height
      tile = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
      picture.paste(tile.resize((width * factor, height * factor), Image.Resampling.NEAREST), (left, top))
      words = labels[i][j]
      while canvas.textlength(words, font=font) > cell_width - 4 and len(words) > 1:
        words = words[:-2] + "…"
      canvas.text((left, top + height * factor + 2), words, "black", font=font)
  return picture


def _save(picture, path):
  path = pathlib.Path(path)
  temporary = path.with_name(path.name + ".tmp")
  try:
    picture.save(temporary, format="png")
    os.replace(temporary, path)
  except OSError as error:
    temporary.unlink(missing_ok=True)
    raise errors.UserError(
      f"--out {path}: cannot be written ({error.strerror}); name a file in a folder that can"
    ) from error


def print_texts(task: tasks.Task, examples: Split, say: Callable[[str], None]) -> None:
  """Says class and text of each example, a pair's texts one below the other; cut after 1,000 characters.

  Args:
    task: whose examples are tokens.
    examples: to be said.
    say: takes a line.
  """
  for tokens, number in zip(examples.inputs, examples.labels, strict=True):
    say(f"--- {task.class_names[number]}")
    for row in np.atleast_2d(tokens):
      words = task.decode(row)
      say(words if len(words) <= 1000 else f"{words[:1000]}… ({len(words):,} characters)")


def _with_config(argv: list[str], task: str) -> list[str]:
  """The command line with `--config FILE:TASK` where it has no task, or no config at all."""
  argv = list(argv)
  for i, argument in enumerate(argv):
    if argument in ("--config", "-config") and i + 1 < len(argv):
      argv[i : i + 2] = [f"--config={argv[i + 1]}"]
      break
  for i, argument in enumerate(argv):
    if argument.startswith(("--config=", "-config=")):
      if ":" not in argument:
        argv[i] += f":{task}"
      return argv
  return [argv[0], f"--config={DEFAULT_CONFIG}:{task}", *argv[1:]]  # before its overrides


def main() -> None:
  """Parses the command line, draws and writes, or prints."""
  # Here and not above, so that a process that imports other tools besides can import this one.
  out = flags.DEFINE_string("out", "sheet.png", "PNG file to write.")
  seed = flags.DEFINE_integer("seed", 0, "Of the choice of examples and of the draws.")
  rows = flags.DEFINE_integer("examples", 8, "Rows of the sheet, or texts.", lower_bound=1)
  columns = flags.DEFINE_integer("draws", 8, "Augmented draws of each example.", lower_bound=1)
  argv = list(sys.argv)
  if len(argv) < 2 or argv[1].startswith("-"):
    errors.parse_flags(argv, required=())
    raise errors.UserError("no task given; as in `python -m lra_jax.data.show cifar10 --out sheet.png`")
  from lra_jax.data import batches  # JAX, not needed for what is wrong above

  task = tasks.get(argv.pop(1))
  has_images = task.image_shape is not None
  config = None
  if has_images or any(a.lstrip("-").partition("=")[0] == "config" for a in argv[1:]):
    config = config_lib.parse_command_line(_with_config(argv, task.name))
    if config.task.name != task.name:
      raise errors.UserError(f"task {task.name}: --config is for {config.task.name}; write it without a task")
  else:
    errors.parse_flags(argv, required=())
  task = tasks.of(config.task if config else {"name": task.name})
  train = task.load(config.task.data_dir or None if config else None)["train"]
  count = min(rows.value, len(train.labels))
  examples = train.take(np.sort(np.random.RandomState(seed.value).choice(len(train.labels), count, replace=False)))
  if not has_images:
    print_texts(task, examples, print)
    return
  drawn, targets = draws(task, examples, config, columns.value, seed.value)
  labels = [
    [task.class_names[number], *(label(column[i], task.class_names) for column in targets)]
    for i, number in enumerate(examples.labels)
  ]
  groups = (config.augment, batches.AUGMENTATION), (config.train, ("mixup", "cutmix"))
  settings = [f"{name}={group[name]}" for group, names in groups for name in names if group[name]]
  title = f"{task.name}: {', '.join(settings) or 'nothing is augmented'}"
  _save(sheet(examples.inputs, drawn, labels, title), out.value)
  print(f"{out.value}: {count} training examples of {task.name}, the original and {columns.value} draws of each")


if __name__ == "__main__":
  errors.exit_on_user_error(main)
