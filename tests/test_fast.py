"""What is fast computes the same as what is plain: values and gradients. And benchmarks/ measures what it says.

The plain forms are those of benchmarks/plain.py, which its tables compare with. To run: `pytest tests/test_fast.py`.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import contests
import growth
import parts
import plain
import processes
import pytest
import timing
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from encoder import PointwiseLinear, build_encoder
from flow import correlation
from losses import variance_covariance_loss, vicreg_loss
from mcjepa import MCJEPA, LossConfig, ModelConfig, deviations

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def values_and_gradients(function, *inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    values = function(*leaves)
    values = [values] if isinstance(values, torch.Tensor) else list(values)
    weights = [normal(k, *value.shape) for k, value in enumerate(values)]
    total = sum((value * weight).sum() for value, weight in zip(values, weights, strict=True))
    return values + list(torch.autograd.grad(total, leaves))


def assert_the_same(ours, theirs, tolerance=1e-10):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------------------- the fast paths


@few
@given(seeds, st.integers(0, 5), st.integers(1, 3), st.integers(1, 4), st.integers(1, 23), st.integers(1, 23))
def test_correlation_in_tiles_equals_shifts_and_unfolding_gradients_too(seed, radius, b, c, h, w):
    x, y = normal(seed, b, c, h, w), normal(seed + 1, b, c, h, w)
    ours = values_and_gradients(lambda x, y: correlation(x, y, radius), x, y)
    for other in (plain.correlation_by_shifts, plain.correlation_by_unfolding):
        assert_the_same(ours, values_and_gradients(lambda x, y, f=other: f(x, y, radius), x, y))


@pytest.mark.parametrize("layout", ["channels_last", "a slice", "expanded"])
def test_correlation_takes_tensors_of_any_layout(layout):
    x, y = normal(0, 2, 5, 11, 9), normal(1, 2, 5, 11, 9)
    expected = plain.correlation_by_shifts(x, y)
    if layout == "channels_last":
        x, y = (v.to(memory_format=torch.channels_last) for v in (x, y))
    elif layout == "a slice":
        x, y = (F.pad(v, (1, 2, 3, 4))[..., 3:-4, 1:-2] for v in (x, y))
    else:
        x, y, expected = (v[:1].expand(3, -1, -1, -1) for v in (x, y, expected))
    torch.testing.assert_close(correlation(x, y), expected)


def test_a_linear_layer_as_a_convolution_equals_the_linear_layer_gradients_too():
    layer = torch.nn.Linear(5, 7).double()
    x = normal(0, 2, 3, 4, 5)
    inputs = (x, layer.weight, layer.bias)

    def through(kind):
        return values_and_gradients(
            lambda x, w, b: torch.func.functional_call(kind(5, 7).double(), {"weight": w, "bias": b}, x), *inputs
        )

    assert_the_same(through(PointwiseLinear), through(torch.nn.Linear))
    layers = [m for m in build_encoder("convnext_tiny").modules() if isinstance(m, torch.nn.Linear)]
    assert len(layers) == 2 * (3 + 3 + 9 + 3) and all(isinstance(m, PointwiseLinear) for m in layers)


@few
@given(seeds, st.integers(2, 12), st.integers(1, 12))
def test_vicreg_through_the_smaller_matrix_equals_the_published_form_gradients_too(seed, n, d):
    x, y = normal(seed, n, d), normal(seed + 1, n, d)
    assert_the_same(values_and_gradients(vicreg_loss, x, y), values_and_gradients(plain.vicreg, x, y))


@few
@given(seeds, st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(2, 4))
def test_moments_summed_over_processes_give_the_loss_of_all_positions_gradients_too(seed, b, c, h, w):
    """Two processes that hold the same have twice its moments."""
    features = normal(seed, b, c, h, w)
    here = values_and_gradients(
        lambda x: variance_covariance_loss(x, 0.7, 0.3, gamma=2.0, sum_over_processes=lambda moment: 2 * moment),
        features,
    )
    joined = values_and_gradients(lambda x: variance_covariance_loss(torch.cat((x, x)), 0.7, 0.3, gamma=2.0), features)
    assert_the_same(here, joined)


def test_the_deviations_of_all_levels_at_once_are_those_of_each():
    pyramid = [3 * normal(0, 4, 5, 2, 3) + 7, normal(1, 4, 3, 8, 9)]
    expected = [level.std(dim=(0, 2, 3)).mean() for level in pyramid]
    assert_the_same(deviations(pyramid), expected)


@pytest.mark.parametrize("occlusion", ["forward_backward", "range_map"])
@pytest.mark.parametrize("encoder", ["pwc", "convnext_tiny"])
def test_a_step_of_the_plain_model_has_the_same_losses_and_gradients(encoder, occlusion):
    config = ModelConfig(encoder=encoder, estimator_factor=0.125, expander=(24, 24, 24))
    loss = LossConfig(occlusion=occlusion, coarse_levels=0.5, flow_balance=1.0)
    coarse = torch.rand(2, 2, 3, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    video = tuple(F.interpolate(x, size=(64, 64), mode="bicubic").clamp(0, 1) for x in coarse)
    small = [F.interpolate(x.repeat(2, 1, 1, 1), size=(32, 32), mode="bilinear") for x in coarse]
    views = (small[0], 0.8 * small[1])
    results = []
    for kind in (MCJEPA, plain.PlainMCJEPA):
        torch.manual_seed(0)
        model = kind(config, loss).double()
        losses = model(video=video, views=views)
        losses.total.backward()
        results.append([losses.total.detach(), *losses.unweighted.values(), *(p.grad for p in model.parameters())])
    assert_the_same(*results, tolerance=1e-7)


def test_channels_last_changes_neither_losses_nor_gradients():
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = MCJEPA(ModelConfig(encoder="convnext_tiny", estimator_factor=0.125, expander=(8, 8, 8))).double()
        model.to(memory_format=layout)
        generator = torch.Generator().manual_seed(1)
        video = tuple(torch.rand(1, 3, 64, 64, generator=generator, dtype=torch.float64) for _ in range(2))
        views = tuple(torch.rand(4, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(2))
        losses = model(video=video, views=views)
        losses.total.backward()
        results.append([losses.total.detach(), *(p.grad for p in model.parameters())])
    assert_the_same(*results, tolerance=1e-8)


COMPILED = """
import functools, sys
import torch
from mcjepa import MCJEPA, LossConfig, ModelConfig

