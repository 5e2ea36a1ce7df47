"""Numbers of weights: which are read, which are rounded and said, which are refused by name."""

import warnings

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from magnet_jax.errors import UserError
from magnet_jax.io import files


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize(("value", "said"), [(np.nan, "NaN"), (-np.inf, "infinity")])
def test_what_is_not_finite_is_refused_by_file_and_tensor(tmp_path, dtype, value, said):
    good = np.linspace(-1, 1, 6).reshape(2, 3).astype(dtype)
    bad = good.copy()
    bad[1, 1] = value
    path = tmp_path / "model.safetensors"
    save_file({"a": good, "b/c": bad, "count": np.arange(3)}, path)
    with pytest.raises(UserError, match=f"{path}: the tensor b/c holds {said}") as error:
        files.read_tensors(path)
    assert "\n" not in str(error.value)


def test_what_float32_cannot_hold_is_refused_by_its_value():
    for value, found in ((1e300, r"1e\+300"), (-3.5e38, r"-3.5e\+38")):
        with pytest.raises(UserError, match=f"x: the tensor b holds {found}"):
            files.finite("x", {"b": np.array([0.0, value])})


def test_sums_that_overflow_are_no_infinity():
    for dtype, most in ((np.float32, 3.4e38), (np.float16, 65504), (ml_dtypes.bfloat16, 3e38)):
        array = np.full((3, 40), most, dtype)
        found = files.finite("x", {"a": array, "turned": array.T, "none": array[:0]})
        assert np.isfinite(found["turned"]).all() and found["none"].size == 0


def test_types_stay_or_are_widened_exactly():
    halves = np.arange(5, dtype=np.float16) / 3
    brains = (np.arange(5) / 3).astype(ml_dtypes.bfloat16)
    with warnings.catch_warnings(action="error"):
        found = files.finite(
            "x", {"half": halves, "brain": brains, "count": np.arange(5), "wide": np.arange(5.0)}
        )
    assert found["half"] is halves and found["count"].dtype == np.arange(5).dtype
    assert found["brain"].dtype == found["wide"].dtype == np.float32
    np.testing.assert_array_equal(found["brain"], brains.astype(np.float64))


def test_what_is_rounded_is_said_by_name():
    thirds = {"same": np.arange(3.0)} | {f"t{i}": np.arange(3) / 3 for i in range(6)}
    with pytest.warns(files.RoundedWarning) as caught:
        found = files.finite("model.bin", thirds)
    (warning,) = caught
    expected = "model.bin: 6 float64 tensors rounded to float32: t0, t1, t2, t3 and 2 more"
    assert str(warning.message) == expected
    np.testing.assert_array_equal(found["t0"], np.float32(thirds["t0"]))


def test_notes_are_collected_once_and_other_warnings_are_shown():
    with pytest.warns(UserWarning, match="other") as caught, files.noting_rounded() as notes:
        for _ in range(2):
            files.finite("x", {"a": np.array([0.1])})
        warnings.warn("other", stacklevel=1)
    assert notes == ["x: 1 float64 tensor rounded to float32: a"] and len(caught) == 1
