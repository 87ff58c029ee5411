"""Pictures of a run: learning curves, confusion matrix, the most confidently wrong test images."""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from lra_jax import metrics
from lra_jax.data import tasks
from lra_jax.data.sources import Split
from lra_jax.data.stream import Streamed


def draw(
  workdir: pathlib.Path,
  title: str,
  test: Split | Streamed,
  predictions: np.ndarray,
  confidences: np.ndarray,
  task: tasks.Task,
) -> None:
  """Draws the pictures of a finished run into its workdir; of texts, the mistakes are written into mistakes.txt.

  Args:
    workdir: has `metrics.jsonl`.
    title: of all pictures.
    test: the test split.
    predictions: (N,) class of each test example; −1 where a picture could not be read, fewer where some were left out.
    confidences: (N,) its probability.
    task: of the run.
  """
  names = task.class_names
  known = np.flatnonzero(predictions >= 0)
  test, predictions, confidences = test.take(known), predictions[known], confidences[known]
  curves(metrics.read(workdir), title, workdir / "curves.png")
  score = f"{title}, test accuracy {np.mean(predictions == test.labels):.2%}"
  confusion(test.labels, predictions, names, score, workdir / "confusion.png")
  if task.image_shape is None:
    text = mistaken_texts(test.inputs, test.labels, predictions, confidences, task)
    (workdir / "mistakes.txt").write_text(text, encoding="utf-8")
  else:
    image = test.image if isinstance(test, Streamed) else test.inputs.__getitem__
    mistakes(image, test.labels, predictions, confidences, names, title, workdir / "mistakes.png")


def _most_confidently_wrong(labels, predictions, confidences, most):
  wrong = np.flatnonzero(labels != predictions)
  return wrong[np.argsort(-confidences[wrong], kind="stable")][:most]


def mistaken_texts(
  tokens: np.ndarray,
  labels: np.ndarray,
  predictions: np.ndarray,
  confidences: np.ndarray,
  task: tasks.Task,
  most: int = 24,
) -> str:
  """The texts of wrong predictions with the highest probability, most confident first; arguments as of `mistakes`."""
  parts = [f"{np.count_nonzero(labels != predictions)} of {len(labels)} wrong, most confident first\n"]
  for index in _most_confidently_wrong(labels, predictions, confidences, most):
    said = f"{task.class_names[predictions[index]]} {confidences[index]:.0%}"
    texts = [task.decode(row) for row in np.atleast_2d(tokens[index])]
    parts.append("\n".join([f"\n--- true {task.class_names[labels[index]]}, said {said}", *texts]) + "\n")
  return "".join(parts)


def _pyplot():
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 120, "font.size": 9})
  return plt


