"""What may be set about a demo."""

from dataclasses import dataclass, field
from typing import Any

from ..processing.media_policy_unimoe import MediaLimits

# All uploads together may take this many times what one may.
_KEPT_UPLOADS = 32


@dataclass(frozen=True)
class DemoSettings:
    """How a model is shown.

    Args:
        model: folder or Hub id.
        host, port: where it listens.
        root_path: the path below which a proxy offers the page, e.g. "/demo".
        device: cuda where there is one, else cpu, for None.
        options: of `generate`.
        max_users: people who are answered or wait for an answer at once.
        max_upload_bytes: of one request that uploads.
        max_media_seconds: length of one audio or video clip.
        password: None lets everybody in.
        quantize: hold the weights in "int8" or "int4".
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 7860
    root_path: str = ""
    device: str | None = None
    options: dict[str, Any] = field(default_factory=lambda: {"max_new_tokens": 256, "do_sample": False})
    max_users: int = 16
    max_upload_bytes: int = 64 << 20
    max_media_seconds: float = 600.0
    password: str | None = field(default=None, repr=False)
    quantize: str | None = None

    @property
    def max_kept_bytes(self) -> int:
        """Of all uploads together; the oldest make room."""
        return _KEPT_UPLOADS * self.max_upload_bytes

    @property
    def media_limits(self) -> MediaLimits:
        return MediaLimits(
            max_file_bytes=self.max_upload_bytes,
            max_audio_seconds=self.max_media_seconds,
            max_video_seconds=self.max_media_seconds,
            max_text_characters=100_000,
        )
