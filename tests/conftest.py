"""What holds for every test: one thread per process, no telemetry, no windows."""

import os

# Before torch is imported: two pytest workers on two cores, and tiny tensors, which threads only slow down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
