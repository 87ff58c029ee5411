"""Runs several configs one after the other and compares them: one table, one picture.

  python -m lra_jax.sweep --out runs/digits --task digits                             # every config on that task
  python -m lra_jax.sweep --out runs/three configs/convmixer.py configs/vit.py:cifar10,variant=ti16 configs/resnet.py \
      --override train.epochs=30 --override train.batch_size=128 --seeds 0,1,2

Each run is a process of its own, `python -m lra_jax.main`, in OUT/<config>-<task and options>-<seed>. The same command
resumes: finished runs are read, others go on where they were. OUT/table.md and OUT/curves.png hold what there is.
"""

import json
import pathlib
import re
import statistics
import subprocess
import sys
from typing import Any

from absl import flags

from lra_jax import config, errors

_OUT = flags.DEFINE_string("out", None, "Folder of all runs, the table and the picture.")
_TASK = flags.DEFINE_string("task", None, "Task of the configs that do not name one.")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds, each a run of every config.")
_OVERRIDE = flags.DEFINE_multi_string("override", [], "field=value of all configs, such as train.epochs=30.")


def runs_of(files: list[str], task: str | None, seeds: list[str]) -> list[tuple[str, str, str]]:
  """(name, config argument, seed) of every run.

  Args:
    files: as after --config, with or without a colon; empty for every config of the package.
    task: of the configs without a colon.
    seeds: as given.

  Raises:
    UserError: no such config file, task or option, or a seed that is no number.
  """
  for seed in seeds:
    if not seed.isdigit():
      raise errors.UserError(f"--seeds: {seed!r} is no number; write --seeds=0,1,2")
  result = []
  for file in files or config.all_files():
    path, colon, argument = file.partition(":")
    argument = argument if colon else task or ""
    config.load(config.find(path), argument)
    for seed in seeds:
      told = re.sub(r"^folder:(?:[^,]*/)?([^/,]+)/*", r"folder_\1", argument)  # of a path its last part
      name = "-".join(filter(None, (pathlib.Path(path).stem, told.replace(",", "-").replace("=", "_"))))
      result.append((f"{name}-{seed}", f"{path}:{argument}" if argument else path, seed))
  return result


def table(results: dict[str, list[dict[str, Any]]]) -> str:
  """A Markdown table of finished runs.

  Args:
    results: config → contents of its `result.json` files, one a seed.
  """
  lines = [
    "| model | task | parameters | test accuracy | seeds | validation | seconds | images/s |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for runs in results.values():
    test = [100 * run["test_accuracy"] for run in runs]
    spread = f" ± {statistics.stdev(test):.2f}" if len(test) > 1 else ""
    mean = lambda name, runs=runs: statistics.mean(run[name] for run in runs)
    lines.append(
      f"| {runs[0]['model']} | {runs[0]['task']} | {runs[0]['parameters']:,} | {statistics.mean(test):.2f}{spread} "
      f"| {len(runs)} | {100 * mean('best_validation_accuracy'):.2f} | {mean('total_seconds'):.0f} "
      f"| {mean('images_per_second'):,.0f} |"
    )
  return "\n".join(lines) + "\n"


def main() -> None:
  """Parses the flags, runs what is not finished, and writes the table and the picture after every run."""
  files = errors.parse_flags(sys.argv, required=("out",), positional="config files", optional=True)
  from lra_jax import metrics, report

  out = pathlib.Path(_OUT.value)
  overrides = [f"--config.{override}" for override in _OVERRIDE.value]
  results, events, failed = {}, {}, []
  for name, argument, seed in runs_of(files, _TASK.value, _SEEDS.value):
    workdir = out / name
    print(f"== {name}", flush=True)
    command = [sys.executable, "-m", "lra_jax.main", f"--config={argument}", f"--config.seed={seed}", *overrides]
    process = subprocess.run([*command, "--workdir", str(workdir)])
    if process.returncode or not (workdir / "result.json").exists():
      failed.append(name)
      if process.returncode == 0 or process.returncode < 0:  # stopped by a signal: so shall the sweep be
        break
      continue
    results.setdefault(argument, []).append(json.loads((workdir / "result.json").read_text()))
    events[name] = metrics.read(workdir)
    (out / "table.md").write_text(table(results))
    report.compare(events, out / "curves.png")
  print(table(results))
  if failed:
    raise errors.UserError(
      f"{len(failed)} runs did not finish: {', '.join(failed)}; the same command goes on with them"
    )
  print(f"table.md and curves.png are in {out}")


if __name__ == "__main__":
  errors.exit_on_user_error(main)
