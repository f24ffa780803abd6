"""Checkpoints on disk: read, described, made sparse, taken over from released models, given back, published.

A map of the files. Upcycling a dense model: `sparsity` (what it is to become), `upcycle` (in memory), `stream_upcycle`
(folder to folder), `group_presets` (groups of experts by name), `expert_init` and `router_init` with `prompted_rows`
(how experts and routers start), `compare`, `receipt`.

Composing a dense model of parts: `compose` (start here), `composition` (parts, choices and the configuration that they
make), `composed_part` (how a part's tensors are found), `language_part`, `vision_part`, `image_projector`,
`speech_part`, `sound_part`, `new_connectors` (what nobody has trained), `composed_processor`, `composition_receipt`.

Assembling tuned dense models: `assemble`, `expert_ffns` (where experts come from), `assembly_receipt`.

Importing released models: `import_plan` (what all imports do), `import_receipt`, `source_tensors` (what was read, and
what became of it). The language of the rules that pair their names with ours is in `key_rules`, what descendants of
LLaVA share in `llava_keys`.

Uni-MoE: `import_unimoe` (start here). What the original ends up with: `unimoe_files`, `unimoe_experts`, `unimoe_lora`.
What that is in ours: `unimoe_variant`, `unimoe_keys`, `unimoe_config`, `unimoe_processor`; `unimoe_adapter` keeps LoRA
apart. Single blocks of DCMoE and UniMoE-Audio: `dcmoe_keys`. Back to the original's layout: `export_unimoe` (start
here), `export_eight_experts`, `unimoe_originals`; `original_tokenizer` travels both ways.

MoIIE: `import_moiie` (start here), `moiie_variant`, `moiie_keys`, `moiie_config`, `bunny_processor`; and back:
`export_moiie`. Both exports read our tensors through `originals`.

The same model in other files: `layouts`, `expert_shards` (loading by rank).

For all of them: `io` (files, tensor by tensor), `finished_folder` (complete or not there), `read_back` (what was written, compared), `sources` (dense models to
start from), `llama_family` (those of other classes), `fused_layouts` and `tensor_parts` (those that fuse tensors),
`multimodal_layouts` and `picture_processor` (those that see), `encoder_folders`, `tokenizer_files`, `meta_model` and
`parameters` (names, shapes, counts), `file_digests`, `licences`, `saved_receipt`, `model_card`, `hub` (the folder that
loads without us). `description` is what the command inspect shows.
"""