model = MCJEPA(ModelConfig(encoder=sys.argv[1], estimator_factor=0.125, expander=(8, 8, 8))).double()
generator = torch.Generator().manual_seed(1)
batch = {
    "video": tuple(torch.rand(1, 3, 64, 64, generator=generator, dtype=torch.float64) for _ in range(2)),
    "views": tuple(torch.rand(4, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(2)),
}
explained = torch._dynamo.explain(model)(**batch)
assert explained.graph_count == 1 and explained.graph_break_count == 0, explained
torch._dynamo.reset()
torch._dynamo.utils.counters.clear()
gradients, n = [], len(sys.argv[2:])
for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
    for regularisation in map(float, sys.argv[2:]):
        model.zero_grad()
        run(**batch, masks=regularisation == 1, regularisation=regularisation).total.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
for plain, compiled in zip(gradients[:n], gradients[n:], strict=True):
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7 * float(a.abs().max()) + 1e-12)
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == min(n, 3), torch._dynamo.utils.counters
"""


def run_python(*arguments, **environment):
    """In a process without jaxtyping's checks, which no compiler can follow."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize(
    "encoder, weights", [("pwc", (0.25, 0.5, 0.75, 1)), ("convnext_tiny", (1,)), ("resnet50", (1,))]
)
def test_the_forward_compiles_into_one_graph_with_the_same_gradients(encoder, weights):
    """The weights of Eq. 6 over its warm-up: after the second no step of it is compiled anew."""
    done = run_python("-c", COMPILED, encoder, *weights)
    assert done.returncode == 0, done.stderr[-3000:]


def compiled_training(folder, *arguments, processes=1):
    """train.py --compile, with a compiler that takes seconds instead of minutes, or none (eager)."""
    program = "import functools, torch; torch.compile = functools.partial(torch.compile, backend='aot_eager'); "
    program += "import train; train.main(); print('graphs', torch._dynamo.utils.counters['stats']['unique_graphs'])"
    (folder / "compiled.py").write_text(program)
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"] if processes > 1 else []
    return run_python(*launcher, folder / "compiled.py", *arguments)


