"""A stand-in for the Hub's HTTP API on 127.0.0.1: repositories are created, committed to and downloaded from.

It speaks the part of the protocol that `huggingface_hub` needs for models: creation, pre-upload, LFS, commits, listing
and resolving of files. Everything is kept in memory.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubStandIn:
    """`repositories[id][path]` is a file's content; `environment` makes a fresh process talk to this Hub only."""

    def __init__(self, home: Path) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.unknown_requests: list[str] = []
        self.address = ""
        self._home = home

    @property
    def environment(self) -> dict[str, str]:
        kept = {
            name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG", "OMP_NUM_THREADS") if name in os.environ
        }
        return kept | {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(self._home),
            "HF_TOKEN": "hf_of_the_stand_in",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }


@contextmanager
def running_hub(home: Path) -> Iterator[HubStandIn]:
    """A stand-in that serves until the block ends; clients keep their cache in `home`."""
    hub = HubStandIn(home)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._send_file(match[1], match[2])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            return self._send_info(match[1])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+(/.*)?", path):
            return self._send_tree(match[1], (match[2] or "").lstrip("/"))
        return self._unknown()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request['organization']}/{request['name']}"
            self.hub.repositories.setdefault(name, {})
            return self._send_json({"url": f"{self.hub.address}/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml":
            return self._send_json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", path):
            return self._send_json({"files": [_upload_mode(file) for file in json.loads(body)["files"]]})
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._send_json({"objects": [self._lfs_action(one) for one in json.loads(body)["objects"]]})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            self._commit(match[1], body)
            url = f"{self.hub.address}/{match[1]}/commit/{COMMIT}"
            return self._send_json({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        return self._unknown()

    def do_PUT(self) -> None:
        body = self._body()
        oid = self.path.rsplit("/", 1)[-1]
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send(400, b"the content does not match its oid")
        self.hub.lfs_objects[oid] = body
        return self._send(200, b"")

    def _commit(self, repository: str, body: bytes) -> None:
        files = self.hub.repositories[repository]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs_objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)

    def _lfs_action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.hub.address}/lfs/{wanted['oid']}", "header": {}}
        return {"oid": wanted["oid"], "size": wanted["size"], "actions": {"upload": upload}}

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _send_tree(self, repository: str, folder: str) -> None:
        files = self.hub.repositories.get(repository, {})
        inside = [self._entry(name, files[name]) for name in files if not folder or name.startswith(folder + "/")]
        if folder and not inside:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        return self._send_json(inside)

    def _send_info(self, repository: str) -> None:
        if repository not in self.hub.repositories:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": name} for name in self.hub.repositories[repository]]
        return self._send_json(
            {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings, "tags": []}
        )

    def _send_file(self, repository: str, name: str) -> None:
        if repository not in self.hub.repositories:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        if name not in self.hub.repositories[repository]:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = self.hub.repositories[repository][name]
        return self._send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def _unknown(self) -> None:
        self.hub.unknown_requests.append(f"{self.command} {self.path}")
        self._send(404, b"")

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send_json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing on the test's screen."""


def _upload_mode(file: dict[str, Any]) -> dict[str, Any]:
    mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
