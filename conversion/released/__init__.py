"""Released models become ours, and ours become theirs again.

All imports: `import_plan` (what all of them do), `import_receipt`.
All exports read our tensors through `originals`; `original_tokenizer` travels both ways.

Uni-MoE: `import_unimoe` (start here). What the original ends up with: `unimoe_files`, `unimoe_experts`, `unimoe_lora`.
What that is in ours: `unimoe_variant`, `unimoe_keys`, `unimoe_config`, `unimoe_processor`; `unimoe_adapter` keeps LoRA
apart. Single blocks of DCMoE and UniMoE-Audio: `dcmoe_keys`. Back to the original's layout: `export_unimoe` (start
here), `export_eight_experts`, `unimoe_originals`.

MoIIE: `import_moiie` (start here), `moiie_variant`, `moiie_keys`, `moiie_config`, `bunny_processor`; and back:
`export_moiie`.

MoAI: `import_moai` (start here), `moai_keys`, `moai_config`, `moai_tokenizer`, `moai_processor`; and back: `export_moai`.
The scene graphs that MoAI reads: `import_psgtr`.
"""
