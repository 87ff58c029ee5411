"""How tensors of a public implementation become our arrays, and back: the words that layouts are written in."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Entry(NamedTuple):
  """One of our arrays.

  Attributes:
    names: of the tensors it is made of.
    load: makes it of them.
    save: makes them of it, in the same order.
  """

  names: list[str]
  load: Callable[[list[np.ndarray]], np.ndarray]
  save: Callable[[np.ndarray], list[np.ndarray]]


class Entries(dict):
  """Path of our array → `Entry`. Paths are tuples, as in `nnx.to_flat_state`."""

  def add(self, path: tuple, names: list[str], load: Callable, save: Callable) -> None:
    self[path] = Entry(names, load, save)

  def same(self, path: tuple, name: str) -> None:
    """The same array in both."""
    self.add(path, [name], lambda ts: ts[0], lambda a: [a])

  def permuted(self, path: tuple, name: str, *axes: int) -> None:
    """Ours is theirs with its axes permuted by `axes`, as in `np.transpose`."""
    back = tuple(np.argsort(axes))
    self.add(path, [name], lambda ts: ts[0].transpose(axes), lambda a: [a.transpose(back)])

  def dense(self, path: tuple, name: str, bias: bool = True) -> None:
    """A Dense layer: torch has (out, in)."""
    self.permuted((*path, "kernel"), f"{name}.weight", 1, 0)
    if bias:
      self.same((*path, "bias"), f"{name}.bias")

  def conv(self, path: tuple, name: str, bias: bool = True) -> None:
    """A convolution: torch has (out, in, rows, columns)."""
    self.permuted((*path, "kernel"), f"{name}.weight", 2, 3, 1, 0)
    if bias:
      self.same((*path, "bias"), f"{name}.bias")

  def norm(self, path: tuple, name: str) -> None:
    """Scale and bias of a LayerNorm."""
    self.same((*path, "scale"), f"{name}.weight")
    self.same((*path, "bias"), f"{name}.bias")

  def batch_norm(self, path: tuple, name: str) -> None:
    """Scale, bias and running statistics of a BatchNorm."""
    self.norm(path, name)
    self.same((*path, "mean"), f"{name}.running_mean")
    self.same((*path, "var"), f"{name}.running_var")

  def joined_dense(self, path: tuple, names: list[str]) -> None:
    """Several Dense layers of the same input that are one of ours, one after the other along the outputs."""
    parts = len(names)
    self.add(
      (*path, "kernel"),
      [f"{name}.weight" for name in names],
      lambda ts: np.concatenate(ts).T,
      lambda a: np.split(a.T, parts),
    )
    self.add((*path, "bias"), [f"{name}.bias" for name in names], np.concatenate, lambda a: np.split(a, parts))
