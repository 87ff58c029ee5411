"""Measures how long it takes to get tasks: `python -m lra_jax.data.measure cifar10 text folder:birds`; prints a table.

A row has the splits, the classes, the bytes in memory, the seconds of the first start, which decodes or generates and
fills an empty cache, of the second, which maps the cache into memory and reads it whole, and both per example. What a
data set costs to download and prepare is not in it. `--config.task.data_dir`, here `--data_dir`, and `--image_size`
are those of training.
"""

import os
import sys
import tempfile
import time

from absl import flags

from lra_jax import errors

_DATA_DIR = flags.DEFINE_string("data_dir", "", "Folder of the data.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 0, "Pixels; 0 for the task's own.", lower_bound=0)

HEADER = (
  "| task | shape | train | validation | test | classes | MiB | first start s | second start s | examples/s, first |\n"
  "|---|---|---|---|---|---|---|---|---|---|"
)


def row(name: str, data_dir: str = "", image_size: int = 0) -> str:
  """Loads a task twice, with a cache that is empty at first; a line of the table.

  Raises:
    UserError: as of `tasks.of` and `tasks.load`.
  """
  from lra_jax.data import tasks

  task = tasks.of({"name": name, "data_dir": data_dir, "image_size": image_size})
  seconds = []
  kept = os.environ.get("LRA_JAX_CACHE")
  with tempfile.TemporaryDirectory() as cache:
    os.environ["LRA_JAX_CACHE"] = cache
    try:
      for _ in range(2):
        start = time.perf_counter()
        splits = tasks.load(task, data_dir=data_dir)
        checksum = sum(int(split.inputs.sum()) for split in splits.values())  # reads what is only mapped
        seconds.append(time.perf_counter() - start)
    finally:
      if kept is None:
        del os.environ["LRA_JAX_CACHE"]
      else:
        os.environ["LRA_JAX_CACHE"] = kept
  if not checksum:
    raise errors.UserError(f"{name}: all inputs are 0; prepare the data anew")
  sizes = [len(splits[part].labels) for part in ("train", "validation", "test")]
  stored = sum(array.nbytes for split in splits.values() for array in split if array is not None)
  shape = " × ".join(map(str, task.stored_shape))
  counts = " | ".join(f"{size:,}" for size in sizes)
  speed = sum(sizes) / seconds[0]
  times = f"{seconds[0]:.2f} | {seconds[1]:.2f} | {speed:,.0f}"
  return f"| {task.name} | {shape} | {counts} | {len(task.class_names)} | {stored / 2**20:,.0f} | {times} |"


def main() -> None:
  """Parses the flags and prints a row for every task."""
  names = errors.parse_flags(sys.argv, required=(), positional="tasks")
  print(HEADER, flush=True)
  for name in names:
    print(row(name, _DATA_DIR.value, _IMAGE_SIZE.value), flush=True)


if __name__ == "__main__":
  errors.exit_on_user_error(main)
