"""The whole run, top to bottom: mesh, data, model, state, restore, loop, test.

What a step does is in `step`. Every process of a run of several does the same here, on its own devices; process 0
speaks and writes for all.
"""

import dataclasses
import functools
import json
import math
import pathlib
import time
from typing import Any

import jax
import ml_collections
import numpy as np
from clu import parameter_overview

from lra_jax import agreement, checkpoint, errors, metrics, optim, parallel, processes, report, runs
from lra_jax import step as step_lib
from lra_jax.data import batches, feed


@dataclasses.dataclass(frozen=True)
class Plan:
  """The run in steps; durations in epochs are converted once, here."""

  batch_size: int
  steps: int
  steps_per_call: int
  steps_per_epoch: float
  eval_every: int

  @classmethod
  def make(cls, config: ml_collections.ConfigDict, examples: int, devices: int, platform: str) -> "Plan":
    """Converts, rounding so that every call to the device has the same number of steps.

    Raises:
      UserError: a batch size that the devices or the accumulation do not divide, or nothing to train.
    """
    batch_size, accumulate = config.train.batch_size, config.train.accumulate
    if batch_size < 1 or accumulate < 1 or batch_size % (devices * accumulate):
      raise errors.UserError(
        f"config.train.batch_size={batch_size} must be a multiple of {devices} devices × accumulate={accumulate}"
      )
    steps_per_epoch = examples / batch_size
    steps = config.train.steps or math.ceil(config.train.epochs * steps_per_epoch)
    if steps < 1 or config.eval.every_epochs <= 0:
      raise errors.UserError(
        f"config.train.epochs={config.train.epochs}, steps={config.train.steps}, eval.every_epochs="
        f"{config.eval.every_epochs}: nothing to do; all must be above 0"
      )
    eval_every = min(max(round(config.eval.every_epochs * steps_per_epoch), 1), steps)
    # On CPU a loop around the step gains nothing, and a convolution in it is ruinously slow.
    most = config.train.steps_per_call or (1 if platform == "cpu" else 100)
    steps_per_call = math.ceil(eval_every / math.ceil(eval_every / most))
    eval_every = math.ceil(eval_every / steps_per_call) * steps_per_call
    return cls(
      batch_size, math.ceil(steps / steps_per_call) * steps_per_call, steps_per_call, steps_per_epoch, eval_every
    )


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str | pathlib.Path | None = None) -> dict[str, Any]:
  """Trains, or resumes, or repeats the result of a finished run.

  Args:
    config: resolved; see configs/common.py for its fields.
    workdir: folder of the run; None for `runs.default_workdir`.

  Returns:
    The content of `result.json`; {} where a signal ended the run early.

  Raises:
    UserError: anything that the user can mend, and a loss that is no longer finite.
  """
  started = time.perf_counter()
  workdir = pathlib.Path(workdir) if workdir else runs.default_workdir(config)
  with runs.Lock(workdir) as lock:
    result = agreement.on_main(lambda: runs.open_workdir(workdir, config, lock))
    if result is not None:
      if agreement.is_main():
        print(f"{workdir} is finished; its result:\n{json.dumps(result, indent=2)}")
      return result
    with runs.StopSignal() as stop, processes.ending_with_others():
      return _train_and_test(config, workdir, stop, started)


