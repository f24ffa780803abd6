"""Many processes.

`settings` (the `parallel` section of a recipe; start here), `parallel_run` (ranks join, load the model, give it back), `ranks`
(what one does for all), `heartbeat` (when one dies, the others stop), `tensor_ranks` (who shares a batch),
`spread_lora` (whole adapters beside weights that are cut), `deepspeed_models` (what DeepSpeed gets, and leaves),
`head_norms` (gradients of norms that see a rank's heads only), `planned_forwards` (what transformers puts around modules).
"""
