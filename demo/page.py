"""The page: a conversation, what is said next, and which experts the last answer used.

What was said is kept by the server; browsers only show it, so that they cannot put words or files into it.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import gradio
from fastapi import FastAPI

from ..errors import UniMoeError
from ..pages.html_page import escape
from .answer_line import AnswerLine, Turn
from .conversation import SUFFIXES, Message, answer, bubble, plainly, question, shown
from .examples import Example
from .expert_panel import BEFORE, expert_panel
from .look import CSS, theme
from .settings import DemoSettings

# What each modality comes in.
_FILES = {"image": "image", "video": "video", "speech": "audio", "sound": "audio"}
_SAME = gradio.skip()
# For events that wait for nothing.
_PLACES = 40


@dataclass(frozen=True)
class Exhibit:
    """The model that is shown: its name, the modalities it takes, and examples."""

    name: str
    modalities: Sequence[str]
    examples: Sequence[Example]

    @property
    def media(self) -> list[str]:
        """Kinds of files that it takes."""
        return list(dict.fromkeys(_FILES[name] for name in self.modalities if name in _FILES))


def build_page(exhibit: Exhibit, line: AnswerLine) -> gradio.Blocks:
    """The page; its media are copied into Gradio's folder for them, the environment variable GRADIO_TEMP_DIR."""
    talk = _Talk(exhibit, line)
    with gradio.Blocks(title=f"{exhibit.name} · unimoe", analytics_enabled=False) as page:
        messages = gradio.State([])
        gradio.HTML(_title(exhibit), elem_id="title", padding=False)
        with gradio.Row():
            with gradio.Column(scale=5, min_width=320):
                chat = _chat(exhibit)
                box = _box(exhibit)
                with gradio.Row(elem_id="below"):
                    hear = gradio.Checkbox(
                        label="Videos with sound",
                        visible={"video", "audio"} <= set(exhibit.media),
                        container=False,
                        min_width=180,
                    )
                    anew = gradio.Button("New conversation", size="sm", min_width=140, elem_id="anew")
            with gradio.Column(scale=3, min_width=320):
                panel = gradio.HTML(BEFORE, elem_id="experts", padding=False)
        outputs = [messages, chat, box, panel]
        settings: Any = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
        box.submit(talk.say, [box, hear, messages], outputs, **settings)
        chat.example_select(talk.say_example, [messages], outputs, **settings)
        box.stop(talk.stop, None, None, **settings)
        for begins_anew in (anew.click, chat.clear):
            begins_anew(talk.begin_anew, None, outputs, **settings)
    # Whoever waits takes one of Gradio's places; others' buttons need some too.
    page.max_threads = line.longest + _PLACES
    return page.queue()


