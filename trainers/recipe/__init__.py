"""What a recipe can say, and reading it.

`recipe` (start here) and its parts: `recipe_parts` (adapters, experts, the sparse model), `recipe_data`, `recipe_mixers`,
`telemetry_settings`; the `parallel` section is in the folder of that name. `recipe_file` reads and writes YAML,
`recipe_values` turns its values into dataclasses.
"""
