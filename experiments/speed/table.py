"""The table of bench.py: its rows with their goals, and how values become a verdict."""
import json
import statistics

from experiments import tables
from formats import disk

# Row → what is measured, goal on a CPU (2 threads, fp32, B = 8), goal on an H100 (bf16, B = 32); None: there
# is none. A row with several goals has several entries: its number is what stands before the space.
ROWS = {
    "1 k=1": ("full LoRA² step, k=1 / own frozen forward + backward", "≤ 1.10", "≤ 1.25"),
    "1 k=8": ("full LoRA² step, k=8 / own frozen forward + backward", "≤ 1.15", "≤ 1.25"),
    "2 k=1": ("own LoRA² step / own AdaLoRA step, r = k = 1", "≤ 1.02", "≤ 1.02"),
    "2 k=8": ("own LoRA² step / own AdaLoRA step, r = k = 8", "≤ 1.02", "≤ 1.02"),
    "3 T=128": ("transformers + peft AdaLoRA / own LoRA², full step, T=128", "≥ 1.3", "≥ 5"),
    "3 T=256": ("transformers + peft AdaLoRA / own LoRA², full step, T=256", None, "≥ 3"),
    "4": ("transformers frozen / own frozen", "≥ 1.15", "≥ 1.8"),
    "5 T=128": ("saved activation bytes, own LoRA² / transformers + peft, T=128", "≤ 0.50", None),
    "5 T=256": ("saved activation bytes, own LoRA² / transformers + peft, T=256", "≤ 0.60", None),
    "5 peak": ("peak memory, own LoRA² / transformers + peft", None, "≤ 0.55"),
    "6": ("operations of a full LoRA² step", "≤ 2500", "≤ 2500"),
    "6 update": ("of these clip, AdamW, importance, selection", "≤ 60", "≤ 60"),
    "6 depth": ("the same, change from 2 layers to all", "= 0", "= 0"),
    "7": ("host synchronisations in a LoRA² step", "= 0", "= 0"),
    "8": ("R + importance + pruning, on / off", "≤ 1.02", "≤ 1.03"),
    "9 rte": ("tokens processed / real tokens, RTE", "≤ 1.10", "≤ 1.10"),
    "9 mrpc": ("tokens processed / real tokens, MRPC", "≤ 1.10", "≤ 1.10"),
    "9 stsb": ("tokens processed / real tokens, STS-B", "≤ 1.20", "≤ 1.20"),
    "9 cola": ("tokens processed / real tokens, CoLA", "≤ 1.40", "≤ 1.40"),
    "10 share": ("share of the measured sgemm rate, own frozen step", "≥ 0.85", None),
    "10 peer": ("the same of transformers' frozen step", None, None),
    "10 rate": ("TFLOP/s of the matrix products, own frozen step", None, "≥ 240"),
    "11 k": ("k = 8 step / k = 1 step", "≤ 1.05", "≤ 1.03"),
    "11 merged": ("merged model / plain model, evaluation", "≤ 1.02", "≤ 1.02"),
    "12 rte": ("epoch, transformers + peft AdaLoRA / own train.py, RTE", "≥ 2.2", "≥ 3"),
    "12 mrpc": ("epoch, transformers + peft AdaLoRA / own train.py, MRPC", "≥ 1.6", "≥ 3"),
    "12 stsb": ("epoch, transformers + peft AdaLoRA / own train.py, STS-B", "≥ 2.2", "≥ 3"),
    "12 cola": ("epoch, transformers + peft AdaLoRA / own train.py, CoLA", "≥ 1.8", "≥ 3")}

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")               # in a profile; in place too, as addmm_


def summary(values, **more):
    """The median, least and greatest of some values, and how many they are."""
    values = list(values)
    return {"value": statistics.median(values), "min": min(values), "max": max(values),
            "n": len(values)} | more


def worst(values):
    """The same of exact counts that are small when good: it is the greatest that has to meet the goal."""
    values = list(values)
    return summary(values, value=max(values))


