"""The tests run on the CPU, where results can be compared bit for bit. Hypothesis tries 20 examples per property."""

import os

from hypothesis import settings

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # set before torch is imported; the processes that tests start inherit it

settings.register_profile("short", max_examples=20, deadline=None)
settings.load_profile("short")
