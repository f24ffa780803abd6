"""From data files to batches.

`conversations` (what a sample is; start here). Opened: `data_sets` (all of a recipe), `data_sources` (each), `data_files`,
`hub_data`, `json_records`, `columns`, `media_paths`, `original_data` (Uni-MoE's and MoIIE's own form), `check_data` (looked
through beforehand). Put together: `batching` (which sampler), `sampler`, `original_sampler`, `stream_sampler`,
`streaming`, `packing`, `lengths`, `collator`, `bad_samples` (left out and counted).
"""
