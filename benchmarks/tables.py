"""Puts the records of results/ into the tables of the READMEs and of docs, between their markers."""

import json
import statistics
from pathlib import Path

import common

HERE = Path(__file__).parent


def record(name):
    return json.loads((common.RESULTS / f"{name}.json").read_text())


def table(head, rows):
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def span(values, form):
    return f"{values['median']:{form}} ({values['min']:{form}} to {values['max']:{form}})"


def cpu():
    """Every row of the CPU record."""
    data = record("cpu")
    rows = []
    for row in data["rows"]:
        peer, ratio = row.get("peer"), row.get("ratio")
        if "share_of_sgemm" in row:
            peer, ratio = f"sgemm, {row['sgemm_flops']['median'] / 1e9:.0f} GFLOP/s / 371 MFLOP", row["share_of_sgemm"]
        allowed = row.get("sgemm_flops", {"median": 0})["median"] / 371e6
        beside = span(row["peer_tok_s"], ",.1f") if "peer_tok_s" in row else f"{allowed:,.0f}"
        rows.append([f"`{row['preset']}`", f"{row['B']} x {row['T']}", span(row["tok_s"], ",.0f"), peer, beside,
                     span(ratio, ".2f")])
    head = ["preset", "streams x tokens", "tokens/s", "beside", "its tokens/s", "ratio"]
    machine = data["machine"]
    return table(head, rows) + (
        f"\n\n{machine['processor']}, {data['threads']} threads, {data['instruction_set']} kernels, commit "
        f"{machine['commit']}; median (smallest to largest) of alternating rounds."
    )


def answer():
    """The token-by-token loop beside the batched step."""
    rows = [row for row in record("cpu")["rows"] if row.get("peer", "").startswith("train_step")]
    body = [[f"`{row['preset']}`, one stream", f"{row['peer_tok_s']['median']:,.1f}", f"{row['tok_s']['median']:,.0f}",
             f"{row['ratio']['median']:,.0f} x"] for row in rows]
    return table(["CPU, tokens/s", "token by token (`train_step`)", "`train_step_batch`, T = 500", "ratio"], body)


def quality():
    """Validation of each text beside its n-grams."""
    rows = []
    for row in record("quality")["rows"]:
        grams = row["ngram_bits_per_byte"]
        reached = f"**{row['validation_bits_per_byte']:.2f}** ({row['validation_nats_per_byte']:.3f} nats)"
        rows.append([row["text"], f"{row['bytes'] / 1e6:.2f} MB", f"{row['tokens'] / 1e6:.1f} M",
                     f"{row['seconds']:.0f} s", reached,
                     *(f"{grams[order]:.2f}" for order in "345")])
    head = ["text", "size", "bytes read", "whole command", "validation", "3-gram", "4-gram", "5-gram"]
    return table(head, rows) + "\n\nBits per byte on the last 10 % of the text; preset `tiny`, CPU, two threads."


def peer_kind(name):
    """The column of a peer."""
    if name.startswith("jax"):
        return "JAX scan"
    if "torch.compile" in name:
        return "LSTM, loss compiled"
    return "LSTM + AdamW" if "AdamW" in name else "LSTM"


def train_step():
    """Every size of the GPU record, ours beside the peers that were measured."""
    data = record("train_step")
    measured = [row for row in data["rows"] if "error" not in row]
    peers = [row for row in measured if row["peer"]]
    kinds = [kind for kind in ("LSTM + AdamW", "LSTM", "LSTM, loss compiled", "JAX scan")
             if any(peer_kind(row["peer"]) == kind for row in peers)]  # fmt: skip
    rows = []
    for ours in (row for row in measured if row["peer"] is None):
        beside = {peer_kind(row["peer"]): row["tok_s"] for row in peers
                  if all(row[key] == ours[key] for key in ("preset", "B", "T"))}  # fmt: skip
        low, high = ours["ms_spread"]
        rows.append([
            f"`{ours['preset']}`", ours["precision"], f"{ours['B']} x {ours['T']}",
            f"{ours['ms']:.2f} ({low:.2f} to {high:.2f})", f"**{ours['tok_s']:,.0f}**",
            *(f"{beside[kind]:,.0f} ({ours['tok_s'] / beside[kind]:.2f})" if kind in beside else "" for kind in kinds),
        ])  # fmt: skip
    head = ["preset", "precision", "streams x tokens", "ms a step", "tokens/s", *kinds]
    names = sorted({row["peer"].split(",")[0].split(" + Linear")[0] for row in peers})
    beside = (
        f" Beside it, in tokens/s, and ours as a multiple: {'; '.join(names)}; each with a linear decoder and "
        "cross-entropy, by BPTT, without clipping, and without an optimizer unless said."
    ) if names else ""  # fmt: skip
    return table(head, rows) + (
        f"\n\n{data['gpu']}, driver {data['driver']}, commit {data['commit']}; median (smallest to largest) of whole "
        f"train steps on random token ids, clipping and AdamW included.{beside}"
    )


