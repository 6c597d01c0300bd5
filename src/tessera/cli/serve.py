"""`tessera serve`: one model, a delta for each tenant, over HTTP."""

from __future__ import annotations

import argparse
import gc
import importlib
import math
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch

from tessera.cli.served import add_model, model_of
from tessera.errors import InputError, MissingDataError
from tessera.serve.fitting_values import Origin
from tessera.serve.settings import AppSettings, Limits

__all__ = ["add_to"]

_EXAMPLES = """examples:
  tessera serve --checkpoint run1                    # a model that tessera learn trained
  tessera serve --model mypackage:build              # a function that returns an nn.Module
  tessera serve --model app.py:build --model-args '{"size": 3}' --port 9000
  tessera serve --checkpoint run1 --db postgresql+psycopg://host/tessera --blobs s3://bucket/tessera
  tessera serve --checkpoint run1 --device cuda --slots 256 --max-rows 256
  tessera serve --checkpoint run1 --fits 2 --fit-ms 60000    # two at a time, a minute each
  tessera serve --checkpoint run1 --log json --no-request-log

The admin key is printed once, at the first start; or set it: TESSERA_ADMIN_KEY=tsr_...
  curl -H "Authorization: Bearer $KEY" --json '{"name": "acme"}' http://127.0.0.1:8080/v1/tenants
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
    where.add_argument("--port", type=_port, default=8080, help="default: 8080; 0: a free one")
    _add_much(parser.add_argument_group("how much"))
    _add_fits(parser.add_argument_group("fits that tenants ask for"))
    _add_requests(parser.add_argument_group("requests"))
    _add_logs(parser.add_argument_group("logs"))
    parser.set_defaults(run=_run)


def _add_much(much: Any) -> None:
    much.add_argument("--slots", type=_count, default=64, help="deltas in use at once; default: 64")
    much.add_argument("--max-rows", type=_count, default=64, help="rows of a batch; default: 64")
    much.add_argument("--deadline-ms", type=float, default=2.0, help="wait for company; default: 2")
    much.add_argument("--queue-rows", type=_count, default=1024, help="rows waiting; default: 1024")
    much.add_argument("--threads", type=_count, default=1, help="of the model; default: 1")


def _add_fits(fits: Any) -> None:
    fits.add_argument("--fits", type=_count, default=1, metavar="N", help="at once; default: 1")
    fits.add_argument(
        "--fit-waiting", type=_count, default=8, metavar="N", help="behind them; default: 8"
    )
    fits.add_argument(
        "--fit-rows", type=_count, default=256, metavar="N", help="most shots; default: 256"
    )
    fits.add_argument(
        "--fit-steps", type=_count, default=1000, metavar="N", help="most steps; default: 1000"
    )
    fits.add_argument(
        "--fit-ms", type=_positive, default=30_000.0, metavar="MS", help="of one; default: 30000"
    )


def _add_requests(requests: Any) -> None:
    requests.add_argument(
        "--timeout-s", type=_positive, default=30.0, help="until an answer; default: 30"
    )
    requests.add_argument(
        "--body-mib", type=_count, default=64, help="largest for inference; default: 64"
    )
    requests.add_argument(
        "--upload-mib", type=_count, default=256, help="largest delta; default: 256"
    )
    requests.add_argument(
        "--metrics-key",
        action="store_true",
        help="/metrics asks this machine for an admin key too",
    )


def _add_logs(logs: Any) -> None:
    logs.add_argument(
        "--log",
        choices=("text", "json"),
        help="what stderr gets; default: text on a terminal, else JSON",
    )
    logs.add_argument(
        "--no-request-log", action="store_true", help="no line for each request, only messages"
    )
    logs.add_argument(
        "--keep",
        default="inputs",
        metavar="inputs|hashes|nothing",
        help="what the audit log keeps of requests; only inputs can be replayed; default: inputs",
    )


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"at least 1, got {value}")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"a finite number > 0, got {text}")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 16:
        raise argparse.ArgumentTypeError(f"0 to 65535, got {value}")
    return value


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=_family(host))
    except OSError as error:
        raise InputError(
            f"nothing can listen at {host} port {port} ({error.strerror or error}); give another "
            "--host or --port"
        ) from error


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
    importlib.import_module("tessera.serve.logs").set_up(args.log, requests=not args.no_request_log)
    torch.set_num_threads(args.threads)
    model = model_of(args)
    Path(args.data).mkdir(parents=True, exist_ok=True)
    settings = _settings(service, args)
    named = {"checkpoint": args.checkpoint, "model": args.model, "model_args": args.model_args}
    origin = Origin(function="tessera.cli.served:build", arguments=named)
    with service.Service(model, settings, origin) as running:
        server = running.server(args.host, args.port)
        shown = f"[{args.host}]" if ":" in args.host else args.host
        # Its own socket, so that a free port has its number here.
        listening = _listen(args.host, args.port)
        port = listening.getsockname()[1]
        print(f"serving {type(model).__name__} at http://{shown}:{port}")
        if running.admin_key and not os.environ.get("TESSERA_ADMIN_KEY"):
            print(f"the admin key, shown this once: {running.admin_key}")
        print(f"registry {args.db}, blobs {args.blobs}; Ctrl-C stops after answering what is here")
        sys.stdout.flush()
        # uvicorn raises the signal again when it is done, and the log must be written to its end.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit(0))
        # What is here stays: a search through all of it would hold up the requests for that long.
        gc.collect()
        gc.freeze()
        server.run(sockets=[listening])
    return 0


def _settings(service: Any, args: argparse.Namespace) -> Any:
    return service.ServiceSettings(
        db=args.db,
        blobs=args.blobs,
        keep=args.keep,
        slots=args.slots,
        max_rows=args.max_rows,
        deadline_ms=args.deadline_ms,
        queue_rows=args.queue_rows,
        app=AppSettings(
            limits=Limits(body_bytes=args.body_mib << 20),
            upload_bytes=args.upload_mib << 20,
            infer_timeout_s=args.timeout_s,
            metrics_on_loopback=not args.metrics_key,
        ),
        fits=service.FitterSettings(
            workers=args.fits,
            waiting=args.fit_waiting,
            rows=args.fit_rows,
            steps=args.fit_steps,
            ms=args.fit_ms,
        ),
    )
