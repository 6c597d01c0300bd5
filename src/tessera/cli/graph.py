"""`tessera graph`: a training step as text, as a drawing, as a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tessera import graph as tg
from tessera.errors import InputError, StorageError, unknown_name
from tessera.recipes.loading import run_file

__all__ = ["add_to"]

_EXAMPLES = """example: step.py holds

  import torch
  model = torch.nn.Linear(4, 2)
  def step(x, y):
      return torch.nn.functional.cross_entropy(model(x), y)
  inputs = (torch.zeros(5, 4), torch.zeros(5, dtype=torch.int64))

  tessera graph step.py:step                    # typed text
  tessera graph step.py:step --joint            # forward and backward
  tessera graph step.py:step --dot step.dot     # then: dot -Tsvg step.dot > step.svg
"""


def add_to(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = commands.add_parser(
        "graph",
        help="print what a training step computes, as a typed graph",
        description="Run FILE.py, capture the function on the file's `inputs` (a tuple, or a "
        "function that returns one) and print the graph.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="FILE.py:FUNCTION", help="it is run, as by python")
    parser.add_argument("--joint", action="store_true", help="forward and backward")
    parser.add_argument("--ops", action="store_true", help="one line an op, with the user's line")
    parser.add_argument("--dot", metavar="FILE", help="write a drawing in Graphviz's language")
    parser.add_argument("--save", metavar="FILE", help="write the graph for tg.Graph.load")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    fn, inputs = _load(args.target)
    graph = tg.capture(fn, *inputs)
    if args.joint:
        graph = graph.joint()
    if args.ops:
        for node in graph.ops():
            kinds = ", ".join(map(str, node.types))
            print(f"{node.line or '-':<20} {node.name:<24} {node.op:<36} {kinds}")
    else:
        print(graph.text(), end="")
    if args.dot:
        try:
            Path(args.dot).write_text(graph.dot(), "utf-8")
        except OSError as error:
            raise StorageError(f"--dot {args.dot} cannot be written: {error}") from error
    if args.save:
        graph.save(args.save)
    return 0


def _load(target: str) -> tuple[Any, tuple[Any, ...]]:
    """The function and its example inputs."""
    name, _, function = target.rpartition(":")
    if not name.endswith(".py") or not function:
        raise InputError(f"name the function as FILE.py:FUNCTION, got {target!r}")
    module = run_file(name)
    fn = getattr(module, function, None)
    if not callable(fn):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise unknown_name(f"function in {name}", function, known)
    inputs = getattr(module, "inputs", None)
    if callable(inputs):
        inputs = inputs()
    if not isinstance(inputs, tuple | list):
        raise InputError(
            f"{name} must define the example inputs of {function}, for example: "
            f"inputs = (torch.zeros(5, 4),); got {type(inputs).__name__}"
        )
    return fn, tuple(inputs)
