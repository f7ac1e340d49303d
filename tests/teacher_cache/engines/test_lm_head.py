"""The teacher's LM head in float32, against casting everything."""

from __future__ import annotations

import pytest
import torch

from llavamod_offline.models import lm_head as heads
from llavamod_offline.models.lm_head import LmHead, float32_products
from teacher_cache.engines.lm_head import Float32Head


def _parts(dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, weight, bias = (torch.randn(shape, generator=generator) for shape in ((7, 48), (111, 48), (111,)))
    return rows.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype)


def _expected(
    rows_RD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, cap: float | None, scale: float
) -> torch.Tensor:
    bias_V = None if bias_V is None else bias_V[:100].float()
    logits_RV = torch.nn.functional.linear(rows_RD.float(), weight_VD[:100].float(), bias_V) * scale
    return logits_RV if cap is None else cap * torch.tanh(logits_RV / cap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("cap", "scale"), [(None, 1.0), (5.0, 1.0), (None, 0.125), (5.0, 0.7)])
def test_logits_are_those_of_everything_cast(dtype: torch.dtype, biased: bool, cap: float | None, scale: float) -> None:
    rows_RD, weight_VD, bias_V = _parts(dtype)
    head = LmHead(weight_VD, bias_V if biased else None, cap, scale)
    found_RV = Float32Head(head, 100).logits(rows_RD)
    assert found_RV.dtype == torch.float32
    expected_RV = _expected(rows_RD, weight_VD, head.bias_V, cap, scale)
    torch.testing.assert_close(found_RV, expected_RV, rtol=1e-5, atol=1e-5)


def test_a_full_precision_weight_is_not_copied() -> None:
    _, weight_VD, _ = _parts(torch.float32)
    assert Float32Head(LmHead(weight_VD), 100)._head.weight_VD.data_ptr() == weight_VD.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_the_weight_cast_in_turn_give_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_RD, weight_VD, _ = _parts(dtype)
    expected_RV = rows_RD.float() @ weight_VD.float().T
    for values in (1, 48 * 10, 48 * 111, 2**26):
        monkeypatch.setattr(heads, "_BLOCK_VALUES", values)
        assert torch.allclose(float32_products(rows_RD, weight_VD), expected_RV, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_half_precision_weights_are_neither_copied_nor_rounded_twice(dtype: torch.dtype) -> None:
    rows_RD, weight_VD, bias_V = _parts(dtype, "cuda")
    head = Float32Head(LmHead(weight_VD, bias_V, 5.0, 0.7), 100)
    assert head._head.weight_VD.data_ptr() == weight_VD.data_ptr()
    expected_RV = _expected(rows_RD, weight_VD, bias_V, 5.0, 0.7)
    for found_RV in (head.logits(rows_RD), head.logits(rows_RD.float())):
        assert found_RV.dtype == torch.float32
        assert torch.allclose(found_RV, expected_RV, atol=1e-4, rtol=1e-5)
