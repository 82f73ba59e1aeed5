"""`train.py` with the true flow of MovingShapes in the estimator's place: can motion help the features here at all?

    python experiments/true_flow.py small --image-dir IMAGES      # the flags of train.py

Eqs. 2, 5 and 6 then train the encoder with exact warps and masks. The estimator learns nothing.
"""

import sys
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mcjepa  # noqa: E402
import train  # noqa: E402
from encoder import pad_to_multiple  # noqa: E402
from engine.faults import run_command  # noqa: E402
from flow import resize_flow  # noqa: E402
from sources.moving_shapes import MovingShapes, ShapePairs  # noqa: E402


class TrueFlowPairs(ShapePairs):
    """Both frames, each with its flow to the other as channels 4 and 5."""

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "5 h w"], Float[Tensor, "5 h w"]]:
        item = MovingShapes.__getitem__(self, index)
        flows = item["flow_forward"][0], item["flow_backward"][0]
        return tuple(torch.cat(parts) for parts in zip(item["images"], flows, strict=True))


class TrueFlowMCJEPA(mcjepa.MCJEPA):
    """MC-JEPA whose flow losses take the flow that comes with the frames."""

    def _flow_terms(self, images: Float[Tensor, "two_b 5 h w"], *warmups) -> tuple[mcjepa.Terms, mcjepa.Monitor]:
        images, truth = pad_to_multiple(images, max(self.encoder.strides)).split((3, 2), dim=1)
        estimated = mcjepa.estimate_flow_pyramid
        sizes = [[length // stride for length in truth.shape[2:]] for stride in self.estimator.strides]
        mcjepa.estimate_flow_pyramid = lambda *_: [resize_flow(truth, size) for size in sizes]
        try:
            return super()._flow_terms(images, *warmups)
        finally:
            mcjepa.estimate_flow_pyramid = estimated


if __name__ == "__main__":
    train.ShapePairs, train.MCJEPA = TrueFlowPairs, TrueFlowMCJEPA
    run_command(lambda: train.train(train.parse(sys.argv[1:])))
