"""A run of several processes: starting them, and ending when one is lost. What they tell each other is in `agreement`.

Each process runs the same program on its own devices; JAX's distributed runtime, over NCCL on GPUs and Gloo on CPUs,
carries what they exchange. launch/ starts them.
"""

import contextlib
import faulthandler
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import NamedTuple

from lra_jax import errors

SILENCE_SECONDS = 20  # until a process counts as lost; then the others end
_RUNTIME_SECONDS = 600  # until JAX's own runtime aborts all for it
_START_SECONDS = 300  # until all processes must have come
_PORT = 9876  # of SLURM's first node; up to 999 are added by the numbers of job, step and restart


class Place(NamedTuple):
  """Which of how many processes this is, and where process 0 listens, as host:port."""

  process: int
  count: int
  coordinator: str


def find_place(environment: dict[str, str]) -> Place | None:
  """What launch/local.sh, a Kubernetes JobSet (launch/jobset.yaml) or SLURM's srun say; None for a single process.

  Of the environment's variables, LRA_JAX_PROCESSES, LRA_JAX_PROCESS and LRA_JAX_COORDINATOR decide; of a JobSet the
  process is JOB_COMPLETION_INDEX. Else SLURM_NTASKS, SLURM_PROCID, SLURM_STEP_NODELIST and SLURM_JOB_ID, set by srun;
  SLURM_STEP_ID and SLURM_RESTART_COUNT change the port, at which the start before may still be listening.

  Raises:
    UserError: they contradict each other or are no numbers.
  """
  try:
    if "LRA_JAX_PROCESSES" in environment:
      count = int(environment["LRA_JAX_PROCESSES"])
      process = int(environment.get("LRA_JAX_PROCESS") or environment.get("JOB_COMPLETION_INDEX") or 0)
      coordinator = environment.get("LRA_JAX_COORDINATOR", "")
    elif environment.get("SLURM_STEP_NODELIST") and int(environment.get("SLURM_NTASKS", "1")) > 1:
      count, process = int(environment["SLURM_NTASKS"]), int(environment["SLURM_PROCID"])
      job, step, restart = (
        int(environment.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
      )
      port = _PORT + (job + 31 * step + 101 * restart) % 1000
      coordinator = f"{first_node(environment['SLURM_STEP_NODELIST'])}:{port}"
    else:
      return None
  except (KeyError, ValueError) as error:
    raise errors.UserError(f"environment of the launch: {error}; see launch/README.md for what is expected") from error
  if count == 1:
    return None
  if not 0 <= process < count or not re.fullmatch(r".+:\d+", coordinator):
    raise errors.UserError(
      f"environment of the launch: process {process} of {count}, coordinator {coordinator!r}; expected a process "
      "from 0 to below their number, and host:port; see launch/README.md"
    )
  return Place(process, count, coordinator)


def first_node(nodes: str) -> str:
  """The first host of SLURM's list: "gpu[004-006,9],other" gives "gpu004"."""
  match = re.match(r"([^,\[]+)(?:\[([^,\]-]+)[^\]]*\]([^,]*))?", nodes)
  if not match:
    raise ValueError(f"list of nodes {nodes!r}")
  return match[1] + (match[2] or "") + (match[3] or "")


def start(environment: dict[str, str] | None = None) -> None:
  """Joins the other processes of the run, if there are any. Call it before JAX looks for devices.

  From then on, when a process is lost, all others say so in one line and end with exit code 1.

  Raises:
    UserError: as of `find_place`, or the others did not come.
  """
  global _pulse, _service
  place = find_place(dict(os.environ) if environment is None else environment)
  if place is None:
    return
  import jax
  from jax._src import distributed

  if "cpu" in (jax.config.jax_platforms or os.environ.get("JAX_PLATFORMS", "")).split(","):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  if place.process == 0:
    _service = _start_service(place)
  original = distributed._jax.get_distributed_runtime_service
  distributed._jax.get_distributed_runtime_service = lambda *_, **__: _Elsewhere()
  try:
    jax.distributed.initialize(
      place.coordinator,
      place.count,
      place.process,
      cluster_detection_method="deactivate",
      initialization_timeout=_START_SECONDS,
      heartbeat_timeout_seconds=_RUNTIME_SECONDS,
    )
  except Exception as error:
    raise errors.UserError(
      f"process {place.process} of {place.count} on {socket.gethostname()}: the others were not met at "
      f"{place.coordinator} ({errors.first_line(error)}); are all started, with the same address?"
    ) from error
  finally:
    distributed._jax.get_distributed_runtime_service = original
  _pulse = _Pulse(place, distributed.global_state.client)


class _Elsewhere:
  """In the place of the service that JAX would start inside process 0."""

  def shutdown(self):
    pass


def _start_service(place):
  """Starts the service by which processes find each other, in a process of its own.

  In process 0, where JAX has it, it would die with that, and every other process at once, by an abort of the runtime
  without a word that one could understand.
  """
  port = place.coordinator.rpartition(":")[2]
  command = [sys.executable, "-c", "from lra_jax import processes; processes.serve()", port, str(place.count)]
  service = subprocess.Popen(
    [*command, str(os.getpid())], start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
  )
  with service.stdout as answer:
    problem = answer.readline().strip()
  if problem != "listening":
    raise errors.UserError(
      f"{place.coordinator}: process 0 cannot listen there ({problem or 'the service did not start'}). What is left of "
      "an earlier start ends within a minute; wait, or take another port"
    )
  return service


def serve() -> None:
  """The service: until a minute after the process that started it has ended, or a second after SIGTERM from that.

  Arguments: port, number of processes, process id of the one that started it.
  """
  from jax._src.lib import _jax

  port, count, parent = sys.argv[1:]
  try:
    with socket.socket(socket.AF_INET6) as taken:  # gRPC would share a port that another start still listens at
      taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      taken.bind(("::", int(port)))
    service = _jax.get_distributed_runtime_service(f"[::]:{port}", int(count), heartbeat_timeout=_RUNTIME_SECONDS)
  except Exception as error:  # of any type that the runtime has
    print(errors.first_line(error), flush=True)
    os._exit(1)
  print("listening", flush=True)
  nothing = os.open(os.devnull, os.O_WRONLY)
  for stream in (1, 2):  # else who reads what process 0 prints would wait for its end until this process ends as well
    os.dup2(nothing, stream)
  done = threading.Event()
  signal.signal(signal.SIGTERM, lambda *_: done.set())
  while os.getppid() == int(parent):
    if done.wait(1):  # all have left
      time.sleep(1)
      os._exit(0)
  time.sleep(60)  # the others still read from it who is lost
  del service
  os._exit(0)


class _Pulse:
  """A thread that tells the others every second that this process lives, and ends it when another does not."""

  def __init__(self, place, client):
    self._place, self._client, self._leaving = place, client, False
    threading.Thread(target=self._run, daemon=True, name="pulse").start()

  def _key(self, process):
    return f"lra_jax/pulse/{process}"

  def leave(self, last_words):
    """Tells the others that this process ends now, and why: "" where all is well."""
    self._leaving = True
    with contextlib.suppress(Exception):  # the service may be gone
      self._client.key_value_set(self._key(self._place.process), f"left {last_words}", allow_overwrite=True)

  def _run(self):
    seen = dict.fromkeys(range(self._place.count), ("", time.monotonic()))
    for beat in itertools.count():
      if self._leaving:
        return
      try:
        self._client.key_value_set(self._key(self._place.process), f"{beat}", allow_overwrite=True)
        values = dict(self._client.key_value_dir_get("lra_jax/pulse"))
      except Exception as error:
        if not self._leaving:
          _say_and_end(f"the service of process 0 at {self._place.coordinator} is lost ({errors.first_line(error)})")
        return
      now = time.monotonic()
      for process in seen:
        value = values.get(self._key(process), "")
        if value.startswith("left"):
          if len(value) > len("left ") and not self._leaving:
            self._end(process, "ended with an error")
          seen[process] = value, now
        elif value != seen[process][0]:
          seen[process] = value, now
        elif now - seen[process][1] > SILENCE_SECONDS and not self._leaving:
          self._end(process, f"is lost (silent for {SILENCE_SECONDS} s)")
      time.sleep(1)

  def _end(self, process, what):
    _say_and_end(
      f"process {process} of {self._place.count} {what}; process {self._place.process} ends too. The same command "
      "resumes from the newest checkpoint"
    )


_pulse: _Pulse | None = None
_service: subprocess.Popen | None = None  # in process 0


@contextlib.contextmanager
def started() -> Iterator[None]:
  """`start`; at the end the processes leave together, and one that ends with an error waits for no other."""
  start()
  import jax

  try:
    yield
  except BaseException as error:
    if _pulse is None:
      raise
    _pulse.leave(errors.first_line(error))
    if isinstance(error, errors.UserError):
      print(f"error: {error}", file=sys.stderr, flush=True)
    else:
      traceback.print_exc()
    sys.stdout.flush()
    os._exit(2 if isinstance(error, errors.UserError) else 1)  # JAX would wait at its exit for the others
  if _pulse is not None:
    _pulse.leave("")
    jax.distributed.shutdown()
    if _service is not None:
      _service.terminate()


def _say_and_end(line):
  print(f"error: {line}", file=sys.stderr, flush=True)
  sys.stdout.flush()
  os._exit(1)


@contextlib.contextmanager
def ending_with_others() -> Iterator[None]:
  """An error in it, but for a `UserError`, waits until it is known which process was lost, and ends with one line.

  What is exchanged fails at once when a process dies, before its silence has been noticed.
  """
  import jax

  try:
    yield
  except errors.UserError:
    raise
  except Exception as error:  # JAX's, or what Orbax makes of it
    if jax.process_count() == 1:
      raise
    time.sleep(SILENCE_SECONDS + 5)  # the pulse ends the process meanwhile, where another was lost
    if not isinstance(error, jax.errors.JaxRuntimeError):
      raise
    _say_and_end(f"what the processes exchange failed ({errors.first_line(error)}); process {jax.process_index()} ends")


class Watchdog:
  """Ends the process, with the stacks of all its threads on standard error, when `alive` was not called for long."""

  def __init__(self, seconds: float):
    """Args: seconds of silence; 0 for never."""
    self._seconds = seconds

  def alive(self) -> None:
    """Starts the time anew."""
    if self._seconds:
      faulthandler.dump_traceback_later(self._seconds, exit=True)

  def stop(self) -> None:
    """Ends the watch."""
    if self._seconds:
      faulthandler.cancel_dump_traceback_later()