def _train_and_test(config, workdir, stop, started):
  """`train_and_evaluate` of a workdir that is open and not finished."""
  parallel.keep_freed_memory()
  main = agreement.is_main()
  say = print if main else lambda *_: None
  watchdog = processes.Watchdog(config.parallel.watchdog_seconds)
  watchdog.alive()

  # What is trained on what.
  mesh = parallel.make_mesh(config.parallel.data, config.parallel.fsdp)
  whole = parallel.replicated(mesh)
  task = runs.task_of(config, workdir)
  splits = feed.load(config, task, mesh, **runs.data_settings(config))
  if jax.process_count() > 1:
    agreement.check_same("data", agreement.digest_of(array for split in splits.values() for array in split.arrays()))
  plan = Plan.make(config, len(splits["train"].labels), mesh.size, mesh.devices.flat[0].platform)
  sizes = plan.batch_size, plan.steps_per_call, plan.steps
  train_feed = feed.make(config, task, splits["train"], *sizes, mesh)
  held_out = {name: feed.held_out(splits[name], mesh) for name in ("validation", "test")}
  schedule = optim.make_schedule(config.optim, plan.steps, plan.steps_per_epoch)
  graphdef, state, optimizer = step_lib.init_state(config, task, schedule, mesh)
  state_shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  parameters = int(parameter_overview.count_parameters(state["params"]))
  overview = parameter_overview.get_parameter_overview(state["params"], include_stats=False)
  if main:
    (workdir / "parameters.txt").write_text(overview + "\n")
  counts = ", ".join(f"{len(split.labels):,} {name}" for name, split in splits.items())
  streamed = " streamed" if train_feed.data is None else ""
  say(overview)
  devices = parallel.describe(mesh)
  say(f"{config.model.name} on {task.name}: {parameters:,} parameters; {counts} examples{streamed}; {devices}")

  # Where an earlier start of this run left off.
  checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint.keep)
  host = {"seed": config.seed, "best_step": None, "best_accuracy": -1.0, "best_loss": math.inf}
  host |= {"evaluations_since_best": 0, "skipped_in_a_row": 0}
  host |= {"seconds": 0.0, "eval_seconds": 0.0, "input_seconds": 0.0}  # of the loop, over all starts of the run
  restored = checkpoints.restore_newest(state, say)
  if restored is not None:
    state, host = restored.state, host | restored.host  # a field may be new
    say(f"resuming at step {restored.step} of {plan.steps}")
  first = restored.step if restored else 0

  # Compiling before the loop tells what a step costs, and keeps its time out of the speed.
  make_call = functools.partial(
    step_lib.make_train_call,
    config,
    task,
    graphdef,
    optimizer,
    schedule,
    plan.steps_per_call,
    mesh,
    shardings=(state_shardings, *train_feed.shardings),
  )
  train_calls, cost = step_lib.compile_calls(make_call, state, train_feed)
  eval_call = step_lib.make_eval_call(config, task, graphdef, mesh)
  operations = cost.operations / plan.steps_per_call
  for operation, implementations in cost.kernels.items():
    for implementation, reason in implementations.items():
      say(f"kernels.{operation}: {implementation} ({reason})")
  say(
    f"a step of {plan.batch_size} examples: {operations / 1e9:,.1f} GFLOP, {cost.memory / 2**20:,.0f} MiB peak memory "
    f"per device; compiled in {cost.seconds:.1f} s; {plan.steps} steps, {plan.steps_per_call} a call"
  )

  writer = metrics.Writer(workdir, first) if main else metrics.Silent()
  progress = metrics.Progress(plan.steps, first, plan.batch_size) if main else metrics.Silent()
  agree = agreement.Agreement(mesh)
  loop_start = last_saved = time.perf_counter()
  seconds_before = host["seconds"]

  evaluation = config.eval.batch_size, mesh, "drop_remainder" in task.quirks, batches.buckets(config, task)

  def weights_of(state):
    return state.get("ema") or {"params": state["params"], "model_state": state["model_state"]}

  def save(step):
    host["seconds"] = seconds_before + time.perf_counter() - loop_start
    problem = checkpoints.save(step, state, host)
    if problem:
      progress.say(f"{problem}; training goes on")

  def read_metrics(step, values):
    """Fetches the metrics of the call that ended at `step`; waits for it."""
    values = jax.device_get(values)
    watchdog.alive()
    good = np.isfinite(values["loss"]) & np.isfinite(values["gradient_norm"])
    if "skipped" in values:
      values, good = skip(step, values), np.ones(1, bool)
    if not good.all():
      bad = step - plan.steps_per_call + int(np.argmin(good)) + 1
      index = bad - step - 1
      checkpoints.wait()
      kept = [f"{workdir}/checkpoints/{step}" for step in checkpoints.steps()]
      raise errors.UserError(
        f"training diverged at step {bad}: loss {values['loss'][index]}, gradient norm "
        f"{values['gradient_norm'][index]}; last good checkpoint: {kept[-1] if kept else 'none yet'}; try a lower "
        f"--config.optim.learning_rate (now {config.optim.learning_rate}) or --config.optim.clip_norm"
      )
    means = {name: float(v.mean()) for name, v in values.items()}
    if "skipped" in means:
      means["skipped"] *= plan.steps_per_call  # how many
    writer.write(step, **{f"train/{name}": value for name, value in means.items()})
    progress.update(step, means["loss"], means["accuracy"])

  def skip(step, values):
    """What is left of the metrics of a call without those of skipped steps, and counts these."""
    for offset, skipped in enumerate(values["skipped"]):
      host["skipped_in_a_row"] = host["skipped_in_a_row"] + 1 if skipped else 0
      if host["skipped_in_a_row"] > config.optim.skip_limit:
        raise errors.UserError(
          f"{host['skipped_in_a_row']} steps in a row were skipped, to step {step - plan.steps_per_call + offset + 1}, "
          f"more than config.optim.skip_limit={config.optim.skip_limit}; try a lower --config.optim.learning_rate (now "
          f"{config.optim.learning_rate}) or a higher --config.optim.skip_above (now {config.optim.skip_above})"
        )
    kept = ~values["skipped"]
    if not kept.any():
      return {"loss": np.zeros(1), "accuracy": np.zeros(1), "skipped": values["skipped"]}
    return {name: v if name == "skipped" else v[kept] for name, v in values.items()}

  step, pending, finished, stopping = first, None, first >= plan.steps or _stopped_early(config, host), False
  try:
    while not finished and not stopping:
      input_start = time.perf_counter()
      length, inputs = train_feed(step)
      host["input_seconds"] += time.perf_counter() - input_start
      state, step_metrics = train_calls[length](state, train_feed.data, inputs)
      step += plan.steps_per_call
      if pending is not None:
        read_metrics(*pending)  # of the call before: the device is busy with this one meanwhile
      pending = (step, step_metrics)
      due = time.perf_counter() - last_saved >= config.checkpoint.every_seconds
      stopping, due = agree(stop.requested, due and main)

      is_best = False
      if step % plan.eval_every == 0 or step == plan.steps:
        read_metrics(*pending)
        pending = None
        eval_start = time.perf_counter()
        values, _, _ = step_lib.evaluate(eval_call, weights_of(state), held_out["validation"], *evaluation)
        host["eval_seconds"] += time.perf_counter() - eval_start
        writer.write(step, **{f"validation/{name}": value for name, value in values.items()})
        progress.say(f"step {step}: validation accuracy {values['accuracy']:.2%}, loss {values['loss']:.4f}")
        score = values["accuracy"], -values["loss"]  # small validation splits tie often; the lower loss decides
        is_best = score > (host["best_accuracy"], -host["best_loss"])
        if is_best:
          host |= {"best_step": step, "best_accuracy": values["accuracy"], "best_loss": values["loss"]}
        host["evaluations_since_best"] = 0 if is_best else host["evaluations_since_best"] + 1
        if "plateau" in state:
          _, plateau = optim.make_plateau(config.optim).update({}, state["plateau"], value=values["loss"])
          state["plateau"] = parallel.put(jax.device_get(plateau), whole)
        watchdog.alive()
        finished = step == plan.steps or _stopped_early(config, host)

      if is_best or finished or due:
        if pending is not None:
          read_metrics(*pending)  # no checkpoint of a state that may be broken
          pending = None
        save(step)
        last_saved = time.perf_counter()
    if not finished:
      if pending is not None:
        read_metrics(*pending)
      if step not in checkpoints.steps():
        save(step)
      problem = checkpoints.wait()
      if problem:
        progress.say(problem)
      if step not in checkpoints.steps():
        raise errors.UserError(
          f"stopped at step {step}, which could not be saved; the same command goes back to the newest checkpoint"
        )
      by = stop.name or "a signal to another process"
      progress.say(f"stopped by {by} at step {step} of {plan.steps}; saved. The same command resumes.")
      return {}

    # The test split is looked at once, with the parameters that validation chose.
    watchdog.stop()
    problem = checkpoints.wait()
    if problem:
      progress.say(problem)
    try:
      best = checkpoints.restore(host["best_step"], state)
    except Exception as error:
      raise errors.UserError(
        f"the best checkpoint, {workdir}/checkpoints/{host['best_step']}, cannot be read ({errors.first_line(error)}); "
        "`python -m lra_jax.evaluate` can use another"
      ) from error
    test, predictions, confidences = step_lib.evaluate(eval_call, weights_of(best.state), held_out["test"], *evaluation)
  finally:
    watchdog.stop()
    train_feed.close()
    progress.close()
    writer.close()
    checkpoints.close()

  stats = mesh.local_devices[0].memory_stats() or {}
  result = {
    "model": config.model.name,
    "task": task.name,
    "parameters": parameters,
    "best_validation_accuracy": host["best_accuracy"],
    "best_step": host["best_step"],
    "test_accuracy": test["accuracy"],
    "test_loss": test["loss"],
    "steps": step,
    "seconds": round(host["seconds"], 3),
    "images_per_second": round(step * plan.batch_size / (host["seconds"] - host["eval_seconds"]), 1),
    "input_share": round(host["input_seconds"] / (host["seconds"] - host["eval_seconds"]), 5),  # at most: calls overlap
    "compile_seconds": round(cost.seconds, 3),
    "total_seconds": round(time.perf_counter() - started, 3),
    "peak_memory_bytes": stats.get("peak_bytes_in_use", cost.memory),
    "gflop_per_step": round(operations / 1e9, 3),
    "kernels": cost.kernels,
    "device": devices,
    "params_sha256": checkpoint.sha256(parallel.fetch(state["params"])),
  }
  if not main:
    return result
  title = f"{config.model.name} on {task.name}, seed {config.seed}"
  report.draw(workdir, title, splits["test"], predictions, confidences, task)
  runs.write_atomically(workdir / "result.json", json.dumps(result, indent=2) + "\n")
  print(json.dumps(result, indent=2))
  print(f"test accuracy {test['accuracy']:.2%}, best validation accuracy {host['best_accuracy']:.2%}; all in {workdir}")
  return result


def _stopped_early(config, host) -> bool:
  patience = config.eval.early_stop_patience
  return bool(patience) and host["evaluations_since_best"] >= patience
