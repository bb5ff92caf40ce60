"""VeRA: its numbers, its one shared pair, and its files beside PEFT's."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.adapters.capture import shared_of
from lorakit.adapters.spectrum import layer_spectra, low_rank_pair, spectra
from lorakit.errors import ConfigError, FormatError, ShapeError, UnsupportedLayerError
from lorakit.formats.store import read_adapter
from lorakit.methods.vera import VeRA, draw

# Two fp32 sums over at most 16 terms in another order.
SUM_ORDER = 1e-5


class Net(nn.Module):
    """Three layers of different sizes, one of them stored as ``[d_in, d_out]``."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 10)
        self.b = nn.Linear(10, 7)
        self.c = Conv1D(5, 7)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(torch.tanh(self.b(torch.relu(self.a(x))))))


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Net()


def trained(method: VeRA, targets: str | list[str] = ("a", "b"), seed: int = 0) -> tuple[Net, lk.Handle]:
    model = net()
    handle = lk.attach(model, method, targets, seed=seed)
    with torch.no_grad():
        for parameter in handle.parameters().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, handle


def peft_saved(folder: Path, **fields: object) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(net(), VeraConfig(r=4, target_modules=["a", "b"], projection_prng_key=11, **fields))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "vera_lambda" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return model.eval()


def test_a_layer_has_as_many_numbers_as_outputs_and_ranks() -> None:
    handle = lk.attach(net(), VeRA(rank=64), ["a", "b", "c"])
    assert handle.counts().trained == (10 + 64) + (7 + 64) + (5 + 64)


def test_the_bounds_are_kaimings() -> None:
    pair = draw(50, 200, 300, seed=0)
    assert pair["A"].abs().max() == pytest.approx((6 / 200) ** 0.5, rel=1e-2)
    assert pair["B"].abs().max() == pytest.approx((6 / 50) ** 0.5, rel=1e-2)


def test_all_layers_read_one_pair() -> None:
    _, handle = trained(VeRA(rank=4), ["a", "b", "c"])
    (shared,) = shared_of(handle.updates())
    assert shared.tensors()["A"].shape == (4, 10)
    assert shared.tensors()["B"].shape == (10, 4)


def test_the_models_state_holds_the_pair_once() -> None:
    model, _ = trained(VeRA(rank=4), ["a", "b", "c"])
    assert sum(name.endswith("shared_tensors.A") for name in model.state_dict()) == 1


def test_the_pair_moves_with_the_model() -> None:
    model, handle = trained(VeRA(rank=4))
    model.to(torch.float64)
    assert {t.dtype for one in shared_of(handle.updates()) for t in one.tensors().values()} == {torch.float64}
    assert model(torch.randn(2, 6, dtype=torch.float64)).dtype == torch.float64


