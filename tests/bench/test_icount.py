"""The counter of instructions counts them, and tells classes apart."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parents[2] / "sparsify" / "bench" / "icount.c"
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"

LOOP = """
int main(int argc, char **argv) {
  (void)argv;
  for (long i = 0; i < 1000L * (argc - 1); ++i)
    __asm__ volatile("fmla v0.4s, v1.4s, v2.4s; ldr q3, [sp]; ldr q4, [sp]" ::: "v0", "v3", "v4");
  return 0;
}
"""


@pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason=f"no {COMPILER} or {EMULATOR}: make edge-deps",
)
def test_instructions_are_counted(tmp_path: Path) -> None:
    (tmp_path / "loop.c").write_text(LOOP)
    plugin, program = tmp_path / "icount.so", tmp_path / "loop"
    for command in (
        ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", PLUGIN, "-o", plugin],
        [COMPILER, "-O2", "-static", "loop.c", "-o", program],
    ):
        subprocess.run(command, cwd=tmp_path, check=True)
    counts = []
    for arguments in ([], ["more"]):
        command = [EMULATOR, "-plugin", plugin, program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        counts.append(json.loads(done.stderr))
    loops = {each["address"]: each["runs"] for each in counts[0].pop("loops")}
    (loop,) = [each for each in counts[1].pop("loops") if "fmla" in " ".join(each["text"])]
    assert loop["runs"] - loops.get(loop["address"], 0) == pytest.approx(1000, abs=1)
    more = {name: counts[1][name] - counts[0][name] for name in counts[0]}
    assert more["vector"] < 50
    assert more["fma"] == 1000
    assert more["loads"] == pytest.approx(2000, abs=50)
    assert 4000 < more["all"] < 8000