def paired(a, b):
    """Of the ratios of times that belong together: a[i] and b[i] were taken in the same round."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} times do not pair")
    return summary(x / y for x, y in zip(a, b))


def passes(value, goal):
    """Whether a value meets a goal such as "≤ 1.10"."""
    sign, bound = goal.split()
    return {"≤": value <= float(bound), "≥": value >= float(bound), "=": value == float(bound)}[sign]


def report(results, device, judged=ROWS, only=ROWS):
    """The table as Markdown: row, ratio, goal, value, least and greatest; a verdict on rows in `judged`."""
    lines = []
    for key, (what, *goals) in ROWS.items():
        goal, result = goals[device == "cuda"], results.get(key)
        if goal is None and result is None or key not in only:
            continue
        whole = result and all(float(result[name]).is_integer() for name in ("value", "min", "max"))
        digits = 0 if whole else 3
        shown = "not run" if result is None else f"{result['value']:,.{digits}f}"
        if result and result["min"] < result["max"]:
            shown += f" ({result['min']:,.{digits}f} – {result['max']:,.{digits}f}; n = {result['n']})"
        verdict = "" if result is None or goal is None or key not in judged else (
            "pass" if passes(result["value"], goal) else "FAIL")
        lines.append([key.split()[0], what, goal or "", shown, verdict])
    return tables.markdown(["#", "ratio", "goal", "value (min – max)", ""], lines)


def saved_table(units):
    """What a forward pass keeps, as Markdown, from {what: how much, in units of B · T · d floats a layer}."""
    return tables.markdown(["own LoRA² k=8 keeps", "in units of B · T · d floats a layer"],
                           [[what, f"{n:.2f}"] for what, n in units.items()])


def products_text(lines, products):
    """Row 10 in a sentence: what the profile's matrix products take, and what share they alone would be.

    products: {"GFLOP": of a step, "GFLOP/s": summary() of the measured rate}, as in bench.py's details.
    """
    total = sum(line["seconds"] for line in lines)
    taken = sum(line["seconds"] for line in lines if line["operation"].rstrip("_") in PRODUCTS)
    reached, rate = products["GFLOP"] / taken, products["GFLOP/s"]["max"]      # the fastest of both
    return (f"The matrix products take {1000 * taken:,.0f} of {1000 * total:,.0f} ms, at {reached:,.0f} of "
            f"the {rate:,.0f} GFLOP/s that were measured at best. Alone they would be a share of "
            f"{reached / rate:.3f}; the other "
            f"{1000 * (total - taken):,.0f} ms are passes over memory, dropout's random numbers and calls.\n")


def profile_table(lines, most=12):
    """The longest lines of bench_steps.profile() as Markdown, and the rest as one line."""
    total = sum(line["seconds"] for line in lines)
    rest = {"operation": "all others", "calls": sum(line["calls"] for line in lines[most:]),
            "seconds": sum(line["seconds"] for line in lines[most:]), "GFLOP/s": 0}
    return tables.markdown(["operation", "calls", "ms", "share", "GFLOP/s"], [[
        line["operation"], f"{line['calls']:,}", f"{1000 * line['seconds']:,.1f}",
        f"{100 * line['seconds'] / total:.1f} %", f"{line['GFLOP/s']:,.0f}" if line["GFLOP/s"] >= 1 else ""]
        for line in lines[:most] + [rest]])


def page(content, device):
    """The Markdown of a bench, from the content of its JSON file. Only a whole one is judged."""
    results = {key: row["result"] for key, row in content["rows"].items() if row["result"] != "not run"}
    judged = [key for key, result in results.items()
              if content["layers"] == "all" and result.get("rows", "all") == "all"]
    details = content["details"]
    products = products_text(details["profile"], details[f"products, T={content['T']}"])
    facts = [f"- {name}: {value}\n" for name, value in content.items() if name not in ("rows", "details")]
    return "\n".join([
        "# Performance\n", report(results, device, judged), "".join(facts),
        "## Row 10: where an own frozen step spends its time\n", profile_table(details["profile"]), products,
        "## Row 5: what a forward pass keeps\n", saved_table(details["saved"])])


def write(stem, content, text):
    """Write stem.json and stem.md; returns the path of the former."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    disk.write_file(f"{stem}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    disk.write_file(f"{stem}.md", text)
    return f"{stem}.json"
