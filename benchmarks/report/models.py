"""Tables of whole models: detectors, runtimes, training, dense attention."""

from __future__ import annotations

from benchmarks.report.tables import Record, Table, megabytes, times, with_spread

DIRECTIONS = {"forward": "forward", "both": "forward + backward"}
OPERATORS = ("reference", "msda")  # that the detector runs on

# ---- the detector --------------------------------------------------------------------------------


def detector_title(record: Record) -> str:
    """What was run."""
    height, width = record["size"]
    amp = record.get("amp", "off")
    dtype = "float32" if amp == "off" else f"autocast to {amp}"
    return f"{record['preset']}, batch {record['batch']}, {height} x {width}, {dtype}, "


def detector(record: Record) -> tuple[str, Table]:
    """Speed and memory on our operator and on the reference."""
    rows = []
    for row in record["rows"]:
        spread, speed, extra = (
            row.get("quartiles", {}),
            row["images_per_second"],
            row["extra_bytes"],
        )
        rows.append(
            [
                DIRECTIONS[row["direction"]],
                *(with_spread(speed[name], spread.get(name), ".3g") for name in OPERATORS),
                times(row["ratio"], 2),
                " / ".join(f"{extra[name] / 1e6:.0f}" for name in OPERATORS),
            ]
        )
    errors = ", ".join(f"{name} {error:.0e}" for name, error in record["errors"].items())
    note = (
        f"Medians of {record['rounds']} rounds in turns; relative errors of ours against the "
        f"reference operator: {errors}."
    )
    columns = ["direction", "images/s: reference operator", "msda", "ratio"]
    columns.append("extra memory, MB: reference operator / msda")
    return detector_title(record), Table(columns, rows, note)


def parts(record: Record) -> tuple[str, Table]:
    """Seconds and shares of the detector's parts, a column for each direction and operator."""
    columns, found = ["part"], []
    for row in record["rows"]:
        columns += [f"{DIRECTIONS[row['direction']]}: {name}, s" for name in OPERATORS]
        found += [row["part_seconds"][name] for name in OPERATORS]

    def cell(seconds: dict[str, float], part: str) -> str:
        share = seconds[part] / sum(seconds.values())
        return f"{seconds[part]:.3g} ({share:.0%})" if seconds[part] else "-"

    rows = [[part, *(cell(seconds, part) for seconds in found)] for part in found[0]]
    return f"By a profiler in one pass. {detector_title(record)}", Table(columns, rows)


MULTI_SCALE = "r50_deformable_detr"  # whose images per second are the detector's


def paper(record: Record) -> tuple[str, Table]:
    """The published configurations, counted and timed by our code."""
    height, width = record["size"]
    base = next(row for row in record["rows"] if row["preset"] == MULTI_SCALE)
    rows = []
    for row in record["rows"]:
        published, counted = row["published"], row["multiply_adds"]
        ours = row["images_per_second"] / base["images_per_second"]
        theirs = published["v100_images_per_second"] / base["published"]["v100_images_per_second"]
        counts = (counted[part] for part in ("backbone", "encoder", "decoder", "rest"))
        rows.append(
            [
                published["title"],
                f"{row['parameters']['trained'] / 1e6:.1f} / {published['parameters_m']}",
                " + ".join(f"{count / 1e9:.1f}" for count in counts),
                f"{counted['sampling'] / 1e9:.2f}",
                f"**{counted['total'] / 1e9:.0f}** / {published['flops_g']}",
                str(row["matching_width"]),
                f"{ours:.2f} / {theirs:.2f}",
            ]
        )
    widths = [row["matching_width"] for row in record["rows"]]
    columns = [
        "configuration",
        "parameters, M: ours / published",
        "multiply-adds, G: backbone + encoder + decoder + rest",
        "of these sampling",
        "total: ours / published",
        f"as published at {height} x",
        "speed, multi-scale = 1: ours / published, V100",
    ]
    note = (
        "Published: the table of the original code's README; the paper's Table 1 has the last "
        "three, each with 40 M, 173 G and 19 images/s on a V100. Parameters are those that are "
        "trained. We count convolutions and matrix products as PyTorch's `FlopCounterMode` does, "
        "the sampling by the rule of `msda/flops.py`, and give multiply-adds; at 2 FLOPs each the "
        "numbers would be twice as large. For which images the published FLOPs are is not said "
        f"there: our multiply-adds equal them for images of {height} x {min(widths)} to "
        f"{height} x {max(widths)}, by configuration. Images per second of the multi-scale "
        "detector are in the table of the detector."
    )
    return f"One image of {height} x {width}, float32, ", Table(columns, rows, note)


