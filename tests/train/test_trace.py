"""The reader of traces on synthetic planes, whose times are known. profile_cases.py reads real traces."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.operation_kinds import kind_of
from train.trace import STEP, TOP, Event, covered, read_trace, self_times, shorten, table


class Span(NamedTuple):
    """An event of a synthetic trace."""

    name: str
    start_ns: float
    duration_ns: float
    stats: tuple[tuple[str, Any], ...] = ()


class Line(NamedTuple):
    name: str
    events: list[Span]


class Plane(NamedTuple):
    name: str
    lines: list[Line]


class Profile(NamedTuple):
    planes: list[Plane]


def host(steps: int) -> Plane:
    return Plane("/host:CPU", [Line("python", [Span(STEP, 10 * i, 9, (("step_num", i + 1),)) for i in range(steps)])])


def shares(breakdown) -> list[float]:
    return [each.seconds / breakdown.total for each in breakdown.operations]


def test_the_operations_of_tpus_are_those_of_the_line_xla_ops():
    def chip(number: int) -> Plane:
        operations = [
            Span("%while.1 = (s32[]) while(%tuple.1), body=%body", 0, 900, (("hlo_category", "while"),)),
            Span("%fusion.7 = f32[8]{0} fusion(%a, %b)", 0, 600, (("hlo_category", "convolution fusion"),)),
            Span("%all-reduce.2 = f32[8]{0} all-reduce(%c)", 600, 200, (("hlo_category", "all-reduce"),)),
            Span("%copy.3 = f32[8]{0} copy(%d)", 950, 50, (("hlo_category", "data formatting"),)),
        ]
        hidden = [Span("%copy-start.1 = f32[8]{0} copy-start(%d)", 0, 1000)]
        return Plane(f"/device:TPU:{number}", [
            Line("Steps", [Span("1", 0, 1000)]), Line("XLA Modules", [Span("jit_step(1)", 0, 1000)]),
            Line("XLA Ops", operations), Line("Async XLA Ops", hidden),
        ])  # fmt: skip

    other = Plane("/device:TPU:0 SparseCore 0", [Line("XLA Ops", [Span("%x.1 = f32[8]{0} add(%a)", 0, 5)])])
    found = read_trace(Profile([host(2), chip(0), other, chip(1)]))
    assert (found.steps, found.devices, found.window) == ((1, 2), 2, 1e-6)
    assert [(each.name, each.kind, each.runs) for each in found.operations] == [
        ("fusion.7", "matmul", 2), ("all-reduce.2", "collective", 2), ("while.1", "control flow", 2),
        ("copy.3", "copy", 2),
    ]  # fmt: skip
    times = {kind: round(seconds * 1e9 / 2) for kind, seconds in found.kinds().items()}
    assert times == {"matmul": 600, "collective": 200, "copy": 50, "control flow": 100, "idle": 50}
    assert found.total == pytest.approx(2e-6) and math.fsum(shares(found)) <= 1


def test_the_operations_of_gpus_are_the_kernels_of_all_streams():
    kernels = [
        Span("sm90_gemm", 0, 500, (("hlo_op", "gemm_fusion_dot.4"), ("hlo_module", "jit_step"))),
        Span("loop_add_fusion", 500, 100, (("hlo_op", "loop_add_fusion"), ("hlo_module", "jit_step"))),
    ]
    copies = [Span("MemcpyH2D", 550, 150)]
    nccl = [Span("ncclDevKernel_AllReduce", 600, 400, (("hlo_op", "all-reduce-start"), ("hlo_module", "jit_step")))]
    plane = Plane("/device:GPU:0", [
        Line("Stream #13(Compute)", kernels), Line("Stream #14(MemcpyH2D)", copies), Line("Stream #15", nccl),
        Line("XLA Ops", kernels), Line("XLA Modules", [Span("jit_step", 0, 1000)]),
    ])  # fmt: skip
    found = read_trace(Profile([plane, host(1)]))
    kinds = {kind: round(seconds * 1e9) for kind, seconds in found.kinds().items()}
    assert kinds == {"matmul": 500, "fusion": 100, "copy": 150, "collective": 400}  # the device is never idle
    assert math.fsum(shares(found)) == pytest.approx(1) and found.window == 1e-6


def test_a_trace_without_operations_has_no_breakdown():
    assert read_trace(Profile([host(3), Plane("/device:TPU:0", [Line("XLA Ops", [])])])) is None
    assert read_trace(Profile([])) is None


times = st.integers(0, 60)
spans = st.lists(st.tuples(times, times), min_size=1, max_size=12)


@given(spans)
def test_self_times_add_up_to_the_time_in_which_anything_ran(pairs):
    events = [Event("x", "", "", float(start), float(start + length)) for start, length in pairs]
    own = [each for _, each in self_times(events)]
    union = len({t for start, length in pairs for t in range(start, start + length)})
    assert covered((event.start, event.end) for event in events) == union
    assert math.fsum(own) == pytest.approx(union)
    assert len(own) == len(events)


@given(st.lists(st.lists(st.tuples(times, times, st.sampled_from(["dot.1", "copy.2", "f"])), max_size=8), max_size=3))
def test_shares_never_exceed_the_whole(lines):
    streams = [[Span(name, start, length) for start, length, name in line] for line in lines]
    plane = Plane("/device:GPU:0", [Line(f"Stream #{i}", events) for i, events in enumerate(streams)])
    found = read_trace(Profile([plane]))
    if found is not None and found.total > 0:
        assert math.fsum(shares(found)) <= 1 + 1e-9
        assert math.fsum(found.kinds().values()) == pytest.approx(found.total)
        assert len(table(found)) <= TOP + 14


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "matmul") for name in ("dot.3", "dot_general.12", "convolution fusion", "cublas-gemm.4")),
        *((name, "collective") for name in ("all-gather-start.2", "reduce-scatter", "recv-done")),
        *((name, "copy") for name in ("copy.7", "MemcpyD2D", "transpose.1", "data formatting", "wrapped_transpose")),
        *((name, "fusion") for name in ("loop fusion", "wrapped_add", "loop_add_fusion")),
        *((name, "other") for name in ("sort.4", "reduce.9", "scatter.1")),
        ("custom-call.3", "custom call"), ("while.2", "control flow"), ("call", "control flow"),
    ],
)  # fmt: skip
def test_a_name_or_a_category_gives_the_kind(name, kind):
    assert kind_of(name) == kind


@given(st.text(alphabet="ab/()", max_size=120))
def test_a_source_fits_its_column(source):
    assert len(shorten(source)) <= 44
