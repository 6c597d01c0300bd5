"""The process that compiles a graph: ``python -m tessera.meta.compiled_worker``."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from itertools import takewhile
from operator import getitem
from typing import Any

import torch
from torch import fx, nn
from torch._inductor import aoti_compile_and_package

from tessera.graph import store
from tessera.graph.ir import Node, Program, Ref, TensorType, find_op, substitute
from tessera.graph.text import types_of

__all__: list[str] = []

aten = torch.ops.aten
_SMALL = 1 << 12


def _graph_module(program: Program, *, small_cpu: bool) -> fx.GraphModule:
    """The program as PyTorch's own graph: all of it is below autograd."""
    graph = fx.Graph()
    known = {name: graph.placeholder(name) for name, _ in program.inputs}

    def get(ref: Ref) -> Any:
        value = known[ref.name]
        return value if ref.item is None else graph.call_function(getitem, (value, ref.item))

    types = types_of(program)
    for node in program.nodes:
        given = {name: substitute(value, get) for name, value in node.arguments}
        op = find_op(node.op, node.name)
        names = [a.name for a in op._schema.arguments if not a.kwarg_only]
        row = list(takewhile(given.__contains__, names))
        args = tuple(given.pop(name) for name in row)
        if small_cpu and op is aten.bmm.default and _is_vector(node, types):
            known[node.name] = _product(graph, *args)
        else:
            known[node.name] = graph.call_function(op, args, given)
    graph.output(tuple(substitute(program.output, get)))
    return fx.GraphModule(nn.Module(), graph)


def _is_vector(node: Node, types: Mapping[str, Sequence[TensorType | None]]) -> bool:
    """Whether a product of matrices is a small one by a vector, or of two."""
    a, b = (types[ref.name][ref.item or 0] for _, ref in node.arguments)
    if a is None or b is None:
        return False
    sizes = (*a.shape[1:], b.shape[2])
    return 1 in sizes and math.prod(sizes) <= _SMALL


def _product(graph: fx.Graph, a: fx.Node, b: fx.Node) -> fx.Node:
    """``sum_k a[., m, k] b[., k, n]``, which is fused with what is around it; a call of BLAS for
    so little is most of its time.
    """
    wide = graph.call_function(aten.unsqueeze.default, (a, -1))
    terms = graph.call_function(
        aten.mul.Tensor, (wide, graph.call_function(aten.unsqueeze.default, (b, 1)))
    )
    return graph.call_function(aten.sum.dim_IntList, (terms, [2]))


def _main(graph: str, out: str, devices: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    program = store.read(graph)
    examples = tuple(
        torch.zeros(kind.shape, dtype=kind.dtype, device=device)
        for (_, kind), device in zip(program.inputs, json.loads(devices), strict=True)
    )
    with torch.no_grad():
        whole = _graph_module(program, small_cpu=examples[0].device.type == "cpu")
        exported = torch.export.export(whole, examples, strict=False)
    # Apart from the wrapper, so that the loops get all of the compiler's optimizations.
    options = {"cpp_wrapper_build_separate": True} if examples[0].device.type == "cpu" else {}
    aoti_compile_and_package(exported, package_path=out, inductor_configs=options)


if __name__ == "__main__":
    _main(*sys.argv[1:])
