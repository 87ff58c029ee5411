"""A long training under kill -9: `python tests/soak.py --minutes 120 --kills 20 [--processes 2] [--seed 0]`.

A run is killed at random moments of loading, compiling, training, evaluation and checkpoints (one of its processes,
drawn as well; the others must end by themselves, with a line that names it) and started again by the same command,
until it has ended. Then the same run again, killed by nobody. At the end no step may be missing or there twice, both
runs must have the same parameters and metrics, and in the second neither memory nor open files may have grown. Prints a
table; exit code 1 where something is wrong.
"""

import argparse
import collections
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time

import numpy as np
from commands import events_of, options, places, result_of
from test_scaling import RUN

from lra_jax.processes import SILENCE_SECONDS

PAGE = os.sysconf("SC_PAGE_SIZE")
# Of a process the first seconds of training do not count: compiling's memory goes, the heap finds its size.
WARM_UP_SECONDS = 100
FEWEST_SAMPLES = 60  # else growth is not judged
MEMORY_GROWTH, FILES_GROWTH = 0.03, 1.0  # share of its size, and number, over all that counts
END_SECONDS = 30  # in which the others end when one is killed
TRIAL_STEPS, TRIAL_SECONDS = 200, 15
PHASES = ("loading", "compiling", "training", "evaluation", "checkpoint")


def start(workdir: pathlib.Path, processes: int, steps: int, every: float) -> list[subprocess.Popen]:
  """Starts the processes of a run; what they print is appended to <workdir>.<process>.log."""
  settings = {"train.steps": steps, "checkpoint.every_seconds": every, "eval.every_epochs": 2.0}
  command = [sys.executable, "-m", "lra_jax.main", *RUN, "--workdir", str(workdir)]
  command += [f"--config.{name}={value}" for name, value in settings.items()]
  running = []
  for i, place in enumerate(places(processes)):
    with open(f"{workdir}.{i}.log", "a") as log:
      keywords = options(env={"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"} | place)
      running.append(subprocess.Popen(command, **keywords | {"stdout": log, "stderr": subprocess.STDOUT}))
  return running


def log_of(workdir: pathlib.Path, process: int) -> str:
  """What a process printed, over all starts."""
  path = pathlib.Path(f"{workdir}.{process}.log")
  return path.read_text() if path.exists() else ""


def phase_of(workdir: pathlib.Path, said_before: int, eval_every: int) -> str:
  """Where a run is, by what process 0 has printed since, and by the files of its workdir."""
  said = log_of(workdir, 0)[said_before:]
  if " parameters; " not in said:
    return "loading"
  if "; compiled in " not in said:
    return "compiling"
  if any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp")):
    return "checkpoint"
  last = re.search(r'\{"step": (\d+), "train/[^\n]*\}\n$', tail_of(workdir / "metrics.jsonl"))
  return "evaluation" if last and int(last[1]) % eval_every == 0 else "training"


def tail_of(path: pathlib.Path) -> str:
  """The last 500 bytes of a text, "" where there is none yet."""
  if not path.exists():
    return ""
  with path.open("rb") as file:
    file.seek(max(0, path.stat().st_size - 500))
    return file.read().decode(errors="replace")


