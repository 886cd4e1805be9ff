"""What every layout promises: exact round trips, byte counts, and specs that read back."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsify.layouts import (
    Bitmap,
    Csr,
    Dense,
    Layout,
    PackedDense,
    Sell,
    WeightStats,
    layout_names,
    parse,
    register,
)

from .conftest import LAYOUTS, matrices, storable

PER_LAYOUT = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_every_registered_layout_is_tested():
    assert {layout.name for layout in LAYOUTS} == set(layout_names())


@PER_LAYOUT
@given(weight=matrices())
def test_round_trip_is_exact(layout, weight):
    weight = storable(layout, weight)
    shape = tuple(weight.shape)
    packed = layout.pack(weight)
    assert tuple(packed) == layout.tensors
    layout.validate(packed, shape)
    found = layout.unpack(packed, shape)
    assert found.dtype == torch.float32 and torch.equal(found, weight)
    nonzero = weight != 0
    assert torch.equal(found[nonzero].view(torch.int32), weight[nonzero].view(torch.int32))


@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (37, 1), (0, 4), (4, 0), (3, 5000)])
@pytest.mark.parametrize("value", [0.0, 1.0, float("nan")])
def test_extreme_shapes(layout, shape, value):
    weight = torch.full(shape, value)
    packed = layout.pack(weight)
    layout.validate(packed, shape)
    torch.testing.assert_close(layout.unpack(packed, shape), weight, rtol=0, atol=0, equal_nan=True)


def test_dense_layouts_are_those_that_gain_nothing_from_zeros(layout):
    sizes = {layout.estimate_nbytes((48, 480), nnz) for nnz in (0, 48 * 480)}
    assert layout.is_dense == (len(sizes) == 1)


def test_packing_copes_with_strided_weights(layout):
    weight = storable(layout, torch.randn(12, 10)).t()[::2]
    assert torch.equal(layout.unpack(layout.pack(weight), (5, 12)), weight)


def test_packing_does_not_keep_gradients(layout):
    packed = layout.pack(torch.nn.Parameter(storable(layout, torch.randn(5, 6))))
    assert not any(t.requires_grad for t in packed.values())


@pytest.mark.parametrize(
    "weight", [torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.float64)]
)
def test_only_float32_matrices_are_packed(layout, weight):
    with pytest.raises(ValueError, match="layouts store float32 matrices"):
        layout.pack(weight)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(384, 384), (130, 700)])
@pytest.mark.parametrize(
    "layout",
    [
        Bitmap(),
        Bitmap(rows=16, value_bits=16),
        Csr(),
        Dense(),
        PackedDense(),
        Sell(),
        Sell(rows=4, k_block=128, window=256),
        Sell(rows=16, k_block=768),
    ],
    ids=lambda layout: layout.spec,
)
def test_estimated_bytes_are_close(layout, shape, density):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    weight[torch.rand(shape, generator=generator) >= density] = 0
    weight = storable(layout, weight)
    packed = layout.pack(weight)
    assert layout.nbytes(packed) == sum(t.numel() * t.element_size() for t in packed.values())
    nnz = int(weight.count_nonzero())
    assert layout.estimate_nbytes(shape, nnz) == pytest.approx(layout.nbytes(packed), rel=0.08)


def damaged(packed, name, change):
    return {**packed, name: change(packed[name])}


def test_missing_tensors_are_refused(layout):
    packed = layout.pack(storable(layout, torch.randn(9, 7)))
    for name in layout.tensors:
        part = {k: v for k, v in packed.items() if k != name}
        with pytest.raises(ValueError, match=f"'{name}' is missing"):
            layout.validate(part, (9, 7))


def test_wrong_dtypes_are_refused(layout):
    packed = layout.pack(storable(layout, torch.randn(9, 7)))
    for name in layout.tensors:
        with pytest.raises(ValueError, match=f"'{name}' is torch.float16"):
            layout.validate(damaged(packed, name, torch.Tensor.half), (9, 7))


def test_strided_tensors_are_refused(layout):
    packed = layout.pack(storable(layout, torch.randn(9, 7)))
    for name in layout.tensors:
        twice = torch.stack([packed[name]] * 2, -1)[..., 0]
        with pytest.raises(ValueError, match=f"'{name}' is not contiguous"):
            layout.validate({**packed, name: twice}, (9, 7))


def test_short_and_long_tensors_are_refused(layout):
    packed = layout.pack(storable(layout, torch.randn(9, 7)))
    for name in layout.tensors:
        for change in (lambda t: t[:-1], lambda t: torch.cat([t, t[-1:]])):
            with pytest.raises(ValueError, match=layout.name):
                layout.validate(damaged(packed, name, change), (9, 7))


def test_a_packing_of_another_shape_is_refused(layout):
    packed = layout.pack(torch.ones(40, 33))
    for shape in ((20, 33), (40, 16), (33, 40)):
        with pytest.raises(ValueError, match=layout.name):
            layout.validate(packed, shape)


@given(
    layout=st.one_of(
        st.sampled_from([Csr(), Dense()]),
        st.builds(Bitmap, st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([16, 32])),
        st.builds(PackedDense, rows=st.integers(1, 64)),
        st.builds(
            lambda rows, k_block, groups: Sell(4 * rows, k_block, 4 * rows * groups),
            st.integers(1, 8),
            st.integers(1, 4096),
            st.integers(1, 64),
        ),
    )
)
def test_specs_read_back(layout):
    assert parse(layout.spec) == layout and str(layout) == layout.spec


def test_specs_leave_out_defaults_and_take_spaces():
    assert parse("sell") == Sell() and parse(" sell{ rows = 4 , window = 8 } ") == Sell(4, window=8)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("coo", "unknown layout 'coo'; known layouts: bitmap, csr, dense"),
        ("sell{rows=8", "unknown layout"),
        ("sell{height=8}", "no option 'height'"),
        ("csr{rows=1}", "no option 'rows'"),
        ("sell{rows=many}", "is not an integer"),
        ("sell{rows=6}", "multiple of 4"),
        ("sell{k_block=5000}", "must be 1..4096"),
        ("sell{rows=8,window=12}", "multiple of rows"),
        ("bitmap{rows=3}", "rows=3 must be one of"),
        ("bitmap{value_bits=8}", "value_bits=8 must be 16 or 32"),
        ("packed_dense{rows=0}", "must be positive"),
    ],
)
def test_spec_errors(spec, message):
    with pytest.raises(ValueError, match=message):
        parse(spec)


def test_a_name_is_registered_once():
    class Impostor(Csr):
        pass

    with pytest.raises(ValueError, match="layout name 'csr' is taken"):
        register(Impostor)
    assert type(parse("csr")) is Csr


def test_index_widths_limit_what_fits():
    big = WeightStats((1 << 16, 1 << 16), nnz=1 << 31)
    small = WeightStats((4, 4), nnz=3, bf16_exact=True)
    for layout in (Bitmap(), Csr(), Sell()):
        assert "do not fit" in (layout.fits(big) or "")
    for layout in LAYOUTS:
        assert layout.fits(small) is None and isinstance(layout, Layout)
