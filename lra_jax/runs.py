"""The workdir: all of a run in one folder, and a trained model back from it."""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import threading
from typing import Any, NamedTuple

import ml_collections
from flax import nnx

from lra_jax import agreement, checkpoint, errors, models
from lra_jax import config as config_lib
from lra_jax.data import tasks

PACKAGES = ("lra_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets", "clu")


def default_workdir(config: ml_collections.ConfigDict) -> pathlib.Path:
  """runs/<model>-<task>-<hash of the config>: the same command finds the same folder."""
  text = config_lib.identity(config)
  task = config.task.name.partition(":")[0]  # of a folder no path
  return pathlib.Path("runs") / f"{config.model.name}-{task}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


class Lock:
  """One run at a time in a workdir: an advisory lock on `<workdir>/lock`, which the system frees when a process ends.

  So a lock whose process was killed is free, and the file itself means nothing. On a shared file system it holds
  between hosts where that passes locks on, as NFS 4 and Lustre (-o flock) do.
  """

  def __init__(self, workdir: pathlib.Path):
    """Args: workdir, which `acquire` needs to be there."""
    self._path = pathlib.Path(workdir) / "lock"
    self._file = None

  def acquire(self) -> None:
    """Takes the lock.

    Raises:
      UserError: another process has it; it is named.
    """
    file = open(self._path, "a+")  # noqa: SIM115 (open as long as the lock is held)
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      owner = file.read().strip() or "another process"
      file.close()
      raise errors.UserError(
        f"--workdir {self._path.parent} is in use by {owner}; wait until it ends, stop it, or take another folder"
      ) from error
    except OSError:  # a file system without locks
      file.close()
      return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    self._file = file

  def __enter__(self) -> "Lock":
    return self

  def __exit__(self, *exception) -> None:
    if self._file is not None:
      self._file.close()


def open_workdir(
  workdir: pathlib.Path, config: ml_collections.ConfigDict, lock: Lock | None = None
) -> dict[str, Any] | None:
  """Makes or enters a workdir; writes `config.json` and `environment.json`.

  A start that was refused, or ended before its first step was recorded, holds nothing: another config takes its place.

  Args:
    workdir: the folder.
    config: of the run.
    lock: to be taken before anything is written; not where the run is finished.

  Returns:
    The content of `result.json` where the run is finished, else None.

  Raises:
    UserError: the folder belongs to a run of another config, is in use, or cannot be written.
  """
  text = config_lib.to_json(config)
  path = workdir / "config.json"
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    changed = []
    if path.exists():
      changed = config_lib.differences(config_lib.to_json(read_config(workdir)), text)
      if changed and _has_begun(workdir):
        raise errors.UserError(
          f"--workdir {workdir} holds a run of another config ({'; '.join(changed)}); take another folder"
        )
    else:
      others = [p.name for p in workdir.iterdir() if p.name != "lock"]
      if others:
        raise errors.UserError(
          f"--workdir {workdir} has no config.json but other files ({others[0]}); take an empty folder"
        )
    result = workdir / "result.json"
    if result.exists():
      return _read_json(result)
    if lock is not None:
      lock.acquire()
    if changed or not path.exists():
      write_atomically(path, text)
    write_atomically(workdir / "environment.json", json.dumps(environment(), indent=2) + "\n")
  except OSError as error:
    raise errors.UserError(f"--workdir {workdir} cannot be used ({error.strerror}: {error.filename})") from error
  return None


def _has_begun(workdir):
  recorded = workdir / "metrics.jsonl"
  return (recorded.exists() and recorded.stat().st_size > 0) or any(workdir.glob("checkpoints/*"))


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """The config of a run.

  Raises:
    UserError: its file is not there, or is not what a run writes.
  """
  path = workdir / "config.json"
  if not path.is_file():
    raise errors.UserError(f"--workdir {workdir} holds no run (no config.json); give the folder of a training run")
  config = _read_json(path, config_lib.from_json)
  for group in (config.get("model"), config.get("task")):
    if not isinstance(group, ml_collections.ConfigDict) or not isinstance(group.get("name"), str):
      raise errors.UserError(
        f"{path} is not the config of a run, which names a model and a task; put the run's own back"
      )
  return config