def sample(process: subprocess.Popen) -> tuple[float, int] | None:
  """Resident memory in MiB and number of open files of a process; None where it has ended."""
  try:
    pages = int(pathlib.Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * PAGE / 2**20, len(os.listdir(f"/proc/{process.pid}/fd"))
  except (OSError, IndexError):
    return None


def wait(running: list[subprocess.Popen], seconds: float, workdir: pathlib.Path, samples: list | None = None) -> bool:
  """Whether all ended within the seconds; samples every process once a second, from the first step on."""
  deadline = time.monotonic() + seconds
  while any(process.poll() is None for process in running):
    if time.monotonic() > deadline:
      return False
    training = samples is not None and (workdir / "metrics.jsonl").exists()
    if training and all(found := [sample(process) for process in running]):
      samples.append((time.monotonic(), found))
    time.sleep(min(1, max(deadline - time.monotonic(), 0.01)))
  return True


def growth(counted: list, process: int, what: int) -> tuple[float, float]:
  """Mean of a number of a process, and by how much it grew, of a straight line through the samples."""
  times = np.array([moment for moment, _ in counted])
  values = np.array([found[process][what] for _, found in counted])
  return float(values.mean()), float(np.polyfit(times - times[0], values, 1)[0] * (times[-1] - times[0]))


def soak(folder: pathlib.Path, minutes: float, kills: int, processes: int, seed: int) -> list[str]:
  """Runs all of it in a folder, prints the table; what is wrong."""
  os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  draw, wrong = random.Random(seed), []
  every = min(60.0, minutes * 30 / max(kills, 1) / 4)

  # The first run fills the compiler's cache; the second shows what a start and a step take without it.
  rate = 0.0
  for name in ("first", "second"):
    trial, trial_steps = folder / name, max(TRIAL_STEPS, int(TRIAL_SECONDS * rate))
    began = time.monotonic()
    if not wait(start(trial, processes, trial_steps, every), 1800, trial):
      return ["the trial did not end"]
    rate = trial_steps / result_of(trial)["seconds"]
  starting = max(time.monotonic() - began - trial_steps / rate, 0.0)
  # A kill costs a start, half the steps between two checkpoints and, with several processes, the time until it is
  # noticed; what is left is for the steps of both runs.
  lost = starting + every / 2 + (SILENCE_SECONDS if processes > 1 else 0)
  training = max((60 * minutes - kills * lost) / 2, 2 * kills, 10)
  steps = max(int(rate * training), TRIAL_STEPS)
  print(f"{steps} steps, {rate:.1f} a second; a start takes {starting:.0f} s", flush=True)

  eval_every = next(event["step"] for event in events_of(trial) if "validation/loss" in event)

  began, hit, workdir = time.monotonic(), collections.Counter(), folder / "killed"
  while True:
    said = [len(log_of(workdir, i)) for i in range(processes)]
    running = start(workdir, processes, steps, every)
    if hit.total() == kills:
      wait(running, 1e6, workdir)
    else:
      phase = PHASES[hit.total() % len(PHASES)]
      most = {"loading": starting / 3, "compiling": 0}.get(phase, 1.6 * training / kills)  # all fit into the run
      wait(running, draw.uniform(0, most), workdir)
      while (now := phase_of(workdir, said[0], eval_every)) != phase and any(p.poll() is None for p in running):
        if PHASES.index(now) > PHASES.index(phase) and phase in ("loading", "compiling"):
          break  # missed
        time.sleep(0.001)
      if phase in ("compiling", "checkpoint"):
        time.sleep(draw.uniform(0, starting / 4 if phase == "compiling" else 0.05))
    if all(process.poll() is not None for process in running):
      if any(process.returncode for process in running):
        wrong.append(f"exit codes {[process.returncode for process in running]} of a start that nobody killed")
      break
    victim = draw.randrange(processes)
    running[victim].kill()
    hit[phase := phase_of(workdir, said[0], eval_every)] += 1
    killed = f"kill {hit.total()} of process {victim}"
    print(f"{killed}, {phase}", flush=True)
    if phase == "loading":  # they may not have met yet: then it is for the launcher to end the others
      wait(running, END_SECONDS, workdir)
      for process in running:
        process.kill()
        process.wait()
      continue
    if not wait(running, END_SECONDS, workdir):
      wrong.append(f"{killed}: the others did not end within {END_SECONDS} s")
      for process in running:
        process.kill()
    for i, process in enumerate(running):
      if i == victim:
        continue
      lines = [line for line in log_of(workdir, i)[said[i] :].splitlines() if line.startswith("error: ")]
      if process.wait() != 1 or len(lines) != 1 or f"process {victim} of {processes} is lost" not in lines[0]:
        last = log_of(workdir, i)[said[i] :].splitlines()[-3:]
        wrong.append(f"{killed}: process {i} ended with {process.returncode} and {lines}; {last}")
  seconds_killed = time.monotonic() - began

  began, samples, whole = time.monotonic(), [], folder / "whole"
  wait(start(whole, processes, steps, every), 1e6, whole, samples)
  seconds_whole = time.monotonic() - began

  found = [event["step"] for event in events_of(workdir) if "train/loss" in event]
  if found != list(range(1, steps + 1)):
    wrong.append(f"{steps} steps, {len(found)} in metrics.jsonl, {len(set(found))} of them different")
  if events_of(workdir) != events_of(whole):
    wrong.append("the metrics of the two runs differ")
  digests = [result_of(path)["params_sha256"] for path in (workdir, whole)]
  if digests[0] != digests[1]:
    wrong.append(f"the parameters of the two runs differ: {digests}")
  rows = [
    ("processes", processes),
    ("steps", steps),
    ("kill -9", ", ".join(f"{hit[phase]} {phase}" for phase in PHASES)),
    ("minutes of the killed run", f"{seconds_killed / 60:.1f}"),
    ("minutes of the other", f"{seconds_whole / 60:.1f}"),
    ("steps missing or twice", abs(steps - len(found)) + len(found) - len(set(found))),
    ("parameters equal", digests[0] == digests[1]),
  ]
  counted = [(moment, found) for moment, found in samples if moment > samples[0][0] + WARM_UP_SECONDS]
  if len(counted) < FEWEST_SAMPLES:
    rows.append(("growth", "not judged: too short"))
    processes = 0
  for i in range(processes):
    memory, more = growth(counted, i, 0)
    files, more_files = growth(counted, i, 1)
    rows.append(
      (f"memory of process {i}", f"{memory:.0f} MiB, {more:+.1f} over {(counted[-1][0] - counted[0][0]) / 60:.0f} min")
    )
    rows.append((f"open files of process {i}", f"{files:.1f}, {more_files:+.2f}"))
    if more > MEMORY_GROWTH * memory or more_files > FILES_GROWTH:
      wrong.append(f"process {i} grows: {more:+.1f} MiB, {more_files:+.2f} files")
  print("\n".join(f"| {name} | {value} |" for name, value in rows))
  return wrong


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--minutes", type=float, default=120, help="of both runs together, about")
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--processes", type=int, default=1)
  parser.add_argument("--seed", type=int, default=0)
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory(prefix="soak_") as folder:
    wrong = soak(pathlib.Path(folder), **vars(arguments))
  print("\n".join(f"wrong: {line}" for line in wrong) or "good")
  sys.exit(bool(wrong))


if __name__ == "__main__":
  main()