def growth():
    """The picture, and a table for each sweep: its values across, speed and memory of each number of streams down."""
    data, out = record("growth"), ["![Speed and memory as one size grows](../docs/growth.png)"]
    for sweep, title in (("B", "streams B"), ("T", "tokens T"), ("N", "neurons N"), ("V", "vocabulary V")):
        rows = [row for row in data["rows"] if row["sweep"] == sweep]
        if not rows:
            continue
        values, body = sorted({row[sweep] for row in rows}), []
        lines = [None] if sweep == "B" else sorted({row["B"] for row in rows})
        for B in lines:
            of = {row[sweep]: row for row in rows if B in (None, row["B"])}
            label = "" if B is None else f"B = {B}: "
            cells = [of.get(value, {}) for value in values]
            body.append([f"{label}tokens/s", *(f"{row['tok_s']:,.0f}" if "tok_s" in row else "-" for row in cells)])
            for key, name in (("planned_bytes", "planned"), ("allocated_bytes", "allocated")):
                body.append([f"{label}GB {name}", *(known(row.get(key) and row[key] / 1e9, ".2f") for row in cells)])
        out.append(table([title, *(f"{value:,}" for value in values)], body))
    refused = [f"{row['B']} x {row['T']}, {row['N']:,} neurons, V = {row['V']:,}: {row['error']}"
               for row in data["rows"] if "error" in row]  # fmt: skip
    return "\n\n".join(out) + (
        f"\n\nPreset `{data['preset']}` but for the size that grows, T = 512 but for the second; {data['gpu']}, commit "
        f"{data['commit']}; medians." + "".join(f" Not run: {text}." for text in sorted(set(refused)))
    )


def kernels(part):
    """(the record, its measured rows) of one part of kernels.json; FileNotFoundError where there are none."""
    data = record("kernels")
    rows = [row for row in data[part] if "error" not in row]
    if not rows:
        raise FileNotFoundError(f"no {part} in kernels.json")
    return data, rows


def decoder():
    """The decoder alone beside torch's."""
    data, rows = kernels("decoder")
    names = sorted({peer["peer"] for row in rows for peer in row["peers"] if "error" not in peer})
    body = []
    for row in rows:
        peers = {peer["peer"]: peer.get("tflops") for peer in row["peers"]}
        body.append([f"{row['M']:,}", row["precision"], span(row["tflops"], ".0f") if row["tflops"] else "",
                     span(row["at_least"], ".0f"),
                     *(span(peers[name], ".0f") if peers.get(name) else "" for name in names)])  # fmt: skip
    head = ["rows M", "precision", "its kernels, TFLOP/s", "whole call, TFLOP/s", *names]
    return table(head, body) + (
        f"\n\nV = {rows[0]['V']:,}, D = {rows[0]['D']:,}, 6 M V D FLOP; {data['gpu']}, commit "
        f"{rows[0]['commit']}; median (smallest to largest)."
    )


def ticks():
    """The brain's time a tick, and the decoder inside the step."""
    data, rows = kernels("steps")
    body = [
        [f"`{row['preset']}`", row["precision"], f"{row['B']} x {row['T']}", f"{row['brain_ms']['median']:.3f}",
         span(row["us_tick"], ".2f"), span(row["decoder_tflops"], ".0f"), f"{row['device_ms']['median']:.2f}",
         f"{row['span_ms']['median']:.2f}"] for row in rows
    ]  # fmt: skip
    head = ["preset", "precision", "streams x tokens", "brain, ms", "us a tick", "decoder, TFLOP/s", "kernels, ms",
            "first to last, ms"]  # fmt: skip
    return table(head, body) + f"\n\nOf one warm train step under CUPTI; {data['gpu']}, commit {rows[0]['commit']}."


def step_kernels(least=0.01):
    """Every kernel that takes a hundredth of a step's time or more."""
    out = []
    for row in kernels("steps")[1]:
        some = [kernel for kernel in row["kernels"] if kernel["share"] >= least]
        rest = sum(kernel["ms"] for kernel in row["kernels"]) - sum(kernel["ms"] for kernel in some)
        body = [[f"`{k['name']}`", str(k["launches"]), f"{k['ms']:.3f}", f"{100 * k['share']:.1f}"] for k in some]
        body.append(["the rest", "", f"{rest:.3f}", ""])
        size = f"`{row['preset']}`, {row['precision']}, {row['B']} x {row['T']}"
        out.append(table([size, "launches", "ms", "%"], body))
    return "\n\n".join(out)


