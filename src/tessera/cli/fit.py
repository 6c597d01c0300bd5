"""`tessera fit`: a delta from a few examples, saved as an adapter folder."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor

from tessera import arch, peft
from tessera import ops as T
from tessera.cli.bases import Base, base_of_function, base_of_texts
from tessera.cli.learning import write_json
from tessera.cli.shots import Examples, numbers_of, read_examples, split_examples
from tessera.data import Batch
from tessera.errors import InputError
from tessera.profiler import Budget

__all__ = ["add_to"]

_EXAMPLES = """examples:
  tessera fit --shots mails.csv --out adapter       # columns text,label; pip install
                                                    # tessera-lifelong[text] has the encoder
  tessera fit --shots mails.csv --held-out 0.3 --budget-ms 2000 --out adapter
  tessera fit --model mypackage:build --shots shots.npz --rank 4 --sites 'encoder.*' --out adapter
  tessera fit --model net.py:build --model-args '{"width": 64}' --shots shots.csv --kind ia3 \\
      --head head --query others.csv --out adapter
"""
_KINDS = ("lora", "ia3", "prefix", "prompt")
_RANKS = (8, 4, 2, 1)
_TOKENS = 8
_ROWS = 64


def add_to(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = commands.add_parser(
        "fit",
        help="fit a small delta to a few examples, over a model that stays as it is",
        description="Fit a delta to a few examples and save it as a folder that Hugging Face's "
        "PEFT reads too.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to fit, and to what")
    what.add_argument(
        "--shots",
        metavar="FILE",
        required=True,
        help=".csv with a header, .jsonl or .npz: text,label; or numbers and label; or x and y",
    )
    what.add_argument(
        "--model", metavar="PKG:FUNC|FILE.py:FUNC", help="builds the base; for numbers"
    )
    what.add_argument("--model-args", metavar="JSON", help='its arguments: {"name": value}')
    what.add_argument(
        "--encoder",
        metavar="FOLDER|minilm",
        help="the base for texts, as transformers saves it; default: minilm",
    )
    what.add_argument(
        "--classes",
        metavar="NAME,NAME",
        help="what the outputs mean, in their order; default: the labels of the shots, sorted",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--kind", choices=_KINDS, default="lora", help="default: lora")
    how.add_argument("--rank", type=int, help="of lora; default: 8, less where a layer is smaller")
    how.add_argument("--tokens", type=int, help="of prefix and prompt; default: 8")
    how.add_argument("--sites", nargs="+", metavar="GLOB", help="modules it lies over")
    how.add_argument("--head", metavar="NAME", help="a module trained whole; for texts: the head")
    how.add_argument("--steps", type=int, default=20, help="default: 20")
    how.add_argument("--lr", type=float, default=5e-3, help="Adam's learning rate; default: 5e-3")
    how.add_argument("--budget-ms", type=float, metavar="MS", help="most milliseconds of the fit")
    how.add_argument("--budget-joules", type=float, metavar="J", help="most joules of the fit")
    how.add_argument("--seed", type=int, default=0, help="default: 0")
    keep = parser.add_argument_group("how good it is, and what to keep")
    keep.add_argument("--query", metavar="FILE", help="other examples, to measure on")
    keep.add_argument(
        "--held-out", type=float, metavar="SHARE", help="measure on this share of the shots instead"
    )
    keep.add_argument("--out", metavar="DIR", required=True, help="the adapter's folder")
    keep.add_argument("--json", metavar="FILE", help="write the result here")
    keep.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    shots, query = _examples(args)
    _refuse(args, texts=shots.texts is not None)
    if shots.texts is not None:
        names = _told_names(args) or _sorted(shots.labels)
        base = base_of_texts(args.encoder, names)
    else:
        base = base_of_function(args.model, args.model_args, args.seed)
        names = _names_of_outputs(args, base, shots)
    parts = {"shots": shots} if query is None else {"shots": shots, "query": query}
    sets = {n: Batch(base.encode(e), numbers_of(e, names)) for n, e in parts.items()}
    delta = _delta(args, base, names)
    if meant := isinstance(base.model, peft.Classifier):
        _start_at_means(delta, base.model, sets["shots"], len(names))
    before = {n: _accuracy(base, delta if meant else None, s) for n, s in sets.items()}
    budget = Budget(ms=args.budget_ms, joules=args.budget_joules, steps=max(1, args.steps))
    with _watching(args) as (loss_fn, losses):
        peft.fit(
            delta,
            sets["shots"],
            steps=args.steps,
            lr=args.lr,
            loss_fn=loss_fn,
            budget=budget,
            model=base.model,
            seed=args.seed,
        )
    delta.save(args.out)
    after = {n: _accuracy(base, delta, s) for n, s in sets.items()}
    result = {
        "adapter": args.out,
        "kind": delta.kind,
        "hash": delta.hash,
        "base": base.name,
        "base_hash": delta.base_hash,
        "classes": list(names),
        "before": "nearest class mean" if meant else "the base",
        "accuracy": {n: {"before": before[n], "after": after[n]} for n in sets},
        "examples": {n: len(s.y) for n, s in sets.items()},
        "input": list(sets["shots"].x.shape[1:]),
        "losses": losses,
        "stopped_by": budget.stopped_by or "loss",
        "ms": budget.spent.ms,
    }
    if args.json:
        write_json(args.json, result)
    if not args.quiet:
        _show(result, delta, base)
    return 0


def _examples(args: argparse.Namespace) -> tuple[Examples, Examples | None]:
    """What is fitted to, and what is measured on beside."""
    if args.query and args.held_out is not None:
        raise InputError("--query and --held-out both say what to measure on; leave one out")
    shots = read_examples(args.shots)
    if args.held_out is not None:
        return split_examples(shots, args.held_out, args.seed)
    query = read_examples(args.query) if args.query else None
    if query is not None and (query.texts is None) != (shots.texts is None):
        kinds = {True: "numbers", False: "texts"}
        raise InputError(
            f"{shots.path} holds {kinds[shots.texts is None]}, and {query.path} "
            f"{kinds[query.texts is None]}"
        )
    return shots, query


def _refuse(args: argparse.Namespace, *, texts: bool) -> None:
    """Raise for options that would have no effect."""
    if not texts and args.model is None:
        raise InputError(f"{args.shots} holds numbers, so a model must be named: --model PKG:FUNC")
    strangers = ("model", "model_args", "head") if texts else ("encoder",)
    for name in strangers:
        if getattr(args, name) is not None:
            what = "texts, whose base is --encoder" if texts else "numbers, whose base is --model"
            option = name.replace("_", "-")
            raise InputError(f"{args.shots} holds {what}; leave --{option} out")
    virtual = args.kind in ("prefix", "prompt")
    for name, unused in (
        ("rank", args.kind != "lora"),
        ("tokens", not virtual),
        ("sites", virtual),
    ):
        if unused and getattr(args, name) is not None:
            raise InputError(f"--{name} has no meaning for --kind {args.kind}; leave it out")


def _told_names(args: argparse.Namespace) -> list[str]:
    names = [name.strip() for name in (args.classes or "").split(",") if name.strip()]
    if len(set(names)) < len(names):
        raise InputError(f"--classes names a class twice: {args.classes}")
    return names


def _sorted(labels: Sequence[str]) -> list[str]:
    """The labels, each once; numbers as numbers are."""
    return sorted(
        set(labels), key=lambda la: (not la.isdecimal(), int(la) if la.isdecimal() else 0, la)
    )


def _names_of_outputs(args: argparse.Namespace, base: Base, shots: Examples) -> list[str]:
    """A name for each of the model's outputs."""
    x = base.encode(shots)[:2]
    try:
        with torch.no_grad():
            logits = _logits(base.model(x))
    except InputError:
        raise
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{base.name} cannot take examples of {args.shots}, {tuple(x.shape[1:])} {x.dtype} "
            f"each: {said}"
        ) from error
    if logits.dim() != 2 or len(logits) != len(x):
        raise InputError(f"{base.name} must give logits [n, classes], got {tuple(logits.shape)}")
    outputs, names = logits.shape[1], _told_names(args)
    if not names and all(la.isdecimal() and int(la) < outputs for la in shots.labels):
        return [str(number) for number in range(outputs)]
    names = names or _sorted(shots.labels)
    if len(names) != outputs:
        raise InputError(
            f"{base.name} gives {outputs} logits and there are {len(names)} classes "
            f"({', '.join(names[:6])}); say what its outputs mean, in their order: --classes "
            f"NAME,NAME,... with {outputs} names"
        )
    return names


