"""`unimoe serve`: a model over HTTP, as OpenAI's clients talk to it."""

import argparse
import sys
from typing import TYPE_CHECKING

from ..errors import UniMoeError
from ..model_folder import require_model
from ._argument_types import add_address, add_quantize, positive
from ._beforehand import opening, require_address, require_extra
from ._perception_options import add_perception_options, models_for_answers

if TYPE_CHECKING:
    from ..serving.server import ModelServer

_EPILOG = """\
examples:
  unimoe serve quickstart-out/model
  unimoe serve you/your-model --port 9000 --device cuda

  from openai import OpenAI
  client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
  client.chat.completions.create(model="quickstart-out/model", messages=[{"role": "user", "content": [
      {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}},
      {"type": "text", "text": "What is in the picture?"}]}])

Pictures, video (video_url) and audio (audio_url, input_audio) come inside the request, as data: URLs; the server opens no
files and, but for --media-host, no addresses for its clients. It answers on this machine only unless --host says otherwise, and it knows no
passwords: put a proxy in front of it before you open it to a network.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "serve",
        help="serve a model over HTTP (OpenAI-compatible)",
        description="Serve a model over HTTP at /v1/chat/completions, with streaming, through transformers' server.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id; also its name for clients")
    add_address(parser, 8000)
    parser.add_argument("--device", default="auto", help="cpu, cuda:0, ... (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: that of the weights)")
    add_quantize(parser)
    parser.add_argument(
        "--continuous-batching",
        action="store_true",
        help="generate requests without media together, as they come, instead of one after the other",
    )
    parser.add_argument(
        "--cache-tokens",
        type=int,
        metavar="N",
        help="of all texts in the running batch (default: four of the model's greatest length)",
    )
    parser.add_argument(
        "--media-host",
        metavar="HOST",
        action="append",
        default=[],
        help="fetch media from https://HOST/... for clients (again for several; default: from nowhere)",
    )
    parser.add_argument(
        "--max-request-mb",
        type=positive,
        default=64,
        metavar="N",
        help="longest request, media included (default: 64)",
    )
    looks = add_perception_options(
        parser, "what looks at images for a model with mixers (default: what its folder names)"
    )
    looks.add_argument("--no-perception", action="store_true", help="nothing: answer from the images alone")


def run(args: argparse.Namespace) -> int:
    """Load the model, say where it is, serve until stopped."""
    if args.cache_tokens is not None and not args.continuous_batching:
        raise UniMoeError("--cache-tokens goes with --continuous-batching.")
    require_extra("serve", "fastapi", "uvicorn", "openai", "pydantic")
    require_address(args.host, args.port)
    require_model(args.model)
    with opening(args.model):
        server = _open(args)
    if server.note is not None:
        print(f"unimoe: {server.note}", file=sys.stderr)
    print(f"{args.model} at http://{args.host}:{args.port}/v1 (Ctrl-C stops)", flush=True)
    server.run()
    return 0


def _open(args: argparse.Namespace) -> "ModelServer":
    from ..hub_access import MODEL_FILES
    from ..model_folder import resolve_folder
    from ..model_opener import check_folder, require_unquantised
    from ..serving.freed_memory import give_back_freed_memory
    from ..serving.server import ModelServer, ServerSettings

    folder = resolve_folder(args.model, MODEL_FILES)
    check_folder(folder)
    if args.quantize is not None:
        require_unquantised(folder)
    settings = ServerSettings(
        args.model,
        args.host,
        args.port,
        args.device,
        args.dtype,
        longest_body=args.max_request_mb << 20,
        continuous_batching=args.continuous_batching,
        cache_tokens=args.cache_tokens,
        quantize=args.quantize,
        perception=models_for_answers(args),
        no_perception=args.no_perception,
        media_hosts=frozenset(args.media_host),
    )
    give_back_freed_memory()
    return ModelServer(settings)
