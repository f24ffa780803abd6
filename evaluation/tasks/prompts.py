"""What is sent along with a question. Every system of the papers has its own wording."""

from .item import Item

SYSTEMS = ("unimoe", "moiie", "moai")

BARE = "{question}"
AS_GIVEN = "{given}"
AS_GIVEN_AND_SHORT = "{given}\nAnswer the question using a single word or phrase."
SHORT = "{hint}{question}\nAnswer the question using a single word or phrase."
YES_NO = "{question}\nPlease answer yes or no."
LETTER = "{hint}{question}\n{options}\nAnswer with the option's letter from the given choices directly."
LETTER_ONE_LINE = (
    "{hint}{question}\n{options_in_line}\nAnswer with the option's letter from the given choices directly."
)
LETTER_CHINESE = "{hint}{question}\n{options}\n请直接回答选项字母。"
SHORT_CHINESE = "{question}\n请用一个词或短语直接回答。"
TRUE_FALSE_CHINESE = "{question}\n请判断对错，直接回答“对”或“错”。"  # noqa: RUF001
UNANSWERABLE = (
    "{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
    "Answer the question using a single word or phrase."
)
TRANSCRIBE = "Transcribe the speech."
CAPTION_SOUND = "Describe the sound in one sentence."


def prompt_text(item: Item, template: str) -> str:
    """The template with the item's question, options (one per line, or in one line) and hint in it."""
    options = [f"{letter}. {text}" for letter, text in zip(item.letters, item.options, strict=True)]
    return template.format_map(
        {
            "question": item.question,
            "given": item.given,
            "options": "\n".join(options),
            "options_in_line": " ".join(options),
            "hint": f"{item.hint}\n" if item.hint else "",
        }
    )