def _read_json(path, parse=json.loads):
  try:
    return parse(path.read_bytes())
  except OSError as error:
    raise errors.UserError(f"{path}: cannot be read ({error.strerror}); make it readable") from error
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:  # no JSON, UTF-8 or fields
    raise errors.UserError(f"{path} is damaged ({errors.first_line(error)}); put the run's own back") from error


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Writes a file so that it is there whole or not at all."""
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text(text)
  os.replace(temporary, path)


def environment() -> dict[str, Any]:
  """What a number depends on besides the config: versions, git revision, machine, command."""
  versions = {}
  for name in PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = None
  return {
    "packages": versions,
    "python": platform.python_version(),
    "git": _git_revision(),
    "platform": platform.platform(),
    "command": sys.argv,
  }


def _git_revision() -> str | None:
  """Commit of the checkout that this package lies in, "-dirty" where files differ from it; None outside a checkout."""
  folder = pathlib.Path(__file__).resolve().parents[1]
  if not (folder / ".git").exists():
    return None
  command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
  try:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return None


class Trained(NamedTuple):
  """A model with the parameters of a checkpoint, its config, task and step."""

  model: nnx.Module
  config: ml_collections.ConfigDict
  task: tasks.Task
  step: int


def task_of(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> tasks.Task:
  """The task of a run. Its class names are those that the first start found: the model's outputs mean them.

  Raises:
    UserError: as of `tasks.of`.
  """
  path = workdir / "class_names.json"
  if path.is_file():
    return tasks.of(config.task, tuple(_read_json(path)))
  task = tasks.of(config.task)
  if agreement.is_main():
    write_atomically(path, json.dumps(task.class_names, indent=1) + "\n")
  return task


def data_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The arguments of `tasks.load` that the config has."""
  names = ("data_dir", "validation_fraction", "split_seed")
  return {name: config.task[name] for name in names} | {"seed": config.seed}


def create_model(config: ml_collections.ConfigDict, task: tasks.Task) -> nnx.Module:
  """The model of a config, initialised from its seed. Where a field of `config.model` is None the preset's holds."""
  overrides = {k: v for k, v in config.model.to_dict().items() if k != "name" and v is not None}
  overrides = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()}
  return models.create(
    config.model.name,
    input_shape=task.input_shape,
    vocab_size=task.vocab_size,
    num_classes=len(task.class_names),
    rngs=nnx.Rngs(config.seed),
    **overrides,
  )


def load(workdir: str | pathlib.Path, step: str = "best") -> Trained:
  """Reads a trained model: `nnx.Module`, ready to be called.

  Args:
    workdir: of the run.
    step: "best" by validation accuracy, "newest", or a number.

  Raises:
    UserError: no such run, step or readable checkpoint.
  """
  workdir = pathlib.Path(workdir)
  config = read_config(workdir)
  if config.model.get("implementation"):
    config.model.implementation = None  # what served in training, on a GPU say, may not serve here
  task = task_of(config, workdir)
  if not (workdir / "checkpoints").is_dir():
    raise errors.UserError(f"--workdir {workdir} holds no checkpoint yet")
  checkpoints = checkpoint.Checkpoints(workdir)
  try:
    restored = _read(checkpoints, step)
  finally:
    checkpoints.close()
  weights = restored.state.get("ema") or restored.state
  graphdef, _ = nnx.split(nnx.eval_shape(lambda: create_model(config, task)))
  model = nnx.merge(graphdef, weights["params"], weights["model_state"])
  return Trained(model, config, task, restored.step)


def _read(checkpoints, step):
  steps = checkpoints.steps()
  if not steps:
    raise errors.UserError("there is no checkpoint yet")
  number = {"best": None, "newest": steps[-1]}.get(step, int(step) if step.isdigit() else -1)
  if number is None:
    number = checkpoints.restore(steps[-1]).host["best_step"] or steps[-1]
  if number not in steps:
    raise errors.UserError(f"--step {step}: checkpoints are there of steps {', '.join(map(str, steps))}, best, newest")
  try:
    return checkpoints.restore(number)
  except Exception as error:
    message = f"checkpoint {number} is damaged ({errors.first_line(error)}); there are {', '.join(map(str, steps))}"
    raise errors.UserError(message) from error


class StopSignal:
  """Remembers SIGTERM or Ctrl-C until the step at hand is done; a second one acts at once."""

  def __init__(self):
    self.requested, self.name, self._old = False, "", {}

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids it
      self._old = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
    return self

  def _handle(self, number, frame):
    del frame
    self.requested, self.name = True, signal.Signals(number).name
    self.__exit__()

  def __exit__(self, *exception):
    while self._old:
      signal.signal(*self._old.popitem())
