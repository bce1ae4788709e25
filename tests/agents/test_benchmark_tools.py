"""What benchmark tools print is read back, in both generations of their formats, or refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from device_agents.benchmark_tools import (
    BenchmarkRun,
    NotDelegated,
    Row,
    Statistics,
    ToolFailed,
    parse_benchmark,
    parse_events,
    parse_flags,
    parse_results,
)

# As printed by a build of 2020 with the GPU delegate, of 2022 with XNNPACK, and of 2018 with its runs cut short.
OLDER = """\
STARTING!
Duplicate flags: num_threads
Min num runs: [50]
Min runs duration (seconds): [1]
Max runs duration (seconds): [150]
Graph: [/data/local/tmp/mnv3_seg_float.tflite]
Require full delegation : [0]
Enable op profiling: [1]
CSV File to export profiling data to: []
#threads used for CPU inference: [1]
Use gpu : [1]
Loaded model /data/local/tmp/mnv3_seg_float.tflite
Applied GPU delegate, and the model graph will be completely executed w/ the delegate.
The input model file size (MB): 3.79893
Initialized session in 1451.51ms.
Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
count=56 first=11147 curr=8146 min=7055 max=12036 avg=8779.68 std=1115

Running benchmark for at least 50 iterations and at least 1 seconds but terminate if exceeding 150 seconds.
count=110 first=8325 curr=10016 min=7863 max=10688 avg=8680.33 std=591

Inference timings in us: Init: 1451507, First inference: 11147, Warmup (avg): 8779.68, Inference (avg): 8680.33
Note: as the benchmark tool itself affects memory footprint, the following is only APPROXIMATE to the actual memory \
footprint of the model at runtime. Take the information at your discretion.
Peak memory footprint (MB): init=63.4883 overall=63.4883
Profiling Info for Benchmark Initialization:
============================== Run Order ==============================
\t             [node type]\t          [start]\t  [first]\t [avg ms]\t     [%]\t  [cdf%]\t  [mem KB]\t[times called]\t[Name]
\t ModifyGraphWithDelegate\t            0.000\t 1450.744\t 1450.744\t 99.998%\t 99.998%\t 62364.000\t        1\tModifyGraphWithDelegate/0
\t         AllocateTensors\t         1450.830\t    0.028\t    0.016\t  0.002%\t100.000%\t     0.000\t        2\tAllocateTensors/0

Timings (microseconds): count=1 curr=1450776
Memory (bytes): count=0
2 nodes observed



Operator-wise Profiling Info for Regular Benchmark Runs:
============================== Run Order ==============================
\t             [node type]\t          [start]\t  [first]\t [avg ms]\t     [%]\t  [cdf%]\t  [mem KB]\t[times called]\t[Name]
\t     TfLiteGpuDelegateV2\t            0.000\t    8.317\t    8.671\t100.000%\t100.000%\t     0.000\t        1\t[Identity]:77

============================== Top by Computation Time ==============================
\t             [node type]\t          [start]\t  [first]\t [avg ms]\t     [%]\t  [cdf%]\t  [mem KB]\t[times called]\t[Name]
\t     TfLiteGpuDelegateV2\t            0.000\t    8.317\t    8.671\t100.000%\t100.000%\t     0.000\t        1\t[Identity]:77

Number of nodes executed: 1
============================== Summary by node type ==============================
\t             [Node type]\t  [count]\t  [avg ms]\t    [avg %]\t    [cdf %]\t  [mem KB]\t[times called]
\t     TfLiteGpuDelegateV2\t        1\t     8.671\t   100.000%\t   100.000%\t     0.000\t        1

Timings (microseconds): count=110 first=8317 curr=10006 min=7854 max=10679 avg=8671.49 std=590
Memory (bytes): count=0
1 nodes observed



