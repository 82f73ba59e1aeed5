"""The flow of a model at a fixed size, as a program that needs none of this code: torch.export's, and ONNX.

    python experiments/export.py runs/pocket/checkpoint.pt exported --size 384 832
    python -c "import torch; flow = torch.export.load('exported/flow.pt2').module()"

Writes exported/flow.pt2 and, after `pip install onnx onnxscript onnxruntime`, exported/flow.onnx. Both take two images
(1, 3, height, width), RGB in [0, 1], and return the flow (1, 2, height, width) in pixels. Each is read back and run on
two images of noise, and its largest difference from the model's flow is printed.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from engine.faults import run_command  # noqa: E402
from mcjepa import MCJEPA, load_model  # noqa: E402


@torch.no_grad()
def export(model: MCJEPA, folder: Path, size: tuple[int, int]) -> dict[str, float]:
    """Writes a model in eval mode. Returns the files' names, and the largest difference of each in pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    images = torch.rand(2, 1, 3, *size, generator=torch.Generator().manual_seed(0)).unbind()
    module = nn.Module()  # its `forward` is what is exported
    module.model, module.forward = model, model.estimate_flow
    program = torch.export.export(module, images)
    torch.export.save(program, folder / "flow.pt2")
    flows = {"flow.pt2": torch.export.load(folder / "flow.pt2").module()(*images)}
    if all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        import onnxruntime

        names = ("image_1", "image_2")
        options = {"output_names": ["flow"], "external_data": False, "verbose": False}
        torch.onnx.export(program, (), folder / "flow.onnx", input_names=names, **options)
        session = onnxruntime.InferenceSession(folder / "flow.onnx")
        feed = {name: image.numpy() for name, image in zip(names, images, strict=True)}
        flows["flow.onnx"] = torch.from_numpy(session.run(None, feed)[0])
    return {name: (flow - model.estimate_flow(*images)).abs().max().item() for name, flow in flows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, nargs=2, default=(384, 832), metavar=("HEIGHT", "WIDTH"))
    arguments = parser.parse_args()
    for name, difference in export(load_model(arguments.checkpoint), arguments.folder, arguments.size).items():
        print(f"{arguments.folder / name}: differs from the model's flow by {difference:.2g} px at most")


if __name__ == "__main__":
    run_command(main)
