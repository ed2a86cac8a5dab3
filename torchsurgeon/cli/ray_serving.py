"""``torchsurgeon serve --ray``: the same models, served by Ray Serve on a cluster."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from torchsurgeon.cli.arguments import number, whole_number
from torchsurgeon.errors import ServerError

# What one server does and a cluster does not, by the names of the parsed arguments.
_NOT_WITH_RAY = (
    "leaf", "verify", "codec", "backend", "backend_sample", "backend_limits", "threads", "concurrency",
    "max_connections", "max_connections_per_address", "grace_s", "max_priority", "tls_cert", "tls_key",
    "tls_client_ca", "log_format", "access_log", "metrics", "page", "allow_load", "check",
)  # fmt: skip
_ONLY_WITH_RAY = ("replicas", "max_replicas", "ongoing", "cpus", "gpus", "models_per_replica")


def add_ray_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``--ray``, and how far the server scales with it."""
    group = parser.add_argument_group("on a Ray cluster")
    group.add_argument(
        "--ray",
        action=argparse.BooleanOptionalAction,
        help="serve by Ray Serve, on the cluster that this machine belongs to or on this machine alone (default: by "
        "one process)",
    )
    group.add_argument(
        "--replicas", type=whole_number(1), default=1, metavar="N", help="fewest replicas (default: %(default)s)"
    )
    group.add_argument(
        "--max-replicas", type=whole_number(1), default=8, metavar="N", help="most replicas (default: %(default)s)"
    )
    group.add_argument(
        "--ongoing",
        type=number,
        default=4.0,
        metavar="N",
        help="requests, waiting and running, that a replica is meant to have; with more, replicas are added "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--cpus", type=number, default=1.0, metavar="N", help="processor cores of a replica (default: %(default)s)"
    )
    group.add_argument(
        "--gpus",
        type=number,
        default=0.0,
        metavar="N",
        help="GPUs of a replica, such as 0.25 for four replicas on one (default: %(default)s, which runs on the CPU)",
    )
    group.add_argument(
        "--models-per-replica",
        type=whole_number(1),
        default=8,
        metavar="N",
        help="models that a replica holds at a time (default: %(default)s)",
    )


def check_without_ray(options: argparse.Namespace) -> None:
    """Check that nothing is said of replicas where one process serves, unless --no-ray says that this is meant.

    Raises:
        ServerError: an option is given that only a cluster has.
    """
    given = _given(options, _ONLY_WITH_RAY) if options.ray is None else ()
    if given:
        raise ServerError(
            f"{given[0]} says how a Ray cluster serves, and one process has no replicas; add --ray, or leave it out"
        )


def run_on_ray(
    options: argparse.Namespace, models: Mapping[str, str], weights: Mapping[str, str], inputs: Mapping[str, str]
) -> None:
    """Serve by Ray Serve until the process is interrupted.

    Args:
        options: the parsed arguments of ``torchsurgeon serve``.
        models: the SPEC of each model by its name.
        weights: weights files by model name.
        inputs: inputs by model name.

    Raises:
        ServerError: an option is given that a cluster does not have, or an address is open to others unguarded.
    """
    from torchsurgeon.serve.ray_options import RayOptions
    from torchsurgeon.serve.server import is_loopback

    given = _given(options, _NOT_WITH_RAY)
    if given:
        raise ServerError(f"{given[0]} is not there with --ray; leave it out, or put a proxy before the cluster")
    if not (is_loopback(options.host) or options.token_file or options.insecure):
        raise ServerError(
            f"an address that other machines can reach needs a token: give --token-file FILE for {options.host[:300]}, "
            "or --insecure to let everyone who can reach it in"
        )
    found = RayOptions(
        models,
        weights=weights,
        input_specs=inputs,
        seed=options.seed,
        replicas=options.replicas,
        max_replicas=max(options.replicas, options.max_replicas),
        ongoing=options.ongoing,
        max_queue=options.max_queue,
        cpus=options.cpus,
        gpus=options.gpus,
        models_per_replica=options.models_per_replica,
        batching="off" if not options.batching else "exact" if options.exact else "rounded",
        max_batch=options.max_batch,
        token_file=options.token_file,
    )
    from torchsurgeon.serve.ray import run

    run(found, options.host, options.port)


def _given(options: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Return which of some options are not as they are by default."""
    from torchsurgeon.cli import parser

    defaults = vars(parser().parse_args(["serve", "a=b"]))
    return [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) != defaults[name]]
