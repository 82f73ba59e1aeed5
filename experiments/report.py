"""Makes report.md and its pictures from results.jsonl and curves/, which run.py writes.

    pip install -r experiments/requirements.txt      # matplotlib
    python experiments/report.py

Numbers are read from the results; what they mean for a claim is judged by hand, in CLAIMS, on one series of runs. A
series has one preset, one number of steps and one set of images: only its runs are compared.
"""

import argparse
import csv
import json
import re
import textwrap
from pathlib import Path

import numpy as np
from pictures import draw_figure_5, draw_levels, draw_training
from rows import FIGURES, TABLES, of_common_seeds

HERE = Path(__file__).resolve().parent
PILOT = "pilot 1, 1,300 steps, images of CIFAR-10"
CONTROLS = "pilot 1 and its controls, measured by run.py, images of CIFAR-10"
POCKET = "pocket, 1,000 steps, images of CIFAR-10, --image-batch 128"
SHAPES = "pilot 2, 1,701 of 2,200 steps, images of MovingShapes"
NOTES = {
    PILOT: """before run.py, on one NVIDIA H200, nine runs side by side: crops of 192 px, 5e-4 as the estimator's rate,
M-JEPA 1,200 steps. EPE on 20 unseen MovingShapes pairs, k-NN (k = 20) and ridge on 10,000 and 2,000 images, J&F on
the first 25 frames of ten of the 20 val clips at 240 px; `seconds` are those of measuring.""",
    CONTROLS: """two models of pilot 1, of which few weights were kept (VICReg of seed 0, MC-JEPA of seed 2), once more,
and controls of seed 0 with the flags of pilot 1, trained on a CPU. EPE on 200 pairs (zero flow 5.65). The same images
and clips, but other batch norm statistics: compare only rows of this table. "J&F, 8" without DAVIS is that of
MovingShapes among distractors. CamVid: a linear head on frozen features, 400 steps on 367 images, measured on 101
others (random weights: 27.8% mIoU; with the statistics of batch norm estimated on CamVid VICReg has 37.5,
MC-JEPA 36.5).""",
    "pilot 2, 1,801 of 2,200 steps, images of CIFAR-10": """the same measures, but EPE on 10 pairs of 256 px (zero flow
10.21), after 4 pairs of 256 px in a step and 1e-3 as the estimator's rate; stopped by the clock.""",
    SHAPES: """as the one before, but VICReg's images are MovingShapes too. `ratio_1` differs from `mcjepa` in two
things: the gradients' ratio is 1, and the estimator's rate 2e-3.""",
    POCKET: """by run.py on a CPU: the encoder half as wide. EPE on 200 pairs (zero flow 5.65), the rest as in the
table of controls. Alternating strategies have a fixed balance of 8; with the gradients' ratio of the others
it ends near 4.""",
}
MEASURES = ("EPE", "object", "texture", "J&F, 8", "J&F, 8+16", "Middlebury EPE", "CIFAR-10 k-NN, stride 32")
MEASURES += ("CIFAR-10 ridge, stride 32", "DAVIS 2016 J&F, 8", "DAVIS 2016 J&F, 8+16", "CamVid mIoU")
INTRODUCTION = """\
`python experiments/report.py` makes this from results.jsonl. Errors (EPE) are in pixels, all else is in percent, at the
strides that are named; "object" is the same object found again among 200 in other colours, "texture" another object of
its texture (chance 4.1%), at the best stride. ± is the standard deviation over the seeds; a table or a claim has those
seeds that all of its rows have. Ours and the paper's columns are of other networks, data and benchmarks: compare their
orders, not their values. The series:"""
TABLE_2 = "Not at this scale: it needs the paper's video sets (`train.py --data-root DATA --sets kitti sintel`)."
FIGURE_5 = """\
The paper's Figure 5, in words: (1) flow from epoch 10 of 100 on is best, later is similar and cheaper; (2) the
coefficient of Eq. 5 improves flow, and is very sensitive; (3) flow and segmentation improve with the balance up to 0.1,
and beyond it segmentation degrades a lot. Ours has the ratio of the tasks' gradients on the encoder for the balance. In
pilot 2 the point at 1 also has twice the estimator's rate."""
WHILE_TRAINING = """\
How the coefficients were chosen. At a fixed balance of 1 the gradient of the flow losses on the encoder would soon be a
few hundredths of that of content, so `--loss.gradient-ratio` raises the balance as the flow is learned (upper right).
The features' deviations (lower left) show what Eq. 6 and VICReg's variance are for: no level may fall to 0."""
NOT_RUN = "**Not measured yet:** `python experiments/run.py {}`."
# The paper's claim, our series, and what it shows; {row: measure} is the mean and the deviation over the seeds that all
# rows named have.
CLAIMS = (
    (
        "One network learns both tasks at no cost to either",
        PILOT,
        """**Holds here.** On the classes of CIFAR-10 the k-NN of MC-JEPA is {mcjepa: CIFAR-10 k-NN, stride 32}%, that
of VICReg {vicreg: CIFAR-10 k-NN, stride 32}% (M-JEPA {mjepa: CIFAR-10 k-NN, stride 32}, random weights
{random: CIFAR-10 k-NN, stride 32}, at their best level, stride 4, {random: CIFAR-10 k-NN, stride 4}), and its flow is
no worse than that of M-JEPA (below).""",
    ),
    (
        "The content of MC-JEPA is ahead of that of VICReg (VOC: 67.1 against 60.1)",
        PILOT,
        """**Does not hold here.** In k-NN the two are alike (above), in ridge regression VICReg is slightly ahead, in
two of three seeds: {vicreg: CIFAR-10 ridge, stride 32}% against {mcjepa: CIFAR-10 ridge, stride 32}%. Nor in the
paper's measure, segmentation (the next claim but one). What may be a difference: on MovingShapes, which VICReg has not
seen here, MC-JEPA finds the textures of objects in
other colours in {mcjepa: texture}% (one seed), VICReg in {vicreg: texture} (two), M-JEPA in {mjepa: texture} (one),
random weights in {random: texture} (two); 200 objects, so that a single number is good to 2.6 points.""",
    ),
    (
        "MC-JEPA follows objects better than either task alone (DAVIS 2017: 70.5 against 58.1 of VICReg)",
        PILOT,
        """**Holds at stride 8, and not for the best features of each.** At stride 8 its J&F is
{mcjepa: DAVIS 2016 J&F, 8}%, that of VICReg {vicreg: DAVIS 2016 J&F, 8}, that of M-JEPA {mjepa: DAVIS 2016 J&F, 8};
it is ahead of both in each seed. With strides 8 and 16 side by side there is no difference:
{mcjepa: DAVIS 2016 J&F, 8+16} against {vicreg: DAVIS 2016 J&F, 8+16}, which M-JEPA reaches at stride 4, centred
({mjepa: DAVIS 2016 J&F, 4 centred}). With stride 8 alone MC-JEPA is less than three
points below its two strides.""",
    ),
    (
        "The three claims above, with an encoder half as wide",
        POCKET,
        """**The first nearly holds, the second does not, the third does at stride 8** (two seeds). K-NN is
{mcjepa: CIFAR-10 k-NN, stride 32}% with both tasks, {vicreg: CIFAR-10 k-NN, stride 32} with VICReg alone,
{mjepa: CIFAR-10 k-NN, stride 32} with M-JEPA alone (random weights {random: CIFAR-10 k-NN, stride 32}); ridge
regression {mcjepa: CIFAR-10 ridge, stride 32} and {vicreg: CIFAR-10 ridge, stride 32}. Flow is {mcjepa: EPE} px with
both, {mjepa: EPE} alone, on Middlebury {mcjepa: Middlebury EPE} and {mjepa: Middlebury EPE}: a small price. J&F on
DAVIS is {mcjepa: DAVIS 2016 J&F, 8}% at stride 8 against {vicreg: DAVIS 2016 J&F, 8} and {mjepa: DAVIS 2016 J&F, 8} of
the tasks alone (random weights {random: DAVIS 2016 J&F, 8}); it is ahead of VICReg by 5.2 in one seed and by 2.7 in the
other. With two strides ({mcjepa: DAVIS 2016 J&F, 8+16}, {vicreg: DAVIS 2016 J&F, 8+16} and
{mjepa: DAVIS 2016 J&F, 8+16}) it is ahead of VICReg in one seed alone. With a stronger Eq. 6 (below) it is ahead at
both in both seeds, and its flow is as good as alone.""",
    ),
    (
        "What MC-JEPA gains is not only more data, more computation, or locality",
        CONTROLS,
        """**Holds for data, hardly for computation and locality** (one seed a row). VICReg with frames of the videos as
half of its images does not follow objects better: J&F at stride 8 {vicreg_frames: DAVIS 2016 J&F, 8}% against
{vicreg: DAVIS 2016 J&F, 8} without them and {mcjepa: DAVIS 2016 J&F, 8} of MC-JEPA. But it finds more textures
({vicreg_frames: texture}% in place of {vicreg: texture}), nearly as many as MC-JEPA ({mcjepa: texture}). VICReg with
twice the steps follows at stride 8 nearly as well ({vicreg_twice: DAVIS 2016 J&F, 8}), and so does VICReg with a local
loss ({vicreg_local: DAVIS 2016 J&F, 8}), which sees no video. Twice the steps are ahead of MC-JEPA in all else, the
local loss in most: k-NN {vicreg_twice: CIFAR-10 k-NN, stride 32} and {vicreg_local: CIFAR-10 k-NN, stride 32}% against
{mcjepa: CIFAR-10 k-NN, stride 32}, textures {vicreg_twice: texture} and {vicreg_local: texture}%, mIoU on CamVid
{vicreg_twice: CamVid mIoU} and {vicreg_local: CamVid mIoU}% against {mcjepa: CamVid mIoU} (VICReg itself
{vicreg: CamVid mIoU}), strides 8 and 16
{vicreg_twice: DAVIS 2016 J&F, 8+16} and {vicreg_local: DAVIS 2016 J&F, 8+16} against {mcjepa: DAVIS 2016 J&F, 8+16},
and among like-coloured distractors on MovingShapes {vicreg_twice: J&F, 8} and {vicreg_local: J&F, 8} against
{mcjepa: J&F, 8}. Where content has hardly begun to be learned, its own task teaches the features more than flow does.
Not tried: other seeds, and longer runs of all.""",
    ),
    (
        "Motion can help the features (with the true flow in the place of ours)",
        CONTROLS,
        """**Not by Eqs. 2, 5 and 6 at this scale** (one seed). With the true flow these alone move the encoder. Their
gradient has the share of MC-JEPA's flow losses, for which the balance rises to 223 (there: about 11), and the
deviations of strides 8 and 16 fall to a half and a third of MC-JEPA's: where the flow is right, smooth features make
Eqs. 2 and 5 small. All measures are below those of VICReg alone: k-NN {true_flow: CIFAR-10 k-NN, stride 32}% against
{vicreg: CIFAR-10 k-NN, stride 32}, CamVid {true_flow: CamVid mIoU} against {vicreg: CamVid mIoU}, J&F at stride 8
{true_flow: DAVIS 2016 J&F, 8} against {vicreg: DAVIS 2016 J&F, 8}, among distractors {true_flow: J&F, 8} against
{vicreg: J&F, 8}. So what MC-JEPA gains at stride 8 seems to come with the gradient that its estimator passes on, from
Eqs. 3 and 4. Not tried: a balance of 11, and weights of Eq. 6 that hold the deviations up.""",
    ),
    (
        "Its flow is as good as that of flow alone (KITTI 2015: 2.67 against 3.01 px)",
        PILOT,
        """**Holds here.** {mcjepa: EPE} px on MovingShapes against {mjepa: EPE} of M-JEPA, {mcjepa: Middlebury EPE}
against {mjepa: Middlebury EPE} on Middlebury: lower in each seed, by about as much as the seeds differ.""",
    ),
    (
        "With more weight of the flow, flow improves and content suffers (Figure 5 (3))",
        POCKET,
        """**Both hold, the first up to a ratio of 1** (one seed). With a gradients' ratio of 0.1, 0.3, 1 and 3 flow has
{ratio_0.1: EPE}, {mcjepa: EPE}, {ratio_1: EPE} and {ratio_3: EPE} px, on Middlebury, in no order,
{ratio_0.1: Middlebury EPE}, {mcjepa: Middlebury EPE}, {ratio_1: Middlebury EPE} and {ratio_3: Middlebury EPE}. Content
falls step by step: k-NN {ratio_0.1: CIFAR-10 k-NN, stride 32}, {mcjepa: CIFAR-10 k-NN, stride 32},
{ratio_1: CIFAR-10 k-NN, stride 32} and {ratio_3: CIFAR-10 k-NN, stride 32}%, J&F at stride 8
{ratio_0.1: DAVIS 2016 J&F, 8}, {mcjepa: DAVIS 2016 J&F, 8}, {ratio_1: DAVIS 2016 J&F, 8} and
{ratio_3: DAVIS 2016 J&F, 8}, with two strides {ratio_0.1: DAVIS 2016 J&F, 8+16},
{mcjepa: DAVIS 2016 J&F, 8+16}, {ratio_1: DAVIS 2016 J&F, 8+16} and {ratio_3: DAVIS 2016 J&F, 8+16}.""",
    ),
    (
        "Flow that starts after 10 of 100 epochs is best (Figure 5 (1))",
        POCKET,
        """**Not in this short run, but later is indeed similar and cheaper** (one seed). Flow that starts with the
first step, after 10% and after 30% of the steps ends at {start_0: EPE}, {mcjepa: EPE} and {start_30: EPE} px
(Middlebury {start_0: Middlebury EPE}, {mcjepa: Middlebury EPE} and {start_30: Middlebury EPE}), with 1,000,
900 and 700 steps of flow. Content is alike: k-NN
{start_0: CIFAR-10 k-NN, stride 32}, {mcjepa: CIFAR-10 k-NN, stride 32} and
{start_30: CIFAR-10 k-NN, stride 32}%, J&F at stride 8 {start_0: DAVIS 2016 J&F, 8}, {mcjepa: DAVIS 2016 J&F, 8} and
{start_30: DAVIS 2016 J&F, 8}, with two strides {start_0: DAVIS 2016 J&F, 8+16}, {mcjepa: DAVIS 2016 J&F, 8+16} and
{start_30: DAVIS 2016 J&F, 8+16}.""",
    ),
    (
        "The coefficient of Eq. 5 improves flow, and is very sensitive (Figure 5 (2))",
        POCKET,
        """**Neither is seen here** (one seed). Without Eq. 5, with a coefficient of 0.02 and with 0.2 the flow has
{cycle_0: EPE}, {mcjepa: EPE} and {cycle_0.2: EPE} px, on Middlebury {cycle_0: Middlebury EPE},
{mcjepa: Middlebury EPE} and {cycle_0.2: Middlebury EPE}; k-NN is {cycle_0: CIFAR-10 k-NN, stride 32},
{mcjepa: CIFAR-10 k-NN, stride 32} and {cycle_0.2: CIFAR-10 k-NN, stride 32}%, J&F at stride 8
{cycle_0: DAVIS 2016 J&F, 8}, {mcjepa: DAVIS 2016 J&F, 8} and {cycle_0.2: DAVIS 2016 J&F, 8}. These differences are
as small as those between seeds, and no order runs through them.""",
    ),
    (
        "Without layer norm in the estimator the training crashes (Table 3)",
        POCKET,
        """**Not in this short run** (one seed). Without it the flow has {norm_none: EPE} px in place of {mcjepa: EPE},
on Middlebury {norm_none: Middlebury EPE} in place of {mcjepa: Middlebury EPE}; content is as good: k-NN
{norm_none: CIFAR-10 k-NN, stride 32} and {mcjepa: CIFAR-10 k-NN, stride 32}%, J&F at stride 8
{norm_none: DAVIS 2016 J&F, 8} and {mcjepa: DAVIS 2016 J&F, 8}. With l2 in its place, far behind
in the paper (6.21 px against 2.68 on KITTI 2015), flow is no worse here: {norm_l2: EPE} px, on Middlebury
{norm_l2: Middlebury EPE}; k-NN is {norm_l2: CIFAR-10 k-NN, stride 32}%, J&F {norm_l2: DAVIS 2016 J&F, 8}; and so with
both (4.55 px in the paper): {norm_layer+l2: EPE} px, {norm_layer+l2: Middlebury EPE},
{norm_layer+l2: CIFAR-10 k-NN, stride 32}% and {norm_layer+l2: DAVIS 2016 J&F, 8}. An estimator twice as wide, slightly
better in the paper, is behind in flow, {factor_1: EPE} px, on Middlebury {factor_1: Middlebury EPE}, and alike in
content: k-NN {factor_1: CIFAR-10 k-NN, stride 32}%, J&F {factor_1: DAVIS 2016 J&F, 8}.""",
    ),
    (
        "An encoder made for flow learns flow alone (Table 4: PWC-Net's has 14.8% mIoU and 10.1% J&F)",
        POCKET,
        """**Holds for the paper's measures** (one seed). With PWC-Net's encoder, without norms, the flow is better,
{pwc: EPE} px in place of {mcjepa: EPE}, on Middlebury {pwc: Middlebury EPE} and {mcjepa: Middlebury EPE}. Its content
is worse, each at its best level: k-NN {pwc: CIFAR-10 k-NN, stride 16} in place of
{mcjepa: CIFAR-10 k-NN, stride 32}%, ridge regression {pwc: CIFAR-10 ridge, stride 8} and
{mcjepa: CIFAR-10 ridge, stride 32}, and J&F on DAVIS {pwc: DAVIS 2016 J&F, 8} and {mcjepa: DAVIS 2016 J&F, 8}, with two
strides {pwc: DAVIS 2016 J&F, 8+16} and {mcjepa: DAVIS 2016 J&F, 8+16}. On MovingShapes themselves it is ahead: it finds
the textures of objects in other colours in {pwc: texture}%, in place of {mcjepa: texture}, and follows objects among
like-coloured distractors with {pwc: J&F, 8}%, in place of {mcjepa: J&F, 8}.""",
    ),
    (
        "The combined loss is best, a frozen encoder is worst at flow (Table 5)",
        POCKET,
        """**The first holds in most measures, at its price; the second does not** (one seed). The combined loss has the
lowest error on MovingShapes, {mcjepa: EPE} px (the others {finetune: EPE} to {alternate_batches: EPE}), and the highest
J&F on DAVIS, {mcjepa: DAVIS 2016 J&F, 8}% at stride 8 and {mcjepa: DAVIS 2016 J&F, 8+16}% with two strides (the best of
the others are alternating epochs, {alternate_epochs: DAVIS 2016 J&F, 8} and {alternate_epochs: DAVIS 2016 J&F, 8+16}).
Its k-NN, {mcjepa: CIFAR-10 k-NN, stride 32}%, is that of an encoder that has learned content alone and was then frozen
({frozen: CIFAR-10 k-NN, stride 32}). But each of its steps learns both tasks, with the others only one. On Middlebury
alternating epochs are ahead ({alternate_epochs: Middlebury EPE} against {mcjepa: Middlebury EPE} px). On a frozen
encoder the estimator learns flow nearly as well as with fine-tuning ({frozen: EPE} and {finetune: EPE} px, on
Middlebury {frozen: Middlebury EPE} and {finetune: Middlebury EPE}); alternating batches are the worst at flow.""",
    ),
    (
        "Eq. 6 improves the method (Table 11)",
        POCKET,
        """**Not with the second-hand weights** (one seed). Without it nothing collapses in 1,000 steps: the deviation
of each level ends within 5% of the other run's. Flow has {without_eq6: EPE} px in place of {mcjepa: EPE} (Middlebury
{without_eq6: Middlebury EPE} and {mcjepa: Middlebury EPE}), k-NN {without_eq6: CIFAR-10 k-NN, stride 32} in place of
{mcjepa: CIFAR-10 k-NN, stride 32}%, J&F at stride 8 {without_eq6: DAVIS 2016 J&F, 8} in place of
{mcjepa: DAVIS 2016 J&F, 8}. These weights are too low to hold features up against Eqs. 2 and 5: the deviation at stride
32 falls from 0.86 to 0.64, and in M-JEPA, whose features no VICReg loss holds, from 0.83 to 0.17.""",
    ),
    (
        "Eq. 6 strong enough to hold all levels up, a variance weight of 0.1 at each (ours)",
        POCKET,
        """**Better in each of two seeds, but for k-NN.** All deviations but that of stride 2 then end between 0.96 and
1.03. Flow has {eq6_strong: EPE} px in place of {mcjepa: EPE}, on Middlebury {eq6_strong: Middlebury EPE} in place of
{mcjepa: Middlebury EPE}, J&F at stride 8 is {eq6_strong: DAVIS 2016 J&F, 8} in place of {mcjepa: DAVIS 2016 J&F, 8}%
(more by 2.6 and 5.9), with two strides {eq6_strong: DAVIS 2016 J&F, 8+16} in place of {mcjepa: DAVIS 2016 J&F, 8+16}
(by 0.1 and 3.5). VICReg alone has {vicreg: DAVIS 2016 J&F, 8} and {vicreg: DAVIS 2016 J&F, 8+16}, M-JEPA's flow
{mjepa: EPE} px, on Middlebury {mjepa: Middlebury EPE}. K-NN is {eq6_strong: CIFAR-10 k-NN, stride 32} in place of
{mcjepa: CIFAR-10 k-NN, stride 32}% (alike, and less by 1.2). In the preset `pocket` itself, whose gradients' ratio is
1, flow becomes worse with it: 1.96 px on its 20 pairs, in four runs without it 1.68 to 1.86.""",
    ),
)