# ---- transformers and runtimes -------------------------------------------------------------------


def transformers(record: Record) -> tuple[str, Table]:
    """Models of transformers before and after use_msda."""
    rows = []
    for row in record["rows"]:
        sides = [(row[f"{side}_ms"], row[f"{side}_quartiles_ms"]) for side in ("before", "after")]
        memory = (row[f"{side}_extra_bytes"] / 1e6 for side in ("before", "after"))
        rows.append(
            [
                *(row["model"], "{} x {}".format(*row["size"]), str(row["threads"])),
                *(with_spread(ms, quartiles, ".0f") for ms, quartiles in sides),
                times(row["ratio"], 2),
                " / ".join(f"{one:.0f}" for one in memory),
            ]
        )
    columns = ["model", "image", "threads", "before, ms", "after, ms", "ratio"]
    return "float32, ", Table([*columns, "extra memory, MB: before / after"], rows)


def runtimes(record: Record) -> tuple[str, Table]:
    """Each runtime on standard operators and on our node."""
    rows = []
    for row in record["rows"]:
        error, share = row["error"], row["operator_share"]
        rows.append(
            [
                *(row["model"], row["side"], str(row["threads"])),
                with_spread(row["ms"], row["quartiles_ms"]),
                times(row["ratio"], 2),
                "-" if error is None else f"{error:.0e}",
                "-" if share is None else f"{share:.0%}",
            ]
        )
    columns = ["model", "in", "threads", "ms (quartiles)", "against standard operators"]
    return "float32, ", Table([*columns, "relative error", "share of the operator"], rows)


# ---- dense attention -----------------------------------------------------------------------------

SIDES = (64, 256, 512, 1024, 2048)  # pixels, of the many that are measured


def scaling(record: Record) -> tuple[str, Table]:
    """Dense and deformable attention over growing images."""

    def milliseconds(one: Record) -> str:
        spread = one.get("quartiles_ms") if one.get("rounds", 1) > 1 else None
        return with_spread(one["ms"], spread, ".3f" if one["ms"] < 1 else ".1f")

    rows = []
    for row in record["rows"]:
        if row["side"] in SIDES:
            both = [row["attentions"][name] for name in ("dense", "msda")]
            marked = [("" if one["computed"] is None else "~", one) for one in both]
            rows.append(
                [
                    *(row["part"], DIRECTIONS[row["direction"]]),
                    *(f"{row['side']} x {row['side']}", str(row["tokens"])),
                    *(mark + milliseconds(one) for mark, one in marked),
                    f"**{max(mark for mark, _ in marked)}{row['ratio']:.1f}x**",
                    " / ".join(mark + megabytes(one["extra_bytes"]) for mark, one in marked),
                    " / ".join(f"{one['flops'] / 1e9:.2f}" for one in both),
                ]
            )
    exponents = "; ".join(
        f"{fit['part']}, {fit['direction']}, {fit['attention']} {fit['exponent']:.2f} "
        f"({fit['half_exponent']:.2f})"
        for fit in record["fits"]
        if fit["quantity"] == "ms" and fit["half_exponent"] is not None
    )
    crossovers = "; ".join(
        f"{one['part']}, {one['direction']}: {one['where']}" for one in record["crossovers"]
    )
    note = (
        "~: not measured, but computed by a law fitted to the measured points (dense: a S + b S², "
        "msda: a S). Time grows with this power of S from 256 pixels on (over the larger half of "
        f"the measured sizes): {exponents or 'too few were measured'}. MSDeformAttn is the faster "
        f"one from here on: {crossovers}."
    )
    columns = ["", "direction", "image", "tokens", "dense, ms", "msda, ms", "ratio"]
    columns += ["extra memory, MB: dense / msda", "GFLOP: dense / msda"]
    return f"{record['dtype']}, more sizes in the record, ", Table(columns, rows, note)


