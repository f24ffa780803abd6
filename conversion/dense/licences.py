"""What a model folder says of its licence, in the fields that the Hub knows."""

from pathlib import Path
from typing import Any

import yaml

_FIELDS = ("license", "license_name", "license_link")


def licence_metadata(folder: Path) -> dict[str, str]:
    """What the model card in a folder says: `license`, and for others `license_name` and `license_link`.

    A folder without such a card, but with a licence file, has a link to that.
    """
    stated = {name: value for name, value in _card_metadata(folder).items() if name in _FIELDS}
    found = {name: value for name, value in stated.items() if isinstance(value, str)}
    files = sorted(path.name for path in folder.glob("LICENSE*"))
    if "license" not in found and files:
        found |= {"license": "other", "license_link": files[0]}
    return found


def _card_metadata(folder: Path) -> dict[str, Any]:
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    try:
        metadata = yaml.safe_load(text[4 : text.index("\n---", 4)])
    except yaml.YAMLError:
        return {}
    return metadata if isinstance(metadata, dict) else {}
