"""Named targets: what to compile for, what the CPU must have, and how LLVM calls it."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from sparsify.codegen.isa import (
    AVX2,
    AVX512,
    AVX512_HALF_RATE,
    AVX512_ZEN5,
    NEON,
    NEON32,
    NEON_A7X,
    NEON_A53,
    NEON_A72,
    RV64,
    RVV,
    WASM,
    Isa,
)

_AVX2 = ("avx2", "fma", "f16c", "bmi2")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
_VBMI2 = "avx512vbmi2"
_TUNINGS = frozenset({"prefer-256-bit"})
"""Attributes that say how LLVM shall choose and not what a CPU has."""
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
    def parse(cls, text: str | Target) -> Target:
        """The target that a name stands for, or one with another CPU and more or fewer features.

        ``arm64-neon,cpu=cortex-a55,+dotprod`` is ``arm64-neon`` for a CPU and a feature by LLVM's
        names, which `tvm` checks. Kernels stay those of the named target.

        Raises:
            UnknownTarget: listing the names there are.
        """
        if isinstance(text, Target):
            return text
        name, *changes = text.split(",")
        if name != "native" and name not in _NAMED:
            raise UnknownTarget(f"unknown target {name!r}; targets: {', '.join(target_names())}")
        target = _native() if name == "native" else _NAMED[name]
        return target._changed(text, changes) if changes else target

    def _changed(self, text: str, changes: list[str]) -> Target:
        spec, features = dict(self.spec), list(self.features)
        for change in changes:
            sign, feature = change[:1], change[1:]
            if change.startswith("cpu="):
                spec["mcpu"] = change.removeprefix("cpu=")
            elif sign in ("+", "-") and feature:
                spec["mattr"] = (*spec.get("mattr", ()), change)
                features = [f for f in features if f != feature]
                features += [feature] if sign == "+" else []
            else:
                raise UnknownTarget(
                    f"target {text!r}: cannot read {change!r}; write cpu=NAME, +FEATURE or -FEATURE"
                )
        return replace(self, name=text, spec=tuple(spec.items()), features=tuple(features))

    @property
    def machine(self) -> str:
        """The architecture, as `platform.machine` calls it."""
        architecture = str(dict(self.spec)["mtriple"]).partition("-")[0]
        return {"armv7": "armv7l"}.get(architecture, architecture)

    def tvm(self) -> Any:
        """The TVM target.

        Raises:
            UnknownTarget: LLVM does not know the CPU or a feature; names those that it knows.
        """
        import tvm

        spec: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in self.spec}
        self._check_names(spec["mtriple"], spec["mcpu"], spec.get("mattr", []))
        return tvm.target.Target(spec)

    def _check_names(self, triple: str, cpu: str, attributes: list[str]) -> None:
        # LLVM itself only logs a wrong name and goes on with its generic CPU.
        from tvm.target import codegen

        if not codegen.llvm_is_valid_cpu(cpu, triple):
            raise UnknownTarget(
                f"target {self.name!r}: LLVM knows no CPU {cpu!r} for {triple}; "
                f"there are {', '.join(_llvm_cpus(triple))}"
            )
        known = _llvm_features(triple)
        for feature in (attribute[1:] for attribute in attributes):
            if feature not in known and feature not in _TUNINGS:
                raise UnknownTarget(
                    f"target {self.name!r}: no CPU of {triple} has a feature {feature!r}; "
                    f"there are {', '.join(known)}"
                )

    def missing_features(self) -> tuple[str, ...]:
        """Features that the code needs and this machine lacks, or the machine that it is for."""
        if self.machine != platform.machine():
            return (self.machine,)
        have = host_features()
        return tuple(f for f in self.features if f not in have)

    def check_host(self) -> None:
        """Raises RuntimeError, naming what is missing, unless this machine can run the code."""
        missing = self.missing_features()
        if missing == (self.machine,):
            raise RuntimeError(
                f"target {self.name!r} is code for {self.machine}, which this machine "
                f"({platform.machine()}, {host_cpu()}) cannot run; compile with target='native', "
                f"or export it: sparsify export --c --target {self.name}"
            )
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


def _foreign(
    name: str, triple: str, cpu: str, isa: Isa, features: tuple[str, ...], *more: tuple[str, Any]
) -> Target:
    spec = (("kind", "llvm"), ("mtriple", triple), ("mcpu", cpu))
    attributes = ("mattr", tuple(f"+{feature}" for feature in features))
    return Target(name, (*spec, attributes, *more), features, isa)


def _arm64(name: str, cpu: str, isa: Isa, *more: str) -> Target:
    return _foreign(name, "aarch64-linux-gnu", cpu, isa, ("neon", *more))


_RISCV = ("riscv64-linux-gnu", "generic-rv64")

_NAMED = {
    "x86-avx2": _x86("x86-avx2", "x86-64-v3", _AVX2, AVX2),
    "x86-avx512": _x86("x86-avx512", "x86-64-v4", _AVX512, AVX512),
    "arm64-neon": _arm64("arm64-neon", "cortex-a72", NEON),
    "cortex-a53": _arm64("cortex-a53", "cortex-a53", NEON_A53),
    "cortex-a72": _arm64("cortex-a72", "cortex-a72", NEON_A72),
    "cortex-a76": _arm64("cortex-a76", "cortex-a76", NEON_A7X, "dotprod"),
    "cortex-a78": _arm64("cortex-a78", "cortex-a78", NEON_A7X, "dotprod"),
    "neoverse-n1": _arm64("neoverse-n1", "neoverse-n1", NEON_A7X, "dotprod"),
    "neoverse-v1": _arm64("neoverse-v1", "neoverse-v1", NEON, "dotprod"),
    "neoverse-v2": _arm64("neoverse-v2", "neoverse-v2", NEON, "dotprod"),
    "raspberry-pi/4b": _arm64("raspberry-pi/4b", "cortex-a72", NEON_A72),
    "raspberry-pi/5": _arm64("raspberry-pi/5", "cortex-a76", NEON_A7X, "dotprod"),
    "armv7-neon": _foreign(
        "armv7-neon",
        "armv7-linux-gnueabihf",
        "cortex-a7",
        NEON32,
        ("neon",),
        ("mfloat-abi", "hard"),
    ),
    "riscv64": _foreign("riscv64", *_RISCV, RV64, ("m", "a", "f", "d", "c"), ("mabi", "lp64d")),
    "riscv64-rvv": _foreign(
        "riscv64-rvv", *_RISCV, RVV, ("m", "a", "f", "d", "c", "v"), ("mabi", "lp64d")
    ),
    "wasm-simd": _foreign("wasm-simd", "wasm32-unknown-wasi", "generic", WASM, ("simd128",)),
}


def target_names() -> tuple[str, ...]:
    return ("native", *_NAMED)


@cache
def _llvm_cpus(triple: str) -> tuple[str, ...]:
    from tvm.target import Target as TvmTarget
    from tvm.target import codegen

    target = TvmTarget({"kind": "llvm", "mtriple": triple})
    return tuple(sorted(map(str, codegen.llvm_get_cpu_archlist(target))))


@cache
def _llvm_features(triple: str) -> tuple[str, ...]:
    """All that any CPU of an architecture has."""
    from tvm.target import Target as TvmTarget
    from tvm.target import codegen

    found: set[str] = set()
    for cpu in _llvm_cpus(triple):
        target = TvmTarget({"kind": "llvm", "mtriple": triple, "mcpu": cpu})
        found.update(map(str, codegen.llvm_get_cpu_features(target)))
    return tuple(sorted(found))


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
