"""`train.py --task vicreg` with a local loss beside VICReg's: is what MC-JEPA gains only locality?

    python experiments/local_loss.py small --task vicreg --image-dir IMAGES      # the flags of train.py

Positions of the two views that show nearly the same place of their image are compared by VICReg too, after an expander
of their own: the matches by location of VICRegL (Bardes, Ponce, LeCun, 2022), from the first view to the second, at the
stride at which objects are followed. Unlike there, the statistics are over images and positions together. Measure the
model.safetensors of a run: its checkpoint.pt has both expanders.
"""

import sys
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mcjepa  # noqa: E402
import train  # noqa: E402
from data import TwoViews  # noqa: E402
from encoder import Expander, gather  # noqa: E402
from engine.faults import run_command  # noqa: E402
from losses import vicreg_loss  # noqa: E402

STRIDE = 8
WIDTHS = (512, 512, 512)  # of the local expander, as in VICRegL
SHARE = 20 / 49  # of the positions, those with the nearest match, as in VICRegL
WEIGHT = 0.25  # of the local loss, as in VICRegL; the other has the rest


class PlacedViews(TwoViews):
    """Two views, each with the places of its pixels in the image as channels 4 and 5: x and y, in its pixels."""

    def __call__(self, image: UInt8[Tensor, "3 h w"]) -> tuple[Float[Tensor, "5 s s"], Float[Tensor, "5 s s"]]:
        rows, columns = (torch.arange(length, dtype=torch.float32) for length in image.shape[1:])
        places, views = tv_tensors.Image(torch.stack(torch.meshgrid(columns, rows, indexing="xy"))), []
        for view in (self.view_1, self.view_2):
            crop_and_flip, colour = v2.Compose(view.transforms[:2]), v2.Compose(view.transforms[2:])
            seen, at = crop_and_flip(tv_tensors.Image(image), places)  # both alike
            views.append(torch.cat((colour(seen.as_subclass(Tensor)) / 255, at.as_subclass(Tensor))))
        return tuple(views)


def match(
    features: Float[Tensor, "two_n c h w"], places: Float[Tensor, "two_n 2 h w"]
) -> tuple[Float[Tensor, "m c"], Float[Tensor, "m c"]]:
    """The features of both views at matching positions; `places` says where in its image a position lies."""
    (x, y), (place_x, place_y) = (z.flatten(2).transpose(1, 2).chunk(2) for z in (features, places))
    distance, nearest = torch.cdist(place_x, place_y).min(dim=2)  # (n, positions)
    kept = distance.topk(round(SHARE * distance.shape[1]), largest=False).indices
    x = x.take_along_dim(kept[..., None], dim=1)
    y = y.take_along_dim(nearest.gather(1, kept)[..., None], dim=1)
    return x.flatten(0, 1), y.flatten(0, 1)


class TwoExpanders(nn.Module):
    """VICReg's expander, and `local`, that of the positions."""

    def __init__(self, pooled: Expander, local: Expander):
        super().__init__()
        self.pooled, self.local = pooled, local

    def forward(self, pooled: Float[Tensor, "n c"], views: int) -> Float[Tensor, "n d"]:
        return self.pooled(pooled, views)


class LocalVICReg(mcjepa.MCJEPA):
    """VICReg and a local loss, on views that carry the places of their pixels."""

    def __init__(self, *arguments, **named) -> None:
        super().__init__(*arguments, **named)
        if self.estimator is not None or any(self.loss_config.pooled):
            raise ValueError("local_loss.py is for --task vicreg, without --loss.pooled")
        self.level = self.encoder.strides.index(STRIDE)
        self.expander = TwoExpanders(self.expander, Expander(self.encoder.channels[self.level], WIDTHS))

    def _encode(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        self.pyramid = super()._encode(images)
        return self.pyramid

    def _content_terms(self, views: Float[Tensor, "two_n 5 s s"]) -> tuple[mcjepa.Terms, mcjepa.Monitor]:
        views, places = views.split((3, 2), dim=1)
        terms, monitor = super()._content_terms(views)
        features, self.pyramid = self.pyramid[self.level], None  # validation copies the model: it must hold no graph
        x, y = match(features, places[..., ::STRIDE, ::STRIDE])  # on which the convolutions are centred
        embeddings = mcjepa.at_least_float32(self.expander.local(torch.cat((x, y)), views=2)).chunk(2)
        with torch.autocast(views.device.type, enabled=False):
            local = zip(terms.items(), vicreg_loss(*map(gather, embeddings)), strict=True)
        both = {}
        for (name, (term, coefficient)), local_term in local:
            both[name] = term, coefficient * (1 - WEIGHT)
            both[f"local_{name}"] = local_term, coefficient * WEIGHT
        return both, monitor


if __name__ == "__main__":
    train.TwoViews, train.MCJEPA = PlacedViews, LocalVICReg
    run_command(lambda: train.train(train.parse(sys.argv[1:])))