# ---- settings ------------------------------------------------------------------------------------

AMP_NAMES = {"off": "float32", "bf16": "autocast to bfloat16"}


def settings(record: Record) -> tuple[str, Table, Table, Table]:
    """Whole programs: precision and pages, how threads wait, average precision."""
    by_task: dict[str, dict[str, float]] = {}
    for row in record["precision"]:
        column = f"{AMP_NAMES[row['amp']]}, {row['pages']} pages"
        by_task.setdefault(row["task"], {})[column] = row["images_per_second"]
    rows = []
    for task, (first, *others) in ((task, speeds.values()) for task, speeds in by_task.items()):
        cells = (f"{one:.3g}, {times(one / first, 2)}" for one in others)
        rows.append([task, f"{first:.3g}", *cells])
    precision = Table(["images/s", *next(iter(by_task.values()))], rows)

    units = ("images_per_second", "images_per_processor_second")
    columns = ["how threads wait", "images/s, alone"]
    columns.append(f"among {record['waiting']['busy_processes']} busy processes")
    columns += ["per second of processor time, alone", "among them"]
    rows = [
        [
            row["waiting"],
            *(f"{row[where][unit]:.3g}" for unit in units for where in ("alone", "among_others")),
        ]
        for row in record["waiting"]["rows"]
    ]
    waiting = Table(columns, rows)

    found = {(row["trained"], row["evaluated"]): row["AP"] for row in record["demo"]["rows"]}
    columns = [f"AP of the demo after {record['demo']['epochs']} epochs"]
    columns += [f"evaluated in {name}" for name in AMP_NAMES.values()]
    rows = [
        [f"trained in {name}", *(f"{found[trained, evaluated]:.3f}" for evaluated in AMP_NAMES)]
        for trained, name in AMP_NAMES.items()
    ]
    return "", precision, waiting, Table(columns, rows)


# ---- convergence ---------------------------------------------------------------------------------


def convergence(record: Record) -> tuple[str, Table]:
    """Epochs and seconds to each AP."""
    experiment, arms = record["experiment"], record["arms"]
    rows = []
    for name, arm in arms.items():
        reached = (passed(one, len(arm["runs"])) for one in arm["thresholds"].values())
        rows.append([name, f"{arm['lr']:g}", *reached])
    first = next(iter(arms.values()))
    epochs = ", ".join(f"{name} {number}" for name, number in experiment["epochs"].items())
    seconds = "processor" if record["seconds"] == "processor_seconds" else "GPU"
    note = (
        f"Epochs, and in brackets {seconds} seconds of training, until validation AP passes a "
        "threshold: the median of the seeds and, where they differ, least to most. Epochs "
        f"trained: {epochs}; seeds: {len(first['runs'])}. "
    )
    tried = first["tuning"]
    if tried:
        tuned = ", ".join(f"{name} {n}" for name, n in experiment["tuning_epochs"].items())
        note += f"Each arm has the learning rate, of {' or '.join(tried)}, with the highest AP "
        note += f"after {tuned} epochs."
        most = max(map(float, tried))
        highest = [name for name, arm in arms.items() if arm["lr"] == most]
        note += f" For {' and '.join(highest)} that is the highest tried." if highest else ""
    else:
        note += "Learning rates are those that the smaller experiment chose."
    title = (
        f"Data set `{experiment['preset']}`, one thread a run, "
        f"{record['total_seconds'] / 60:.0f} minutes of training in all, curves in the .csv beside "
        "the record. "
    )
    columns = ["arm", "learning rate", *(f"AP {one:g}" for one in record["thresholds"])]
    return title, Table(columns, rows, note)


def passed(entry: Record, seeds: int) -> str:
    """Epochs and seconds to one threshold."""
    if entry["epochs"] is None:
        return f"{entry['reached']} of {seeds} seeds" if entry["reached"] else "not reached"
    texts = []
    for what, digits in (("epochs", 1), ("seconds", 0)):
        middle, least, most = (f"{entry[what][key]:.{digits}f}" for key in ("median", "min", "max"))
        texts.append(middle if least == most else f"{middle}, {least} to {most}")
    return f"{texts[0]} ({texts[1]} s)"
