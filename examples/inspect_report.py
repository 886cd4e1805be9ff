"""Ask the compiler what it did at each site, and why.

python examples/inspect_report.py
"""

import torch
from torch import nn

import sparsify


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(256, 1024)
        self.down = nn.Linear(1024, 256)
        self.norm = nn.LayerNorm(256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(nn.functional.gelu(self.up(x))))


def main() -> None:
    torch.manual_seed(0)
    # Only `up` is pruned, so the two linears get different layouts.
    model = sparsify.prune(Block().eval(), sparsify.Unstructured(0.9, skip=("down",)))
    compiled = sparsify.compile(model, (torch.randn(32, 256),))
    print(compiled.report)
    print("Every decision about 'up':")
    for decision in compiled.report.about("up"):
        print(f"  {decision.made_by}: {decision.verdict}, {decision.reason}")


if __name__ == "__main__":
    main()