class _Talk:
    """What happens on the page. Handlers return or yield what was said, the chat, the box and the panel."""

    def __init__(self, exhibit: Exhibit, line: AnswerLine) -> None:
        self.exhibit, self.line = exhibit, line
        self._turns: dict[str | None, Turn] = {}

    async def say(
        self, said: dict[str, Any], hear: bool, messages: list[Message], request: gradio.Request
    ) -> AsyncIterator[tuple]:
        """Answer what is in the box."""
        async for change in self._answer(said["text"], said["files"], hear, messages, request.session_hash):
            yield change

    async def say_example(
        self, messages: list[Message], chosen: gradio.SelectData, request: gradio.Request
    ) -> AsyncIterator[tuple]:
        """Answer an example. Browsers send its text and files too, which are not looked at."""
        number, examples = chosen.index, self.exhibit.examples
        if type(number) is not int or not 0 <= number < len(examples):
            yield (
                _SAME,
                [*shown(messages), bubble("⚠ There is no such example: choose one of those shown.")],
                _SAME,
                _SAME,
            )
            return
        async for change in self._answer(
            examples[number].text, examples[number].files, False, messages, request.session_hash
        ):
            yield change

    async def stop(self, request: gradio.Request) -> None:
        """End the answer; what was written so far stays."""
        turn = self._turns.get(request.session_hash)
        if turn is not None:
            turn.stop()

    async def begin_anew(self, request: gradio.Request) -> tuple:
        """Forget what was said."""
        turn = self._turns.pop(request.session_hash, None)
        if turn is not None:
            turn.stop()
        return [], [], _idle_box(None), BEFORE

    async def _answer(
        self, text: str, files: list[str], hear: bool, messages: list[Message], session: str | None
    ) -> AsyncIterator[tuple]:
        put_back = _idle_box({"text": text, "files": files})
        try:
            said = [*messages, question(text, files, self.exhibit.media, hear)]
            turn = self.line.ask(said)
        except UniMoeError as error:
            yield _SAME, [*shown(messages), bubble(f"⚠ {plainly(error)}")], put_back, _SAME
            return
        self._turns[session] = turn
        box: Any = gradio.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)
        try:
            async with aclosing(turn.progress()) as progress:
                async for _ in progress:
                    if self._turns.get(session) is not turn:  # a new conversation has begun
                        return
                    yield _SAME, [*shown(said), bubble(_so_far(turn))], box, _SAME
                    box = _SAME
        except UniMoeError as error:
            yield _SAME, [*shown(said), bubble(f"⚠ {plainly(error)}")], put_back, _SAME
            return
        finally:
            if self._turns.get(session) is turn:
                del self._turns[session]
        if turn.reply is None:  # stopped while it waited
            yield _SAME, shown(messages), put_back, _SAME
            return
        said.append(answer(turn.reply.text))
        yield said, shown(said), _idle_box(), expert_panel(turn.reply)


def _so_far(turn: Turn) -> str:
    if turn.text or not turn.ahead:
        return turn.text.strip() or "…"
    return f"Waiting: {turn.ahead} {'person is' if turn.ahead == 1 else 'people are'} answered first …"


def _idle_box(value: Any = _SAME) -> Any:
    change = {} if value is _SAME else {"value": value}
    return gradio.MultimodalTextbox(**change, submit_btn=True, stop_btn=False)


def _title(exhibit: Exhibit) -> str:
    takes = [name for name in exhibit.modalities if name != "text"]
    return f"<h1>{escape(exhibit.name)}</h1><p>Takes {escape(', '.join(['text', *takes]))}. It can be wrong.</p>"


def _chat(exhibit: Exhibit) -> gradio.Chatbot:
    examples: Any = [
        {"text": example.text, "display_text": f"{example.title}: {example.text}", "files": list(example.files)}
        for example in exhibit.examples
    ]
    return gradio.Chatbot(
        elem_id="chat",
        label="Conversation",
        show_label=False,
        height="66vh",
        examples=examples,
        buttons=[],
        # Answers are shown as they are; see `shown` for HTML.
        render_markdown=False,
        latex_delimiters=[],
        allow_file_downloads=False,
        layout="bubble",
    )


def _box(exhibit: Exhibit) -> gradio.MultimodalTextbox:
    suffixes = [suffix for kind in exhibit.media for suffix in SUFFIXES[kind]]
    can_hear = "audio" in exhibit.media
    return gradio.MultimodalTextbox(
        elem_id="box",
        label="Message",
        show_label=False,
        placeholder="Ask, or add a file" if suffixes else "Ask something",
        sources=(["upload"] if suffixes else []) + (["microphone"] if can_hear else []),  # type: ignore[arg-type]
        file_types=suffixes,
        file_count="multiple",
        max_plain_text_length=100_000,
        submit_btn=True,
        stop_btn=False,
    )


def mounted(page: gradio.Blocks, settings: DemoSettings) -> FastAPI:
    """The page as an application of its own; nothing of Gradio that reaches other servers is on."""
    return gradio.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        "/",
        server_name=settings.host,
        server_port=settings.port,
        root_path=settings.root_path or None,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        max_file_size=settings.max_upload_bytes,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        theme=theme(),
        # As `css` Gradio would put selectors of its own before ours.
        head=f"<style>{CSS}</style>",
    )
