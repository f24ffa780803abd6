"""Serves the page of one model."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..conversion.publishing.model_card import modalities_of
from ..processing.media_policy_unimoe import MediaPolicy
from ..serving.answering import Answerer, load_answerer
from ..serving.sight import let_perceive
from .settings import DemoSettings


class DemoServer:
    """Loads the model at once; `run()` then serves until it is stopped. Uploads are deleted by `close()`.

    Needs the extra `demo`. Raises UniMoeError as `open_model` does.
    """

    def __init__(self, settings: DemoSettings) -> None:
        self.settings = settings
        answerer = load_answerer(settings.model, settings.device, settings.options, settings.quantize)
        self.note = let_perceive(settings.model, answerer.model, answerer.processor)
        self._folder = TemporaryDirectory(prefix="unimoe-demo-")
        uploads = Path(self._folder.name).resolve()
        # Read by Gradio when it is imported and when parts of a page are made.
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", GRADIO_TEMP_DIR=str(uploads))
        answerer.processor.media_policy = MediaPolicy(media_root=str(uploads), limits=settings.media_limits)
        self._prepare(answerer, uploads)

    def _prepare(self, answerer: Answerer, folder: Path) -> None:
        # Gradio reads the environment when it is imported.
        from .answer_line import AnswerLine
        from .examples import examples_for
        from .guard import PageGuard
        from .hosting import PageHost
        from .login import Login
        from .page import Exhibit, build_page, mounted
        from .uploads import UploadFolder

        settings = self.settings
        modalities = modalities_of(answerer.model.config)
        exhibit = Exhibit(_title(settings.model), modalities, examples_for(modalities, folder))
        self.line = AnswerLine(answerer, settings.max_users)
        page = mounted(build_page(exhibit, self.line), settings)
        uploads = UploadFolder(folder, settings.max_kept_bytes)
        uploads.keep_what_is_there()
        app: Any = PageGuard(page, uploads, settings.max_upload_bytes)
        if settings.password is not None:
            app = Login(app, settings.password, settings.root_path + "/")
        self.server = PageHost(app, page, self.line, settings)

    def run(self) -> None:
        """Serve until the process is interrupted, or `stop` is called from another thread."""
        self.server.run()

    def stop(self) -> None:
        self.server.should_exit = True

    def close(self) -> None:
        """End the answers and delete the uploads."""
        self.line.close()
        self._folder.cleanup()


def _title(model: str) -> str:
    """A Hub id as it is; of a folder its last two names, since folders of models are often just called "model"."""
    return "/".join(Path(model).parts[-2:]).lstrip("/") or model
