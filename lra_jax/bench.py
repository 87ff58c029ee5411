"""Times training steps, alone or beside a model's PyTorch twin on the same cores.

  python -m lra_jax.bench --model sequencer2d_small32 --against torch
  python -m lra_jax.bench --model all --against torch       the small forms of all models that have a twin

Each contestant is a process of its own, as its users run it: all start, then take turns for `--rounds` rounds of
`--steps` steps, so that a noisy machine is noisy for all. "kept memory" marks a contestant whose allocator keeps freed
memory (`parallel.keep_freed_memory`, which the trainer of lra_jax always uses on CPU and PyTorch by default does not).
A step is: batch, forward, backward, clipping by global norm, AdamW; float32, no dropout.
"""

import json
import statistics
import subprocess
import sys
import time

from absl import flags

from lra_jax import errors

_MODEL = flags.DEFINE_string("model", "sequencer2d_small32", "Name of the model, or all.")
_SIZE = flags.DEFINE_integer("size", 32, "Height and width of the images in pixels.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 64, "Images per step.", lower_bound=1)
_AGAINST = flags.DEFINE_enum("against", None, ["torch"], "What to compare with.")
_CHANNELS_LAST = flags.DEFINE_bool("channels_last", False, "PyTorch's other memory format, for convolutions.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each contestant.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 2, "Steps in a turn.", lower_bound=1)
_WORKER = flags.DEFINE_string("worker", None, "Internal: contestant that this process is.")

CHANNELS, CLASSES = 3, 10


def lra_jax_step():
  """Returns a function that runs one step of the real trainer on synthetic data, and waits for it."""
  import jax
  import numpy as np

  from configs import common
  from lra_jax import models, parallel, step, twins
  from lra_jax.data import resident, sources, tasks

  name = _MODEL.value
  config = common.base(name, "synthetic")
  config.train.batch_size = _BATCH.value
  for field, value in ({"drop_path": 0.0} | twins.OVERRIDES.get(name, {})).items():
    if field in models.fields(name):
      config.model[field] = value
  tokens = twins.reads_tokens(name)
  channels = 1 if tokens else CHANNELS
  shape = (_SIZE.value, _SIZE.value, channels)
  mean, std = ((0.0,), (1 / 255,)) if tokens else ((0.5,) * channels, (0.25,) * channels)
  view = "tokens" if tokens else "image"
  vocab_size = 256 if tokens else None
  task = tasks.Task("synthetic", shape, tuple(map(str, range(CLASSES))), mean, std, dict, view, vocab_size=vocab_size)
  mesh = parallel.make_mesh(-1)
  random = np.random.RandomState(0)
  split = sources.Split(
    random.randint(0, 256, (_BATCH.value, *shape)).astype(np.uint8), np.arange(_BATCH.value, dtype=np.int32) % CLASSES
  )
  data = resident.put(split, mesh)
  schedule = lambda step: 1e-3
  graphdef, state, optimizer = step.init_state(config, task, schedule, mesh)
  call = step.make_train_call(config, task, graphdef, optimizer, schedule, 1, mesh)
  indices = np.arange(_BATCH.value, dtype=np.int32)[None]

  def run():
    nonlocal state
    state, values = call(state, data, indices)
    jax.block_until_ready(values)

  return run


def torch_step():
  """The same for the public PyTorch model of the same sizes."""
  import torch

  from lra_jax import twins

  model, logits_of = twins.create(_MODEL.value, _SIZE.value, CHANNELS, CLASSES)
  optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
  if twins.reads_tokens(_MODEL.value):
    inputs = torch.randint(0, 256, (_BATCH.value, _SIZE.value**2))
  else:
    inputs = torch.randn(_BATCH.value, CHANNELS, _SIZE.value, _SIZE.value)
  if _CHANNELS_LAST.value:
    model, inputs = model.to(memory_format=torch.channels_last), inputs.to(memory_format=torch.channels_last)
  labels = torch.arange(_BATCH.value) % CLASSES

  def run():
    optimizer.zero_grad(set_to_none=True)
    torch.nn.functional.cross_entropy(logits_of(model(inputs)), labels).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()

  return run


CONTESTANTS = {"lra_jax": lra_jax_step, "torch": torch_step}


def work(name: str) -> None:
  """A contestant's process: one JSON line when ready, then one for every line on standard input."""
  start = time.perf_counter()
  library, _, kept = name.partition("+")
  if kept:
    from lra_jax import parallel

    parallel.keep_freed_memory()
  step = CONTESTANTS[library]()
  ready = time.perf_counter()
  step()
  first = time.perf_counter()
  step()
  print(json.dumps({"startup": ready - start, "first_step": first - ready}), flush=True)
  for _ in sys.stdin:
    seconds = []
    for _ in range(_STEPS.value):
      begin = time.perf_counter()
      step()
      seconds.append(time.perf_counter() - begin)
    print(json.dumps(seconds), flush=True)


def main() -> None:
  """Parses the flags, starts the contestants, lets them take turns and prints a table."""
  errors.parse_flags(sys.argv, required=())
  if _WORKER.value:
    work(_WORKER.value)
    return
  if _MODEL.value == "all":
    from lra_jax import twins

    for name in twins.SMALL_FORMS:
      subprocess.run([sys.executable, "-m", "lra_jax.bench", *sys.argv[1:], f"--model={name}"], check=False)
    return
  names = ["lra_jax+kept", "lra_jax"] + ([_AGAINST.value, f"{_AGAINST.value}+kept"] if _AGAINST.value else [])
  processes, starts = {}, {}
  for name in names:
    command = [sys.executable, "-m", "lra_jax.bench", *sys.argv[1:], f"--worker={name}"]
    processes[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    line = processes[name].stdout.readline()
    if not line:
      raise errors.UserError(f"{name} did not start; its message is above")
    starts[name] = json.loads(line)
  seconds = {name: [] for name in names}
  for _ in range(_ROUNDS.value):
    for name, process in processes.items():
      process.stdin.write("go\n")
      process.stdin.flush()
      seconds[name] += json.loads(process.stdout.readline())
  for process in processes.values():
    process.stdin.close()
    process.wait()
  print(f"{_MODEL.value}, {_SIZE.value} px, batch {_BATCH.value}, {_ROUNDS.value} × {_STEPS.value} steps in turn")
  print(f"{'':22}{'start s':>9}{'first step s':>14}{'step ms (median)':>18}{'fastest':>9}{'ratio':>7}")
  base = statistics.median(seconds["lra_jax+kept"])
  for name in names:
    median = statistics.median(seconds[name])
    label = name.replace("+kept", ", kept memory")
    print(
      f"{label:22}{starts[name]['startup']:9.1f}{starts[name]['first_step']:14.1f}{median * 1e3:18.0f}"
      f"{min(seconds[name]) * 1e3:9.0f}{median / base:7.2f}"
    )


if __name__ == "__main__":
  errors.exit_on_user_error(main)
