"""The tests run on the CPU, where results can be compared bit for bit. Hypothesis tries 20 examples per property."""

import os

from hypothesis import settings

# Set before torch is imported; the processes that tests start inherit them.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"  # with -n 2 two tests share the cores; sums are the same in every process

settings.register_profile("short", max_examples=20, deadline=None)
settings.load_profile("short")