def text_of(runs: list[dict], name: str, measure: str) -> str:
    """The mean and the standard deviation of a measure over the seeds of a row, or how it failed."""
    own = [run for run in runs if run["name"] == name]
    numbers = [run["measures"][measure] for run in own if measure in run["measures"]]
    if not numbers:
        return "diverged" if any(run.get("diverged") for run in own) else ""
    digits, several = 2 if "EPE" in measure else 1, len(numbers) > 1
    return f"{np.mean(numbers):.{digits}f}" + (f" ± {np.std(numbers, ddof=1):.{digits}f}" if several else "")


def table(number: str, series: str, runs: list[dict], paper: list[dict[str, str]]) -> list[str]:
    """The lines of a table of one series, with the paper's columns; none without a row of its own."""
    rows = [row for row in paper if row["table"] == number and any(run["name"] == row["row"] for run in runs)]
    if number != "1" and all(row["row"] == "mcjepa" for row in rows):
        return []
    runs = of_common_seeds(runs, [row["row"] for row in rows])
    measures = [each for each in MEASURES if any(each in run["measures"] for run in runs)]
    columns = [*paper[0]][3:]
    lines = [[series, "seeds", *measures, *(f"paper: {column}" for column in columns)]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        seeds = sum(run["name"] == row["row"] for run in runs)
        numbers = [text_of(runs, row["row"], measure) for measure in measures]
        lines.append([row["title"], str(seeds), *numbers, *(row[column] for column in columns)])
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def cite(text: str, runs: list[dict]) -> str:
    """A claim's text with the numbers that it names."""
    cited = re.compile(r"\{([\w.+]+): (.+?)\}")
    runs = of_common_seeds(runs, [name for name, _ in cited.findall(text)])
    text = cited.sub(lambda m: text_of(runs, m[1], m[2]) or "(not measured)", text)
    return textwrap.fill(text, 120, break_on_hyphens=False)


def write_report(folder: Path) -> None:
    """report.md and the pictures in report/, from the results.jsonl and the curves/ in a folder."""
    results: dict[str, list[dict]] = {}
    for run in map(json.loads, (folder / "results.jsonl").read_text().splitlines()):
        results.setdefault(run["series"], []).append(run)
    paper = [*csv.DictReader((HERE / "paper.csv").read_text().splitlines())]
    lines = ["# The paper's claims at a small scale", "", *INTRODUCTION.splitlines(), ""]
    notes = (f"- {series}: {NOTES.get(series, 'by run.py.')}" for series in results)
    lines += [*(textwrap.fill(note, 120, subsequent_indent="  ") for note in notes), "", "## Claims", ""]
    for claim, series, text in CLAIMS:
        lines += [f"{claim}:", cite(text, results.get(series, [])), ""]
    for number in TABLES:
        tables = [line for series, runs in results.items() for line in table(number, series, runs, paper)]
        lines += [f"## Table {number}", "", *(tables or [NOT_RUN.format(f"--table {number}"), ""])]
        if number == "1":
            lines += draw_levels(results, paper, folder) + ["## Table 2", "", TABLE_2, ""]
    pictures = draw_figure_5(results, folder)
    lines += ["## Figure 5", "", FIGURE_5, "", *(pictures or [NOT_RUN.format(f"--figure {' '.join(FIGURES)}"), ""])]
    lines += ["## While training", "", WHILE_TRAINING, "", *draw_training(results, folder)]
    (folder / "report.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=HERE, help="of results.jsonl, curves/ and report.md")
    write_report(parser.parse_args().folder)
