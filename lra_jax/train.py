"""The whole run, top to bottom: mesh, data, model, state, restore, loop, test.

Training state is one pytree of arrays: {"step", "params", "model_state", "opt_state", "ema", "plateau"}, the last two
where the config asks for them. One call to the device runs `plan.steps_per_call` steps.
Axes: B batch, S classes, M steps of a call.
"""

import dataclasses
import functools
import json
import math
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from clu import parameter_overview
from flax import nnx

from kernels import dispatch
from lra_jax import checkpoint, errors, flops, metrics, optim, parallel, report, runs
from lra_jax.data import batches, feed, resident, tasks

# Randomness is a function of (seed, step, purpose); these are the purposes.
AUGMENT, MIX, DROPOUT = range(3)


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


def init_state(config, task, schedule) -> tuple[Any, Any, optax.GradientTransformation]:
  """Returns the model's graph definition, the training state at step 0, and the optimizer."""
  optimizer = optim.make_optimizer(config.optim, schedule)
  # Not under jit: compiling every parameter's draw into one program takes far longer than one small program per shape.
  graphdef, params, rest = nnx.split(runs.create_model(config, task), nnx.Param, ...)

  def complete(params, rest):
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "model_state": rest}
    state["opt_state"] = optimizer.init(params)
    if config.optim.ema_decay:
      state["ema"] = {"params": jax.tree.map(jnp.copy, params), "model_state": jax.tree.map(jnp.copy, rest)}
    if config.optim.schedule.name == "plateau":
      state["plateau"] = optim.make_plateau(config.optim).init(params)
    return state

  return graphdef, jax.jit(complete)(nnx.to_pure_dict(params), nnx.to_pure_dict(rest)), optimizer


def make_train_call(config, task, graphdef, optimizer, schedule, steps: int, mesh, length: int | None = None):
  """Returns `call(state, data, indices_MB) -> state, metrics`, M = `steps` training steps in one program.

  Texts are cut to `length` tokens.
  """
  batches.check(config, task)
  root = jax.random.key(config.seed)
  parts = config.train.accumulate
  batch_sharding = parallel.sharded(mesh)

  def key_of(step, purpose):
    return jax.random.fold_in(jax.random.fold_in(root, purpose), step)

  def loss_fn(params, model_state, inputs, targets_BS, key):
    model = nnx.merge(graphdef, params, model_state)
    with dispatch.batches_split(mesh):
      x, options = inputs
      logits_BS = model(x, **options, train=True, rngs=nnx.Rngs(dropout=key))
    loss = optax.softmax_cross_entropy(logits_BS, targets_BS).mean()
    accuracy = (logits_BS.argmax(-1) == targets_BS.argmax(-1)).mean()
    _, _, model_state = nnx.split(model, nnx.Param, ...)
    return loss, (accuracy, nnx.to_pure_dict(model_state))

  def gradients(params, model_state, inputs, targets_BS, key):
    """Mean gradient over the batch, taken in `parts` parts; every part has examples of every device."""

    def one(carry, part):
      sums, model_state = carry
      x, targets, index = part
      grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
      (loss, (accuracy, model_state)), grads = grad_fn(params, model_state, x, targets, jax.random.fold_in(key, index))
      return (jax.tree.map(jnp.add, sums, (grads, loss, accuracy)), model_state), None

    split = jax.tree.map(lambda a: jnp.swapaxes(a.reshape(-1, parts, *a.shape[1:]), 0, 1), (inputs, targets_BS))
    zeros = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()), jnp.zeros(()))
    carry = zeros, model_state
    if mesh.devices.flat[0].platform == "cpu":  # no convolution in a loop there, not even in one of a single turn
      for index in range(parts):
        carry, _ = one(carry, (*jax.tree.map(lambda a, index=index: a[index], split), index))
    else:
      carry, _ = jax.lax.scan(one, carry, (*split, jnp.arange(parts)))
    sums, model_state = carry
    return *jax.tree.map(lambda a: a / parts, sums), model_state

  def step(data, state, indices_B):
    number = state["step"]
    examples = batches.take(data, indices_B, batch_sharding, length)
    inputs, targets_BS = batches.training(config, task, examples, key_of(number, AUGMENT), key_of(number, MIX))

    grads, loss, accuracy, model_state = gradients(
      state["params"], state["model_state"], inputs, targets_BS, key_of(number, DROPOUT)
    )
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    rate = jnp.asarray(schedule(number), jnp.float32)
    if "plateau" in state:
      rate = rate * state["plateau"].scale
      updates = jax.tree.map(lambda u: u * state["plateau"].scale, updates)
    params = optax.apply_updates(state["params"], updates)
    new = {"step": number + 1, "params": params, "model_state": model_state, "opt_state": opt_state}
    if "ema" in state:
      current = {"params": params, "model_state": model_state}
      new["ema"] = optim.ema_update(state["ema"], current, number, config.optim.ema_decay)
    values = {"loss": loss, "accuracy": accuracy, "gradient_norm": optax.tree.norm(grads), "learning_rate": rate}
    return state | new, values

  def call(state, data, indices_MB):
    if steps == 1:
      state, values = step(data, state, indices_MB[0])
      return state, jax.tree.map(lambda v: v[None], values)
    return jax.lax.scan(functools.partial(step, data), state, indices_MB)

  whole = parallel.replicated(mesh)
  return jax.jit(
    call, donate_argnums=0, in_shardings=(whole, whole, parallel.sharded(mesh, 1)), out_shardings=(whole, whole)
  )


