"""What the README shows does what it says."""

import re
import shutil
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_python_examples_run(tmp_path, monkeypatch, capsys):
    shutil.copy(README, tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S):
        exec(compile(block, "README.md", "exec"), names)
    output = capsys.readouterr().out
    bits = [float(value) for value in re.findall(r"epoch \d: (\d\.\d+) bits per byte", output)]
    assert len(bits) == 3 and bits[2] < bits[0] < 8.0
    assert (tmp_path / "my_brain" / "meta.json").exists()
    assert names["broca"].any()
