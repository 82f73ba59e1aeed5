"""experiments/: the parts that others run without the rest of it."""

import torch
from export import export

from mcjepa import MCJEPA, ModelConfig


def test_an_exported_program_estimates_the_flow_of_the_model_at_a_size_that_is_no_multiple_of_its_strides(tmp_path):
    torch.manual_seed(0)
    model = MCJEPA(ModelConfig(encoder="pwc", estimator_factor=0.5), task="mjepa").eval()
    assert export(model, tmp_path, (40, 56))["flow.pt2"] < 1e-4
    images = torch.rand(2, 1, 3, 40, 56).unbind()
    flow = model.estimate_flow(*images)
    assert flow.abs().max() > 0.1
    torch.testing.assert_close(torch.export.load(tmp_path / "flow.pt2").module()(*images), flow)
