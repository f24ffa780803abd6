"""Checkpoints on disk: read, described, made sparse, taken over from released models, given back, published.

Commands of `unimoe convert`, and the folder of each: `composing` (compose), `upcycling` (upcycle, assemble), `released`
(unimoe, moiie, moai and their exports). All of them stand on `checkpoints` (tensors in files, names, layouts), `dense` (models
to start from) and `publishing` (what lies beside the weights). The text of every folder is a map of its files.
"""
