"""Dense models become sparse ones.

Upcycling: `sparsity` (what it is to become), `upcycle` (in memory), `stream_upcycle` (folder to folder), `group_presets`
and `group_options` (groups of experts by name, or as a person gives them), `expert_init` and `router_init` with `prompted_rows` (how experts and routers start), `exactness`
(whether it must be the same function), `compare` and `receipt` (the proof that it is).

Assembling tuned dense models: `assemble`, `expert_ffns` (where experts come from), `assembly_receipt`.
"""
