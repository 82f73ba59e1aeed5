"""What several test files share."""

from pathlib import Path

import numpy as np
import torch


# ------------------------------------------------------------------------------- numbers, for the tests of the method


def golden(name):
    """Numbers computed by the published code of others."""
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as archive:
        return {key: torch.from_numpy(np.array(archive[key])) for key in archive.files}


def uniform(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual, expected, tolerance=1e-10):
    """Equal up to rounding, whatever the two types of numbers."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def assert_same_gradients(ours, theirs, *inputs):
    """Two functions of the same inputs have the same values and the same gradients of a random projection of them."""
    results = []
    for function in (ours, theirs):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        values = function(*leaves)
        values = [values] if isinstance(values, torch.Tensor) else list(values)
        projection = sum((value * normal(k, *value.shape)).sum() for k, value in enumerate(values))
        results.append(values + list(torch.autograd.grad(projection, leaves)))
    for a, b in zip(*results, strict=True):
        close(a, b.detach())
