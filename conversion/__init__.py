"""Checkpoints on disk: read, described, made sparse, taken over from Uni-MoE, given back, published. A map of the files:

Upcycling a dense model: `upcycle` (the arithmetic, in memory too), `stream_upcycle` (folder to folder), `compare`,
`receipt`.

Assembling tuned dense models: `assemble`, `expert_ffns` (where experts come from), `assembly_receipt`.

Importing released Uni-MoE models: `import_unimoe` (start here), `import_receipt`. What the original ends up with:
`unimoe_files`, `unimoe_experts`, `unimoe_lora`. What that is in ours: `unimoe_variant`, `unimoe_keys`, `unimoe_config`,
`unimoe_processor`; `unimoe_adapter` keeps LoRA apart. Single blocks of DCMoE and UniMoE-Audio: `dcmoe_keys`.

Exporting to Uni-MoE's layout: `export_unimoe` (start here), `export_eight_experts`, `unimoe_originals`.

For all of them: `io` (files, tensor by tensor), `sources` (dense models to start from), `llama_family` (those of other
classes), `meta_model` and `parameters` (names, shapes, counts), `model_card`, `hub` (the folder that loads without us).
`description` is what the command inspect shows.
"""
