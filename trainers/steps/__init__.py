"""What happens in an optimizer step.

Losses: `objective`, `step_balance` (balance losses over whole steps), `balance_decay`, `loss_meter` (each apart, for the
log), `non_finite` (stopped before it reaches a weight). What moves: `trainable` (by role), `lora`, `router_bias` (loss-free
balancing).
"""
