"""Training: recipes of stages, and the Trainer that runs each of them.

`curriculum` (start here) runs a recipe's stages in order; `trainer` is the `transformers.Trainer` of every stage. Below them,
a folder each: `recipe` (what a recipe can say), `data` (conversations become batches), `stages` (what a stage starts from,
does and leaves), `steps` (losses and what else happens in an optimizer step), `saving` (checkpoints that are whole or
ignored), `caches` (what frozen models saw, computed once), `parallel` (many processes), `planning` (memory and time,
beforehand), `telemetry` (what the routers do meanwhile). `recipes` holds ready recipes. The text of every folder is a map
of its files.
"""
