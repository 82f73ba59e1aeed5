"""The tests run on the CPU: what they compare bit for bit is not exact on a GPU."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported; the processes that tests start inherit it
