"""The Hub, asked once and briefly: a machine without network must not wait for it.

huggingface_hub follows its own timeouts and retries, and against a network that swallows packets it waits for minutes
(measured: over 120 s). So one small request with a deadline goes first, and a Hub that did not answer it is not asked
again by this process.
"""

import queue
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from .package_errors import PartError

_DEADLINE_SECONDS = 4.0
# Configuration, safetensors weights and tokenizer files of the top folder; never pickles.
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_silent_endpoints: dict[str, str] = {}  # endpoint → why


def hub_snapshot(hub_id: str, patterns: Sequence[str] = MODEL_FILES, *, local_only: bool = False) -> Path:
    """Folder of the model `hub_id`: from the Hub, or from its local cache if the Hub is silent or not to be asked.

    Args:
        patterns: which files of the top folder are wanted.
        local_only: do not ask the Hub; HF_HUB_OFFLINE means the same.

    Raises:
        PartError: the model is not there, or it is not in the cache and the Hub does not answer within 4 seconds.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    offline = local_only or bool(constants.HF_HUB_OFFLINE)
    silence = "" if offline else why_silent(constants.ENDPOINT, f"models/{hub_id}")
    try:
        folder = snapshot_download(
            hub_id,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],
            local_files_only=offline or bool(silence),
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        if silence:
            reason = f"{constants.ENDPOINT}: {silence}"
        elif offline:
            reason = "it is not in the local cache"
        raise PartError(f"{hub_id} cannot be had from the Hub ({reason}). Check the name and the network.") from error
    return Path(folder)


def why_silent(endpoint: str, name: str) -> str:
    """Why `endpoint` answers nothing at all before the deadline; an empty text if it does answer.

    Args:
        name: what is asked for, "models/owner/name" or "datasets/owner/name".
    """
    if endpoint not in _silent_endpoints:
        outcome: queue.SimpleQueue[str] = queue.SimpleQueue()
        # A thread, because name resolution takes no timeout; a daemon, so that nobody waits for it at exit.
        asking = threading.Thread(target=_ask, args=(f"{endpoint}/api/{name}", outcome), daemon=True)
        asking.start()
        try:
            why = outcome.get(timeout=_DEADLINE_SECONDS)
        except queue.Empty:
            why = "no answer"
        if not why:
            return ""
        _silent_endpoints[endpoint] = why
    return _silent_endpoints[endpoint]


def _ask(url: str, outcome: "queue.SimpleQueue[str]") -> None:
    """Put what went wrong into `outcome`, or an empty text when the server answered, with whatever status."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_DEADLINE_SECONDS).close()
        outcome.put("")
    except urllib.error.HTTPError:
        outcome.put("")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        # Certificates are the Hub client's own affair (it may know others): somebody is there.
        outcome.put("" if isinstance(reason, ssl.SSLError) else str(reason))
