"""Serves a model: OpenAI's `/v1/embeddings`, for texts, images, audio and mixes of them.

    python serve_vipolyqwen.py MODEL [--host 127.0.0.1] [--port 8000]

MODEL is a folder or a Hub id. `/v1/models` names it, `/health` embeds its golden inputs and compares them with the
published vectors, `/ready` says whether it is loaded. Every answer carries the model's fingerprint. Needs the extra
`serve`: pip install -c constraints.txt -e '.[serve]'
"""

import argparse
import signal
import socket
from pathlib import Path

from vipolyqwen import __version__
from vipolyqwen.data.command_line import run_command
from vipolyqwen.serving.limits import Load
from vipolyqwen.serving.requests import Bounds

MEBIBYTE = 2**20


def main(argv: list[str] | None = None) -> int:
    """Serves until it is stopped."""
    options = read_options(argv)
    try:
        from vipolyqwen.serving.connections import BoundedConnections
        from vipolyqwen.serving.loading import fingerprint_of
        from vipolyqwen.serving.server import ServerOptions, build_server
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The server needs litserve; install it with: pip install -c constraints.txt -e '.[serve]'"
        ) from error
    served = ServerOptions(
        model=options.model,
        name=options.name or (Path(options.model).resolve().name if Path(options.model).is_dir() else options.model),
        fingerprint=fingerprint_of(options.model, options.revision),
        dtype=options.dtype,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        towers=options.towers,
        bounds=Bounds(options.max_inputs, options.max_parts, options.max_characters, options.allow_urls),
        load=Load(
            options.max_requests,
            options.max_body_mib * MEBIBYTE,
            options.max_pending_mib * MEBIBYTE,
            options.body_seconds,
        ),
        timeout=options.timeout,
        max_batch_requests=options.max_batch_requests,
        batch_seconds=options.batch_seconds,
        max_tokens=options.max_batch_tokens,
        max_decoded=options.max_decoded_mib * MEBIBYTE,
    )
    check_port(options.host, options.port)
    server = build_server(served, options.accelerator, options.devices)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl+C: litserve then ends its processes too
    server.run(
        host=options.host,
        port=options.port,
        num_api_servers=1,  # the limits count what one process answers
        generate_client_file=False,
        log_level="warning",
        limit_concurrency=4 * options.max_requests,
        http=BoundedConnections,
    )
    return 0


def check_port(host: str, port: int) -> None:
    """Raises an OSError that names the remedy if the port cannot be used."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(f"{host}:{port} cannot be used: {error.strerror}; choose another `--port`.") from error


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"vipolyqwen {__version__}")
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    parser.add_argument("--name", help="name of the model for clients; default: the folder's, or the Hub id")
    parser.add_argument(
        "--towers",
        nargs="+",
        choices=("text", "image", "audio"),
        help="towers to load, text among them; default: all of the model",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the model")
    parser.add_argument("--trust_remote_code", action="store_true", help="run a model's code from the Hub")
    parser.add_argument("--accelerator", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: auto")
    parser.add_argument("--devices", type=int, default=1, help="devices, each with the model; default: 1")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; default: as published"
    )
    add_limits(parser)
    options = parser.parse_args(argv)
    for name, value in vars(options).items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and not value > 0 and name != "batch_seconds":
            parser.error(f"--{name} is {value}; it must be above 0.")
    if not 1024 <= options.port <= 65_535:
        parser.error(f"--port is {options.port}; choose one from 1024 to 65535.")
    if options.towers is not None and "text" not in options.towers:
        parser.error(f"--towers is {' '.join(options.towers)}; text must be among them.")
    return options


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Adds the options that bound requests and batches."""
    bounds, load = Bounds(), Load()
    limits = parser.add_argument_group("limits, beyond which a request is refused")
    limits.add_argument(
        "--max_inputs", type=int, default=bounds.max_inputs, help="inputs of a request; default: %(default)s"
    )
    limits.add_argument(
        "--max_parts",
        type=int,
        default=bounds.max_parts,
        help="texts, images and clips of an input; default: %(default)s",
    )
    limits.add_argument(
        "--max_characters", type=int, default=bounds.max_characters, help="characters of a text; default: %(default)s"
    )
    limits.add_argument(
        "--max_requests", type=int, default=load.max_requests, help="requests in progress; default: %(default)s"
    )
    limits.add_argument(
        "--max_body_mib", type=int, default=load.max_body // MEBIBYTE, help="MiB of a body; default: %(default)s"
    )
    limits.add_argument(
        "--max_pending_mib",
        type=int,
        default=load.max_pending // MEBIBYTE,
        help="MiB of all bodies in progress; default: %(default)s",
    )
    limits.add_argument(
        "--max_decoded_mib",
        type=int,
        default=512,
        help="MiB of the decoded images and audio of a request; default: %(default)s",
    )
    limits.add_argument(
        "--body_seconds",
        type=float,
        default=load.body_seconds,
        help="seconds to send a body, and to read an answer; default: %(default)s",
    )
    limits.add_argument("--timeout", type=float, default=60.0, help="seconds a request may wait; default: %(default)s")
    limits.add_argument("--allow_urls", action="store_true", help="fetch media from URLs that clients name")
    batches = parser.add_argument_group("batches")
    batches.add_argument(
        "--max_batch_requests",
        type=int,
        default=64,
        help="requests that pass the model together; default: %(default)s",
    )
    batches.add_argument(
        "--max_batch_tokens",
        type=int,
        default=16_384,
        help="padded tokens that pass the model together; default: %(default)s",
    )
    batches.add_argument(
        "--batch_seconds", type=float, default=0.005, help="seconds a request waits for others; default: %(default)s"
    )


if __name__ == "__main__":
    run_command(main)
