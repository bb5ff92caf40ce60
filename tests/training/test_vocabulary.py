"""New tokens in a run: the tokenizer learns them, the tables grow, the rows train, the folder holds it all."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CanineConfig,
    CanineForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lorakit.bases.vocabulary import grow, new_tokens, num_tokens
from lorakit.errors import ConfigError, ModelError
from lorakit.formats.outline import describe_adapter
from lorakit.records import Choice
from lorakit.training.config import TrainConfig
from lorakit.training.costs.plan import plan_costs
from lorakit.training.costs.subject import named, subject
from lorakit.training.deliver import merge_run
from lorakit.training.fit import FitResult, resume
from lorakit.training.observe import Observer, Step
from lorakit.training.preview import preview
from lorakit.training.runs import open_run

Fit = Callable[..., FitResult]
Bases = Callable[[str], Path]

NEW = ["redboat", "skycar"]
# One fp32 sum in another order: logits of a tiny model, of order 1.
SUM_ORDER = 2e-5

tied_or_not = pytest.mark.parametrize("kind", ["llama-tied", "llama"])


def rows(count: int = 24) -> list[dict[str, str]]:
    words = ("house", "boat", "tree", "car")
    return [{"prompt": f"the {words[i % 4]} {NEW[i % 2]}", "completion": f"{NEW[i % 2]} red"} for i in range(count)]


@pytest.fixture(scope="module", params=["llama-tied", "llama"])
def run(request: pytest.FixtureRequest, quick_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    """Return a run that added tokens and trained their rows."""
    return quick_fit(request.param, rows(), add_tokens=NEW, output=tmp_path_factory.mktemp("runs") / "run")


@torch.no_grad()
def logits(model: Any, tokenizer: Any) -> Tensor:
    found = tokenizer(["the redboat is skycar now", "a skycar was a redboat"], return_tensors="pt", padding=True)
    return model(input_ids=found.input_ids, attention_mask=found.attention_mask).logits


def choice(found: FitResult) -> Choice:
    return next(choice for choice in found.summary.choices if choice.name == "vocabulary")


def rows_of(found: FitResult) -> dict[str, Tensor]:
    return {path: site.tensors["rows"] for path, site in found.handle.state().rows.items()}


def test_the_rows_are_trained_and_the_base_stays(run: FitResult) -> None:
    base = run.model.get_input_embeddings().weight[-2:]
    assert all(not torch.equal(rows, base) for rows in rows_of(run).values())
    assert run.summary.proof.base_unchanged


def test_the_folder_keeps_the_tokenizer(run: FitResult) -> None:
    assert run.folder is not None
    assert AutoTokenizer.from_pretrained(run.folder).tokenize("the redboat") == ["the", "redboat"]


def test_the_run_is_used_with_its_tokens(run: FitResult) -> None:
    assert run.folder is not None
    opened = open_run(run.folder)
    assert torch.equal(logits(opened.base.model, opened.base.tokenizer), logits(run.model, run.tokenizer))


def test_the_folders_outline_names_the_rows(run: FitResult) -> None:
    assert run.folder is not None
    found = {outlined.path: outlined.num_parameters for outlined in describe_adapter(run.folder).rows}
    assert found == {path: rows.numel() for path, rows in rows_of(run).items()}


def test_a_checkpoint_is_used_with_its_tokens(run: FitResult) -> None:
    assert run.folder is not None
    opened = open_run(next((run.folder / "checkpoints").iterdir()))
    assert opened.base.tokenizer.tokenize("skycar") == ["skycar"]


def test_it_is_measured_with_its_tokens(run: FitResult) -> None:
    assert run.folder is not None
    held = open_run(run.folder).read(_table(run.folder.parent, rows(4)))
    assert all(max(row.input_ids) >= num_tokens(run.model) - len(NEW) for row in held.rows)


def test_a_merged_run_is_a_plain_model_with_its_tokenizer(run: FitResult, tmp_path: Path) -> None:
    assert run.folder is not None
    report = merge_run(run.folder, tmp_path / "merged")
    assert report.reloaded
    plain, tokenizer = (kind.from_pretrained(tmp_path / "merged") for kind in (AutoModelForCausalLM, AutoTokenizer))
    expected = logits(run.model, run.tokenizer)
    torch.testing.assert_close(logits(plain.eval(), tokenizer), expected, rtol=0, atol=SUM_ORDER)


def test_a_merged_run_keeps_its_tie(quick_fit: Fit, tmp_path: Path) -> None:
    found = quick_fit("llama-tied", rows(), add_tokens=NEW, output=tmp_path / "run", max_steps=2)
    assert found.folder is not None
    assert merge_run(found.folder, tmp_path / "merged").untied == ()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # what PEFT asks transformers
def test_peft_computes_the_same(run: FitResult) -> None:
    peft = pytest.importorskip("peft", reason="parity needs the real peft, from the extra 'test'")
    base = AutoModelForCausalLM.from_pretrained(run.summary.model)
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(base, run.folder).eval()
    torch.testing.assert_close(logits(theirs, tokenizer), logits(run.model, run.tokenizer), rtol=0, atol=SUM_ORDER)


@tied_or_not
def test_the_chinese_llama_way_trains_both_tables_in_full(kind: str, quick_fit: Fit, tmp_path: Path) -> None:
    found = quick_fit(kind, rows(), add_tokens=NEW, train_vocabulary="full", output=tmp_path / "run")
    state = found.handle.state()
    assert set(state.modules) == {"model.embed_tokens", "lm_head"}
    assert not state.rows
    assert state.sites
    opened = open_run(tmp_path / "run")
    assert torch.equal(logits(opened.base.model, opened.base.tokenizer), logits(found.model, found.tokenizer))


def test_none_of_the_tables_is_trained_where_none_is_asked(quick_fit: Fit, tmp_path: Path) -> None:
    found = quick_fit("llama", rows(), add_tokens=NEW, train_vocabulary="none", output=tmp_path / "run", max_steps=2)
    state = found.handle.state()
    assert not state.rows
    assert not state.modules
    opened = open_run(tmp_path / "run")  # the new rows are the same again, so it is the same base
    assert torch.equal(logits(opened.base.model, opened.base.tokenizer), logits(found.model, found.tokenizer))


def test_the_tables_are_trained_in_full_without_new_tokens(quick_fit: Fit) -> None:
    found = quick_fit("llama", "prompted", train_vocabulary="full", max_steps=2)
    assert set(found.handle.state().modules) == {"model.embed_tokens", "lm_head"}
    assert choice(found).reason == "as asked: all of embedding and head is trained"


def test_a_tokenizer_with_more_tokens_than_the_model_is_caught_up_with(bases: Bases, quick_fit: Fit) -> None:
    folder = bases("llama").with_name("llama-extended")
    shutil.copytree(bases("llama"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(NEW)
    tokenizer.save_pretrained(folder)
    found, asked = (quick_fit(*case) for case in ((("llama-extended", rows())), ("llama", rows())))
    assert choice(found).value == "2 new: redboat skycar"
    assert choice(found).reason.startswith("the tokenizer has 2 tokens more than the model: rows added")
    assert not any(choice.name == "vocabulary" for choice in asked.summary.choices)


def test_an_extended_tokenizer_and_added_tokens_are_the_same_run(bases: Bases, quick_fit: Fit) -> None:
    folder = bases("llama").with_name("llama-extended-too")
    shutil.copytree(bases("llama"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(NEW)
    tokenizer.save_pretrained(folder)
    first, second = quick_fit("llama-extended-too", rows()), quick_fit("llama", rows(), add_tokens=NEW)
    assert all(torch.equal(a, rows_of(second)[path]) for path, a in rows_of(first).items())


class _Interrupts(Observer):
    """Press Ctrl-C twice at a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, step: Step) -> None:
        if step.step == self.at:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("kind", "vocabulary"), [("llama-tied", "new"), ("llama", "full")])
