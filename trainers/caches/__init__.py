"""What frozen models saw, computed once and kept on disk.

`encoder_cache` (states of the towers), on `tensor_store`. `perception_cache` (results of external vision models), filled by
`perceive_data` and put into batches by `perceived`.
"""
