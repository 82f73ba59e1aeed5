"""The tests run on the CPU, where results can be compared bit for bit. Hypothesis tries 20 examples per property."""

import os

import pytest
from hypothesis import settings

# Set before torch is imported; the processes that tests start inherit them.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"  # with -n 2 two tests share the cores; sums are the same in every process

settings.register_profile("short", max_examples=20, deadline=None)
settings.load_profile("short")


@pytest.fixture
def few_shapes(monkeypatch):
    """MovingShapes small enough to be measured in a second: 3 pairs, images and videos of 64 px."""
    import evaluate  # not before the settings above: it imports torch

    for name, value in {"SIZE": 64, "PAIRS": 3, "IMAGES": 3, "VIDEOS": 3, "FRAMES": 5, "OBJECTS": 8}.items():
        monkeypatch.setattr(evaluate, f"SHAPES_{name}", value)
    monkeypatch.setitem(evaluate.RECIPES, "shapes", evaluate.Recipe(6, 2, 2, 48, 48, 1e-2, 2e-4))
