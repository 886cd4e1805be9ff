"""Names of what is exported are ones that C and C++ take."""

import pytest

from sparsify.c_names import c_name, check_model_name, member_name


@pytest.mark.parametrize(
    "text, name",
    [
        ("input_ids", "input_ids"),
        ("Next.h", "next_h"),
        ("1", "_1"),
        ("größe", "gr__e"),
    ],
)
def test_names_of_tensors(text: str, name: str) -> None:
    assert c_name(text) == name


@pytest.mark.parametrize("name, member", [("h", "h"), ("new", "new_"), ("register", "register_")])
def test_names_of_members(name: str, member: str) -> None:
    assert member_name(name) == member


@pytest.mark.parametrize("name", ["model", "tiny_2", "sparsify_model"])
def test_names_of_models(name: str) -> None:
    check_model_name(name)


@pytest.mark.parametrize(
    "name", ["class", "sparsify", "string", "numpy", "pool", "Model", "2d", ""]
)
def test_names_that_no_model_can_have(name: str) -> None:
    with pytest.raises(ValueError, match=f"export_c: name {name!r}"):
        check_model_name(name)
