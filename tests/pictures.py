"""What tests of pictures look at: artists by what they show, labels that overlap, files that can be read."""

import xml.etree.ElementTree as ElementTree

from PIL import Image

import neurogen_cy as ng

CONFIG = ng.Config(
    vocab_size=256,
    dim=32,
    regions=(
        ng.Region("senses", 32, 0), ng.Region("memory", 160, 1), ng.Region("speech", 64, 3), ng.Region("will", 32, 3),
    ),
    projections=(
        ng.Projection("embedding", "senses"),
        ng.Projection("embedding", "memory", kind="gate"),
        ng.Projection("embedding", "will"),
        ng.Projection("senses", "memory"),
        ng.Projection("memory", "speech"),
        ng.Projection("senses", "speech", kind="gate"),
        ng.Projection("memory", "speech", kind="gate", density=0.5),
        ng.Projection("memory", "memory", delay=1),
        ng.Projection("memory", "memory", delay=2),
        ng.Projection("speech", "senses", delay=4),
        ng.Projection("will", "speech", delay=1),
        ng.Projection("speech", "broca_out"),
    ),
    max_spike=4.0,
)  # fmt: skip


def _texts(figure):
    """(text, box in pixels) of all that is written on a figure: ticks, titles, labels, legends."""
    figure.draw_without_rendering()
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        if axes.axison:
            ticks = [*axes.xaxis._update_ticks(), *axes.yaxis._update_ticks()]  # those inside the axes
            texts += [label for tick in ticks for label in (tick.label1, tick.label2)]
            texts += [axes.xaxis.label, axes.yaxis.label]
        texts += [axes._left_title, *axes.texts, *(axes.get_legend().get_texts() if axes.get_legend() else [])]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_visible() and text.get_text()]
    return [(text, box) for text, box in boxes if box.width and box.height]


def overlapping(figure):
    """Pairs of texts of a figure that lie over each other."""
    boxes = [(text, box.shrunk(0.9, 0.9)) for text, box in _texts(figure)]
    return [(one, other) for i, (one, a) in enumerate(boxes) for other, b in boxes[i + 1 :] if a.overlaps(b)]


def outside(figure):
    """Texts of a figure that its edge cuts off."""
    frame = figure.bbox.padded(1.0)
    inside = lambda box: frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
    return [text for text, box in _texts(figure) if not inside(box)]


def check_files(files):
    """Every file is a picture of its kind with something in it."""
    for file in files:
        if file.suffix == ".png":
            with Image.open(file) as image:
                image.verify()
            with Image.open(file) as image:
                assert image.format == "PNG" and min(image.size) > 300
                assert len(image.convert("RGB").getcolors(1 << 24)) > 20, "more than a blank page"
        else:
            root = ElementTree.parse(file).getroot()
            assert file.suffix == ".svg" and root.tag == "{http://www.w3.org/2000/svg}svg"
            assert len(root.findall(".//{http://www.w3.org/2000/svg}path")) > 20
