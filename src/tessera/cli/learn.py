"""`tessera learn`: learn a stream without forgetting, and see what was forgotten."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from typing import Any

import tessera.report
from tessera import recipes
from tessera.cli import online
from tessera.cli.learning import interrupted, told, words, write_json
from tessera.cli.show import Watch, show_results
from tessera.errors import InputError

__all__ = ["add_to"]

_EXAMPLES = """examples:
  tessera learn                                      # digits, class-incremental, der
  tessera learn --recipe ewc --scenario domain --report out
  tessera learn --stream fashion_mnist --recipe der --buffer 500 --json der.json
  tessera learn --stream path/to/idx-or-npz --scenario permuted --recipe er
  tessera learn --recipe my_recipe.py                # a file with def recipe(run): ...
  tessera learn --checkpoint run1                    # Ctrl-C or kill -9 it, then:
  tessera learn --checkpoint run1 --resume           # ends with the very same weights
  tessera learn --online --report out                # test, then learn: a stream that drifts
  tessera learn --online --stream rows.npz --classes 7 --budget-ms 5
"""


def add_to(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = commands.add_parser(
        "learn",
        help="learn a stream of tasks with one recipe and measure what is forgotten",
        description="Learn a stream of tasks with one recipe, beside finetune and joint.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    d = recipes.Settings()
    what = parser.add_argument_group("what to learn")
    what.add_argument("--stream", metavar="digits|fashion_mnist|DIR", help=f"default: {d.stream}")
    what.add_argument("--scenario", metavar="task|domain|class|permuted", help=f"{d.scenario}")
    what.add_argument("--data", metavar="DIR", help="where the stream's IDX or .npz files lie")
    what.add_argument("--tasks", dest="num_tasks", type=int, help=f"default: {d.num_tasks}")
    how = parser.add_argument_group("how")
    names = "|".join(recipes.RECIPES)
    how.add_argument("--recipe", metavar="NAME|FILE.py", help=f"{names}; default: {d.recipe}")
    how.add_argument("--model", metavar="PKG:FUNC", help=f"default: {d.model}")
    how.add_argument("--epochs", type=int, help="default: 10 on digits, else 1")
    how.add_argument("--batch-size", type=int, help="default: 32 on digits, else 128")
    how.add_argument("--lr", type=float, help=f"Adam's learning rate; default: {d.lr}")
    how.add_argument("--lam", type=float, help="penalty strength; default: by recipe and scenario")
    how.add_argument("--buffer", type=int, help="rows replayed from; default: 200 on digits, 500")
    how.add_argument("--seed", type=int, help=f"default: {d.seed}")
    how.add_argument(
        "--threads",
        type=int,
        help=f"CPU threads; default: {d.threads}, so that every machine gets the same bits",
    )
    how.add_argument(
        "--validation",
        type=float,
        metavar="FRACTION",
        help="measure on this share of the training rows, not on the test set",
    )
    online.add_options(parser)
    keep = parser.add_argument_group("what to keep")
    keep.add_argument("--checkpoint", metavar="DIR", help="save the run here as it goes")
    keep.add_argument(
        "--checkpoint-every",
        type=int,
        metavar="STEPS",
        help="default: every second, and after each task",
    )
    keep.add_argument("--resume", action="store_true", help="go on from the checkpoint, if any")
    keep.add_argument("--json", metavar="FILE", help="write the result here")
    keep.add_argument("--report", metavar="DIR", help="write DIR/index.html")
    keep.add_argument(
        "--compare",
        nargs="*",
        metavar="RECIPE",
        help="also run these; none given: no comparison; default: finetune joint, online: steady",
    )
    keep.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.checkpoint_every is not None and args.checkpoint_every < 1:
        raise InputError(f"--checkpoint-every must be >= 1, got {args.checkpoint_every}")
    if args.online:
        return online.run(args)
    online.refuse_options(args)
    settings = told(args, recipes.Settings(), recipes.saved_settings)
    compare = ["finetune", "joint"] if args.compare is None else args.compare
    for name in compare:
        recipes.find_recipe(name)
    watch = Watch(quiet=args.quiet)
    try:
        with watch.showing(settings.recipe):
            main = recipes.learn(
                settings,
                folder=args.checkpoint,
                resume=args.resume,
                every=args.checkpoint_every,
                watch=watch.update,
            )
    except KeyboardInterrupt:
        return interrupted(args)
    main["settings"]["command"] = "tessera " + shlex.join(["learn", *_words(settings)])
    results = [main]
    for name in compare:
        if name != settings.recipe:
            with watch.showing(name):
                other = replace(settings, recipe=name, lam=None)
                results.append(recipes.learn(other, watch=watch.update))
    if args.json:
        write_json(args.json, {**main, "baselines": results[1:]})
    page = tessera.report.write(results, args.report) if args.report else None
    if not args.quiet:
        show_results(results, page=page, checkpoint=args.checkpoint, json_file=args.json)
    return 0


def _words(settings: recipes.Settings) -> list[str]:
    """The options that reproduce these settings."""
    return words(settings, recipes.Settings(), ("recipe", "stream", "scenario", "seed"))
