"""The table of bench.py: its rows with their goals, and how values become a verdict."""
import json
import statistics
from pathlib import Path

from experiments import pages
from formats import disk

# Row → what is measured, goal on a CPU (2 threads, fp32, B = 8), goal on an H100 (bf16, B = 32) or
# None, perhaps the two steps, or evaluations, whose times it compares (their names in bench.py). A
# row with several goals has several entries: its number is what stands before the space.
ROWS = disk.read_json(Path(__file__).parent / "goals.json", "restore it")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")       # in a profile; in place too, as addmm_


def rows(results, device):
    """{row: what is measured, its goal on that device or None, its result or "not run"}."""
    found = {}
    for row, (what, on_cpu, on_gpu, *_) in ROWS.items():
        found[row] = {"ratio": what, "goal": on_gpu if device == "cuda" else on_cpu,
                      "result": results.get(row, "not run")}
    return found


def summary(values, **more):
    """The median, least and greatest of some values, and how many they are."""
    values = list(values)
    return {"value": statistics.median(values), "min": min(values), "max": max(values),
            "n": len(values)} | more


def worst(values):
    """The same of exact counts that are small when good: the greatest has to meet the goal."""
    values = list(values)
    return summary(values, value=max(values))


def paired(a, b):
    """Of the ratios of times that belong together: a[i] and b[i] are of the same round."""
    return summary(x / y for x, y in zip(a, b, strict=True))


def passes(value, goal):
    """Whether a value meets a goal such as "≤ 1.10"."""
    sign, bound = goal.split()
    met = {"≤": value <= float(bound), "≥": value >= float(bound), "=": value == float(bound)}
    return met[sign]


def shown(result):
    """A summary as text: "1.074 (1.048 – 1.101; n = 21)", without digits where all are whole."""
    ends = [result["value"], result["min"], result["max"]]
    digits = 0 if all(float(end).is_integer() for end in ends) else 3
    value, least, greatest = (f"{end:,.{digits}f}" for end in ends)
    if result["min"] < result["max"]:
        return f"{value} ({least} – {greatest}; n = {result['n']})"
    return value


def report(lines, is_judged=True):
    """What rows() gave as Markdown, with a verdict where all of a task's rows were used."""
    shown_lines = []
    for row, line in lines.items():
        goal, result, value, verdict = line["goal"], line["result"], "not run", ""
        if goal is None and result == "not run":
            continue
        if result != "not run":
            value = shown(result)
            if goal and is_judged and result.get("rows", "all") == "all":
                verdict = "pass" if passes(result["value"], goal) else "FAIL"
        shown_lines.append([row.split()[0], line["ratio"], goal or "", value, verdict])
    return pages.markdown(["#", "ratio", "goal", "value (min – max)", ""], shown_lines)


def products_text(lines, products):
    """Row 10 in a sentence: what a profile's products take, and what share they alone would be.

    products: {"GFLOP": of a step, "GFLOP/s": summary() of the measured rate}.
    """
    total = sum(line["seconds"] for line in lines)
    taken = sum(line["seconds"] for line in lines if line["operation"].rstrip("_") in PRODUCTS)
    reached, rate = products["GFLOP"] / taken, products["GFLOP/s"]["max"]      # the fastest of both
    return (f"The matrix products take {1000 * taken:,.0f} of {1000 * total:,.0f} ms, at "
            f"{reached:,.0f} of the {rate:,.0f} GFLOP/s that were measured at best. Alone they "
            f"would be a share of {reached / rate:.3f}; the other {1000 * (total - taken):,.0f} ms "
            "are passes over memory, dropout's random numbers and calls.\n")


def profile_table(lines, most=12):
    """The longest lines of steps.profile() as Markdown, and the rest as one line."""
    total = sum(line["seconds"] for line in lines)
    rest = {"operation": "all others", "calls": 0, "seconds": 0, "GFLOP/s": 0}
    for line in lines[most:]:
        rest["calls"] += line["calls"]
        rest["seconds"] += line["seconds"]
    cells = []
    for line in [*lines[:most], rest]:
        rate = f"{line['GFLOP/s']:,.0f}" if line["GFLOP/s"] >= 1 else ""
        cells.append([line["operation"], f"{line['calls']:,}", f"{1000 * line['seconds']:,.1f}",
                      f"{100 * line['seconds'] / total:.1f} %", rate])
    return pages.markdown(["operation", "calls", "ms", "share", "GFLOP/s"], cells)


def page(content):
    """The Markdown of a bench, from the content of its JSON file. Only a whole one is judged."""
    facts = [f"- {name}: {value}\n" for name, value in content.items()
             if name not in ("rows", "details")]
    details = content["details"]
    products = products_text(details["profile"], details[f"products, T={content['T']}"])
    saved = pages.markdown(["own LoRA² k=8 keeps", "in units of B · T · d floats a layer"],
                            [[what, f"{n:.2f}"] for what, n in details["saved"].items()])
    return "\n".join([
        "# Performance\n", report(content["rows"], content["layers"] == "all"), "".join(facts),
        "## Row 10: where an own frozen step spends its time\n",
        profile_table(details["profile"]), products,
        "## Row 5: what a forward pass keeps\n", saved])


def write(kind, job, content, text):
    """Write the JSON file of a measurement and its Markdown into job.out; show what is first."""
    shape = "" if job.shape == "deberta-v3-base" else f"-{job.shape}"
    quick = "-quick" if job.quick else ""
    stem = Path(job.out) / f"{kind}-{job.device}{shape}{quick}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    disk.write_file(f"{stem}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    disk.write_file(f"{stem}.md", text)
    print(text.partition("\n## ")[0], f"written: {stem}.json", sep="\n")