def _delta(args: argparse.Namespace, base: Base, names: Sequence[str]) -> arch.Delta:
    head = "head" if isinstance(base.model, peft.Classifier) else args.head
    match args.kind:
        case "lora":
            made = _lora(args, base, head)
        case "ia3":
            made = peft.ia3(base.model, sites=args.sites, head=head)
        case kind:
            make = peft.prefix if kind == "prefix" else peft.prompt
            tokens = _TOKENS if args.tokens is None else args.tokens
            made = make(base.model, tokens, head=head, seed=args.seed)
    return replace(made, info={**made.info, "classes": list(names), "base_name": base.name})


def _lora(args: argparse.Namespace, base: Base, head: str | None) -> arch.Delta:
    """Of the rank told; else of the largest in _RANKS that every layer allows."""
    ranks = _RANKS if args.rank is None else (args.rank,)
    for rank in ranks:
        try:
            return peft.lora(base.model, rank, sites=args.sites, head=head, seed=args.seed)
        except InputError:
            if rank == ranks[-1]:
                raise
    raise AssertionError


@torch.no_grad()
def _start_at_means(delta: arch.Delta, model: peft.Classifier, shots: Batch, classes: int) -> None:
    """Let the delta's head begin with what the encoder tells apart without any fit."""
    weight, _ = peft.class_means(_in_parts(model.features, shots.x), shots.y, classes)
    delta.tensors["head.weight.full"].copy_(weight)