def generation():
    """Tokens a second of `generate`."""
    data, rows = kernels("generation")
    body = [[f"`{row['preset']}`", str(row["B"]), row["how"], span(row["tok_s"], ",.0f"),
             f"{row['tok_s_with_prompt']['median']:,.0f}"] for row in rows]  # fmt: skip
    head = ["preset", "streams", "drawn", "tokens/s", "with prompt and first batch"]
    return table(head, body) + (
        f"\n\n{rows[0]['new_tokens']} new tokens after a prompt of {rows[0]['prompt']}, {rows[0]['precision']}; "
        f"{data['gpu']}, commit {rows[0]['commit']}; median (smallest to largest)."
    )


def quality_gpu():
    """Validation over training time, at some points of the curve."""
    data = record("quality_gpu")
    curve, best, recipe = data["curve"], data["best"], data["recipe"]
    every = max(1, -(-len(curve) // 8))
    points = [point for i, point in enumerate(curve) if (i + 1) % every == 0 or point in (best, curve[-1])]
    rows = [[f"{point['step']:,}", f"{point['tokens'] / 1e6:.1f} M", f"{point['train_seconds']:.1f} s",
             f"{point['train_nats']:.3f}",
             f"{'**' * (point == best)}{point['validation_nats']:.3f}{'**' * (point == best)}"] for point in points]
    head = ["step", "bytes read", "training", "training nats", "validation nats a byte"]
    return table(head, rows) + (
        f"\n\n{data['text']}, preset `{recipe['preset']}`, {data['weights'] / 1e6:.1f} M weights, {data['precision']}, "
        f"{recipe['streams']} x {recipe['tokens']}, rate {recipe['lr']:g}, dropout {recipe['dropout']:g}, "
        f"weight decay {recipe['weight_decay']:g}; "
        f"{data['train_tok_s']:,.0f} tokens/s; {data['gpu']}, commit {data['commit']}."
    )


def words():
    """Validation of each precision at the end, and on the way."""
    data = record("words")
    recipe, rows = data["recipe"], data["rows"]
    body = []
    for precision in dict.fromkeys(row["precision"] for row in rows):
        runs = [row for row in rows if row["precision"] == precision]
        points = zip(*(row["curve"] for row in runs), strict=True)
        losses = [common.spread([validation for _, _, validation in point]) for point in points]
        rate = recipe["steps"] * recipe["streams"] * recipe["tokens"] / statistics.median(
            row["train_seconds"] for row in runs)  # fmt: skip
        body.append([precision, *(f"{found['median']:.3f}" for found in losses[:-1]), span(losses[-1], ".3f"),
                     f"{rate:,.0f}"])  # fmt: skip
    head = ["precision", *(f"step {step}" for step, _, _ in rows[0]["curve"]), "tokens/s"]
    return table(head, body) + (
        f"\n\nNats a word, of {recipe['vocab']:,}: WikiText-2, {data['words']['training'] / 1e6:.2f} M words "
        f"to train on, preset `{recipe['preset']}`, {recipe['streams']} x {recipe['tokens']}, rate {recipe['lr']:g}, "
        f"dropout {recipe['dropout']:g}; median of {recipe['seeds']} seeds (smallest to largest); a unigram model has "
        f"{data['unigram_nats']:.3f}. {data['gpu']}, commit {data['commit']}."
    )


def ladder_run(backend):
    """(what was measured, {(rung, T): row}) of one backend; FileNotFoundError where it was not."""
    data = record("ladder")
    if backend not in data["runs"]:
        raise FileNotFoundError(f"no rows of backend {backend} in ladder.json")
    rows = {(row["rung"], row["T"]): row for row in data["rows"] if row["backend"] == backend}
    return data, data["runs"][backend], rows


def known(value, form, unit=""):
    return "" if value is None else f"{value:{form}}{unit}"


def ladder_rungs(backend):
    """Tokens/s of every rung, and what a sequence costs the host."""
    _, run, rows = ladder_run(backend)
    lengths = sorted({T for _, T in rows})
    told = 500 if 500 in lengths else lengths[-1]
    body = []
    for rung in sorted({rung for rung, _ in rows}):
        row = rows[rung, told]
        body.append([
            f"{rung}. {row['name']}", *(f"{rows[rung, T]['tok_s']:,.0f}" for T in lengths), f"{row['syncs']:,.0f}",
            f"{row['launches']:,.0f}", known(row["array_allocs"], ",.0f"), known(row["native_allocs"], ",.0f"),
            known(row["python_allocs"], ",.0f"), known(row["host_alloc_bytes"], ",.0f"),
            f"{row['cpu_percent']:.0f}", known(row["gpu_percent"], ".0f"),
        ])  # fmt: skip
    head = ["rung", *(f"T = {T:,}, tokens/s" for T in lengths), "syncs", "launches", "array buffers", "native",
            "Python", "bytes in all", "CPU, % of a core", "GPU busy, %"]  # fmt: skip
    steady, where = run["steady"], run["gpu"] if backend == "cuda" else run["processor"]
    busy = known(steady["gpu_percent"], ".0f", " % of the time")
    return table(head, body) + (
        f"\n\nPreset `{run['preset']}`, {run['precision']}, one stream, {where}, commit {run['commit']}. From `syncs` "
        f"on: of a sequence of {told:,} tokens; allocations by hooks. Loops that take longer than "
        f"{run['row_seconds']:g} s are measured over fewer tokens. Consecutive batched steps of {steady['B']} x "
        f"{steady['T']}: {steady['tok_s']:,.0f} tokens/s, host CPU {steady['cpu_percent']:.0f} % of one core"
        + (f", GPU busy {busy}." if busy else ".")
    )


def ladder_time(backend="cuda", T=500):
    """The rows of the user's tables: today, promised, the original, and what is measured."""
    data, run, rows = ladder_run(backend)
    where = run["gpu"] if backend == "cuda" else run["processor"]
    report = data["report"]
    quoted = [report[name] for name in ("today", "promised", "original")]
    measured = [{**rows[rung, T], **rows[rung, T]["time"]} for rung in range(4)]
    lines = (
        ("synchronisation", "s", "{:,.4g}"), ("allocation", "s", "{:,.3g}"), ("copying", "s", "{:,.3g}"),
        ("brain_decoder", "s", "{:,.3g}"), ("learning", "s", "{:,.3g}"), ("python", "s", "{:,.3g}"),
        ("seconds", "s", "{:,.4g}"), ("tok_s", "tokens/s", "{:,.0f}"), ("cpu_percent", "% of a core", "{:.0f}"),
        ("gpu_percent", "%", "{:.0f}"), ("host_alloc_bytes", "bytes", "{:,.0f}"),
    )  # fmt: skip
    names = {"brain_decoder": "brain and decoder (GPU processing)", "python": "the loop itself", "seconds": "in all",
             "tok_s": "speed", "cpu_percent": "host CPU", "gpu_percent": "GPU busy",
             "host_alloc_bytes": "allocated on the host"}  # fmt: skip
    body = []
    for key, unit, form in lines:
        cells = [column.get(key) for column in (*quoted, *measured)]
        body.append([f"{names.get(key, key)}, {unit}", *("" if cell is None else form.format(cell) for cell in cells)])
    head = [f"{T} tokens", "today (reported)", "promised (reported)", "the original, H200",
            *(f"rung {rung}" for rung in range(4))]  # fmt: skip
    return table(head, body) + (
        f"\n\nThe first three columns are quoted: {quoted[0]['source']}; {quoted[2]['source']}. The others are "
        f"measured: preset `{run['preset']}`, {where}, commit {run['commit']}."
    )


def main():
    makers = {
        "cpu": cpu, "answer": answer, "quality": quality, "train_step": train_step, "quality_gpu": quality_gpu,
        "ladder_cuda": lambda: ladder_rungs("cuda"), "ladder_cpu": lambda: ladder_rungs("cpu"),
        "ladder_time": ladder_time, "growth": growth, "decoder": decoder, "ticks": ticks, "kernels": step_kernels,
        "generation": generation, "words": words,
    }  # fmt: skip
    docs = HERE.parent / "docs"
    for path in (HERE.parent / "README.md", HERE / "README.md", docs / "FROM_10.md", docs / "PERFORMANCE.md"):
        text = path.read_text()
        for name, make in makers.items():
            marks = f"<!-- {name} -->", f"<!-- /{name} -->"
            try:
                made = make() if marks[0] in text else None
            except FileNotFoundError as missing:
                print(f"{name}: nothing measured yet ({missing})")
                continue
            if made is not None:
                before, after = text.split(marks[0])[0], text.split(marks[1])[1]
                text = f"{before}{marks[0]}\n{made}\n{marks[1]}{after}"
        path.write_text(text)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
