"""Weak scaling on CPU processes: `python tests/weak_scaling.py [--processes 1 2] [--rounds 3] [--steps 60]`.

ViTs of two widths on digits at two batches a process, each process bound to a core of its own, in turn. The model of
`lra_jax.scaling` says that a step of n processes takes what one takes alone, and what the exchange takes besides, which
depends on the number of parameters alone, not on the batch. Prints a table; needs as many cores as processes.
"""

import argparse
import os
import pathlib
import statistics
import sys
import tempfile

from commands import result_of, start_run
from test_scaling import finish

WIDTHS, BATCHES = (64, 256), (64, 256)


def step_ms(folder: pathlib.Path, processes: int, width: int, batch: int, steps: int) -> tuple[float, int]:
  """Milliseconds of a training step, evaluation and compiling left out, and parameters."""
  settings = {
    "model.width": width,
    "train.batch_size": batch * processes,
    "train.steps": steps,
    "eval.every_epochs": 1e6,
    "optim.schedule.warmup_epochs": 0.0,
  }
  workdir = folder / f"{processes}-{width}-{batch}-{len(os.listdir(folder))}"
  flags = [f"--config.{name}={value}" for name, value in settings.items()]
  running = start_run(processes, "--config=configs/vit.py:digits", "--workdir", workdir, *flags)
  for process, core in zip(running, sorted(os.sched_getaffinity(0)), strict=False):
    os.sched_setaffinity(process.pid, {core})
  finish(running)
  result = result_of(workdir)
  return 1e3 * batch * processes / result["images_per_second"], result["parameters"]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=60)
  arguments = parser.parse_args()
  cores = len(os.sched_getaffinity(0))
  if max(arguments.processes) > cores:
    sys.exit(f"error: {max(arguments.processes)} processes need as many cores; there are {cores}")
  heads = [f"{n} processes, ms" for n in arguments.processes]
  print(f"| parameters | batch a process | {' | '.join(heads)} | more |")
  print("|---|---|" + "---|" * (len(arguments.processes) + 1))
  with tempfile.TemporaryDirectory() as folder:
    for width in WIDTHS:
      for batch in BATCHES:
        times, size = {n: [] for n in arguments.processes}, 0
        for _ in range(arguments.rounds):
          for n in arguments.processes:
            milliseconds, size = step_ms(pathlib.Path(folder), n, width, batch, arguments.steps)
            times[n].append(milliseconds)
        medians = [statistics.median(times[n]) for n in arguments.processes]
        cells = [f"{t:.1f} ({min(times[n]):.1f} to {max(times[n]):.1f})" for n, t in zip(times, medians, strict=True)]
        print(f"| {size:,} | {batch} | {' | '.join(cells)} | {medians[-1] - medians[0]:.1f} |", flush=True)


if __name__ == "__main__":
  main()
