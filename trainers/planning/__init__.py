"""What a run will need, before it starts.

`plan` (steps and files, always printed), `run_plan` (start here: memory and time, without weights), made of `plan_model`,
`plan_data`, `memory_plan`, and shown by `plan_text`. `speed` measures steps where a stage has a time limit.
"""