def test_each_device_has_one_copy_of_the_pair() -> None:
    model = nn.Sequential(*(nn.Linear(6, 6, device=device) for device in ("cpu", "cpu", "meta", "meta")))
    handle = lk.attach(model, VeRA(rank=4))
    assert sorted(one.tensors()["A"].device.type for one in shared_of(handle.updates())) == ["cpu", "meta"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_has_a_pair_of_its_own(copied: object) -> None:
    model, handle = trained(VeRA(rank=4))
    twin = copied(model)  # type: ignore[operator]
    again = lk.handle_of(twin)
    assert again is not None
    (ours,), (theirs,) = shared_of(handle.updates()), shared_of(again.updates())
    assert ours is not theirs
    x = torch.randn(4, 6)
    assert torch.equal(twin(x), model(x))


def test_the_pair_is_not_trained() -> None:
    _, handle = trained(VeRA(rank=4))
    assert {name.rsplit(".", 1)[-1] for name in handle.parameters()} == {"d", "b"}


def test_a_given_seed_draws_the_same_pair_whatever_the_runs_seed_is() -> None:
    first, second = (trained(VeRA(rank=4, projection_seed=5), seed=seed)[1].state().shared for seed in (1, 2))
    assert torch.equal(first["A"], second["A"])
    assert torch.equal(first["B"], second["B"])


@pytest.mark.parametrize("save_projection", [True, False])
def test_a_saved_adapter_comes_back_bit_for_bit(tmp_path: Path, save_projection: bool) -> None:
    model, handle = trained(VeRA(rank=4, save_projection=save_projection), ["a", "b", "c"])
    lk.save(handle, tmp_path)
    assert ("base_model.vera_A" in load_file(tmp_path / "adapter_model.safetensors")) == save_projection
    other = net()
    again = lk.load(other, tmp_path)
    x = torch.randn(4, 6)
    assert torch.equal(other(x), model(x))
    assert again.state().method == handle.state().method


def test_layers_that_peft_has_no_vera_for_come_back_bit_for_bit(tmp_path: Path) -> None:
    def convolutional() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return nn.Sequential(nn.Conv1d(3, 5, 2), nn.Flatten(), nn.Linear(20, 6))

    model = convolutional()
    handle = lk.attach(model, VeRA(rank=4), ["0", "2[0:3]"])
    with torch.no_grad():
        for parameter in handle.parameters().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    lk.save(handle, tmp_path)
    other, x = convolutional(), torch.randn(2, 3, 5)
    lk.load(other, tmp_path)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("save_projection", [True, False])
def test_peft_computes_the_same_from_our_file(tmp_path: Path, save_projection: bool) -> None:
    model, handle = trained(VeRA(rank=4, save_projection=save_projection), ["a", "b"])
    lk.save(handle, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(net(), tmp_path).eval()
    x = torch.randn(4, 6)
    torch.testing.assert_close(theirs(x), model(x), rtol=0, atol=SUM_ORDER)


@pytest.mark.parametrize("save_projection", [True, False])
def test_we_compute_the_same_from_pefts_file(tmp_path: Path, save_projection: bool) -> None:
    theirs = peft_saved(tmp_path, save_projection=save_projection, modules_to_save=["head"])
    model = net()
    lk.load(model, tmp_path, check_base=False)
    x = torch.randn(4, 6)
    torch.testing.assert_close(model(x), theirs(x), rtol=0, atol=SUM_ORDER)


def test_pefts_projections_are_drawn_as_pefts(tmp_path: Path) -> None:
    peft_saved(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    ours = draw(4, 10, 10, seed=11)
    assert torch.equal(ours["A"], saved["base_model.vera_A"])
    assert torch.equal(ours["B"], saved["base_model.vera_B"])


def test_a_pair_that_its_seed_does_not_give_is_always_saved(tmp_path: Path) -> None:
    model, handle = trained(VeRA(rank=4, save_projection=False))
    for one in shared_of(handle.updates()):
        one.load({name: tensor + 0.5 for name, tensor in one.tensors().items()})
    lk.save(handle, tmp_path)
    other, x = net(), torch.randn(4, 6)
    lk.load(other, tmp_path)
    assert torch.equal(other(x), model(x))


def test_tensors_without_their_pair_are_not_put_over_another_pair() -> None:
    _, handle = trained(VeRA(rank=4), seed=1)
    state = handle.state()
    lost = lk.AdapterState(method=VeRA(rank=4, projection_seed=99), sites=state.sites, targets=state.targets)
    with pytest.raises(ShapeError, match="another seed"):
        handle.set_state(lost)


def test_a_file_without_its_projections_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    peft_saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if name != "base_model.vera_B"}, file)
    with pytest.raises(FormatError, match=r"base_model\.vera_B"):
        read_adapter(tmp_path)


def test_pefts_trained_biases_are_refused(tmp_path: Path) -> None:
    peft_saved(tmp_path, bias="all")
    with pytest.raises(FormatError, match="bias"):
        read_adapter(tmp_path)


def test_an_embedding_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 4))
    with pytest.raises(UnsupportedLayerError, match="'0'"):
        lk.attach(model, VeRA(rank=4), ["0", "1"])


def test_a_start_at_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="d_init"):
        VeRA(d_init=0.0)


def test_the_saved_tensors_alone_give_the_spectrum(tmp_path: Path) -> None:
    _, handle = trained(VeRA(rank=4), ["a", "b", "c"])
    lk.save(handle, tmp_path)
    state = read_adapter(tmp_path)
    for live in spectra(handle):
        pair = low_rank_pair(state.method, live.path, state.sites[live.path], shared=state.shared)
        assert pair is not None
        (saved,) = layer_spectra(live.path, pair)
        assert saved.singular_values == pytest.approx(live.singular_values, rel=1e-5, abs=1e-6)


def test_two_adapters_of_different_widths_are_routed_by_row() -> None:
    model, handle = trained(VeRA(rank=4), ["b"])
    handle.add("wide", VeRA(rank=6), ["a", "c"], seed=4)
    with torch.no_grad():
        for parameter in handle.parameters("wide").values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(3, 6)
    with handle.routed(["default", "wide", None]):
        mixed = model(x)
    for row, name in enumerate(("default", "wide", None)):
        with handle.using(name):
            torch.testing.assert_close(mixed[row], model(x)[row], rtol=0, atol=SUM_ORDER)


def test_peft_loads_a_head_that_was_trained_beside(tmp_path: Path) -> None:
    model = net()
    handle = lk.attach(model, VeRA(rank=4), ["a", "b"], train_modules="head")
    with torch.no_grad():
        for parameter in handle.parameters().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    lk.save(handle, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(net(), tmp_path).eval()
    x = torch.randn(4, 6)
    torch.testing.assert_close(theirs(x), model(x), rtol=0, atol=SUM_ORDER)


@pytest.mark.parametrize("save_projection", [True, False])
def test_a_checkpoint_goes_back_into_the_run_that_wrote_it(tmp_path: Path, save_projection: bool) -> None:
    model, handle = trained(VeRA(rank=4, save_projection=save_projection))
    lk.save(handle, tmp_path)
    x = torch.randn(4, 6)
    before = model(x)
    with torch.no_grad():
        for parameter in handle.parameters().values():
            parameter.zero_()
    handle.set_state(read_adapter(tmp_path))
    assert torch.equal(model(x), before)