TINY = [
    "pocket", "--workers", "0", "--crop", "64", "64", "--image-size", "32", "--video-batch", "2", "--image-batch", "4",
    "--model.estimator-factor", "0.125", "--model.expander", "16", "16", "16", "--validation-pairs", "2",
    "--steps-per-epoch", "3", "--epochs", "2", "--flow-start-epoch", "0.4", "--log-every", "1",
    "--learning-rate", "1e-6", "--estimator-learning-rate", "1e-6",
]  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2])
def test_a_compiled_run_learns_the_same_and_a_plain_one_goes_on_from_it(processes, tmp_path):
    numbers, learned = [], []
    for name, flags in (("compiled", ["--compile", "--max-steps", "4"]), ("plain", [])):
        folder = tmp_path / name
        done = compiled_training(tmp_path, *TINY, *flags, "--output-dir", folder, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        graphs = [int(n) for n in re.findall(r"graphs (\d+)", done.stdout)]
        assert len(graphs) == processes and all((n > 0) == bool(flags) for n in graphs), done.stdout
        if flags:
            done = compiled_training(tmp_path, *TINY, "--output-dir", folder, "--resume", processes=processes)
            assert done.returncode == 0, done.stderr[-3000:]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "total" in line]
        assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
        # Of the gradients those of the compiled steps: at the fifth a ReLU sits at its kink, where rounding decides.
        names = [name for name in steps[3] if name.startswith("gradient_norm")]
        assert len(names) == 3
        numbers.append([line["total"] for line in steps] + [line.get(k, 0) for line in steps[:4] for k in names])
        newest, *_, oldest = (torch.load(path, weights_only=True) for path in train.checkpoints(folder))
        assert (oldest["step"], newest["step"]) == (3, 6)
        weights = [name for name in newest["model"] if "running" not in name and "num_batches" not in name]
        learned.append(torch.cat([(newest["model"][k] - oldest["model"][k]).flatten() for k in weights]))
    assert numbers[0] == pytest.approx(numbers[1], rel=2e-3)
    assert (learned[0] - learned[1]).norm() < 0.1 * learned[1].norm()