def curves(events: list[dict[str, Any]], title: str, path: pathlib.Path) -> None:
  """Loss and accuracy of training and validation by step.

  Args:
    events: of `metrics.read`.
    title: of the picture.
    path: of the PNG file to write.
  """
  plt = _pyplot()
  figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
  for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
    for split, color in (("train", "tab:blue"), ("validation", "tab:orange")):
      points = [(e["step"], e[f"{split}/{name}"]) for e in events if f"{split}/{name}" in e]
      if points:
        steps, values = np.array(points).T
        window = max(1, len(points) // 50) if split == "train" else 1
        if window > 1:
          axis.plot(steps, values, color=color, alpha=0.2, linewidth=0.6)
          values = np.convolve(values, np.ones(window) / window, "valid")
          steps = steps[window - 1 :]
        axis.plot(steps, values, color=color, label=split, marker="o" if len(points) < 5 else None, linewidth=1.4)
    axis.set_xlabel("step")
    axis.set_title("accuracy" if name == "accuracy" else "cross-entropy (training: as smoothed and mixed)", fontsize=10)
    axis.legend(frameon=False)
  figure.suptitle(title)
  figure.savefig(path)
  plt.close(figure)


def compare(runs: dict[str, list[dict[str, Any]]], path: pathlib.Path) -> None:
  """Training loss, validation loss and validation accuracy of several runs in one picture.

  Args:
    runs: name → its events, of `metrics.read`.
    path: of the PNG file to write.
  """
  plt = _pyplot()
  figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
  styles = ["-", "--", ":"]
  for axis, field, title in zip(
    axes,
    ("train/loss", "validation/loss", "validation/accuracy"),
    ("training loss (as smoothed and mixed)", "validation loss", "validation accuracy"),
    strict=True,
  ):
    for index, (name, events) in enumerate(runs.items()):
      points = np.array([(e["step"], e[field]) for e in events if field in e])
      if not len(points):
        continue
      steps, values = points.T
      window = max(1, len(points) // 40) if field == "train/loss" else 1
      values = np.convolve(values, np.ones(window) / window, "valid")
      style = dict(color=f"C{index % 10}", linestyle=styles[index // 10 % 3], linewidth=1.2)
      axis.plot(steps[window - 1 :], values, label=name, **style)
    axis.set_xlabel("step")
    axis.set_title(title, fontsize=10)
  figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=7)
  figure.savefig(path)
  plt.close(figure)


def confusion(
  labels: np.ndarray, predictions: np.ndarray, names: tuple[str, ...], title: str, path: pathlib.Path
) -> None:
  """Confusion matrix: rows are true classes, columns predicted ones, shares of the row.

  Args:
    labels, predictions: (N,) integers.
    names: of the S classes.
    title: of the picture.
    path: of the PNG file to write.
  """
  plt = _pyplot()
  counts = np.zeros((len(names), len(names)))
  np.add.at(counts, (labels, predictions), 1)
  share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
  size = min(max(3.5, 0.42 * len(names)), 14)
  figure, axis = plt.subplots(figsize=(size + 0.8, size), layout="constrained")
  image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
  if len(names) <= 20:
    for (row, column), value in np.ndenumerate(counts):
      if value:
        color = "white" if share[row, column] > 0.5 else "black"
        axis.text(column, row, int(value), ha="center", va="center", fontsize=7, color=color)
    axis.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 2 else 0)
    axis.set_yticks(range(len(names)), names)
  axis.set_xlabel("predicted")
  axis.set_ylabel("true")
  axis.set_title(title, fontsize=9)
  figure.colorbar(image, shrink=0.7, label="share of the true class")
  figure.savefig(path)
  plt.close(figure)


def mistakes(
  image_of: Callable[[int], np.ndarray],
  labels: np.ndarray,
  predictions: np.ndarray,
  confidences: np.ndarray,
  names: tuple[str, ...],
  title: str,
  path: pathlib.Path,
  most: int = 24,
) -> None:
  """The wrong predictions with the highest probability, most confident first.

  Args:
    image_of: gives (H, W, C) uint8 of an example by its number.
    labels, predictions: (N,) integers.
    confidences: (N,) probability of the predicted class.
    names: of the S classes.
    title: of the picture.
    path: of the PNG file to write.
    most: how many at most.
  """
  plt = _pyplot()
  wrong = _most_confidently_wrong(labels, predictions, confidences, most)
  columns = min(8, max(len(wrong), 5))
  rows = max(1, -(-len(wrong) // columns))
  figure, axes = plt.subplots(
    rows, columns, figsize=(9, 9 / columns * 1.25 * rows + 0.5), layout="constrained", squeeze=False
  )
  for axis in axes.flat:
    axis.axis("off")
  for axis, index in zip(axes.flat, wrong, strict=False):
    image = image_of(index)
    axis.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
    axis.set_title(
      f"true {names[labels[index]]}\n{names[predictions[index]]} {confidences[index]:.0%}", fontsize=7, linespacing=1.3
    )
  figure.suptitle(f"{title}: {np.count_nonzero(labels != predictions)} of {len(labels)} wrong, most confident first")
  figure.savefig(path)
  plt.close(figure)
