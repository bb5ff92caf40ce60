from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lorakit.adapters.identity import Identity, compare, digest, identify, non_finite
from lorakit.errors import FormatError, ModelError


class Tied(nn.Module):
    """An embedding whose matrix is also the output layer's, a norm with statistics, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.body = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)
        self.out = nn.Linear(6, 20, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("cache", torch.arange(4.0), persistent=False)


@pytest.fixture
def model() -> Tied:
    torch.manual_seed(0)
    return Tied()


def flip_one_bit(tensor: Tensor) -> None:
    tensor.data.view(-1)[-1:].view(torch.uint8)[:1].bitwise_xor_(1)


def test_identity_is_the_same_every_time(model: Tied) -> None:
    assert identify(model) == identify(copy.deepcopy(model))


def test_tied_tensor_counts_once(model: Tied) -> None:
    parameters = list(model.parameters())
    found = identify(model)
    assert (found.num_tensors, found.num_parameters) == (len(parameters), sum(p.numel() for p in parameters))


@pytest.mark.parametrize("fingerprint", [identify, digest])
def test_order_of_registration_does_not_count(model: Tied, fingerprint: Callable[[nn.Module], Identity | str]) -> None:
    turned = copy.deepcopy(model)
    turned._modules = dict(reversed(turned._modules.items()))
    assert fingerprint(turned) == fingerprint(model)


@pytest.mark.parametrize("fingerprint", [identify, digest])
def test_attached_adapter_does_not_count(model: Tied, fingerprint: Callable[[nn.Module], Identity | str]) -> None:
    before = fingerprint(model)
    model.body.add_module("lorakit", nn.ModuleDict({"default": nn.Linear(6, 2)}))
    assert fingerprint(model) == before


@pytest.mark.parametrize("fingerprint", [identify, digest])
def test_buffer_that_is_not_saved_does_not_count(
    model: Tied, fingerprint: Callable[[nn.Module], Identity | str]
) -> None:
    before = fingerprint(model)
    model.cache += 1
    assert fingerprint(model) == before


def test_excluded_head_does_not_count(model: Tied) -> None:
    saved = identify(model, exclude=("head",))
    nn.init.normal_(model.head.weight)
    assert saved.excluded == ("head",)
    assert compare(saved, model) is None


def test_compiled_model_is_the_same_base(model: Tied) -> None:
    assert compare(identify(model), torch.compile(model, backend="eager")) is None


def test_short_names_structure_and_content(model: Tied) -> None:
    before = identify(model).short
    assert len(before) == 12
    model.body.weight.data.mul_(1.1)
    assert identify(model).short != before


def test_metadata_returns_the_identity(model: Tied) -> None:
    saved = identify(model, exclude=("head", "norm"))
    metadata = saved.to_metadata()
    assert all(key.startswith("lorakit.") and isinstance(value, str) for key, value in metadata.items())
    assert Identity.from_metadata({"format": "pt", **metadata}) == saved


def test_file_without_identity_gives_none() -> None:
    assert Identity.from_metadata({"format": "pt"}) is None


@pytest.mark.parametrize(
    ("key", "value"), [("identity", "9"), ("sketch", "%%%"), ("num_tensors", "many"), ("excluded", "[")]
)
def test_broken_metadata_is_refused(model: Tied, key: str, value: str) -> None:
    metadata = identify(model).to_metadata() | {f"lorakit.base.{key}": value}
    with pytest.raises(FormatError, match="identity"):
        Identity.from_metadata(metadata)


def test_incomplete_metadata_is_refused(model: Tied) -> None:
    metadata = identify(model).to_metadata()
    del metadata["lorakit.base.structure"]
    with pytest.raises(FormatError, match=r"lacks 'lorakit\.base\.structure'"):
        Identity.from_metadata(metadata)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-7])  # 1e-7: most values are lost in fp16's underflow
def test_dtype_it_is_loaded_in_does_not_count(model: Tied, dtype: torch.dtype, scale: float) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(scale)
    other = copy.deepcopy(model).to(dtype)
    assert compare(identify(model), other) is None
    assert compare(identify(other), model) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_weights_are_counted_and_named(model: Tied, dtype: torch.dtype) -> None:
    saved = identify(model)
    model.head.weight.data[:] += 0.1
    found = compare(saved, model.to(dtype))
    assert found is not None
    assert str(found) == ("same architecture, other weights: 8 of 45 sampled values differ, first in 'head.weight'")


def test_other_structure_is_said_with_counts(model: Tied) -> None:
    saved = identify(model)
    model.extra = nn.Linear(2, 2)
    found = compare(saved, model)
    assert found is not None
    assert found.kind == "structure"
    assert f"expected {saved.num_tensors} parameters" in found.message
    assert f"found {saved.num_tensors + 2}" in found.message


@pytest.mark.parametrize("fingerprint", [identify, digest])
def test_model_without_values_is_refused(fingerprint: Callable[[nn.Module], Identity | str]) -> None:
    with torch.device("meta"):
        empty = Tied()
    with pytest.raises(ModelError, match="have no values"):
        fingerprint(empty)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["body.weight", "norm.running_var", "embed.weight"])
def test_digest_changes_with_one_bit(model: Tied, dtype: torch.dtype, name: str) -> None:
    model.to(dtype)
    before = digest(model)
    flip_one_bit(model.state_dict()[name])
    assert digest(model) != before


def test_digest_reads_scalars(model: Tied) -> None:
    before = digest(model)
    model.norm.num_batches_tracked += 1
    assert digest(model) != before


def test_digest_tells_dtypes_apart(model: Tied) -> None:
    before = digest(model)
    assert digest(model.to(torch.float64)) != before


def test_digest_does_not_see_the_memory_layout(model: Tied) -> None:
    before = digest(model)
    model.body.weight.data = model.body.weight.data.t().contiguous().t()
    assert not model.body.weight.is_contiguous()
    assert digest(model) == before


def test_digest_of_a_tensor_larger_than_a_chunk_reads_its_end() -> None:
    large = nn.Linear(2**12, 2**10 + 1, bias=False)  # 16 MiB and one row
    before = digest(large)
    flip_one_bit(large.weight)
    assert digest(large) != before


def test_digest_without_a_module_ignores_it(model: Tied) -> None:
    before = digest(model, exclude=("head",))
    flip_one_bit(model.head.weight)
    assert digest(model, exclude=("head",)) == before


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_numbers_are_named(model: Tied, value: float, dtype: torch.dtype) -> None:
    model.to(dtype)
    assert non_finite(model) == []
    model.head.bias.data[1] = value
    model.embed.weight.data[3, 2] = value
    assert non_finite(model) == ["embed.weight", "head.bias"]
