"""benchmarks/: the ways that are compared compute the same, and the measurements are what they are called."""

import json
import re
import sys

import comparisons
import growth
import parts
import plain
import pytest
import run
import timing
import torch
import torch.nn.functional as F
from comparisons import Comparison
from helpers import uniform

import train
from mcjepa import MCJEPA, LossConfig, ModelConfig

CPU = torch.device("cpu")


# -------------------------------------------------------------------------------- the ways that are compared are equal


def test_a_step_of_the_plain_model_has_the_same_losses_and_gradients():
    config = ModelConfig(encoder="pwc", estimator_factor=0.125, expander=(24, 24, 24))
    loss = LossConfig(occlusion="range_map", coarse_levels=0.5, flow_balance=1.0)
    coarse = uniform(0, 2, 2, 3, 9, 9)
    video = tuple(F.interpolate(x, size=(64, 64), mode="bicubic").clamp(0, 1) for x in coarse)
    small = [F.interpolate(x.repeat(2, 1, 1, 1), size=(32, 32), mode="bilinear") for x in coarse]
    results = []
    for kind in (MCJEPA, plain.PlainMCJEPA):
        torch.manual_seed(0)
        model = kind(config, loss).double()
        losses = model(video=video, views=(small[0], 0.8 * small[1]))
        losses.total.backward()
        results.append([losses.total.detach(), *losses.unweighted.values(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-7)


def test_a_way_that_computes_something_else_is_an_error(monkeypatch):
    wrong = Comparison("x", lambda _: {"ours": lambda: [torch.ones(3)], "theirs": lambda: [torch.zeros(3)]}, "")
    monkeypatch.setitem(comparisons.COMPARISONS, "wrong", wrong)
    with pytest.raises(ValueError, match="wrong: ours and theirs differ by"):
        run.compare("wrong", CPU, 1)


def test_ways_take_turns_and_the_warm_up_does_not_count():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = timing.take_turns(ways, repeats=3, device=CPU, warmup=2)
    assert calls == ["a", "b"] * 5
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_flops_equal_those_by_hand_backward_and_in_depthwise_convolutions_too():
    a, b = torch.ones(10, 20, requires_grad=True), torch.ones(20, 30)
    assert timing.count_work(lambda: a @ b)[0] == 2 * 10 * 20 * 30
    assert timing.count_work(lambda: (a @ b).sum().backward())[0] == 2 * 2 * 10 * 20 * 30
    image = torch.ones(1, 6, 8, 8, requires_grad=True)
    for groups in (1, 6):
        weight = torch.ones(6, 6 // groups, 3, 3, requires_grad=True)

        def step(weight=weight, groups=groups):
            F.conv2d(image, weight, padding=1, groups=groups).sum().backward()

        assert timing.count_work(step)[0] == 3 * 2 * 6 * (6 // groups) * 9 * 64


def test_bytes_equal_those_by_hand():
    a, b, x, y = torch.ones(10, 20), torch.ones(20, 30), torch.ones(6), torch.ones(6)
    for way, numbers in (
        (lambda: a @ b, 10 * 20 + 20 * 30 + 10 * 30),
        (lambda: x.copy_(y), 6 + 6),
        (lambda: torch.zeros_like(x), 6),
        (lambda: x + torch.ones(1).expand(6), 6 + 1 + 6 + 1),  # an expanded axis is read once
        (lambda: a.view(20, 10).T, 0),  # views move nothing
    ):
        assert timing.count_work(way)[1] == 4 * numbers
    parameter = torch.nn.Parameter(torch.ones(1000))
    parameter.grad = torch.ones(1000)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    optimizer.step()
    traffic = timing.count_work(optimizer.step)[1]  # reads weight, gradient, two moments; writes all but the gradient
    assert 4 * 7 * 1000 <= traffic < 4 * 7.2 * 1000


def test_the_parts_of_a_step_have_the_flops_and_bytes_of_the_whole_step(monkeypatch):
    small = train.Config(model=ModelConfig(encoder="pwc", estimator_factor=0.25, expander=(16, 16, 16)))
    monkeypatch.setitem(train.PRESETS, "paper", small)
    monkeypatch.setattr(comparisons, "CROP", (64, 128))
    monkeypatch.setattr(comparisons, "IMAGES", 2)
    result = parts.measure(CPU, 1, {"matrices": 1e11, "convolution": 2e11, "bytes": 1e10})
    table = parts.table(result).splitlines()
    assert len(table) == 2 + len(result)
    whole = result.pop("whole step")
    assert whole["flops"] == pytest.approx(sum(row["flops"] for row in result.values()), rel=0.02)
    assert whole["bytes"] == pytest.approx(sum(row["bytes"] for row in result.values()), rel=0.25)
    share = result["VICReg loss"]["seconds"][0] / whole["seconds"][0]
    assert f"| {share:.1%} |" in next(line for line in table if "VICReg loss" in line)


@pytest.mark.parametrize("point", [{"levels": 1, "losses": False}, {"levels": 5}, {"pairs": 0, "views": 4}])
def test_a_point_of_a_line_is_measured(point):
    row = growth.measure_point(growth.POINT | {"crop": 64, "size": 32, "width": 16} | point, CPU, repeats=1)
    assert row["seconds"].median > 0 and row["gigabytes"] >= 0


# ------------------------------------------------------------------------------------------------------ the commands


def test_the_command_prints_a_table_writes_json_and_goes_on_after_a_package_that_fails(monkeypatch, tmp_path, capsys):
    """Its times are of small features; the memory of one way is measured at full size, in a process of its own."""

    def broken(_):
        raise ImportError("no such module")

    memory_of = run.memory_of
    measure = lambda name, way, *others: memory_of(name, way, *others) if way == "81 shifts" else 0.1  # noqa: E731
    monkeypatch.setattr(run, "memory_of", measure)
    monkeypatch.setitem(run.COMPARISONS, "broken", Comparison("broken", broken, ""))
    monkeypatch.setattr(comparisons, "CROP", (64, 128))
    monkeypatch.setattr(run, "measure_ceilings", lambda _: {"matrices": 1.0, "convolution": 1.0, "bytes": 1.0})
    output = tmp_path / "new/numbers.json"
    words = ["--only", "broken", "correlation", "vicreg-384", "--repeats", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["run.py", *words, "--output", str(output)])
    with pytest.raises(ValueError, match="^broken: no such module$"):
        run.main()
    printed = capsys.readouterr().out
    row = re.search(r"81 shifts \| [\d,.]+ \| \*\*([\d.]+)\*\* \(.*\| ([\d.]+) \|", printed)
    assert float(row[1]) > 0 and 4 < float(row[2]) < 10, printed
    numbers = json.loads(output.read_text())
    shifts = numbers["comparisons"]["correlation"]["ways"]["81 shifts"]
    assert 0 < shifts["difference"] < 1e-4 and shifts["gigabytes"] > 0.4
    assert numbers["environment"]["torch"] == torch.__version__
    vicreg = numbers["comparisons"]["vicreg-384"]
    assert vicreg.get("missing") == "lightly" or len(vicreg["ways"]) == 2