def test_an_interrupted_run_goes_on_bit_for_bit(kind: str, vocabulary: str, quick_fit: Fit, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"add_tokens": NEW, "train_vocabulary": vocabulary, "save_every": 2}
    data = _table(tmp_path, rows())
    whole = quick_fit(kind, str(data), **settings)
    with pytest.raises(KeyboardInterrupt):
        quick_fit(kind, str(data), **settings, output=tmp_path / "run", observer=_Interrupts(5))
    again = resume(tmp_path / "run")
    pairs = zip(whole.handle.parameters().items(), again.handle.parameters().items(), strict=True)
    assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)


def _table(folder: Path, given: list[dict[str, str]]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    return file


def test_preview_counts_the_tokens_of_training(bases: Bases, run: FitResult) -> None:
    plain, found = (preview(bases("llama"), rows(), add_tokens=added) for added in (None, NEW))
    assert found.num_supervised == plain.num_supervised  # an unknown word is one token in any case
    assert any(piece.text.strip() == "redboat" for row in found.rows for piece in row.pieces)
    assert not any(piece.text.strip() == "redboat" for row in plain.rows for piece in row.pieces)


@pytest.mark.parametrize(("kind", "vocabulary"), [("llama-tied", "new"), ("llama", "full")])
def test_plan_counts_the_numbers_of_training(kind: str, vocabulary: str, bases: Bases, quick_fit: Fit) -> None:
    settings: dict[str, Any] = {"add_tokens": NEW, "train_vocabulary": vocabulary, "batch_size": 8}
    planned = plan_costs(bases(kind), rows(), TrainConfig(**settings), probing=False)
    trained = quick_fit(kind, rows(), **settings, max_steps=1)
    assert planned.asked.num_trainable == sum(p.numel() for p in trained.handle.parameters().values())
    assert planned.num_parameters == trained.handle.counts().base


def test_a_plan_without_rows_imagines_the_new_tokens(bases: Bases) -> None:
    config = TrainConfig(add_tokens=NEW)
    model = named(bases("llama"), config)
    before = model.config.vocab_size
    imagined, _ = subject(model, None, config, num_rows=20, length=16)
    assert imagined.new is not None
    assert imagined.new.runs == ((before, before + 2),)
    assert model.config.vocab_size == before + 2


# Where rows start -----------------------------------------------------------------------------------

PIECES = {"<unk>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "abc": 5}


def _bpe() -> PreTrainedTokenizerFast:
    built = Tokenizer(models.BPE(PIECES, [("a", "b"), ("ab", "c")], unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=built, unk_token="<unk>")


def _unigram() -> PreTrainedTokenizerFast:
    scores = [("<unk>", 0.0), ("a", -3.0), ("b", -3.0), ("c", -3.0), ("ab", -4.0), ("abc", -5.0)]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(scores, 0)), unk_token="<unk>")


def _word_piece() -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "a": 1, "##b": 2, "##c": 3, "ab": 4, "abc": 5}
    built = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=built, unk_token="<unk>")


