"""Tensors in files and their names, whatever model they belong to.

`checkpoint_reader` and `checkpoint_writer` (tensor by tensor), `pickle_files`, `bitsandbytes_tensors` (4 and 8 bits become
plain again), `read_back` (what was written, compared), `file_digests`, `finished_folder` (all of it or nothing). Names:
`key_rules` (the language of the rules that pair another's names with ours), `llava_keys` (what descendants of LLaVA share),
`tensor_parts` (fused tensors, seen one by one). `source_tensors` (what was read, and what became of it), `accounting`
(everything is used, everything is made). What a configuration's model holds, without memory: `meta_model` (names and shapes), `parameters`
(counts). `description` is what the command inspect shows, `expert_names` what experts are called wherever they are shown.

The same model in other files: `layouts`, `expert_shards` (loading by rank).
"""