def make_eval_call(config, task, graphdef, mesh):
  """Returns `call(weights, data, indices_B, mask_B, length) -> metrics, predictions_B, confidences_B`."""

  def call(weights, data, indices_B, mask_B, length):
    model = nnx.merge(graphdef, weights["params"], weights["model_state"])
    examples = batches.take(data, indices_B, parallel.sharded(mesh), length)
    x, options = batches.evaluation(config, task, examples)
    with dispatch.batches_split(mesh):
      logits_BS = model(x, **options)
    labels_B = examples.labels
    losses_B = optax.softmax_cross_entropy_with_integer_labels(logits_BS, labels_B)
    totals = metrics.EvalMetrics.single_from_model_output(
      logits=logits_BS, labels=labels_B, losses=losses_B, mask=mask_B
    )
    return totals, logits_BS.argmax(-1), jax.nn.softmax(logits_BS).max(-1)

  whole, split = parallel.replicated(mesh), parallel.sharded(mesh)
  return jax.jit(call, static_argnums=4, in_shardings=(whole, whole, split, split), out_shardings=whole)


class Cost(NamedTuple):
  """What compiling tells of a call: products' operations, bytes of memory, seconds of compiling, kernels' choices."""

  operations: float
  memory: int
  seconds: float
  kernels: dict[str, dict[str, str]]


def compile_calls(make_call, state, feed) -> tuple[dict[int | None, Any], Cost]:
  """Compiles the call of every length of a feed; says which kernels are taken.

  Args:
    make_call: `make_train_call` but for the length.
    state: of the training.
    feed: see `data.feed`.

  Returns:
    The calls by length, and the cost of the longest.

  Raises:
    UserError: a kernel was asked for that cannot serve.
  """
  start = time.perf_counter()
  *shorter, longest = feed.lengths
  arguments = state, feed.data, feed.abstract
  make_longest = functools.partial(make_call, length=longest)
  try:
    with dispatch.recording() as choices:
      traced = make_longest().trace(*arguments)
  except dispatch.UnsupportedError as error:
    raise errors.UserError(
      f"config.model.implementation: {error}; without it the best that can serve is taken"
    ) from error
  for operation, implementations in choices.items():
    for implementation, reason in implementations.items():
      print(f"kernels.{operation}: {implementation} ({reason})")
  operations = flops.count_call(make_longest, arguments, traced, choices)
  calls = {length: make_call(length=length).trace(*arguments).lower().compile() for length in shorter}
  calls[longest] = traced.lower().compile()
  plan = calls[longest].memory_analysis()
  memory = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes - plan.alias_size_in_bytes
  return calls, Cost(operations, memory, time.perf_counter() - start, choices)


