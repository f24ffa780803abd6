"""What a stage starts from, does and leaves.

`stage` (one training run; start here), `stage_settings` (what it was started with), `stage_files` (what it leaves),
`stage_processor`, `start_model`. Between stages: `assembly` (experts become a sparse model), `moe_fit` (whether they can),
`mixer_stage` (MoAI's mixers).
"""
