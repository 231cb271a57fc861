"""What is imported before a command can answer; a count, because a clock depends on the machine."""

import os
import subprocess
import sys

import pytest

from crosslevel.cli import main

HEAVY = {
    "torch", "torchvision", "lightning_fabric", "timm", "sklearn", "scipy", "pandas", "matplotlib", "numpy",
    "jaxtyping",
}  # fmt: skip
SHOW = "import sys; print(*sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr)"
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"{{name}} is blocked")
sys.meta_path.insert(0, Block())
"""


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def imported(code):
    """The packages that are there after ``code``, by their names, and what it printed."""
    done = python(f"import contextlib\nwith contextlib.suppress(SystemExit):\n    {code}\n{SHOW}")
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split()), done


@pytest.mark.parametrize(
    "line",
    ["--version", "--help", "recipes", "recipes --show cifar10-moco-cld", "train --help", "train --help all",
     "train --method.help simclr", "evaluate --help", "tune --help all", "trian", "train photos --epohcs 3",
     "train photos --epochs abc", "export run --format tflite", "completion bash", "train photos --print_config"],
)  # fmt: skip
def test_a_command_answers_before_anything_large_is_imported(line):
    found, _ = imported(f"__import__('crosslevel.cli').cli.main({line.split()!r})")
    assert not found & HEAVY
    assert not line.startswith(("--", "recipes")) or not found & {"rich", "yaml", "importlib_metadata"}


@pytest.mark.parametrize("line", ["train --help all", "--help", "train photos --epohcs 3 --print_config"])
def test_whoever_stops_reading_ends_it_quietly(line, monkeypatch, capfd):
    """As ``| head`` does; an error of the user's is said as ever, since it goes elsewhere."""
    reading, writing = os.pipe()
    os.close(reading)
    with monkeypatch.context() as patch, os.fdopen(writing, "w") as out:
        patch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit) as end:
            main(line.split())
    said = capfd.readouterr().err
    if "epohcs" in line:
        assert (end.value.code, said.count("\n")) == (2, 1)
    else:
        assert (end.value.code, said) == (141, "")


def test_the_package_imports_nothing_large():
    found, _ = imported("import crosslevel; assert 'train' in dir(crosslevel)")
    assert not found & (HEAVY | {"rich", "yaml"})


def test_the_add_on_needs_torch_alone():
    """So ``pip install --no-deps crosslevel`` serves the two lines of a plain loop: all that torch does not bring is
    kept away, and what torch brings is there before.
    """
    code = (
        "import torch"
        + BLOCK.replace("in {blocked}", "not in {*sys.stdlib_module_names, 'crosslevel', *sys.modules}")
        + """
import crosslevel
cld = crosslevel.CrossLevel(in_features=8, groups=4)
loss = 0.25 * cld(torch.randn(12, 8), torch.randn(12, 8))
loss.backward()
print(float(loss) > 0)
"""
    )
    done = python(code)
    assert done.stdout == "True\n", done.stderr


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "crosslevel", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("crosslevel 0.")


def test_a_name_that_is_not_there_is_an_attribute_error():
    import crosslevel

    with pytest.raises(AttributeError, match="trian"):
        _ = crosslevel.trian
