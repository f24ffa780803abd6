"""Checkpoints that are whole or ignored, and that any number of processes can go on from.

`checkpoints` (start here), `resumable` (the Trainer's part), `folder_lock` (one writer). What is in them: `state_tree` (nested
states without pickles), `optimizer_state`, `random_state`. Spread over ranks: `sharded_checkpoints`, `sharded_tensors`,
`optimizer_parts`.
"""
