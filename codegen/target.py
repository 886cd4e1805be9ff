"""Named targets: what to compile for, what the CPU must have, and how LLVM calls it."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from sparsify.codegen.isa import AVX2, AVX512, AVX512_HALF_RATE, AVX512_ZEN5, NEON, Isa

_AVX2 = ("avx2", "fma", "f16c", "bmi2")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
_VBMI2 = "avx512vbmi2"
_AVX512_ISAS = {"znver4": AVX512_HALF_RATE, "znver5": AVX512_ZEN5}


class UnknownTarget(ValueError):
    """The target's name is not known, or this machine is not one we compile for."""


@dataclass(frozen=True)
class Target:
    """One CPU to compile for.

    Attributes:
        name: as given by the user, ``native`` already resolved to what the host is.
        spec: the TVM target, as a dict's items.
        features: CPU features, in LLVM's names, that the code uses and the machine must have.
        isa: what kernels are generated for.
    """

    name: str
    spec: tuple[tuple[str, Any], ...]
    features: tuple[str, ...]
    isa: Isa

    @classmethod
    def parse(cls, name: str | Target) -> Target:
        """The target a name stands for.

        Raises:
            UnknownTarget: listing the names there are.
        """
        if isinstance(name, Target):
            return name
        if name == "native":
            return _native()
        if name not in _NAMED:
            raise UnknownTarget(f"unknown target {name!r}; targets: {', '.join(target_names())}")
        return _NAMED[name]

    def tvm(self) -> Any:
        """The TVM target; its CPU name and features are checked against LLVM first."""
        import tvm

        spec = {k: list(v) if isinstance(v, tuple) else v for k, v in self.spec}
        target = tvm.target.Target(spec)
        from tvm.target import codegen

        if not codegen.llvm_is_valid_cpu(spec["mcpu"], spec["mtriple"]):
            raise UnknownTarget(
                f"target {self.name!r}: LLVM knows no CPU {spec['mcpu']!r} for {spec['mtriple']}"
            )
        return target

    def missing_features(self) -> tuple[str, ...]:
        """Features that the code needs and this machine lacks."""
        have = host_features()
        return tuple(f for f in self.features if f not in have)

    def check_host(self) -> None:
        """Raises RuntimeError, naming what is missing, unless this machine can run the code."""
        missing = self.missing_features()
        if missing:
            raise RuntimeError(
                f"target {self.name!r} needs the CPU features {', '.join(missing)}, which this "
                f"machine ({platform.machine()}, {host_cpu()}) lacks; compile with target='native'"
            )


def _x86(name: str, cpu: str, features: tuple[str, ...], isa: Isa) -> Target:
    spec: list[tuple[str, Any]] = [("kind", "llvm"), ("mtriple", "x86_64-linux-gnu"), ("mcpu", cpu)]
    if isa.vector == 16:
        # LLVM would split 512-bit vectors in two where it thinks them slow.
        more = tuple(f"+{feature}" for feature in (_VBMI2,) if feature in features)
        spec.append(("mattr", ("-prefer-256-bit", *more)))
    return Target(name, tuple(spec), features, isa)


_NAMED = {
    "x86-avx2": _x86("x86-avx2", "x86-64-v3", _AVX2, AVX2),
    "x86-avx512": _x86("x86-avx512", "x86-64-v4", _AVX512, AVX512),
    "arm64-neon": Target(
        "arm64-neon",
        (
            ("kind", "llvm"),
            ("mtriple", "aarch64-linux-gnu"),
            ("mcpu", "cortex-a72"),
            ("mattr", ("+neon",)),
        ),
        ("neon",),
        NEON,
    ),
}


def target_names() -> tuple[str, ...]:
    return ("native", *_NAMED)


@cache
def host_cpu() -> str:
    """LLVM's name for this machine's CPU."""
    from tvm.target import codegen

    return str(codegen.llvm_get_system_cpu())


@cache
def host_model() -> str:
    """This machine's CPU as the operating system names it, and its name in LLVM."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.processor())} ({host_cpu()})"


@cache
def host_features() -> frozenset[str]:
    """LLVM's names of the features this machine has, as the operating system reports them.

    LLVM's own answer follows from the CPU's name, which a virtual machine may keep while it hides
    features.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return _features_by_name()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    found = set(flags.partition(":")[2].split())
    named = {"asimd": "neon", "avx512_vbmi2": _VBMI2}
    return frozenset(found | {name for flag, name in named.items() if flag in found})


def _features_by_name() -> frozenset[str]:
    import tvm
    from tvm.target import codegen

    target = tvm.target.Target({"kind": "llvm", "mcpu": host_cpu()})
    return frozenset(str(feature) for feature in codegen.llvm_get_cpu_features(target))


@cache
def _native() -> Target:
    cpu, have = host_cpu(), host_features()
    triple = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}.get(platform.machine())
    if triple is None:
        raise UnknownTarget(
            f"target 'native': {platform.machine()} is no machine we compile for; "
            f"name one of {', '.join(_NAMED)}"
        )
    if triple.startswith("aarch64"):
        spec = (("kind", "llvm"), ("mtriple", triple), ("mcpu", cpu), ("mattr", ("+neon",)))
        return Target(f"native ({cpu})", spec, ("neon",), NEON)
    if have.issuperset(_AVX512):
        isa = _AVX512_ISAS.get(cpu, AVX512)
        if _VBMI2 in have:
            isa = replace(isa, vbmi2=True)
            return _x86(f"native ({cpu})", cpu, (*_AVX512, _VBMI2), isa)
        return _x86(f"native ({cpu})", cpu, _AVX512, isa)
    if have.issuperset(_AVX2):
        return _x86(f"native ({cpu})", "x86-64-v3", _AVX2, AVX2)
    raise UnknownTarget("target 'native': this x86 CPU has no AVX2, which the kernels need")