def test_moments_of_another_layout_are_the_same_numbers_after_a_resume(monkeypatch, tmp_path):
    """A GPU keeps convolutions channels_last, and its optimizer's moments; the fused AdamW does not look at strides."""

    def run(folder, *flags):
        monkeypatch.setattr(
            sys, "argv", ["train.py", *TINY, "--learning-rate", "1e-3", "--output-dir", str(folder), *flags]
        )
        train.main()
        return torch.load(folder / "checkpoint.pt", weights_only=True)

    checkpoint = run(tmp_path / "a", "--max-steps", "4")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    changed = 0
    for state in checkpoint["optimizer"]["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].ndim == 4:
                state[name] = state[name].to(memory_format=torch.channels_last)
                changed += not state[name].is_contiguous()
    assert changed > 20
    torch.save(checkpoint, tmp_path / "b/checkpoint.pt")
    ours, theirs = (run(tmp_path / name, "--resume")["model"] for name in "ab")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# -------------------------------------------------------------------------------------------------- the measurements


def test_ways_take_turns_and_the_warm_up_does_not_count():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = timing.in_turns(ways, repeats=3, device=CPU, warmup=2)
    assert calls == ["a", "b"] * 5
    assert [len(values) for values in seconds.values()] == [3, 3]
    slow = timing.in_turns({"": lambda: time.sleep(0.02)}, 2, CPU, warmup=0)[""]
    assert all(0.02 <= value < 0.2 for value in slow)


def test_differences_and_spreads_and_slopes_are_what_they_say():
    a = torch.tensor([3.0, 4.0])
    assert timing.difference([a, a], [a, 2 * a]) == pytest.approx(0.5)
    assert math.isnan(timing.difference([a], [a * math.nan]))
    assert math.isnan(timing.difference([a, a], [a, a * math.nan]))
    assert timing.spread([4.0, 1.0, 3.0, 2.0, 5.0]) == (3.0, 2.0, 4.0)
    assert timing.spread([2.0]) == (2.0, 2.0, 2.0)
    assert timing.slope([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2.0)


def test_flops_and_bytes_of_a_product_are_counted_backward_too():
    a, b = torch.ones(10, 20, requires_grad=True), torch.ones(20, 30)
    flops, traffic = timing.work(lambda: a @ b)
    assert flops == 2 * 10 * 20 * 30
    assert traffic == 4 * (10 * 20 + 20 * 30 + 10 * 30)
    flops, _ = timing.work(lambda: (a @ b).sum().backward())
    assert flops == 2 * 2 * 10 * 20 * 30
    image = torch.ones(1, 6, 8, 8, requires_grad=True)
    for groups in (1, 6):
        weight = torch.ones(6, 6 // groups, 3, 3, requires_grad=True)
        flops, _ = timing.work(lambda g=groups, w=weight: F.conv2d(image, w, padding=1, groups=g).sum().backward())
        assert flops == 3 * 2 * 6 * (6 // groups) * 9 * 64
    given = torch.ones(6), torch.ones(6)
    assert timing.work(lambda: given[0].copy_(given[1]))[1] == 4 * 2 * 6
    parameter = torch.nn.Parameter(torch.ones(1000))
    parameter.grad = torch.ones(1000)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    optimizer.step()
    traffic = timing.work(optimizer.step)[1]  # reads weight, gradient, two moments; writes all but the gradient
    assert 4 * 7 * 1000 <= traffic < 4 * 7.2 * 1000
    assert timing.work(lambda: torch.zeros_like(given[0]))[1] == 4 * 6
    assert timing.work(lambda: given[0] + torch.ones(1).expand(6))[1] == 4 * (6 + 1 + 6 + 1)
    assert timing.work(lambda: a.detach().view(20, 10).T)[1] == 0  # views move nothing


def test_the_peak_of_memory_is_that_of_the_way():
    megabytes = 300
    program = (
        "import sys, torch; sys.path[:0] = ['benchmarks']; import timing; "
        f"way = lambda: torch.ones({megabytes} * 250_000).sum(); torch.ones(10); "
        "before = torch.ones(500 * 250_000).sum(); print(timing.peak_memory(way, torch.device('cpu')))"
    )
    done = run_python("-c", program)
    assert done.returncode == 0, done.stderr
    assert 0.298 < float(done.stdout) < 0.40


def test_the_parts_of_a_step_cover_it(monkeypatch):
    """At a size for tests. FLOPs of the parts are those of the step: nothing is left out, nothing counted twice."""
    small = train.Config(model=ModelConfig(estimator_factor=0.25, expander=(16, 16, 16)))
    monkeypatch.setitem(train.PRESETS, "paper", small)
    monkeypatch.setattr(contests, "CROP", (64, 128))
    monkeypatch.setattr(contests, "IMAGES", 4)
    result = parts.measure(CPU, 1, {"matrices": 1e11, "convolution": 2e11, "bytes": 1e10})
    whole = result.pop("whole step")
    assert whole["flops"] == pytest.approx(sum(row["flops"] for row in result.values()), rel=0.02)
    assert whole["bytes"] == pytest.approx(sum(row["bytes"] for row in result.values()), rel=0.25)
    table = parts.show(result | {"whole step": whole})
    assert len(table.splitlines()) == 2 + len(result) + 1
    share = result["VICReg loss"]["seconds"][0] / whole["seconds"][0]
    assert f"| {share:.1%} |" in next(line for line in table.splitlines() if "VICReg loss" in line)


def test_what_is_expected_of_many_gpus_follows_from_the_work_and_the_bytes():
    """By hand. Measured are two processes with half of the images; the backward of a gather is a sum."""
    sent = {"gradients": 600e6, "all_gather": 1e6, "all_reduce": 12e6}
    expected = processes.expect(flops=1e12, traffic=63e9, sent=sent)
    computing = 63e9 / 2 / 3e12 / 0.35  # 30 ms: bytes, halved by bf16, decide
    gathered, moments = 2e6, 10e6
    of_8 = 2 * 7 / 8 * (600e6 + moments + 8 * gathered) + 7 * gathered
    of_64 = 2 * 63 / 64 * (600e6 + moments + 64 * gathered) + 63 * gathered
    out_of_a_node = of_64 / 8  # of each GPU: of eight rings one passes from its node to the next through it
    assert out_of_a_node / 40e9 < of_64 / 300e9
    for name, sending, steps in (
        ("8 GPUs", of_8 / 300e9, 100 * 1_281_167 / 384),
        ("8 nodes of 8 GPUs", of_64 / 300e9, 100 * 1_281_167 / 3072),
    ):
        assert expected[name]["computing"] == pytest.approx(computing)
        assert expected[name]["sending"] == pytest.approx(sending)
        assert expected[name]["hours"] == pytest.approx(steps * (computing + sending) / 3600)


def test_a_point_of_a_line_runs_at_each_number_of_levels():
    for levels in (1, 5):
        point = growth.POINT | {"crop": 64, "levels": levels, "width": 16}
        row = timing.run_child([growth.__file__, json.dumps(point), "--device", "cpu", "--repeats", "1"])
        assert row["seconds"][0] > 0 and row["gigabytes"] > 0.001


def test_the_command_measures_prints_a_table_and_writes_json(tmp_path):
    output = tmp_path / "new/numbers.json"
    flags = ("--only", "both-flows-pwc", "vicreg-384", "--repeats", 1, "--output", output)
    done = run_python("benchmarks/run.py", *flags, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr[-2000:]
    row = re.search(r"two passes \| [\d,.]+ \| \*\*([\d.]+)\*\* \(.*\| ([\d.]+) \|", done.stdout)
    assert 0.5 < float(row[1]) < 4 and 0.5 < float(row[2]) < 4, done.stdout
    numbers = json.loads(output.read_text())
    ways = numbers["contests"]["both-flows-pwc"]["ways"]
    assert 0 < ways["two passes"]["difference"] < 0.02 and ways["two passes"]["gigabytes"] > 0.1
    assert numbers["environment"]["torch"] == torch.__version__
    vicreg = numbers["contests"]["vicreg-384"]
    assert vicreg.get("missing") == "lightly" or len(vicreg["ways"]) == 2


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--device", "mps"], "invalid choice: 'mps'"),
        (["--output", "."], "--output .: not a place for a file"),
        (["--output", __file__ + "/x.json"], "not a place for a file"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--only", "nonsense"], "invalid choice: 'nonsense'"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(flags, told, monkeypatch, capsys):
    import run

    monkeypatch.setattr(sys, "argv", ["run.py", *flags])
    with pytest.raises(SystemExit) as stop:
        run.main()
    assert stop.value.code == 2 and told in capsys.readouterr().err


def test_a_package_that_fails_does_not_end_the_others(monkeypatch, tmp_path, capsys):
    import run

    def broken(_):
        raise ImportError("no such module")

    good = contests.Contest("good", lambda _: {"ours": lambda: [torch.ones(3)], "theirs": lambda: [torch.ones(3)]}, "")
    monkeypatch.setattr(run, "CONTESTS", {"broken": good._replace(build=broken), "good": good})
    monkeypatch.setattr(run, "ceilings", lambda _: {"matrices": 1.0, "convolution": 1.0, "bytes": 1.0})
    monkeypatch.setattr(run, "memory_of", lambda *_: math.nan)
    monkeypatch.setattr(
        sys, "argv", ["run.py", "--only", "broken", "good", "--device", "cpu", "--output", str(tmp_path / "x.json")]
    )
    with pytest.raises(ValueError, match="broken: no such module"):
        run.main()
    assert "| good [] | ours |" in capsys.readouterr().out


def test_a_way_that_computes_something_else_ends_the_benchmark(monkeypatch):
    import run

    wrong = contests.Contest("x", lambda _: {"ours": lambda: [torch.ones(3)], "theirs": lambda: [torch.zeros(3)]}, "")
    monkeypatch.setitem(contests.CONTESTS, "wrong", wrong)
    with pytest.raises(ValueError, match="wrong: ours and theirs differ by"):
        run.hold("wrong", CPU, 1)
