"""Tables of the operator on a CPU."""

from __future__ import annotations

from benchmarks.report.tables import Record, Table, by_key, megabytes, times, with_spread


def operator(record: Record) -> tuple[str, Table]:
    """float32: one line per workload, direction and number of threads."""
    rows = []
    for row in record["rows"]:
        if row["dtype"] == "float32":
            core, compiled = (row["baselines"].get(x) for x in ("grid_sample", "torch.compile"))
            rows.append(
                [
                    *(row["workload"], row["direction"], str(row["threads"])),
                    with_spread(row["ms"], row["quartiles_ms"]),
                    times(core["ratio"]),
                    times(compiled and compiled["ratio"]),
                    f"{row['floor']['share']:.2f}",
                    f"{megabytes(row['extra_bytes'])} / {core['extra_bytes'] / 1e6:.0f}",
                ]
            )
    rates = record["rates"]
    copied = rates["copy_bytes_per_second"].items()
    floor = ", ".join(f"{rate / 1e9:.1f} GB/s ({threads})" for threads, rate in copied)
    if rates["loads_per_second"]:
        billion = rates["loads_per_second"] / 1e9
        floor += f"; a core loads {billion:.2f} billion vectors of 64 bytes per second"
    note = (
        "Milliseconds with quartiles, and the time of the `grid_sample` core over ours, as it is "
        "and under `torch.compile`. The floor is the higher of two: memory is copied there at "
        f"{floor}. Extra memory is ours and the core's."
    )
    columns = ["workload", "direction", "threads", "msda, ms", "`grid_sample`", "`torch.compile`"]
    columns += ["share of the floor", "extra memory, MB"]
    return "float32, ", Table(columns, rows, note)


def dtypes(record: Record) -> tuple[str, Table]:
    """The workloads that were measured in every dtype, on one thread: time, ratio, error."""
    names = list(dict.fromkeys(row["dtype"] for row in record["rows"]))

    def cell(row: Record | None) -> str:
        if row is None:
            return "-"
        core = row["baselines"]["grid_sample"]
        our_error, core_error = (max(one["errors"].values()) for one in (row, core))
        return f"{row['ms']:.2f}, {times(core['ratio'])}, {our_error:.0e} ({core_error:.0e})"

    alone = [row for row in record["rows"] if row["threads"] == 1]
    lines = by_key(alone, ("workload", "direction"), "dtype").items()
    rows = [[*line, *(cell(by_dtype.get(name)) for name in names)] for line, by_dtype in lines]
    note = (
        "One thread: milliseconds, the time of the `grid_sample` core over ours, and the largest "
        "relative error against float64 (Euclidean norm, the largest of the gradients), ours and "
        "the core's. 16 bits: the core computes in float32, as PyTorch's 16-bit `grid_sample` on "
        "a CPU reads outside its input."
    )
    return "", Table(["workload", "direction", *names], rows, note)


# Sides of old records of peers whose times are those of operator.json.
OF_OPERATOR = ("msda", "grid_sample", "torch.compile")


def peers(record: Record) -> tuple[str, Table]:
    """Other implementations, without what the operator's record holds."""
    names = [name for name in record["sides"] if name not in OF_OPERATOR]

    def cell(side: Record | None) -> str:
        if side is None:
            return "-"
        if "ms" not in side:
            return "refused"
        return f"{with_spread(side['ms'], side['quartiles_ms'], '.1f')}, {times(side['ratio'])}"

    rows = [
        [
            *(row["workload"], row["direction"], str(row["threads"])),
            *(cell(row["sides"].get(name)) for name in names),
        ]
        for row in record["rows"]
    ]
    described = []
    for name in names:
        about = record["sides"][name]
        versions = ", ".join(f"{what} {number}" for what, number in about["versions"].items())
        described.append(f"{name}: {about['about']} ({versions}).")
    if record["missing"]:
        described.append(f"Not measured: {', '.join(record['missing'])}.")
    note = (
        "Milliseconds with quartiles, and times ours in the same run; ours and the `grid_sample` "
        f"core have their times in the operator's table. {' '.join(described)}"
    )
    return "float32, ", Table(["workload", "direction", "threads", *names], rows, note)


def fused(record: Record) -> tuple[str, Table]:
    """What the fused form saves; its own time is in the operator's record."""
    rows = [
        [
            *(row["workload"], row["direction"], str(row["threads"])),
            with_spread(row["unfused_ms"], row.get("unfused_quartiles_ms")),
            times(row["ratio"], 2),
            f"{row['over_plain']:.2f}",
            " / ".join(megabytes(row[f"{side}_extra_bytes"]) for side in ("unfused", "fused")),
        ]
        for row in record["rows"]
    ]
    calls = ", ".join(f"{name} {us:.0f} us" for name, us in record["calls"].items())
    note = (
        "The fused form's own times are in the operator's table. The plain call is of the "
        "operator on locations and weights that are there already. A call on one query, one "
        f"thread: {calls}."
    )
    columns = ["workload", "direction", "threads", "unfused, ms", "over the fused"]
    columns += ["fused over the plain call", "extra memory, MB: unfused / fused"]
    return "float32, ", Table(columns, rows, note)


def capabilities(record: Record) -> tuple[str, Table]:
    """Each instruction set beside the best one."""
    names = dict.fromkeys(row["capability"] for row in record["rows"])
    by_direction = by_key(record["rows"], ["direction"], "capability")
    rows = [[*line, *(f"{of[x]['speed']:.2f}" for x in names)] for line, of in by_direction.items()]
    title = f"The {record['workload']} on one thread, float32, the best set = 1. "
    return title, Table(["speed of", *names], rows)
