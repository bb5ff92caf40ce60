"""What the digits demo found in sentences, the same ones for the terminal and for the page."""

from __future__ import annotations

import shlex

from lorakit.reports import wording
from lorakit.reports.digits_record import Adapted, DigitsSummary

_SMALL = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def headline(summary: DigitsSummary) -> str:
    """Say the whole result in two sentences."""
    digit, before = summary.digit, summary.before
    alone, replay = summary.adapter("alone").after, summary.adapter("replay").after
    return (
        f"{wording.count(summary.num_added)} numbers more ({summary.percent:.3f} %) change the errors on digit {digit} "
        f"from {before.errors[digit]} to {alone.errors[digit]} when they are trained on that digit alone, and to "
        f"{replay.errors[digit]} with replay of the others. "
        f"Errors on all digits: {before.total} before, {alone.total} alone, {replay.total} with replay."
    )


def setting(summary: DigitsSummary) -> list[tuple[str, str]]:
    """Say what was trained on what, and how the digit was chosen, as (name, sentences)."""
    layers = "-".join(str(size) for size in summary.network)
    network = (
        f"{layers}, {wording.count(summary.num_base)} numbers: far more than digits need. Trained on "
        f"{wording.count(summary.num_fit)} images, each seen once, in batches of {summary.recipe.base_batch}."
    )
    return [("data", summary.source), ("network", network), ("digit", choice(summary))]


def choice(summary: DigitsSummary) -> str:
    """Say which digit the adapters are trained on, and why it."""
    digit, errors = summary.digit, summary.before.errors
    if summary.asked:
        return f"{digit}, as asked."
    wrong, images = summary.choice_errors[digit], summary.choice_counts[digit]
    text = (
        f"{digit} is the worst: {wrong} of {images} wrong among {wording.count(summary.num_choice)} images kept back "
        "from the training for this choice only. The test images chose nothing."
    )
    shares = [wrong / sum(row) for wrong, row in zip(errors, summary.before.confusion, strict=True)]
    if shares[digit] < max(shares):
        worse = shares.index(max(shares))
        text += f" (On them {worse} turns out to be worse: {images} images of a digit are a small sample.)"
    return text


def outcomes(summary: DigitsSummary) -> list[tuple[str, str]]:
    """Say what each adapter did, as (name, sentences), the honest total included."""
    return [("alone", _alone(summary)), ("replay", _replay(summary)), ("disabled", _disabled(summary))]


def _alone(summary: DigitsSummary) -> str:
    digit, before, adapter = summary.digit, summary.before, summary.adapter("alone")
    own = f"{_small(summary.recipe.num_own)} images of {digit}"
    text = f"{summary.recipe.num_batches} batches of {own} and nothing else. {_moves(summary, adapter)} "
    others = sum(item.truth != digit for item in adapter.broken)
    if adapter.after.total > before.total:
        return text + (
            f"This is forgetting: {wording.plural(others, 'image')} of other digits that were right are wrong now. "
            f"The network answers {digit} for {wording.plural(adapter.after.taken_for(digit), 'image')} of others, "
            f"before for {before.taken_for(digit)}."
        )
    return text + (
        f"Even so {wording.plural(others, 'image')} of other digits that were right are wrong now: "
        "with more batches or a larger learning rate it forgets them."
    )


def _replay(summary: DigitsSummary) -> str:
    digit, before, adapter = summary.digit, summary.before, summary.adapter("replay")
    own, others = _small(summary.recipe.num_own), _small(summary.recipe.num_replayed)
    text = (
        f"The same {own} images of {digit} in each batch and {others} of other digits. "
        f"{_moves(summary, adapter)} {wording.plural(len(adapter.repaired), 'image')} that were wrong are right now, "
        f"{wording.count(len(adapter.broken))} the other way round. "
    )
    if adapter.after.total > before.total:
        return text + "Replay did not hold the other digits here."
    return text + "Part of this gain is simply more training: the network saw its images only once."


def _moves(summary: DigitsSummary, adapter: Adapted) -> str:
    digit, before, after = summary.digit, summary.before, adapter.after
    own = moved(before.errors[digit], after.errors[digit])
    rises = (after.total > before.total) and (after.errors[digit] < before.errors[digit])
    return (
        f"Errors on {digit} {own}{', but' if rises else ','} errors on all digits {moved(before.total, after.total)}; "
        f"accuracy {wording.percent(before.accuracy)} → {wording.percent(after.accuracy)}."
    )


def _disabled(summary: DigitsSummary) -> str:
    same = summary.disabled == summary.before
    verdict = "every prediction is what it was before" if same else "the predictions are NOT what they were"
    return f"Both adapters attached and switched off: {verdict}."


def moved(before: int, after: int) -> str:
    """Write how a count of errors changed: ``fell from 21 to 3 (-86 %)``."""
    if after == before:
        return f"stayed at {before}"
    change = f" ({100.0 * (after - before) / before:+.0f} %)" if before else ""
    return f"{'fell' if after < before else 'rose'} from {before} to {after}{change}"


def added(summary: DigitsSummary) -> str:
    """Say what one adapter adds, and how its scale comes about."""
    recipe = summary.recipe
    return (
        f"Rank {recipe.rank} on all {_small(len(summary.adapter('alone').layers))} layers adds "
        f"{wording.count(summary.num_added)} numbers to {wording.count(summary.num_base)}: {summary.percent:.3f} %. "
        f"Scale = alpha / rank = {recipe.alpha:g} / {recipe.rank} = {recipe.scale:g}."
    )


def _small(number: int) -> str:
    return _SMALL[number] if number < len(_SMALL) else str(number)


def commands(folder: str, summary: DigitsSummary) -> list[str]:
    """Return commands to go on with."""
    data = f" --data {shlex.quote(summary.data)}" if summary.data is not None else ""
    other = (summary.digit + 5) % len(summary.before.errors)
    return [
        f"lorakit inspect {shlex.quote(f'{folder}/replay')}",
        f"lorakit demo digits --digit {other} --seed {summary.seed + 1}{data}",
    ]


def snippet(folder: str, summary: DigitsSummary) -> str:
    """Return Python that loads network and adapters again and switches between them."""
    data = "" if summary.data is None else f"{summary.data!r}, "
    return "\n".join(
        [
            "import lorakit as lk",
            "from lorakit.demos.digits import logits_of, network, read_digits",
            "from safetensors.torch import load_file",
            "",
            f"model, run = network(), {folder!r}",
            'model.load_state_dict(load_file(run + "/base.safetensors"))',
            'handle = lk.load(model, run + "/alone", "alone")',
            'lk.load(model, run + "/replay", "replay")',
            f"test = read_digits({data}seed={summary.seed}).test",
            'for use in (None, "alone", "replay", {"alone": 0.5}):',
            "    with handle.using(use):",
            "        right = logits_of(model, test).argmax(1) == test.labels",
            '    print(use, int((~right).sum()), "errors")',
        ]
    )