"""  # noqa: E501
NEWER = """\
INFO: STARTING!
INFO: Log parameter values verbosely: [0]
INFO: Min num runs: [10]
INFO: Min runs duration (seconds): [0.5]
INFO: Num threads: [4]
INFO: Graph: [mobile_object_localizer_v1.tflite]
INFO: Enable op profiling: [1]
INFO: #threads used for CPU inference: [4]
INFO: Loaded model mobile_object_localizer_v1.tflite
INFO: Created TensorFlow Lite XNNPACK delegate for CPU.
INFO: The input model file size (MB): 1.86664
INFO: Initialized session in 16.772ms.
INFO: Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
INFO: count=67 first=8781 curr=7197 min=6335 max=9775 avg=7514.93 std=419

INFO: Running benchmark for at least 10 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
INFO: count=67 first=7176 curr=7505 min=6373 max=7775 avg=7454.97 std=256

INFO: Inference timings in us: Init: 16772, First inference: 8781, Warmup (avg): 7514.93, Inference (avg): 7454.97
INFO: Memory footprint delta from the start of the tool (MB): init=8.44922 overall=10.8789
INFO: Profiling Info for Benchmark Initialization:
============================== Run Order ==============================
\t                         [node type]\t  [first]\t [avg ms]\t     [%]\t  [cdf%]\t  [mem KB]\t[times called]\t[Name]
\t             ModifyGraphWithDelegate\t   14.842\t   14.842\t 99.317%\t 99.317%\t  3428.000\t        1\tModifyGraphWithDelegate/0
\t                     AllocateTensors\t    0.102\t    0.102\t  0.683%\t100.000%\t     0.000\t        1\tAllocateTensors/0

Timings (microseconds): count=1 curr=14944
Memory (bytes): count=0
2 nodes observed



INFO: Operator-wise Profiling Info for Regular Benchmark Runs:
============================== Run Order ==============================
\t                         [node type]\t  [first]\t [avg ms]\t     [%]\t  [cdf%]\t  [mem KB]\t[times called]\t[Name]
\t       Convolution (NHWC, QU8) IGEMM\t    0.267\t    0.278\t  3.783%\t  3.783%\t     0.000\t        1\tDelegate/Convolution (NHWC, QU8) IGEMM:0
\t                       Copy (NC, X8)\t    0.000\t    0.000\t  0.000%\t 81.690%\t     0.000\t        1\tDelegate/Copy (NC, X8):109
\t                       CONCATENATION\t    0.004\t    0.004\t  0.049%\t 81.766%\t     0.000\t        1\t[concat_1]:108
\t        TFLite_Detection_PostProcess\t    1.342\t    1.339\t 18.197%\t100.000%\t     0.000\t        1\t[TFLite_Detection_PostProcess, TFLite_Detection_PostProcess:1, TFLite_Detection_PostProcess:2]:114

============================== Top by Computation Time ==============================
\t                         [node type]\t  [first]\t [avg ms]\t     [%]\t  [cdf%]\t  [mem KB]\t[times called]\t[Name]
\t        TFLite_Detection_PostProcess\t    1.342\t    1.339\t 18.197%\t 18.197%\t     0.000\t        1\t[TFLite_Detection_PostProcess, TFLite_Detection_PostProcess:1, TFLite_Detection_PostProcess:2]:114

Number of nodes executed: 115
Timings (microseconds): count=67 first=7068 curr=7410 min=6282 max=7683 avg=7360.09 std=256
Memory (bytes): count=0
4 nodes observed

"""  # noqa: E501
OLDEST = """\
STARTING!
Loaded model /data/local/tmp/model.tflite
resolved reporter
Initialized session in 2.491ms
Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
count=1 curr=352

Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
count=1 curr=178

Average inference timings in us: Warmup: 352, Init: 2491, no stats: 178
"""
# Percentiles, and a profile in CSV with a table for what ran inside a delegate.
NEWEST = """\
INFO: STARTING!
INFO: Loaded model m.tflite
INFO: Explicitly applied XNNPACK delegate, and the model graph will be partially executed by the delegate w/ 1 \
delegate kernels.
INFO: Running benchmark for at least 1 iterations and at least 0 seconds but terminate if exceeding 150 seconds.
INFO: count=1 curr=14744

INFO: Running benchmark for at least 5 iterations and at least 0 seconds but terminate if exceeding 150 seconds.
INFO: count=5 first=14850 curr=13315 min=13105 max=15765 avg=13920.2 std=470 p5=13105 median=13460 p95=15765

