"""The README files: their commands parse, their files, links and names exist, and the examples run."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
import tyro

import evaluate
import mcjepa
import train

ROOT = Path(__file__).parent.parent
READMES = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in (".", "assets", "benchmarks", "experiments", "sources")
    for path in (ROOT / folder).glob("README.md")
}
COMMANDS = [
    command
    for text in READMES.values()
    for command in re.findall(r"\b((?:train|evaluate)\.py [^`\n]*)", text.replace("\\\n", " "))
    if re.search(rf"(python|torchrun)[^`\n]* {re.escape(command)}", text.replace("\\\n", " "))
]


def test_commands_of_both_scripts_are_found():
    assert sum(command.startswith("train.py") for command in COMMANDS) >= 8
    assert sum(command.startswith("evaluate.py") for command in COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command):
    script, *words = shlex.split(command.replace("--benchmark NAME", ""), comments=True)
    if words == ["--help"]:
        return
    if script == "train.py":
        words = ["pocket" if word.endswith("config.json") else word for word in words]
        assert isinstance(train.parse(words), train.Config)
    else:
        config = getattr(evaluate, f"{words[0].title()}Config")
        words = [*words[1:], *([] if "--model" in words else ["--model", "random"])]
        assert isinstance(tyro.cli(config, args=words, config=(tyro.conf.OmitArgPrefixes,)), config)


def test_every_torchrun_line_has_a_share_of_the_batches_for_each_process(monkeypatch):
    text = READMES["README.md"].replace("\\\n", " ")
    nodes = int(re.search(r"--nodes=(\d+)", text)[1])
    lines = re.findall(r"torchrun ([^`\n]*)--nproc_per_node=(\d+)[^`\n]* train\.py ([^`\n]*)", text)
    assert len(lines) >= 4
    for options, count, words in lines:
        monkeypatch.setenv("WORLD_SIZE", str(int(count) * (nodes if "--nnodes" in options else 1)))
        train.check(train.parse(shlex.split(words)))


@pytest.mark.parametrize("readme", READMES)
def test_every_relative_link_leads_to_a_file_and_its_heading(readme):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", READMES[readme]):
        path, _, heading = link.partition("#")
        target = (ROOT / readme).parent / path if path else ROOT / readme
        assert target.exists(), link
        titles = re.findall(r"(?m)^#+ (.*)", target.read_text().lower()) if heading else []
        assert not heading or heading in [re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles], link


@pytest.mark.parametrize("readme", READMES)
def test_every_file_and_every_name_of_a_module_exists(readme):
    for code in re.findall(r"(?<!`)`([^`\n]+)`", READMES[readme]):
        if re.fullmatch(r"[\w/]+\.(py|sh)|(sources|engine|assets|tests|benchmarks|experiments)/[\w./]*", code):
            folders = (ROOT, (ROOT / readme).parent, ROOT / "experiments")
            assert any((folder / code).exists() for folder in folders), code
            continue
        name = re.fullmatch(r"((?:sources|engine)\.\w+|[a-z]+)\.(\w+(?:\.\w+)*)(?:\(.*\))?", code)
        if name and (ROOT / f"{name[1].replace('.', '/')}.py").exists():
            value = importlib.import_module(name[1])
            for part in name[2].split("."):
                value = getattr(value, part)


def test_the_examples_run_and_the_first_prints_what_it_says(monkeypatch, capsys):
    examples = re.findall(r"```python\n(.*?)```", READMES["README.md"], re.S)
    build, small = mcjepa.MCJEPA, mcjepa.ModelConfig("pwc", expander=(16, 16, 16))
    monkeypatch.setattr(mcjepa, "MCJEPA", lambda *config, **options: build(*(config or [small]), **options))
    torch.manual_seed(0)
    exec("".join(examples), names := {})
    assert names["flow"].shape == (1, 2, 64, 96) and len(names["pyramid"]) == 5
    without_flow, with_flow, smoothness = map(float, re.findall(r"tensor\(([-\d.e]+)\)", capsys.readouterr().out))
    assert with_flow < 0.01 < 0.5 < without_flow and smoothness == 0
