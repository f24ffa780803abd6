"""What media a processor accepts: size limits, where they may come from, and the errors raised when they break a rule.

Limits are checked from headers, before anything is decoded. Network access is off unless a `MediaPolicy` turns it on
for named hosts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

try:  # In a model folder on the Hub this file stands alone and the package may be absent.
    from unimoe.modeling_unimoe.errors_unimoe import UniMoeError
except ImportError:

    class UniMoeError(ValueError):  # type: ignore[no-redef]
        """Root of the family; catching it catches every error that unimoe raises on purpose."""


class MediaError(UniMoeError):
    """An image, video or audio input was refused.

    Attributes: kind ("image", "video" or "audio"), where (place in the input, e.g. "message 0, content 1"), reason.
    The message never repeats what a decoder said: decoder texts have leaked memory addresses and server replies.
    """

    def __init__(self, kind: str, reason: str, where: str = "") -> None:
        self.kind, self.reason, self.where = kind, reason, where
        super().__init__(f"{kind} at {where}: {reason}" if where else f"{kind}: {reason}")


class MissingPackageError(UniMoeError, ImportError):
    """An input needs an optional package that is not installed; the message names the extra that brings it."""


class PlaceholderError(UniMoeError):
    """Placeholders in the text and media given do not match, or a limit would cut a medium's features."""


class OptionError(UniMoeError):
    """An option of a call has a value that cannot work."""


class ConversationError(UniMoeError):
    """A conversation or a chat template does not have the expected form."""


@dataclass(frozen=True)
class MediaLimits:
    """Upper and lower limits; a medium outside of them is refused with a `MediaError` before it is decoded.

    Fields: pixels count width x height of one image or frame, and may be twice as many where a PIL image holds them
    decoded already (vLLM measures itself with one of 10,000 x 10,000); seconds are those of a whole clip;
    `max_text_characters` limits all texts of one conversation together; `max_decoded_frames` bounds the decoding work
    per video.
    """

    max_file_bytes: int = 1 << 30
    max_image_pixels: int = 50_000_000
    min_audio_samples: int = 1
    max_audio_seconds: float = 3600.0
    min_sampling_rate: int = 4000
    max_sampling_rate: int = 192_000
    max_audio_channels: int = 8
    max_video_seconds: float = 3600.0
    max_video_frames: int = 250_000
    max_video_pixels: int = 36_000_000
    max_decoded_frames: int = 2400
    max_text_characters: int = 2_000_000


@dataclass(frozen=True)
class MediaPolicy:
    """Where media may come from.

    Fields:
        media_root: folder that relative paths start from; when given, files outside of it (after following symbolic
            links) are refused. None: any readable regular file.
        allow_paths: False refuses every path, for servers that only take uploads.
        allow_network: False (default) refuses every http(s) URL without resolving its name.
        allowed_hosts: host names that may be contacted; matched exactly, no wildcards.
        allow_plain_http: also allow http, not only https.
        network_seconds, network_bytes: caps for one download; redirects are never followed.
        limits: `MediaLimits`.
    """

    media_root: str | None = None
    allow_paths: bool = True
    allow_network: bool = False
    allowed_hosts: frozenset[str] = frozenset()
    allow_plain_http: bool = False
    network_seconds: float = 20.0
    network_bytes: int = 64 << 20
    limits: MediaLimits = field(default_factory=MediaLimits)

    def rooted(self, media_root: str | None) -> "MediaPolicy":
        """This policy with another `media_root`; as it is for None."""
        return self if media_root is None else replace(self, media_root=str(media_root))


DEFAULT_POLICY = MediaPolicy()


@contextmanager
def refuse_on_failure(kind: str, where: str, reason: str) -> Iterator[None]:
    """Turn whatever a third-party decoder raises into a `MediaError` with our own words.

    Decoders raise anything on hostile input (struct.error, SyntaxError, IndexError, ...), so this is the one place
    that catches every exception; missing packages and our own refusals pass through.
    """
    try:
        yield
    except (UniMoeError, ImportError):
        raise
    except Exception:
        raise MediaError(kind, reason, where) from None


def check_audio(samples: int, rate: Any, channels: int, policy: MediaPolicy, where: str) -> None:
    """Refuse, from header figures alone, audio outside of the limits."""
    limits = policy.limits
    if not _is_whole(rate):
        raise MediaError("audio", f"its sampling rate must be a whole number of Hz, got {rate!r}", where)
    if not limits.min_sampling_rate <= rate <= limits.max_sampling_rate:
        allowed = f"{limits.min_sampling_rate} to {limits.max_sampling_rate}"
        raise MediaError("audio", f"its sampling rate is {rate} Hz; allowed are {allowed} Hz", where)
    if not 1 <= channels <= limits.max_audio_channels:
        raise MediaError("audio", f"it has {channels} channels; allowed are 1 to {limits.max_audio_channels}", where)
    if samples < limits.min_audio_samples:
        raise MediaError("audio", "it is empty", where)
    if samples > limits.max_audio_seconds * rate:
        seconds = f"{samples / rate:.0f} s; allowed are {limits.max_audio_seconds:g} s"
        raise MediaError("audio", f"it lasts {seconds}", where)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and float(value).is_integer()
