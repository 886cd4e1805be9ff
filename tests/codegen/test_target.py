"""Targets: their names, what they ask of the machine, what the host is taken for, refusals."""

import dataclasses
import platform
from pathlib import Path

import pytest

from sparsify.codegen import target as targets
from sparsify.codegen.isa import AVX2, AVX512, AVX512_HALF_RATE, AVX512_ZEN5, NEON
from sparsify.codegen.target import Target, UnknownTarget, host_features, target_names
from sparsify.layouts import LANES

NAMED = [name for name in target_names() if name != "native"]
FEATURES_AVX2 = frozenset(Target.parse("x86-avx2").features)
FEATURES_AVX512 = frozenset(Target.parse("x86-avx512").features)


def host(monkeypatch: pytest.MonkeyPatch, machine: str, cpu: str, features: frozenset[str]) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(targets, "host_cpu", lambda: cpu)
    monkeypatch.setattr(targets, "host_features", lambda: features)
    # The real one is kept for the whole process.
    monkeypatch.setattr(targets, "_native", targets._native.__wrapped__)


def test_native_comes_first() -> None:
    assert target_names()[0] == "native"
    assert {"x86-avx2", "x86-avx512", "arm64-neon"} <= set(NAMED)


@pytest.mark.parametrize("name", NAMED)
def test_a_named_target(name: str) -> None:
    target = Target.parse(name)
    assert target.name == name
    assert target.features
    assert target.isa.vector * target.isa.vectors_per_group == LANES
    assert Target.parse(target) is target
    assert str(target.tvm().attrs["mcpu"]) == dict(target.spec)["mcpu"]


def test_wide_vectors_are_not_split() -> None:
    for name in NAMED:
        target = Target.parse(name)
        whole = "-prefer-256-bit" in map(str, target.tvm().attrs.get("mattr", ()))
        assert whole == (target.isa.vector == 16)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownTarget, match=r"unknown target 'vax'; targets: native, x86-avx2"):
        Target.parse("vax")


def test_a_cpu_that_llvm_does_not_know_is_refused() -> None:
    good = Target.parse("x86-avx2")
    spec = tuple((k, "pentium-9" if k == "mcpu" else v) for k, v in good.spec)
    wrong = dataclasses.replace(good, name="mine", spec=spec)
    with pytest.raises(UnknownTarget, match="target 'mine': LLVM knows no CPU 'pentium-9' for x86"):
        wrong.tvm()


def test_missing_features_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    host(monkeypatch, "x86_64", "haswell", FEATURES_AVX2 - {"fma"})
    target = Target.parse("x86-avx2")
    assert target.missing_features() == ("fma",)
    with pytest.raises(RuntimeError, match=r"'x86-avx2' needs the CPU features fma, .*haswell"):
        target.check_host()
    assert "avx512f" in Target.parse("x86-avx512").missing_features()


@pytest.mark.parametrize(
    ("name", "machine"),
    [
        ("raspberry-pi/4b", "aarch64"),
        ("armv7-neon", "armv7l"),
        ("riscv64-rvv", "riscv64"),
        ("wasm-simd", "wasm32"),
    ],
)
def test_code_for_another_machine(monkeypatch: pytest.MonkeyPatch, name: str, machine: str) -> None:
    host(monkeypatch, "x86_64", "haswell", FEATURES_AVX2)
    target = Target.parse(name)
    assert target.machine == machine
    assert target.missing_features() == (machine,)
    with pytest.raises(RuntimeError, match=f"'{name}' is code for {machine}, .* --target {name}"):
        target.check_host()


def test_a_cpu_and_features_after_the_name() -> None:
    target = Target.parse("arm64-neon,cpu=cortex-a55,+dotprod,-crc")
    assert target.features == ("neon", "dotprod")
    assert target.isa == NEON
    made = target.tvm()
    assert str(made.attrs["mcpu"]) == "cortex-a55"
    assert list(map(str, made.attrs["mattr"])) == ["+neon", "+dotprod", "-crc"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arm64-neon,cpu=cortex-a1000", r"no CPU 'cortex-a1000' for aarch64.* cortex-a72, "),
        ("arm64-neon,+sve9", r"no CPU of aarch64-linux-gnu has a feature 'sve9'.* sve, "),
        ("riscv64,+neon", r"no CPU of riscv64-linux-gnu has a feature 'neon'.* zba, "),
        ("arm64-neon,dotprod", "cannot read 'dotprod'; write cpu=NAME, "),
        ("arm65,+neon", "unknown target 'arm65'; targets: native"),
    ],
)
def test_wrong_changes_are_refused(text: str, message: str) -> None:
    with pytest.raises(UnknownTarget, match=message):
        Target.parse(text).tvm()


def test_a_machine_with_all_features_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    host(monkeypatch, "x86_64", "x86-64-v4", FEATURES_AVX512)
    for name in ("x86-avx2", "x86-avx512"):
        assert Target.parse(name).missing_features() == ()
        Target.parse(name).check_host()


@pytest.mark.parametrize(
    ("machine", "cpu", "features", "isa", "mcpu"),
    [
        ("x86_64", "znver5", FEATURES_AVX512, AVX512_ZEN5, "znver5"),
        ("x86_64", "sapphirerapids", FEATURES_AVX512, AVX512, "sapphirerapids"),
        ("x86_64", "znver4", FEATURES_AVX512, AVX512_HALF_RATE, "znver4"),
        ("x86_64", "haswell", FEATURES_AVX2, AVX2, "x86-64-v3"),
        # A virtual machine that keeps the name and hides AVX-512.
        ("x86_64", "znver4", FEATURES_AVX2, AVX2, "x86-64-v3"),
        ("aarch64", "cortex-a76", frozenset({"neon"}), NEON, "cortex-a76"),
    ],
)
def test_what_the_host_is_taken_for(
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    cpu: str,
    features: frozenset[str],
    isa: object,
    mcpu: str,
) -> None:
    host(monkeypatch, machine, cpu, features)
    target = Target.parse("native")
    assert target.name == f"native ({cpu})"
    assert target.isa == isa
    assert dict(target.spec)["mcpu"] == mcpu
    assert target.missing_features() == ()


@pytest.mark.parametrize(
    ("machine", "features", "message"),
    [
        ("x86_64", frozenset({"sse2"}), "this x86 CPU has no AVX2"),
        ("s390x", frozenset(), "s390x is no machine we compile for; name one of x86-avx2"),
    ],
)
def test_hosts_that_are_refused(
    monkeypatch: pytest.MonkeyPatch, machine: str, features: frozenset[str], message: str
) -> None:
    host(monkeypatch, machine, "generic", features)
    with pytest.raises(UnknownTarget, match=message):
        Target.parse("native")


def test_features_are_read_from_the_operating_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(targets, "Path", lambda _: cpuinfo)
    read = host_features.__wrapped__
    cpuinfo.write_text("processor: 0\nflags\t\t: fpu avx2 fma\nflags: other\n")
    assert read() == {"fpu", "avx2", "fma"}
    cpuinfo.write_text("Features\t: fp asimd crc32\n")
    assert read() == {"fp", "asimd", "crc32", "neon"}


def test_without_cpuinfo_llvm_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "Path", lambda _: tmp_path / "absent")
    monkeypatch.setattr(targets, "host_cpu", lambda: "x86-64-v3")
    assert host_features.__wrapped__() >= FEATURES_AVX2