@pytest.mark.parametrize("make", [_bpe, _unigram, _word_piece])
def test_pieces_are_those_of_the_tokenizer_before_it_was_extended(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make()
    whole = new_tokens(tokenizer, num_rows=5)
    assert whole is not None
    assert (whole.tokens, whole.ids, whole.pieces) == (("abc",), (5,), ((4, 3),))
    tokenizer.add_tokens(["ab c!"])
    more = new_tokens(tokenizer, num_rows=6)
    assert more is not None
    assert (more.ids, more.pieces[0][0]) == ((6,), 4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_row_starts_as_the_mean_of_its_pieces(tied: bool) -> None:
    model = _tiny(tied)
    tables = [t.weight.detach().clone() for t in (model.get_input_embeddings(), model.get_output_embeddings())]
    grow(model, (12, 13), ((1, 4), ()))
    for table, before in zip((model.get_input_embeddings(), model.get_output_embeddings()), tables, strict=True):
        assert torch.equal(table.weight[:12], before)
        torch.testing.assert_close(table.weight[12], before[[1, 4]].mean(0))
        torch.testing.assert_close(table.weight[13], before.mean(0))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_growing_draws_no_random_number() -> None:
    model = _tiny(tied=False)
    state = torch.get_rng_state()
    grow(model, (12,))
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_of_a_padded_table_are_written_where_they_are() -> None:
    model = _tiny(tied=False)
    before = model.get_input_embeddings().weight.detach().clone()
    grow(model, (10,), ((2,),))
    assert num_tokens(model) == 12
    assert torch.equal(model.get_input_embeddings().weight[10], before[2])


def _tiny(tied: bool) -> Any:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=12, tie_word_embeddings=tied, **sizes)).requires_grad_(False)


# Refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [
        (["red"], "the tokenizer has 'red' already"),
        (["new1", "red", "blue"], "has 'red', 'blue' already"),
    ],
)
def test_tokens_that_are_there_already_are_named(tokens: list[str], problem: str, quick_fit: Fit) -> None:
    with pytest.raises(ConfigError, match=problem):
        quick_fit("llama", rows(), add_tokens=tokens)


@pytest.mark.parametrize(
    ("content", "problem"),
    [("", "there is no token in it"), ("\n \n", "there is no token in it"), ("a\nb\na\n", "twice the same token: 'a'")],
)
def test_a_file_of_tokens_that_says_nothing_new_is_refused(content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_text(content)
    with pytest.raises(ConfigError, match=problem):
        TrainConfig(add_tokens=str(tmp_path / "tokens.txt"))


def test_a_file_of_tokens_is_read() -> None:
    assert TrainConfig(add_tokens="<a>, <b>").add_tokens == ["<a>", "<b>"]


def test_a_file_of_tokens_has_one_in_each_line(tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_text("<a>\n\n<b c>\n")
    assert TrainConfig(add_tokens=str(tmp_path / "tokens.txt")).add_tokens == ["<a>", "<b c>"]


@pytest.mark.parametrize("value", ["missing.txt", "", ","])
def test_no_tokens_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="there is no"):
        TrainConfig(add_tokens=value)


def test_training_new_rows_without_new_tokens_is_refused(quick_fit: Fit) -> None:
    with pytest.raises(ConfigError, match="there are none: name them in add_tokens"):
        quick_fit("llama", "prompted", train_vocabulary="new")


def test_a_model_object_is_not_extended(
    build: Callable[[str], Any], tokenizer: Callable[[str], Any], quick_fit: Fit
) -> None:
    from lorakit.training.fit import fit

    with pytest.raises(ConfigError, match="cannot be set for a model object"):
        fit(build("llama"), rows(), tokenizer=tokenizer("llama"), add_tokens=NEW)


def test_a_model_without_a_table_of_tokens_is_named() -> None:
    model = CanineForSequenceClassification(CanineConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ModelError, match="CanineForSequenceClassification cannot have more tokens"):
        num_tokens(model)


def test_an_encoder_grows_too(quick_fit: Fit, tmp_path: Path) -> None:
    words = ("the", "old", "new", "very", "house", "tree")
    data = [{"text": f"{words[i % 6]} {NEW[i % 2]} is {words[i // 6]}", "label": NEW[i % 2]} for i in range(24)]
    found = quick_fit("bert", data, add_tokens=NEW, output=tmp_path / "run")
    assert list(found.handle.state().rows) == ["bert.embeddings.word_embeddings[34:36]"]
    opened = open_run(tmp_path / "run")
    assert torch.equal(logits(opened.base.model, opened.base.tokenizer), logits(found.model, found.tokenizer))
