"""Classifies files: `python -m lra_jax.predict --workdir W image.png ...`; prints the top classes of each.

Pictures are read as folders of them are: of another size, the largest centred square is resized to the task's size;
colours become grey where the task is.
Of a task of texts the files are texts (of listops, expressions), of a task of pairs each two that follow each other;
bytes after the task's length are not read, as in training.
"""

import sys

import numpy as np
from absl import flags

from lra_jax import errors
from lra_jax.data import pictures, tasks

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_STEP = flags.DEFINE_string("step", "best", "Checkpoint: best (by validation), newest, or a step.")
_TOP = flags.DEFINE_integer("top", 5, "How many classes to print.", lower_bound=1)


def read_texts(paths: list[str], task: tasks.Task) -> tuple[np.ndarray, np.ndarray]:
  """Reads texts as tokens (B, L), or pairs of texts as (B, 2, L); and their lengths, (B,) or (B, 2).

  Raises:
    UserError: a file that cannot be read or is no such text, or an odd number of files for pairs.
  """
  *pair, length = task.token_shape
  if pair and len(paths) % 2:
    raise errors.UserError(f"{len(paths)} files: task {task.name} compares two texts; give an even number")
  rows = []
  for path in paths:
    try:
      with open(path, "rb") as file:
        rows.append(task.encode([file.read()], length))
    except OSError as error:
      raise errors.UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
      raise errors.UserError(f"{path}: it {error}; task {task.name} reads others") from error
  tokens, lengths = (np.concatenate(arrays) for arrays in zip(*rows, strict=True))
  return tokens.reshape(-1, *task.token_shape), lengths.reshape(-1, *pair)


def main() -> None:
  """Parses the flags, classifies and prints."""
  paths = errors.parse_flags(sys.argv, required=("workdir",), positional="files")
  import jax

  from lra_jax import runs
  from lra_jax.data import batches, resident

  trained = runs.load(_WORKDIR.value, _STEP.value)
  task = trained.task
  if task.image_shape is None:
    inputs, lengths = read_texts(paths, task)
  else:
    size, _, channels = task.image_shape
    images = [pictures.resize_and_crop(pictures.read(path, channels), size) for path in paths]
    inputs, lengths = np.stack(images), None
  examples = resident.Resident(inputs, np.zeros(len(inputs), np.int32), lengths)
  x, options = batches.evaluation(trained.config, task, examples)
  probabilities = np.asarray(jax.nn.softmax(trained.model(x, **options)))
  named = [" ".join(paths[i : i + len(paths) // len(inputs)]) for i in range(0, len(paths), len(paths) // len(inputs))]
  for path, row in zip(named, probabilities, strict=True):
    top = np.argsort(-row, kind="stable")[: _TOP.value]
    print(f"{path}: " + ", ".join(f"{task.class_names[i]} {row[i]:.1%}" for i in top))


if __name__ == "__main__":
  errors.exit_on_user_error(main)