def _accuracy(base: Base, delta: arch.Delta | None, rows: Batch) -> float:
    model: Any = base.model if delta is None else peft.apply(base.model, delta)
    found = _in_parts(lambda x: _logits(model(x)), rows.x).argmax(-1)
    return float((found == rows.y).double().mean())


@torch.no_grad()
def _in_parts(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([function(part) for part in torch.split(x, _ROWS)])


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise InputError(f"the model must give logits, it gave {type(logits).__name__}")
    return logits


@contextmanager
def _watching(
    args: argparse.Namespace,
) -> Iterator[tuple[Callable[[Any, Tensor], Tensor], list[float]]]:
    """A loss that shows itself step by step where there is a terminal, and what it was."""
    losses: list[float] = []
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("step {task.completed:>4.0f}/{task.total:.0f}  loss {task.fields[loss]}"),
    )
    shown = console.is_terminal and not args.quiet
    with Progress(*columns, console=console, disable=not shown) as bar:
        line = bar.add_task(f"fit {args.kind}", total=args.steps, loss="-")

        def loss_fn(output: Any, y: Tensor) -> Tensor:
            loss = T.cross_entropy(_logits(output), y)
            losses.append(loss.item())
            bar.update(line, completed=min(len(losses), args.steps), loss=f"{losses[-1]:.4f}")
            return loss

        yield loss_fn, losses


def _show(result: dict[str, Any], delta: arch.Delta, base: Base) -> None:
    console = Console()
    counts, losses = result["examples"], result["losses"]
    table = Table(title="accuracy %", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for name, count in counts.items():
        table.add_column(f"{count} {name}", justify="right")
    for row, key in ((result["before"], "before"), ("fitted", "after")):
        table.add_row(row, *(f"{100 * a[key]:.1f}" for a in result["accuracy"].values()))
    console.print()
    console.print(table)
    console.print()
    why = "" if result["stopped_by"] == "steps" else f", ended by {result['stopped_by']}"
    console.print(
        f"fit          {len(losses)} steps in {result['ms']:.0f} ms{why}; loss {losses[0]:.3f} -> "
        f"{losses[-1]:.3f}"
    )
    values = sum(t.numel() for t in delta.tensors.values())
    console.print(
        f"adapter      {result['adapter']}   {delta.kind}, {values:,} values", soft_wrap=True
    )
    if "query" not in counts:
        console.print("no query     how it does on others: --held-out 0.3, or --query FILE")
    lines = ["from tessera import arch, peft", *base.lines]
    if not isinstance(base.model, peft.Classifier):
        lines.append(f"# x: rows as in the shots, [n, {', '.join(map(str, result['input']))}]")
    lines += [
        f"delta = arch.Delta.load({result['adapter']!r})",
        "logits = peft.apply(model, delta)(x)",
        'print([delta.info["classes"][i] for i in logits.argmax(-1)])',
    ]
    console.print("next         in Python:")
    for line in lines:
        console.print(f"  {line}", soft_wrap=True, markup=False, highlight=False)
