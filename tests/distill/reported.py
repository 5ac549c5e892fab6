"""A finished run's report, made up, and the page of one as a browser would see it."""

import dataclasses
import html.parser

from distill.monitor.metrics import RolloutSample
from distill.report import report as reports

SAMPLE = RolloutSample(
    mode="thinking",
    prompt="2 + 3 = ?",
    thinking="2 + 3 is 5.",
    answer="5",
    expected="5",
    correct=True,
    response_tokens=12,
    finished=True,
    prompt_id="sums-7",
)
OFF_POLICY = reports.StageCost(
    name="off_policy",
    kind="OffPolicy",
    steps=150,
    tokens_trained=1_228_800,
    tokens_sampled=24_576,
    student_train_flops=9.6e11,
    student_sample_flops=0,
    teacher_flops=3.6e11,
    device_seconds=48.0,
    student_train_seconds=36.0,
    teacher_generate_seconds=12.0,
)
ON_POLICY = dataclasses.replace(
    OFF_POLICY,
    name="on_policy",
    kind="OnPolicy",
    student_train_seconds=None,
    teacher_generate_seconds=None,
)


def row(model, pass_at_1, mode="thinking", **fields):
    defaults = {"pass_at_k": {8: min(1, 1.2 * pass_at_1)}, "problems": 256, "samples_per_problem": 8}
    return reports.EvaluationRow(
        model=model, mode=mode, pass_at_1=pass_at_1, mean_response_tokens=31.4, **defaults | fields
    )


REPORT = reports.Report(
    experiment="quickstart",
    rows=[
        row("student_initial", 0.031),
        row("off_policy", 0.491, pass_at_1_stderr=0.031, working_correct=0.45),
        row("off_policy", 0.22, mode="non_thinking"),
        row("on_policy", 0.962),
        row("teacher", 0.995),
    ],
    stages=[OFF_POLICY, ON_POLICY],
    student_parameters=131_200,
    teacher_parameters=722_000,
)


class Page(html.parser.HTMLParser):
    """Collects what a browser would see: tags that are open wrongly, texts, and addresses."""

    VOID = ("meta", "br", "path", "use")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.texts = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("href", "src", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data.strip())
