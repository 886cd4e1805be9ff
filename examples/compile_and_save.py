"""Compile a pruned network, save it, load it again.

python examples/compile_and_save.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

import sparsify


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)).eval()
    model = sparsify.prune(model, sparsify.Unstructured(0.9))
    x = torch.randn(8, 256)

    compiled = sparsify.compile(model, (x,))
    y = compiled(x)

    with TemporaryDirectory() as folder:
        path = Path(folder, "model.sparsify")
        compiled.save(path)
        loaded = sparsify.load(path)
        print(f"saved {path.stat().st_size / 1e3:.0f} kB; dense weights take 2101 kB")

    with torch.no_grad():
        print(f"largest difference from eager: {(y - model(x)).abs().max():.1e}")
    print(f"loaded model agrees: {torch.equal(loaded(x), y)}")
    print(f"other batch sizes need no recompiling: {tuple(loaded(torch.randn(3, 256)).shape)}")


if __name__ == "__main__":
    main()
