"""``torchsurgeon serve``: the server of a split model."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torchsurgeon.cli import completion
from torchsurgeon.cli.arguments import (
    SPEC_HELP,
    WEIGHTS_HELP,
    command,
    judged_by,
    leaf_argument,
    lists,
    pairs,
    port_number,
    seconds,
    threads_argument,
    whole_number,
)
from torchsurgeon.cli.completion import completed, named, one_of
from torchsurgeon.cli.ray_serving import add_ray_arguments, check_without_ray, run_on_ray
from torchsurgeon.cli.screen import loading
from torchsurgeon.cli.serve_file import with_file
from torchsurgeon.errors import TorchSurgeonError, short

if TYPE_CHECKING:
    from torchsurgeon.cli.arguments import Commands


def add_serve(commands: Commands) -> None:
    """Declare ``torchsurgeon serve``."""
    parser = command(
        commands,
        _serve,
        "serve",
        "Serve models: run the part of each that a device does not run.",
        "alexnet=torchvision:alexnet",
        "mine=my_package.models:make --weights mine=mine.safetensors --host 0.0.0.0 --token-file tokens.txt",
    )
    parser.extend = with_file
    models = parser.add_argument(
        "models", nargs="*", metavar="NAME=SPEC", help=f"the name under which a model is served, and {SPEC_HELP}"
    )
    completed(models, named(completion.specs))
    parser.set_defaults(file_models={})
    config = parser.add_argument(
        "--config",
        metavar="FILE",
        help="a TOML file with models and with options, by their names here; what is given here wins (default: none)",
    )
    completed(config, one_of((), "toml"))
    parser.add_argument(
        "--check",
        action="store_true",
        help="read every file and load every model, say what would be served, and end (default: serve)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; one that other machines reach needs --token-file or --insecure (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--port",
        type=port_number,
        default=8000,
        help="port to listen on; 0 takes a free one and prints it (default: %(default)s)",
    )
    weights = parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help=f"weights of a model: {WEIGHTS_HELP}; may be repeated (default: random ones)",
    )
    completed(weights, named(one_of(("default",), "safetensors", "pt", "pth")))
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=SPEC",
        help="example input of a model, such as resnet=x:float32[1,3,320,320]; may be repeated (default: the example "
        "that the model comes with)",
    )
    leaf_argument(parser, "NAME=MODULE", "keep this submodule of a model whole, as the device does")
    codec = parser.add_argument(
        "--codec",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a codec that was fitted to a model (codecs --fit), as devices have it; may be repeated (default: none)",
    )
    completed(codec, named(one_of((), "fitted")))
    backend = parser.add_argument(
        "--backend",
        action="append",
        default=[],
        metavar="NAME=BACKEND",
        help="what runs a model's layers in place of eager PyTorch: onnxruntime, openvino, openvino:bf16, inductor or "
        "aot; of several with commas between, devices may choose; may be repeated (default: eager)",
    )
    completed(backend, named(one_of(completion.BACKENDS)))
    parser.add_argument(
        "--backend-sample",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a folder of your own images, which calibrates and judges a model's --backend; onnxruntime:int8 and "
        "openvino:int8 need it; may be repeated (default: none)",
    )
    parser.add_argument(
        "--backend-limits",
        action="append",
        default=[],
        metavar="NAME=LIMITS",
        help="how much a model's answers may change on --backend-sample where its --backend runs a tail, such as "
        "max-top1-change=0.01,min-cosine=0.99; a tail that changes more runs in eager PyTorch; may be repeated "
        "(default: none)",
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, metavar="N", help="seed of random weights (default: %(default)s)"
    )
    threads_argument(parser)
    parser.add_argument(
        "--max-batch",
        type=whole_number(1),
        default=64,
        metavar="N",
        help="largest batch that a request may have (default: %(default)s)",
    )
    parser.add_argument(
        "--concurrency",
        type=whole_number(1),
        metavar="N",
        help="requests of one model that run at once, each on --threads threads (default: so many that they use each "
        "core once)",
    )
    parser.add_argument(
        "--batching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run requests together that wait and are alike, where a model allows it (default: --batching)",
    )
    parser.add_argument(
        "--exact",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="run them together only as far as each answer keeps the bits that it has alone (default: --no-exact, also "
        "where it is the same to rounding, which devices are told)",
    )
    parser.add_argument(
        "--max-queue",
        type=whole_number(1),
        default=256,
        metavar="N",
        help="requests of one model that may wait; another one is answered with 503 (default: %(default)s)",
    )
    parser.add_argument(
        "--max-connections",
        type=whole_number(1),
        default=512,
        metavar="N",
        help="most connections; for another one, the one that has been idle the longest is closed (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--max-connections-per-address",
        type=whole_number(1),
        metavar="N",
        help="most connections from one address (default: half of --max-connections, and no limit for this machine's "
        "own address)",
    )
    parser.add_argument(
        "--grace-s",
        type=seconds,
        default=10.0,
        metavar="SECONDS",
        help="after SIGTERM or Ctrl-C, longest time for the requests that are under way (default: %(default)s)",
    )
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        help="tokens, one a line, of which each request must have one; name= and priority= may follow a token; read "
        "again on SIGHUP (default: none is asked for)",
    )
    parser.add_argument(
        "--insecure",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="let everyone who reaches --host in, without a token (default: not)",
    )
    parser.add_argument(
        "--max-priority",
        choices=("high", "normal", "low"),
        default="normal",
        help="highest priority that a client may ask for, unless the line of its token says priority= (default: "
        "%(default)s)",
    )
    parser.add_argument("--tls-cert", metavar="FILE", help="certificate, for https (default: http)")
    parser.add_argument("--tls-key", metavar="FILE", help="the certificate's key (default: in the certificate's file)")
    parser.add_argument(
        "--tls-client-ca",
        metavar="FILE",
        help="certificates of those who sign clients' certificates; others are not let in (default: clients need none)",
    )
    parser.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="how the log is written to standard error; with json, what is printed otherwise is part of it (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--access-log",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="write a line for each request: client, id, model, cut, status and milliseconds (default: "
        "--no-access-log)",
    )
    parser.add_argument(
        "--metrics",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="answer GET /metrics with what the server does, for Prometheus (default: no such path)",
    )
    parser.add_argument(
        "--page",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show at / how busy the server is (default: --page)",
    )
    parser.add_argument(
        "--allow-load",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="let clients have models unloaded, and loaded again (default: refuse that with 403)",
    )
    add_ray_arguments(parser)


def _serve(options: argparse.Namespace) -> None:
    # With a file, what is given on the command line comes after what stands there.
    last_wins = options.config is not None
    models = {**options.file_models, **_models(options.models)}
    weights, inputs, backends, samples, limits = (
        pairs(one, f"{option} must be NAME={value}", last_wins=last_wins)
        for option, value, one in (
            ("--weights", "FILE", options.weights),
            ("--input", "SPEC", options.input),
            ("--backend", "BACKEND", options.backend),
            ("--backend-sample", "DIR", options.backend_sample),
            ("--backend-limits", "LIMITS", options.backend_limits),
        )
    )
    leaves = lists(options.leaf, "--leaf must be NAME=MODULE")
    codecs = lists(options.codec, "--codec must be NAME=FILE")
    if not models:
        raise TorchSurgeonError("name at least one model as NAME=SPEC, or under [models] in the file of --config")
    for name in (*weights, *inputs, *leaves, *codecs, *backends, *samples, *limits):
        if name not in models:
            raise TorchSurgeonError(
                f"--weights, --input, --leaf, --codec, --backend, --backend-sample and --backend-limits take the name "
                f"of a served model; got {short(name, 100)}, and the served models are {short(list(models), 200)}"
            )
    for name in (*samples, *limits):
        if name not in backends:
            raise TorchSurgeonError(
                f"--backend-sample and --backend-limits judge what a --backend runs, and {short(name, 100)} has none; "
                f"give --backend {short(name, 100, quote=False)}=NAME, or leave them out"
            )
    if options.ray:
        run_on_ray(options, models, weights, inputs)
        return
    check_without_ray(options)
    if options.token_file is not None or options.tls_cert is not None:
        # The files are read later, so there is nothing to read again yet. And it must not end a server that starts.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with loading():
        import torch

        from torchsurgeon import serve
        from torchsurgeon.backends import find_backends

    runs = {
        name: find_backends(text, **judged_by(samples.get(name), limits.get(name), "--backend-"))
        for name, text in backends.items()
    }
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    serve.run(
        models,
        options.host,
        options.port,
        weights=weights,
        input_specs=inputs,
        leaf_modules=leaves,
        codecs=codecs,
        backends=runs,
        verify=options.verify,
        seed=options.seed,
        max_batch=options.max_batch,
        concurrency=options.concurrency,
        max_queue=options.max_queue,
        batching="off" if not options.batching else "exact" if options.exact else "rounded",
        max_connections=options.max_connections,
        max_connections_per_address=options.max_connections_per_address,
        grace_s=options.grace_s,
        token_file=options.token_file,
        insecure=options.insecure,
        max_priority=options.max_priority,
        tls_cert=options.tls_cert,
        tls_key=options.tls_key,
        tls_client_ca=options.tls_client_ca,
        log_format=options.log_format,
        access_log=options.access_log,
        metrics=options.metrics,
        allow_load=options.allow_load,
        page=options.page,
        check=options.check,
    )


def _models(texts: Sequence[str]) -> dict[str, str]:
    for text in texts:
        if "=" not in text:
            name = text.removesuffix(".pt2").rpartition("/")[2].rpartition(":")[2] or "NAME"
            raise TorchSurgeonError(
                f"a served model must be NAME=SPEC; got {short(text, 100)}; such as "
                f"{short(f'{name}={text}', 150, quote=False)}"
            )
    return pairs(texts, "a served model must be NAME=SPEC")