def evaluate(
  call,
  weights,
  data: resident.Resident,
  batch_size: int,
  devices: int,
  drop_remainder: bool = False,
  lengths: tuple[int, ...] = (),
) -> tuple[dict, np.ndarray, np.ndarray]:
  """Runs `call` over a split, every example once.

  Args:
    call: of `make_eval_call`.
    weights: {"params", "model_state"}.
    data: the split.
    batch_size: examples of one call, at most.
    devices: of which the batch size becomes a multiple.
    drop_remainder: whole batches only.
    lengths: as of `batches.buckets`; texts are evaluated in the order of theirs.

  Returns:
    {"loss", "accuracy"} as floats, predictions (N,) and the probability (N,) of each.
  """
  examples = len(data.labels)
  batch_size = -(-min(batch_size, examples) // devices) * devices
  if drop_remainder:
    examples -= examples % batch_size
  bucket = resident.bucket_of(np.asarray(data.lengths)[:examples], lengths) if lengths else np.zeros(examples, int)
  order = np.argsort(bucket, kind="stable").astype(np.int32)
  outputs = []
  for places, mask in zip(*resident.eval_batches(examples, batch_size), strict=True):
    length = lengths[bucket[order[places]].max()] if lengths else None
    outputs.append(call(weights, data, order[places], mask, length))
  outputs = jax.device_get(outputs)
  totals = functools.reduce(lambda a, b: a.merge(b), (o[0] for o in outputs))
  back = np.argsort(order)
  predictions, confidences = (np.concatenate([o[i] for o in outputs])[:examples][back] for i in (1, 2))
  return {name: float(value) for name, value in totals.compute().items()}, predictions, confidences


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
  result = runs.open_workdir(workdir, config)
  if result is not None:
    print(f"{workdir} is finished; its result:\n{json.dumps(result, indent=2)}")
    return result
  with runs.StopSignal() as stop:
    return _train_and_test(config, workdir, stop, started)


def _train_and_test(config, workdir, stop, started):
  """`train_and_evaluate` of a workdir that is open and not finished."""
  parallel.keep_freed_memory()

  # What is trained on what.
  mesh = parallel.make_mesh(config.parallel.data)
  whole = parallel.replicated(mesh)
  task = runs.task_of(config, workdir)
  splits = tasks.load(task, **runs.data_settings(config))
  plan = Plan.make(config, len(splits["train"].labels), mesh.size, mesh.devices.flat[0].platform)
  train_feed = feed.ResidentFeed(config, task, splits["train"], plan.batch_size, plan.steps_per_call, mesh)
  held_out = {name: resident.put(splits[name], whole) for name in ("validation", "test")}
  schedule = optim.make_schedule(config.optim, plan.steps, plan.steps_per_epoch)
  graphdef, state, optimizer = init_state(config, task, schedule)
  parameters = int(parameter_overview.count_parameters(state["params"]))
  overview = parameter_overview.get_parameter_overview(state["params"], include_stats=False)
  (workdir / "parameters.txt").write_text(overview + "\n")
  sizes = ", ".join(f"{len(split.labels):,} {name}" for name, split in splits.items())
  print(overview)
  print(f"{config.model.name} on {task.name}: {parameters:,} parameters; {sizes} examples; {parallel.describe(mesh)}")

  # Where an earlier start of this run left off.
  checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint.keep)
  host = {"seed": config.seed, "best_step": None, "best_accuracy": -1.0, "best_loss": math.inf}
  host |= {
    "evaluations_since_best": 0,
    "seconds": 0.0,
    "eval_seconds": 0.0,
    "input_seconds": 0.0,
  }  # of the loop, over all starts of the run
  restored = checkpoints.restore_newest(state, print)
  if restored is not None:
    state, host = restored.state, host | restored.host  # a field may be new
    print(f"resuming at step {restored.step} of {plan.steps}")
  first = restored.step if restored else 0
  state = jax.device_put(state, whole)

  # Compiling before the loop tells what a step costs, and keeps its time out of the speed.
  make_call = functools.partial(make_train_call, config, task, graphdef, optimizer, schedule, plan.steps_per_call, mesh)
  train_calls, cost = compile_calls(make_call, state, train_feed)
  eval_call = make_eval_call(config, task, graphdef, mesh)
  operations = cost.operations / plan.steps_per_call
  print(
    f"a step of {plan.batch_size} examples: {operations / 1e9:,.1f} GFLOP, {cost.memory / 2**20:,.0f} MiB peak memory "
    f"per device; compiled in {cost.seconds:.1f} s; {plan.steps} steps, {plan.steps_per_call} a call"
  )

  writer = metrics.Writer(workdir, first)
  progress = metrics.Progress(plan.steps, first, plan.batch_size)
  loop_start = last_saved = time.perf_counter()
  seconds_before = host["seconds"]

  evaluation = config.eval.batch_size, mesh.size, "drop_remainder" in task.quirks, batches.buckets(config, task)

  def weights_of(state):
    return state.get("ema") or {"params": state["params"], "model_state": state["model_state"]}

  def save(step):
    host["seconds"] = seconds_before + time.perf_counter() - loop_start
    checkpoints.save(step, state, host)

  def read_metrics(step, values):
    """Fetches the metrics of the call that ended at `step`; waits for it."""
    values = jax.device_get(values)
    good = np.isfinite(values["loss"]) & np.isfinite(values["gradient_norm"])
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
    writer.write(step, **{f"train/{name}": value for name, value in means.items()})
    progress.update(step, means["loss"], means["accuracy"])

  step, pending, finished = first, None, first >= plan.steps or _stopped_early(config, host)
  try:
    while not finished and not stop.requested:
      input_start = time.perf_counter()
      length, inputs = train_feed(step)
      host["input_seconds"] += time.perf_counter() - input_start
      state, step_metrics = train_calls[length](state, train_feed.data, inputs)
      step += plan.steps_per_call
      if pending is not None:
        read_metrics(*pending)  # of the call before: the device is busy with this one meanwhile
      pending = (step, step_metrics)

      is_best = False
      if step % plan.eval_every == 0 or step == plan.steps:
        read_metrics(*pending)
        pending = None
        eval_start = time.perf_counter()
        values, _, _ = evaluate(eval_call, weights_of(state), held_out["validation"], *evaluation)
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
          state["plateau"] = jax.device_put(plateau, whole)
        finished = step == plan.steps or _stopped_early(config, host)

      if is_best or finished or time.perf_counter() - last_saved >= config.checkpoint.every_seconds:
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
      checkpoints.wait()
      progress.say(f"stopped by {stop.name} at step {step} of {plan.steps}; saved. The same command resumes.")
      return {}

    # The test split is looked at once, with the parameters that validation chose.
    checkpoints.wait()
    try:
      best = checkpoints.restore(host["best_step"], state)
    except Exception as error:
      raise errors.UserError(
        f"the best checkpoint, {workdir}/checkpoints/{host['best_step']}, is damaged ({errors.first_line(error)}); "
        "`python -m lra_jax.evaluate` can use another"
      ) from error
    weights = jax.device_put(weights_of(best.state), whole)
    test, predictions, confidences = evaluate(eval_call, weights, held_out["test"], *evaluation)
  finally:
    progress.close()
    writer.close()
    checkpoints.close()

  stats = mesh.devices.flat[0].memory_stats() or {}
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
    "device": parallel.describe(mesh),
    "params_sha256": checkpoint.sha256(jax.device_get(state["params"])),
  }
  title = f"{config.model.name} on {task.name}, seed {config.seed}"
  report.draw(workdir, title, splits["test"], predictions, confidences, task)
  runs.write_atomically(workdir / "result.json", json.dumps(result, indent=2) + "\n")
  print(json.dumps(result, indent=2))
  print(f"test accuracy {test['accuracy']:.2%}, best validation accuracy {host['best_accuracy']:.2%}; all in {workdir}")
  return result


def _stopped_early(config, host) -> bool:
  patience = config.eval.early_stop_patience
  return bool(patience) and host["evaluations_since_best"] >= patience
