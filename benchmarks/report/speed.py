"""The README's tables of speed: beside what people use today, each figure from one record."""

from __future__ import annotations

from benchmarks.common import harness
from benchmarks.report.tables import (
    Record,
    Table,
    by_key,
    measured_on,
    no_figure,
    records,
    times,
    with_spread,
)

WORKLOADS = ("encoder", "decoder", "dino-900", "mask2former", "rt-detr")
DIRECTIONS = ("forward", "backward")
RUNTIMES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}


def speed(page: str) -> str:
    """Beside PyTorch, and where it was measured in runtimes: before and after."""
    parts: list[str] = []
    for path, record in records("operator"):
        beside = path.with_name("peers.json")
        peers = harness.read_record(beside) if beside.exists() else None
        parts += [f"float32, {measured_on(path, record)}", str(in_torch(record, peers))]
    for path, record in records("runtimes"):
        parts += [f"float32, {measured_on(path, record)}", str(in_runtimes(record))]
    return "\n\n".join(parts) or no_figure("operator")


def in_torch(record: Record, peers: Record | None) -> Table:
    """float32 on all cores: ours, and the ratios of the others."""
    rows = [row for row in record["rows"] if row["dtype"] == "float32"]
    most = max(row["threads"] for row in rows)
    ours = by_key(rows, ("workload", "threads"), "direction")
    beside = by_key(peers["rows"] if peers else (), ("workload", "threads"), "direction")
    cells = []
    for name in WORKLOADS:
        for direction in DIRECTIONS:
            row = ours[name, most][direction]
            peer = beside.get((name, most), {}).get(direction, {"sides": {}})["sides"]
            cells.append(
                [
                    f"{name}, {direction}",
                    with_spread(row["ms"], row["quartiles_ms"], ".1f"),
                    times(row["baselines"]["grid_sample"]["ratio"]),
                    times(peer.get("transformers", {}).get("ratio")),
                ]
            )
    note = (
        "`grid_sample`, the core that detection libraries fall back to, and transformers' own "
        "core: their time over ours. Each ratio is of one run; transformers' is of `peers.json`, "
        "beside that file."
    )
    return Table(["workload", "msda, ms (quartiles)", "`grid_sample`", "transformers"], cells, note)


def in_runtimes(record: Record) -> Table:
    """On all cores: each runtime before, and after with the library that is built for it."""
    most = max(row["threads"] for row in record["rows"])
    on_all = [row for row in record["rows"] if row["threads"] == most]
    rows = []
    for (model,), sides in by_key(on_all, ["model"], "side").items():
        for runtime, title in RUNTIMES.items():
            if after := sides.get(f"{runtime}, library"):
                spreads = [
                    with_spread(side["ms"], side["quartiles_ms"], ".1f")
                    for side in (sides[runtime], after)
                ]
                rows.append([model, title, *spreads, times(after["ratio"])])
    columns = ["model", "in", "standard operators, ms (quartiles)", "our node, ms", "ratio"]
    return Table(columns, rows)