INFO: Inference timings in us: Init: 12750, First inference: 14744, Warmup (avg): 14744, Inference (avg): 13920.2
INFO: Operator-wise Profiling Info for Regular Benchmark Runs:
============================== Run Order ==============================
node type, first, avg_ms, %, cdf%, mem KB, times called, name
RESIZE_NEAREST_NEIGHBOR, 0.051, 0.0498, 1.2%, 1.2%, 0, 1, [n0/a\t t1]:3
TfLiteXNNPackDelegate, 9.1, 9.00125, 98.8%, 100%, 0, 1, [t9]:12

============================== Top by Computation Time ==============================
node type, first, avg_ms, %, cdf%, mem KB, times called, name
TfLiteXNNPackDelegate, 9.1, 9.00125, 98.8%, 100%, 0, 1, [t9]:12

Timings (microseconds): count=5 first=9151 curr=9050 min=9000 max=9151 avg=9051.05 std=5
Memory (bytes): count=0
2 nodes observed

Delegate internal:
============================== Run Order ==============================
node type, first, avg_ms, %, cdf%, mem KB, times called, name
Convolution (NHWC, F32) IGEMM, 8.2, 8.12345, 90%, 90%, 0, 1, Delegate/Convolution (NHWC\t F32) IGEMM:0
Copy (NC, X32), 0.001, 8e-05, 0.1%, 90.1%, 0, 1, Delegate/Copy (NC\t X32):1

