"""A language model, encoders and connectors become one dense model.

`compose` (start here), `composition` (parts and choices, and the configuration they make), `composed_part` (how a part's
tensors are found), `language_part`, `vision_part`, `image_projector`, `speech_part`, `sound_part`, `new_connectors` (what
nobody has trained), `composed_processor`, `composition_receipt`.
"""
