"""`unimoe demo`: a model on a web page."""

import argparse
import getpass
import ipaddress
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UniMoeError
from ..model_folder import require_model
from ._argument_types import add_address, add_quantize, positive
from ._beforehand import opening, require_address, require_extra
from .chat import generation_options

if TYPE_CHECKING:
    from ..demo.server import DemoServer

PASSWORD_VARIABLE = "UNIMOE_DEMO_PASSWORD"
_EPILOG = f"""\
examples:
  unimoe demo quickstart-out/model
  unimoe demo you/your-model --port 9000 --device cuda --temperature 0.7
  unimoe demo quickstart-out/model --host 0.0.0.0 --password-file password.txt

The page is for this machine only unless --host says otherwise, is never shared through another server, and fetches nothing
from a network. A password can also come from the environment variable {PASSWORD_VARIABLE}. docs/demo.md says what is
guarded, and how to put the page behind a proxy.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "demo",
        help="talk to a model on a web page",
        description="Open a web page for a model: text, pictures, sound, video, and which experts an answer used.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a unimoe model")
    add_address(parser, 7860)
    parser.add_argument("--root-path", default="", metavar="PATH", help="where a proxy offers the page, e.g. /demo")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    add_quantize(parser)
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: always the likeliest word (default); 1: sample"
    )
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest words that make up P")
    parser.add_argument(
        "--max-users", type=positive, default=16, metavar="N", help="answered or waiting at once (default: 16)"
    )
    parser.add_argument("--max-upload-mb", type=positive, default=64, metavar="N", help="largest upload (default: 64)")
    parser.add_argument(
        "--max-media-seconds", type=positive, default=600, metavar="N", help="longest audio or video (default: 600)"
    )
    secret = parser.add_mutually_exclusive_group()
    secret.add_argument("--password", action="store_true", help="ask here for a password that the page shall ask for")
    secret.add_argument("--password-file", type=Path, metavar="FILE", help="its first line is that password")


def run(args: argparse.Namespace) -> int:
    """Load the model, say where it is, serve until stopped."""
    options = generation_options(args)
    if args.root_path and (not args.root_path.startswith("/") or args.root_path.endswith("/")):
        raise UniMoeError(f"--root-path is {args.root_path!r}; it must begin with / and not end with one, like /demo.")
    require_extra("demo", "gradio")
    require_address(args.host, args.port)
    password = given_password(args)
    require_model(args.model)
    with opening(args.model):
        server = _open(args, options, password)
    if server.note is not None:
        print(f"unimoe: {server.note}", file=sys.stderr)
    if password is None and not _is_loopback(args.host):
        print(
            f"unimoe: {args.host} can be reached by others and no password is set; --password asks for one.",
            file=sys.stderr,
        )
    print(f"{args.model} at http://{args.host}:{args.port}{args.root_path} (Ctrl-C stops)", flush=True)
    try:
        server.run()
    finally:
        server.close()
    return 0


def _open(args: argparse.Namespace, options: dict[str, Any], password: str | None) -> "DemoServer":
    from ..demo.server import DemoServer
    from ..demo.settings import DemoSettings
    from ..serving.freed_memory import give_back_freed_memory

    give_back_freed_memory()
    return DemoServer(
        DemoSettings(
            args.model,
            args.host,
            args.port,
            args.root_path,
            args.device,
            options,
            args.max_users,
            args.max_upload_mb << 20,
            args.max_media_seconds,
            password,
            args.quantize,
        )
    )


def given_password(args: argparse.Namespace) -> str | None:
    """The password from a prompt, a file or the environment; None where none is set."""
    if args.password:
        password, source = getpass.getpass("Password of the page: "), "What was typed"
    elif args.password_file is not None:
        try:
            text = args.password_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UniMoeError(f"--password-file {args.password_file} cannot be read ({error}).") from error
        password, source = text.partition("\n")[0].strip("\r"), f"--password-file {args.password_file}"
    elif PASSWORD_VARIABLE in os.environ:
        password, source = os.environ[PASSWORD_VARIABLE], PASSWORD_VARIABLE
    else:
        return None
    if not password:
        raise UniMoeError(f"{source} is an empty password: give one, or leave it out to let everybody in.")
    return password


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
