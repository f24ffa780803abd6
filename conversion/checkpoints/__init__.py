"""Tensors in files and their names, whatever model they belong to.

`checkpoint_reader` and `checkpoint_writer` (tensor by tensor), `pickle_files`, `bitsandbytes_tensors` (4 and 8 bits become
plain again), `read_back` (what was written, compared), `file_digests`, `finished_folder` (all of it or nothing). Names:
`key_rules` (the language of the rules that pair another's names with ours), `llava_keys` (what descendants of LLaVA share),
`tensor_parts` (fused tensors, seen one by one). `source_tensors` (what was read, and what became of it), `accounting`
(everything is used, everything is made).

A model of ours: `our_folder` (its configuration, and the tensors that it needs), `meta_model` (names and shapes, without
memory), `parameters` (counts), `router_load` (what its folder records of its routers), `expert_names` (what experts are
called wherever they are shown). In other files: `layouts`, `expert_shards` (loading by rank).
"""
