"""Classifies image files: `python -m lra_jax.predict --workdir W image.png ...`; prints the top classes of each.

A picture of another size is resized to the task's by Pillow's bicubic filter; colours become grey where the task is.
"""

import sys

import numpy as np
from absl import flags

from lra_jax import errors

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_STEP = flags.DEFINE_string("step", "best", "Checkpoint: best (by validation), newest, or a step.")
_TOP = flags.DEFINE_integer("top", 5, "How many classes to print.", lower_bound=1)


def read_image(path: str, shape: tuple[int, int, int]) -> np.ndarray:
  """Reads any picture that Pillow knows as uint8 of shape (H, W, C); transparency is laid on black.

  Raises:
    UserError: there is no such file, or it is no picture.
  """
  from PIL import Image

  height, width, channels = shape
  try:
    with Image.open(path) as image:
      image = image.convert("RGBA")
      image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
      image = image.convert("L" if channels == 1 else "RGB")
      if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
      return np.asarray(image, np.uint8).reshape(shape)
  except (OSError, ValueError, Image.DecompressionBombError) as error:
    raise errors.UserError(f"{path}: cannot be read as a picture ({error}); give PNG, JPEG or WebP files") from error


def main() -> None:
  """Parses the flags, classifies and prints."""
  paths = errors.parse_flags(sys.argv, required=("workdir",), positional="image files")
  import jax

  from lra_jax import runs
  from lra_jax.data import augment

  trained = runs.load(_WORKDIR.value, _STEP.value)
  task = trained.task
  crop_share = trained.config.augment.eval_crop_share
  images = np.stack([read_image(path, task.image_shape) for path in paths])
  probabilities = np.asarray(jax.nn.softmax(trained.model(augment.prepare(images, task, crop_share))))
  for path, row in zip(paths, probabilities, strict=True):
    top = np.argsort(-row, kind="stable")[: _TOP.value]
    print(f"{path}: " + ", ".join(f"{task.class_names[i]} {row[i]:.1%}" for i in top))


if __name__ == "__main__":
  errors.exit_on_user_error(main)
