"""Models with mixers that answer people: other vision models look at the images, or it is said that none do."""

from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..hub_access import MODEL_FILES
from ..model_folder import resolve_folder

if TYPE_CHECKING:
    from ..processing.perception.choice import PerceiverChoice


def let_perceive(
    name: str, model: Any, processor: Any, choice: "PerceiverChoice | None" = None, without: bool = False
) -> str | None:
    """Have a loaded model's processor look at images with the chosen vision models; returns what a person should know.

    Args:
        name: folder or Hub id of the model, whose `perception.json` chooses where `choice` is None.
        without: no vision model is to look.

    Raises:
        OptionError: vision models are chosen for a model that has no mixers, or together with `without`.
        DataError: the model's perception.json is damaged.
    """
    if choice is not None and without:
        raise OptionError("--no-perception and options that name vision models exclude each other: leave one out.")
    if model.config.text_config.mixer_config is None:
        if choice is not None:
            raise OptionError(
                f"{name} has no mixers, so it cannot read what other vision models see: leave the options that name them "
                "out."
            )
        return None
    if without:
        return None
    from ..processing.perception.choice import PERCEPTION_FILE, PerceiverChoice
    from ..processing.perception.on_the_fly import perceive_images

    choice = choice or PerceiverChoice.of_folder(resolve_folder(name, MODEL_FILES))
    if choice is None or not choice.lines():
        return (
            f"{name} has mixers for what other vision models see in an image, but has no {PERCEPTION_FILE} that names any: "
            "it answers from images alone."
        )
    perceive_images(processor, choice.perceiver(device=str(model.device)))
    return f"images are looked at for {name} by other vision models ({', '.join(choice.lines())})."
