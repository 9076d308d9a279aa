"""What traces of the device say: kernels by name, and the time that some of them cover.

A trace is what `neurogen_cy.gpu_watch.DeviceClock.events` gives: (name, begin, end) in seconds of everything that the
device did during one call.
"""

import re
import statistics

from neurogen_cy.gpu_watch import is_copy

BRAIN = re.compile("run_(brain|register|wide|dense)_kernel")
OWN = "neurogen"  # the namespace of our kernels; the others are the library's products, which only the decoder has
DECODER = re.compile(
    r"score_rows|walk_rows|sum_columns|add_slices|turn_kernel|find_top|choose_scales|logit|softmax|cross_entropy|decoder"
)


def short(name):
    """A kernel's own name, without namespaces, template and function arguments; mangled names too."""
    if name.startswith("_ZN"):
        parts, rest = [name], name[3:]
        while found := re.match(r"\d+", rest):
            begin, length = found.end(), int(found[0])
            parts.append(rest[begin : begin + length])
            rest = rest[begin + length :]
        return parts[-1]
    plain = re.split(r"[<(]", name.removeprefix("void ").replace("(anonymous namespace)::", ""))[0].strip()
    return plain.split("::")[-1] if OWN in name else plain[:70]


def of_brain(name):
    """Whether a kernel is the brain's launch."""
    return BRAIN.search(name) is not None


def of_decoder(name):
    """Whether a kernel belongs to the decoder: the library's products, and ours by name."""
    return not is_copy(name) and (OWN not in name or DECODER.search(short(name)) is not None)


def union(intervals):
    """Time covered by (begin, end) pairs, however they overlap."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def covered(events, wanted=lambda name: True):
    """Seconds in which at least one of the wanted events ran."""
    return union([(begin, end) for name, begin, end in events if wanted(name)])


def span(events):
    """Seconds from the begin of the first event to the end of the last."""
    return max(end for _, _, end in events) - min(begin for _, begin, _ in events)


def table(traces):
    """[{name, launches, ms, share}] of a call, longest first: medians of its traces; a share is of the sum of all."""
    found = {}
    for number, events in enumerate(traces):
        for name, begin, end in events:
            found.setdefault(short(name), [[] for _ in traces])[number].append(1e3 * (end - begin))
    rows = [
        {"name": name, "launches": statistics.median_high(map(len, times)), "ms": statistics.median(map(sum, times))}
        for name, times in found.items()
    ]
    total = sum(row["ms"] for row in rows) or 1.0
    return sorted(({**row, "share": row["ms"] / total} for row in rows), key=lambda row: -row["ms"])
