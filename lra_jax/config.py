"""Config files, the command line, and comparing one run's config with another's."""

import difflib
import importlib.util
import json
import pathlib
import sys
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from lra_jax import errors

# Fields that may differ between two starts of one run: they say where things are and how they are split over devices,
# not what is computed.
NOT_IDENTITY = (
  "task.data_dir", "task.input", "task.memory_share", "parallel.data", "parallel.fsdp", "parallel.watchdog_seconds",
)  # fmt: skip


def parse_command_line(argv: list[str], flag: str = "config") -> ml_collections.ConfigDict:
  """Parses all flags, with `--config FILE.py[:task,option=value]` and its overrides `--config.a.b=value`.

  A file that is not there is looked for among the configs installed with the package.

  Args:
    argv: as `sys.argv`; flags other than the config's must be defined.
    flag: name of the config's flag.

  Returns:
    The config, locked.

  Raises:
    UserError: a missing file, an unknown task, option or field, a value of the wrong type, an unknown flag.
  """
  argv = list(argv)
  for i, argument in enumerate(argv):  # "--config X" as "--config=X"
    if argument in (f"--{flag}", f"-{flag}") and i + 1 < len(argv):
      argv[i : i + 2] = [f"--{flag}={argv[i + 1]}"]
      break
  position = next((i for i, a in enumerate(argv) if a.startswith((f"--{flag}=", f"-{flag}="))), None)
  if position is not None:
    path, colon, argument = argv[position].partition("=")[2].partition(":")
    path = find(path)
    argv[position] = f"--{flag}={path}{colon}{argument}"
    config = load(path, argument)
    _check_overrides(argv, flag, config)
  if flag not in flags.FLAGS:
    config_flags.DEFINE_config_file(
      flag, None, "Config file, with :task,option=value.", lock_config=True, sys_argv=argv
    )
  try:
    errors.parse_flags(argv, required=())
  except (ValueError, TypeError, AttributeError, KeyError) as error:  # of an override's value
    raise errors.UserError(" ".join(str(error).split())) from error
  if position is None:
    raise errors.UserError(f"--{flag} is missing; try `python -m lra_jax.main --config configs/sequencer2d.py:digits`")
  return flags.FLAGS[flag].value


def find(path: str) -> str:
  """The config file of that path, or of that name among the configs installed with the package.

  Raises:
    UserError: there is none; near misses are named.
  """
  if pathlib.Path(path).is_file():
    return path
  if pathlib.Path(path).parent.name in ("configs", "") and (_installed() / pathlib.Path(path).name).is_file():
    return str(_installed() / pathlib.Path(path).name)
  raise errors.UserError(errors.unknown("config file", path, all_files()))


def all_files() -> list[str]:
  """Every config of the package, as "configs/vit.py", sorted."""
  return sorted(f"configs/{p.name}" for p in _installed().glob("*.py") if p.stem not in ("common", "__init__"))


def _installed() -> pathlib.Path:
  spec = importlib.util.find_spec("configs")
  return pathlib.Path(spec.submodule_search_locations[0]) if spec else pathlib.Path("configs")


def load(path: str, argument: str) -> ml_collections.ConfigDict:
  """Runs `get_config` of a file once, for its errors and field names; ml_collections' flag runs it again."""
  spec = importlib.util.spec_from_file_location("_config_file", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  try:
    return module.get_config(*[argument] if argument else [])
  except ValueError as error:  # what configs raise for a wrong task or option
    raise errors.UserError(f"--config {path}:{argument}: {error}") from error


def _check_overrides(argv, flag, config):
  known = flatten(config.to_dict())
  groups = {name.rpartition(".")[0] for name in known}
  for argument in argv[1:]:
    name = argument.lstrip("-").partition("=")[0]
    field = name.removeprefix("no").removeprefix(f"{flag}.")
    if argument.startswith("-") and name.removeprefix("no").startswith(f"{flag}.") and field not in known:
      if field in groups:
        inside = ", ".join(n for n in sorted(known) if n.startswith(f"{field}."))
        raise errors.UserError(f"--{flag}.{field} is a group; set one of its fields: {inside}")
      last = [n for n in known if n.rpartition(".")[2] == field.rpartition(".")[2]]
      near = list(dict.fromkeys(last + difflib.get_close_matches(field, known, n=3, cutoff=0.6)))[:3]
      meant = f"; did you mean {' or '.join(near)}?" if near else f"; known fields: {', '.join(sorted(known))}"
      raise errors.UserError(f"--{flag}.{field} does not exist{meant}")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"a": {"b": 1}} as {"a.b": 1}."""
  result = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      result.update(flatten(value, f"{prefix}{key}."))
    else:
      result[prefix + key] = value
  return result


def to_json(config: ml_collections.ConfigDict) -> str:
  """The config as JSON, keys sorted: equal configs give equal texts."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str | bytes) -> ml_collections.ConfigDict:
  """The inverse of `to_json`; tuples come back as lists."""
  return ml_collections.ConfigDict(json.loads(text)).lock()


def differences(old: str, new: str) -> list[str]:
  """Fields in which two JSON configs differ, as "a.b: 1 → 2", without those that are not part of a run's identity."""
  old, new = flatten(json.loads(old)), flatten(json.loads(new))
  missing = "(absent)"
  return [
    f"{name}: {old.get(name, missing)!r} → {new.get(name, missing)!r}"
    for name in sorted(old.keys() | new.keys())
    if old.get(name, missing) != new.get(name, missing) and name not in NOT_IDENTITY
  ]


def identity(config: ml_collections.ConfigDict) -> str:
  """What makes a run this one, as JSON: all fields but those of `NOT_IDENTITY`."""
  fields = flatten(config.to_dict())
  return json.dumps({name: value for name, value in fields.items() if name not in NOT_IDENTITY}, sort_keys=True)


if __name__ == "__main__":  # python -m lra_jax.config configs/X.py:task prints the resolved config
  errors.exit_on_user_error(lambda: print(to_json(parse_command_line(["config", "--config", *sys.argv[1:]])), end=""))
