"""CompileConfig: checks, and a digest that is equal in every process."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from sparsify.config import CompileConfig
from sparsify.pruning import Unstructured


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": ""}, "target='' must be a name"),
        ({"num_threads": 0}, "num_threads=0 must be at least 1"),
        ({"num_threads": 1.5}, "num_threads=1.5 must be a whole number"),
        ({"num_threads": True}, "num_threads=True must be a whole number"),
        ({"dynamic_shapes": "all"}, "dynamic_shapes='all' is unknown"),
        ({"recipe": 0.8}, "recipe=0.8 is no recipe"),
        ({"recipe": Unstructured}, "is no recipe"),
        ({"strict": "yes"}, "strict='yes' must be True or False"),
        ({"cache": 1}, "cache=1 must be True or False"),
        ({"verify": "all"}, "verify='all' must be 'shapes' or 'numeric'"),
        ({"tune": True}, "tune=True must be 'off' or 'quick' or 'full'"),
        ({"observer": 3}, "observer=3 must be callable"),
        ({"disable": [3]}, "must hold names; 3 is none"),
        ({"disable": 3}, "disable=3 must be a sequence"),
        ({"passes": 3}, "passes=3 must be a sequence"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        CompileConfig(**options)


def test_sequences_become_tuples() -> None:
    assert CompileConfig(disable="cse").disable == ("cse",)
    assert CompileConfig(disable=["a", "b"]).disable == ("a", "b")
    assert CompileConfig(passes=["a"]).passes == ("a",)
    assert CompileConfig(passes="a,b").passes == "a,b"


def test_the_digest_follows_what_changes_the_result() -> None:
    base = CompileConfig()
    changed = [
        replace(base, target="x86-avx2"),
        replace(base, num_threads=2),
        replace(base, dynamic_shapes=None),
        replace(base, dynamic_shapes={"x": {0: torch.export.Dim.AUTO}}),
        replace(base, dynamic_shapes={"x": {0: torch.export.Dim("n", min=2, max=8)}}),
        replace(base, dynamic_shapes={"x": {0: torch.export.Dim("n", min=2, max=9)}}),
        replace(base, recipe=Unstructured(0.8)),
        replace(base, recipe=Unstructured(0.8, skip=("a",))),
        replace(base, strict=True),
        replace(base, passes="a"),
        replace(base, disable=("a",)),
        replace(base, tune="quick"),
        replace(base, tune="full"),
    ]
    digests = {config.digest() for config in [base, *changed]}
    assert len(digests) == len(changed) + 1
    assert replace(base, cache=False, observer=print, verify="numeric").digest() == base.digest()


def test_the_digest_is_equal_in_another_process() -> None:
    program = (
        "import torch; from sparsify.config import CompileConfig as C;"
        "from sparsify.pruning import Unstructured as U;"
        "print(C(recipe=U(0.8), dynamic_shapes={'x': {0: torch.export.Dim.AUTO}}).digest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    shapes = {"x": {0: torch.export.Dim.AUTO}}
    here = CompileConfig(recipe=Unstructured(0.8), dynamic_shapes=shapes).digest()
    assert done.stdout.strip() == here
