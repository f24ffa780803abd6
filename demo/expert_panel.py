"""Which experts the last answer used, as HTML."""

from ..pages.heat_map import heat_map
from ..pages.html_page import escape
from ..serving.answering import Reply

# Times an even share, from which on a cell has its full shade.
_FULL = 3.0
_TITLE = "<h2>Experts of the last answer</h2>"
BEFORE = f"{_TITLE}<p class=note>After an answer this shows which experts each kind of its tokens went to.</p>"


def expert_panel(reply: Reply) -> str:
    """A table of shades for every modality of the conversation: a row per sparse layer, a column per expert."""
    top = (
        f"{_TITLE}<p class=note>{_count(reply.prompt_tokens, 'token')} read, {_count(reply.new_tokens, 'token')} written "
        f"in {reply.seconds:.1f} s</p>"
    )
    if reply.load is None:
        return top + "<p class=note>This model is dense: it has no experts.</p>"
    load = reply.load
    full = min(1.0, _FULL / len(load.experts))
    tables = "".join(
        heat_map(modality, [f"layer {layer}" for layer in load.layers], load.experts, rows, full)
        for modality, rows in load.modalities.items()
    )
    note = "Percent of a modality's tokens, in the whole conversation so far, that went to each expert."
    return f"{top}{tables}<p class=note>{escape(note)}</p>"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
