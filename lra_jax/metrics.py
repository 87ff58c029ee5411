"""What a run says: evaluation metrics, metrics.jsonl, TensorBoard events, one progress bar or plain lines."""

import json
import math
import os
import pathlib
import platform
import struct
import sys
import time
from typing import Any

import flax.struct
import tqdm
from clu import metrics as clu_metrics

from lra_jax import errors


@flax.struct.dataclass
class EvalMetrics(clu_metrics.Collection):
  """Accuracy and mean cross-entropy of the examples whose mask is 1."""

  accuracy: clu_metrics.Accuracy
  loss: clu_metrics.Average.from_output("losses")


class Writer:
  """`metrics.jsonl`, one line an event, and TensorBoard events of the same numbers (no TensorFlow needed).

  A full disk stops nothing: what cannot be written is kept and written when there is room.
  """

  def __init__(self, workdir: pathlib.Path, resume_step: int):
    """Opens both for appending; what an earlier run wrote beyond `resume_step` is taken out, as it comes again.

    Raises:
      UserError: they cannot be written.
    """
    from tensorboardX import record_writer, summary  # slow to import
    from tensorboardX.proto import event_pb2

    self._crc, self._scalar, self._event = record_writer.masked_crc32c, summary.scalar, event_pb2.Event
    path = pathlib.Path(workdir) / "metrics.jsonl"
    # Not the time alone: a run that starts twice in a second, or after the clock went back, has two files.
    events = f"events.out.tfevents.{int(time.time())}.{platform.node()}.{os.getpid()}"
    try:
      if path.exists():
        kept = [line for line in path.read_text(errors="replace").splitlines() if _step_of(line) <= resume_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        os.replace(temporary, path)
      self._logs = _Log(path), _Log(path.with_name(events))
    except OSError as error:
      raise errors.UserError(f"{path} cannot be written ({error.strerror}); make room, then start again") from error
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    heads = [{"file_version": "brain.Event:2"}]
    if resume_step:  # TensorBoard hides what other files have from here on
      heads.append({"step": resume_step + 1, "session_log": start})
    self._logs[1].append(b"".join(map(self._record, heads)))

  def write(self, step: int, **values: float) -> None:
    """Writes numbers of one step, named like "train/loss"."""
    values = {name: float(value) for name, value in values.items()}
    self._logs[0].append((json.dumps({"step": step, **values}) + "\n").encode())
    events = ({"step": step, "summary": self._scalar(name, value)} for name, value in values.items())
    self._logs[1].append(b"".join(map(self._record, events)))

  def _record(self, fields: dict[str, Any]) -> bytes:
    """An event as TFRecord has it: length, its CRC, content, its CRC."""
    content = self._event(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack("<Q", len(content))
    return b"".join((length, struct.pack("<I", self._crc(length)), content, struct.pack("<I", self._crc(content))))

  def close(self) -> None:
    """Closes both; says what could not be written."""
    for log in self._logs:
      log.close()


class _Log:
  """A file that is appended to. What the disk does not take is kept, in order, and tried again with what comes next."""

  def __init__(self, path: pathlib.Path):
    self._path, self._rest, self._said = path, b"", False
    self._file = path.open("ab", buffering=0)

  def append(self, content: bytes) -> None:
    self._rest += content
    try:
      while self._rest:
        self._rest = self._rest[self._file.write(self._rest) :]  # a full disk takes a part of it first
      self._said = False
    except OSError as error:
      if not self._said:
        print(f"{self._path} cannot be written ({error.strerror}); training goes on, it is tried again", flush=True)
      self._said = True

  def close(self) -> None:
    self.append(b"")
    if self._rest:
      print(f"{self._path}: the last {len(self._rest):,} bytes could not be written", flush=True)
    self._file.close()


class Silent:
  """In the place of a `Writer` or a `Progress`, for a process that does not speak."""

  def write(self, step: int, **values: float) -> None:
    pass

  def update(self, step: int, loss: float, accuracy: float) -> None:
    pass

  def say(self, line: str) -> None:
    pass

  def close(self) -> None:
    pass


def _step_of(line: str) -> float:
  try:
    return json.loads(line)["step"]
  except (ValueError, KeyError, TypeError):  # a line that a killed run wrote half
    return math.inf


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The events of `metrics.jsonl`, in order."""
  return [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]


class Progress:
  """A progress bar with loss, accuracy, images/s and time left; plain lines where the output is no terminal."""

  SECONDS_BETWEEN_LINES = 10.0

  def __init__(self, steps: int, first_step: int, batch_size: int):
    self._steps, self._batch_size = steps, batch_size
    self._start = self._last = time.perf_counter()
    self._first_step = first_step
    terminal = sys.stderr.isatty()
    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed} < {remaining}{postfix}]"
    self._bar = (
      tqdm.tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True, bar_format=form) if terminal else None
    )

  def update(self, step: int, loss: float, accuracy: float) -> None:
    """Called with the mean loss and accuracy of the last steps."""
    now = time.perf_counter()
    rate = (step - self._first_step) / max(now - self._start, 1e-9)
    images = f"{rate * self._batch_size:,.0f} images/s"
    if self._bar is not None:
      self._bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1%}, {images}", refresh=False)
      self._bar.update(step - self._bar.n)
    elif now - self._last > self.SECONDS_BETWEEN_LINES:
      self._last = now
      left = (self._steps - step) / max(rate, 1e-9)
      print(
        f"step {step}/{self._steps}  loss {loss:.3f}  accuracy {accuracy:.1%}  {images}  {duration(left)} left",
        flush=True,
      )

  def say(self, text: str) -> None:
    """Prints a line without breaking the bar."""
    if self._bar is not None:
      self._bar.write(text)
    else:
      print(text, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


def duration(seconds: float) -> str:
  """Seconds as "42 s", "3:05 min" or "2:10 h"."""
  seconds = round(seconds)
  if seconds < 60:
    return f"{seconds} s"
  if seconds < 3600:
    return f"{seconds // 60}:{seconds % 60:02d} min"
  return f"{seconds // 3600}:{seconds % 3600 // 60:02d} h"
