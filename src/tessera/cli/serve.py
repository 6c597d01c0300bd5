"""`tessera serve`: one model, a delta for each tenant, over HTTP."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch

from tessera.cli.served import add_model, model_of
from tessera.errors import MissingDataError

__all__ = ["add_to"]

_EXAMPLES = """examples:
  tessera serve --checkpoint run1                    # a model that tessera learn trained
  tessera serve --model mypackage:build              # a function that returns an nn.Module
  tessera serve --model app.py:build --model-args '{"size": 3}' --port 9000
  tessera serve --checkpoint run1 --db postgresql+psycopg://host/tessera --blobs s3://bucket/tessera

The admin key is printed once, at the first start; or set it: TESSERA_ADMIN_KEY=tsr_...
  curl -H "Authorization: Bearer $KEY" -d '{"name": "acme"}' http://127.0.0.1:8080/v1/tenants
"""


def add_to(commands: Any) -> None:
    """Add the command to argparse's sub-commands."""
    parser = commands.add_parser(
        "serve",
        help="serve a model with a delta for each tenant",
        description="Serve one model over HTTP (Open Inference Protocol v2), each tenant under "
        "deltas of its own, with hot swaps, rollback, and a log that can be replayed.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    where = parser.add_argument_group("where")
    where.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    where.add_argument("--port", type=int, default=8080, help="default: 8080; 0: a free one")
    much = parser.add_argument_group("how much")
    much.add_argument("--slots", type=int, default=64, help="deltas in use at a time; default: 64")
    much.add_argument("--max-rows", type=int, default=64, help="rows of a batch; default: 64")
    much.add_argument("--deadline-ms", type=float, default=2.0, help="wait for company; default: 2")
    much.add_argument("--queue-rows", type=int, default=1024, help="rows waiting; default: 1024")
    much.add_argument("--threads", type=int, default=1, help="of the model; default: 1")
    much.add_argument(
        "--keep",
        default="inputs",
        metavar="inputs|hashes|nothing",
        help="what the log keeps of requests; only inputs can be replayed; default: inputs",
    )
    parser.set_defaults(run=_run)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _run(args: argparse.Namespace) -> int:
    try:
        # Optional third parties come with it; no other command should wait for them.
        service = importlib.import_module("tessera.serve.service")
    except ImportError as error:
        raise MissingDataError(
            f"tessera serve needs the extra serve ({error}): pip install 'tessera-lifelong[serve]'"
        ) from error
    torch.set_num_threads(args.threads)
    model = model_of(args)
    Path(args.data).mkdir(parents=True, exist_ok=True)
    settings = service.ServiceSettings(
        db=args.db,
        blobs=args.blobs,
        keep=args.keep,
        slots=args.slots,
        max_rows=args.max_rows,
        deadline_ms=args.deadline_ms,
        queue_rows=args.queue_rows,
    )
    with service.Service(model, settings) as running:
        server = running.server(args.host, args.port)
        shown = f"[{args.host}]" if ":" in args.host else args.host
        # Its own socket, so that a free port has its number here.
        listening = socket.create_server((args.host, args.port), family=_family(args.host))
        port = listening.getsockname()[1]
        print(f"serving {type(model).__name__} at http://{shown}:{port}")
        if running.admin_key and not os.environ.get("TESSERA_ADMIN_KEY"):
            print(f"the admin key, shown this once: {running.admin_key}")
        print(f"registry {args.db}, blobs {args.blobs}; Ctrl-C stops after answering what is here")
        sys.stdout.flush()
        # uvicorn raises the signal again when it is done, and the log must be written to its end.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit(0))
        server.run(sockets=[listening])
    return 0