Timings (microseconds): count=0
Memory (bytes): count=0
2 nodes observed
"""
RESULTS = "tmp,0.000940745,50905088,74,0\ntmp,0.00102,50905088,74,1\na,b,9.5e-05,50905088,-1,2\n"


def test_the_older_format() -> None:
    read = parse_benchmark(OLDER, 110, warmup_runs=56, delegate="GPU", profiled=True)
    assert read.latency_ms == pytest.approx(8.68033)
    assert read.measured.median_us is None
    assert read.profile == (Row("TfLiteGpuDelegateV2", 8.671, 1, ("Identity",), False, 77),)


def test_the_newer_format() -> None:
    read = parse_benchmark(NEWER, 67, warmup_runs=67, profiled=True)
    assert read.latency_ms == pytest.approx(7.45497)
    assert [row.type for row in read.profile] == [
        "Convolution (NHWC, QU8) IGEMM", "Copy (NC, X8)", "CONCATENATION", "TFLite_Detection_PostProcess",
    ]  # fmt: skip
    assert [row.inside for row in read.profile] == [True, True, False, False]
    assert [row.index for row in read.profile] == [0, 109, 108, 114]
    assert read.profile[3].outputs[1] == "TFLite_Detection_PostProcess:1"


def test_the_oldest_format() -> None:
    assert parse_benchmark(OLDEST, 1).latency_ms == pytest.approx(0.178)


def test_percentiles_and_profiles_in_csv() -> None:
    read = parse_benchmark(NEWEST, 5, profiled=True)
    assert read.latency_ms == pytest.approx(13.46)
    assert [(found.delegate, found.extent) for found in read.delegations] == [("XNNPACK", "partial")]
    assert read.profile == (
        Row("RESIZE_NEAREST_NEIGHBOR", 0.0498, 1, ("n0/a", "t1"), False, 3),
        Row("TfLiteXNNPackDelegate", 9.00125, 1, ("t9",), False, 12),
        Row("Convolution (NHWC\t F32) IGEMM", 8.12345, 1, (), True, 0),
        Row("Copy (NC\t X32)", 8e-05, 1, (), True, 1),
    )


def test_lines_that_end_as_on_a_terminal() -> None:
    assert parse_benchmark(NEWEST.replace("\n", "\r\n"), 5, profiled=True) == parse_benchmark(NEWEST, 5, profiled=True)


def test_equal_samples() -> None:
    text = OLDEST.replace("count=1 curr=178", "count=9 curr=178(all same)")
    assert parse_benchmark(text, 9).latency_ms == pytest.approx(0.178)
    text = text.replace("(all same)", "(all same) p5=178 median=178 p95=178")
    assert parse_benchmark(text, 9).latency_ms == pytest.approx(0.178)
    with pytest.raises(ToolFailed, match="contradict"):
        parse_benchmark(text.replace("median=178", "median=187"), 9)


def test_large_means_in_scientific_notation() -> None:
    text = NEWEST.replace("avg=13920.2", "avg=1.2e+06").replace("(avg): 13920.2", "(avg): 1.2e+06")
    text = text.replace("max=15765", "max=1300000").replace("median=13460", "median=1250000")
    assert parse_benchmark(text, 5).latency_ms == pytest.approx(1250)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("INFO: Loaded", "WARN: Unconsumed cmdline flags: --num_rums=5\nINFO: Loaded"), "does not know a flag"),
        (("INFO: Loaded", "ERROR: Failed to map the model\nINFO: Loaded"), "reported an error"),
        (("count=5 first", "count=4 first"), "4 runs instead of 5"),
        (("count=1 curr=14744", "count=2 curr=14744(all same)"), "2 warm-up runs"),
        (("count=1 curr=14744", "count=2 curr=14744"), "contradict themselves"),
        (("count=1 curr=14744", "count=0"), "no statistics where they belong"),
        (("median=13460", "median=16000"), "contradict themselves"),
        (("avg=13920.2", "avg=13520.2"), "contradicts its statistics"),
        (("INFO: Inference timings", "INFO: Interference timings"), "0 summaries"),
        (("Regular Benchmark Runs:", "Regular Runs:"), "0 profiles"),
        (("avg_ms,", "average,"), "no column 'avg_ms'"),
        (("0.0498, 1.2%", "fast, 1.2%"), "does not fit its header"),
        (("1.2%, 0, 1, [n0", "1.2%, 0, 0, [n0"), "did not run every time"),
        (("Timings (microseconds): count=5", "Timings (microseconds): count=3"), "of 3 runs instead of 5"),
        (("Timings (microseconds): count=5", "Timings (microseconds): count=few"), "of 0 runs instead of 5"),
        (("2 nodes observed\n\nDelegate", "3 nodes observed\n\nDelegate"), "3 nodes observed"),
        (("first=14850 curr=13315 min=13105", "first=0 curr=0 min=0"), None),
    ],
)
def test_anything_unexpected_is_refused_and_kept(change: tuple[str, str], why: str | None) -> None:
    changed = NEWEST.replace(*change)
    assert changed != NEWEST
    if why is None:
        assert parse_benchmark(changed, 5, profiled=True).latency_ms == pytest.approx(13.46)
        return
    with pytest.raises(ToolFailed, match=why) as caught:
        parse_benchmark(changed, 5, profiled=True)
    assert changed.strip()[-200:] in str(caught.value)


def test_faster_than_the_tick() -> None:
    with pytest.raises(ToolFailed, match="tick"):
        parse_benchmark(OLDEST.replace("curr=178", "curr=0").replace("stats: 178", "stats: 0"), 1)


@pytest.mark.parametrize(
    ("statistics", "latency_ms"),
    [
        (Statistics(6, 0, 2, 0.5, 0.0), 5e-4), (Statistics(6, 1, 60, 14.0, 3.0), 14e-3),
        (Statistics(6, 9, 60, 20.0, 12.0), 12e-3), (Statistics(6, 9, 60, 20.0, None), 20e-3),
    ],
)  # fmt: skip
def test_a_median_of_few_ticks_is_too_coarse(statistics: Statistics, latency_ms: float) -> None:
    assert BenchmarkRun(statistics, (), ()).latency_ms == pytest.approx(latency_ms)


@pytest.mark.parametrize(
    "said",
    [
        "",
        "INFO: Explicitly applied GPU delegate, and the model graph will be partially executed by the delegate w/ 2 "
        "delegate kernels.\n",
        "INFO: Though GPU delegate is explicitly applied, the model graph will not be executed by the delegate.\n",
        "INFO: Explicitly applied NNAPI delegate, and the model graph will be completely executed by the delegate.\n",
    ],
)
def test_a_delegate_must_prove_that_it_ran_everything(said: str) -> None:
    with pytest.raises(NotDelegated, match="GPU delegate"):
        parse_benchmark(said + OLDEST, 1, delegate="GPU")


def test_builds_that_do_not_count_calls() -> None:
    text = NEWEST.replace("%, 0, 1, ", "%, 0, 0, ")
    assert {row.calls for row in parse_benchmark(text, 5, profiled=True).profile} == {1}


@given(st.text())
def test_no_number_comes_from_garbage(text: str) -> None:
    for parse in (parse_flags, parse_events):
        with pytest.raises(ToolFailed):
            parse(text if not text.strip().startswith("[") else "x" + text)
    with pytest.raises(ToolFailed):
        parse_benchmark(text, 1)
    with pytest.raises(ToolFailed):
        parse_results(text, 1)


@given(st.integers(0, len(NEWEST) - 1))
def test_output_that_is_cut_off_is_refused(length: int) -> None:
    assume("nodes observed" not in NEWEST[:length])  # whether more tables come then, nothing says
    with pytest.raises(ToolFailed):
        parse_benchmark(NEWEST[:length], 5, profiled=True)


@settings(max_examples=300)
@given(st.integers(0, len(OLDEST) - 1), st.characters(codec="utf-8"))
def test_a_wrong_character_never_makes_a_wrong_number(place: int, character: str) -> None:
    for text, runs in ((OLDEST, 1), (NEWEST, 5)):
        broken = text[:place] + character + text[place + 1 :]
        try:
            read = parse_benchmark(broken, runs)
        except ToolFailed:
            continue
        assert read.latency_ms == pytest.approx(parse_benchmark(text, runs).latency_ms, rel=2e-3, abs=1e-3)


@given(st.sets(st.integers(0, NEWEST.count("\n")), max_size=8))
def test_missing_lines_never_make_a_wrong_number(lost: set[int]) -> None:
    kept = "\n".join(line for number, line in enumerate(NEWEST.split("\n")) if number not in lost)
    try:
        read = parse_benchmark(kept, 5)
    except ToolFailed:
        return
    assert read.latency_ms == pytest.approx(13.46)


def test_the_flags_of_a_build() -> None:
    said = (
        "ERROR: usage: ./benchmark_model <flags>\nFlags:\n\t--num_runs=50\tint32\toptional\texpected number of runs\n"
        "\t--graph=\tstring\trequired\tgraph file name\n\t--op_profiling_output_mode=stdout\tstring\toptional\tmode\n"
    )
    assert parse_flags(said) == {"num_runs", "graph", "op_profiling_output_mode"}


def test_results_of_onnxruntime_perf_test() -> None:
    assert parse_results(RESULTS, 3) == pytest.approx([0.940745, 1.02, 0.095])


@pytest.mark.parametrize(
    "text",
    [
        RESULTS.replace(",2\n", ",3\n"), RESULTS + RESULTS, RESULTS.replace("0.00102", "nan"), "",
        RESULTS.replace("0.00102", "0"), RESULTS.replace("0.00102", "-1"), RESULTS + "\nMin Latency is 1sec\n",
        RESULTS.replace("0.00102", "1e999"),
    ],
)  # fmt: skip
def test_results_that_do_not_fit(text: str) -> None:
    with pytest.raises(ToolFailed):
        parse_results(text, 3)


def test_what_the_tool_said_is_kept_with_its_results() -> None:
    with pytest.raises(ToolFailed, match="usage: onnxruntime_perf_test"):
        parse_results("", 3, "usage: onnxruntime_perf_test")


def test_events_of_a_profile() -> None:
    events = [
        {"cat": "Session", "name": "model_run", "dur": 5},
        {"cat": "Node", "name": "n0/conv_kernel_time", "dur": 3},
    ]
    assert parse_events(json.dumps(events)) == events
    for broken in (json.dumps(events)[:-1], "{}", '[{"cat": "Node", "name": "a", "dur": -1}]', '[{"cat": "Node"}]'):
        with pytest.raises(ToolFailed):
            parse_events(broken)
