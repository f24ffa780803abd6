"""A Hub that is silent or not to be asked."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from unimoe import hub_access
from unimoe.errors import ConversionError
from unimoe.model_folder import resolve_folder


def test_silent_hub_is_given_up_after_the_deadline_and_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts and never answers, as a firewall that swallows packets looks."""
    monkeypatch.setattr(hub_access, "_DEADLINE_SECONDS", 0.2)
    monkeypatch.setattr(hub_access, "_silent_endpoints", {})
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        silences = {hub_access.why_silent(endpoint, "models/owner/model") for _ in range(2)}
        assert len(silences) == 1
        assert silences <= {"no answer", "timed out"}
        server.setblocking(False)
        server.accept()[0].close()
        with pytest.raises(BlockingIOError):
            server.accept()  # the second call did not ask


def test_conversion_takes_what_the_cache_of_a_silent_hub_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot(hub_id: str, *, local_files_only: bool, **_: object) -> str:
        assert local_files_only
        if hub_id == "owner/cached":
            return str(tmp_path)
        raise LocalEntryNotFoundError("nothing here")

    monkeypatch.setattr(hub_access, "why_silent", lambda endpoint, name: "no answer")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_folder("owner/cached", ("*.json",)) == tmp_path
    with pytest.raises(
        ConversionError, match=r"'owner/absent' is no folder, and owner/absent cannot be had .*no answer"
    ):
        resolve_folder("owner/absent", ("*.json",))


def test_offline_hub_fails_at_once_in_a_fresh_process(tmp_path: Path) -> None:
    code = (
        "from unimoe.quickstart.parts import resolve_part\n"
        "try:\n    resolve_part('vision-tower', 'owner/model')\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("PartError owner/model cannot be had from the Hub (it is not in the local cache)")
