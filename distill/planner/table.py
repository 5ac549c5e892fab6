"""A plan as a person reads it in a terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill.monitor.time_left import duration
from distill.planner.topology_plan import Plan

_GIB, _MIB = 2**30, 2**20


def show(plans: Sequence[Plan], console: Console) -> None:
    """Each topology's programs and stages, then all topologies side by side."""
    for plan in plans:
        _show_one(plan, console)
    if len(plans) > 1:
        console.print(_side_by_side(plans))


def _show_one(plan: Plan, console: Console) -> None:
    chips = f"{plan.chips:,.0f} × {plan.chip.name}"
    console.print(Text.assemble("\n", (plan.experiment, "bold"), " on ", (plan.topology, "bold"), f", {chips}"))
    if plan.refusal is None:
        console.print(_memory_table(plan))
        console.print(_roof_table(plan))
        console.print(_stage_table(plan))
        assumed = plan.assumed
        console.print(
            f"Assumed: {assumed.efficiency:.0%} of every roof, {assumed.decoding_efficiency:.0%} of decoding's, "
            f"responses {assumed.response_share:.0%} of max_new_tokens, prompts {assumed.prompt_share:.0%} of "
            f"max_prompt_tokens, rows {assumed.filled_share:.0%} filled (see --help); loading, compiling and saving "
            "are left out.",
            style="dim",
        )
        if any(program.sent is None for program in plan.programs):
            console.print(
                "Not compiled: without temporaries and what is sent between devices, a program may need more and take "
                "longer.",
                style="yellow",
            )
    for problem in plan.problems:
        console.print(Text.assemble(("does not fit", "red"), f"  {problem}"), soft_wrap=True)
    if plan.fits:
        total = f"{_hours(plan.seconds)}, {plan.chip_hours:,.1f} chip-hours"
        console.print(Text.assemble(("fits", "green"), f"  {total}"))
    if plan.smallest is not None:
        kind = plan.topology.partition(":")[0]
        console.print(f"smallest {kind} that fits, batches as they are: {plan.smallest}")


def _memory_table(plan: Plan) -> Table:
    # A model for tests would be a row of zeros in GiB.
    small = all(program.memory.total < _GIB for program in plan.programs)
    unit, name = (_MIB, "MiB") if small else (_GIB, "GiB")

    def size(count: float) -> str:
        return f"{count / unit:,.2f}" if count < 10 * unit else f"{count / unit:,.1f}"

    capacity = f"of {size(plan.chip.memory_bytes)}"
    table = _table(f"{name} a device", "weights", "optimizer", "cache", "rows", "temporaries", "all", capacity)
    for program in plan.programs:
        memory = program.memory
        share = memory.total / plan.chip.memory_bytes
        table.add_row(
            program.name,
            *map(size, (memory.weights, memory.optimizer, memory.cache, memory.other)),
            "?" if memory.temporaries is None else size(memory.temporaries),
            size(memory.total),
            f"{share:.0%}",
            style="red" if program.problem else None,
        )
    return table


def _roof_table(plan: Plan) -> Table:
    table = _table(
        "a call, at the roof", "TFLOP", "GB memory", "MB a link", "MB network", "time", "bound by", "tokens/s"
    )
    for program in plan.programs:
        sent = program.sent
        table.add_row(
            program.name,
            _number(program.work.flops / 1e12),
            _number(program.work.device_bytes / 1e9),
            "?" if sent is None else _number(sent.link_bytes / 1e6),
            "?" if sent is None else _number(sent.network_bytes / 1e6) if plan.chip.network_bytes_per_s else "",
            _seconds(program.roof.seconds),
            program.roof.bound,
            f"{program.tokens_per_s:,.0f}" if program.work.tokens else "",
        )
    table.caption = "FLOP on all devices, memory on each; a call that writes is one token of every sequence"
    return table


def _stage_table(plan: Plan) -> Table:
    table = _table(
        "the whole run", "teacher", "student generates, scores", "student trains", "all", "chip-hours", "targets moved"
    )
    for stage in plan.stages:
        teacher = sum(value for name, value in stage.seconds.items() if name.startswith("teacher"))
        writes = sum(
            stage.seconds.get(name, 0.0) for name in ("student_prefills", "student_generates", "student_scores")
        )
        trains = sum(stage.seconds.get(name, 0.0) for name in ("student_routes", "student_trains", "student_updates"))
        moved = f"{stage.bytes_moved / 1e9:,.1f} GB" if stage.bytes_moved else ""
        table.add_row(
            stage.name,
            *(_hours(value) if value else "" for value in (teacher, writes, trains)),
            _hours(stage.elapsed_seconds),
            f"{plan.chips * stage.elapsed_seconds / 3600:,.1f}",
            moved,
        )
    table.caption = "\n".join(
        f"{stage.name}: less than the sum, since the teacher scores on devices of its own while the student "
        f"{'writes ahead and trains' if stage.pipeline.ahead else 'trains'}"
        for stage in plan.stages
        if stage.pipeline is not None and stage.elapsed_seconds < sum(stage.seconds.values())
    )
    return table


def _side_by_side(plans: Sequence[Plan]) -> Table:
    table = _table("topology", "chips", "fullest device", "hours", "chip-hours", "smallest that fits")
    for plan in plans:
        fullest = max((one.memory.total for one in plan.programs), default=0) / plan.chip.memory_bytes
        row = [f"{plan.chips:,.0f}", f"{fullest:.0%}" if plan.programs else ""]
        row += [f"{plan.seconds / 3600:,.1f}", f"{plan.chip_hours:,.0f}"] if plan.fits else ["does not fit", ""]
        table.add_row(plan.topology, *row, plan.smallest or "")
    return table


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left", caption_style="dim")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else duration(seconds)
