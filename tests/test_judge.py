import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from tiny_folder import save, tiny_model
from torch.nn import functional as F

from qpruner.errors import CorpusError
from qpruner.judge import predictions, speed, turns
from qpruner.judge.divergence import kl_from_logprobs, kl_to, reference_logprobs
from qpruner.judge.loss import evaluate_loss, paired_difference
from qpruner.model.corpus import Windows, bundled_corpus, read_corpus, token_windows
from qpruner.model.load import inspect_source, load_model, load_tokenizer

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=1).double()


@pytest.fixture(scope="module")
def other():
    """A model that is surer of itself than `model`, and of other things."""
    model = tiny_model(seed=2, tie_word_embeddings=False).double()
    model.lm_head.weight.data *= 20
    return model


@pytest.fixture(scope="module")
def windows():
    ids = torch.randint(3, 259, (6, 12), generator=torch.Generator().manual_seed(0))
    return Windows(ids, "bos", (40,) * 6, "random", "digest")


def by_hand(model, windows):
    """Losses of all predicted tokens, (windows, length - 1), one window at a time."""
    with torch.no_grad():
        rows = [model(row[None]).logits[0, :-1].double() for row in windows.ids]
    return torch.stack(
        [F.cross_entropy(r, row[1:], reduction="none") for r, row in zip(rows, windows.ids, strict=True)]
    )


# --- loss ------------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_cross_entropy(model, windows):
    losses = by_hand(model, windows)
    report = evaluate_loss(model, windows)
    assert report.loss == pytest.approx(losses.mean().item(), abs=1e-12)
    assert report.perplexity == pytest.approx(math.exp(losses.mean()))
    assert report.bits_per_byte == pytest.approx(losses.sum().item() / math.log(2) / 240)
    assert report.n_tokens == 66 and report.window_losses == pytest.approx(losses.mean(1).tolist())
    assert report.standard_error == pytest.approx(losses.mean(1).std().item() / math.sqrt(6))


@pytest.mark.parametrize("batch_size, chunk", [(1, 1), (2, 259 * 3), (4, 10**9)])
def test_neither_batch_size_nor_chunks_matter(model, other, windows, batch_size, chunk, monkeypatch):
    whole, distance = evaluate_loss(model, windows, batch_size=6), kl_to(model, other, windows, batch_size=6)
    monkeypatch.setattr(predictions, "CHUNK_ELEMENTS", chunk)
    report = evaluate_loss(model, windows, batch_size=batch_size)
    assert report.window_losses == pytest.approx(whole.window_losses, abs=1e-12)
    again = kl_to(model, other, windows, batch_size=batch_size)
    assert again.window_losses == pytest.approx(distance.window_losses, abs=1e-12)


def test_a_model_that_knows_nothing_loses_the_logarithm_of_its_vocabulary(windows):
    model = tiny_model(tie_word_embeddings=False)
    model.lm_head.weight.data.zero_()
    report = evaluate_loss(model, windows)
    assert report.loss == pytest.approx(math.log(259), abs=1e-6)
    assert report.standard_error == pytest.approx(0, abs=1e-6)


def test_nothing_of_the_model_changes(windows):
    model = tiny_model()
    model.train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = evaluate_loss(model, windows)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert evaluate_loss(model.eval(), windows) == report


def test_progress_counts_windows(model, windows):
    seen = []
    evaluate_loss(model, windows, batch_size=4, on_batch=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 6), (6, 6)]


def test_one_window_has_no_standard_error(model, windows):
    one = dataclasses.replace(windows, ids=windows.ids[:1], covered_bytes=(40,))
    report = evaluate_loss(model, one)
    assert math.isnan(report.standard_error) and "(one window)" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["standard_error"] is None


def test_the_report_carries_its_protocol(model, windows):
    content = evaluate_loss(model, windows).to_dict()
    numbers = {"loss", "perplexity", "bits_per_byte"}
    errors = {"standard_error", "perplexity_standard_error", "bits_per_byte_standard_error"}
    assert numbers | errors | {"standard_error_by", "n_tokens", "protocol"} == set(content)
    assert content["standard_error_by"] == "bootstrap of 6 windows"
    assert content["protocol"]["window"] == 12 and content["protocol"]["stride"] == 11
    assert content["protocol"]["first_token"] == "bos"
    plain = dataclasses.replace(windows, first_token="text", seed=3)
    shown = str(evaluate_loss(model, plain))
    assert "chosen with seed 3" in shown and "stride 12" in shown and "first token not predicted" in shown


def test_tokens_that_the_model_does_not_know(model, windows):
    alien = dataclasses.replace(windows, ids=windows.ids + 200)
    with pytest.raises(CorpusError, match="beyond the model's 259 embeddings"):
        evaluate_loss(model, alien)


# --- distance --------------------------------------------------------------------------------------------------------


def test_kl_is_the_sum_over_the_vocabulary(model, other, windows):
    with torch.no_grad():
        p, q = (m(windows.ids).logits[:, :-1].log_softmax(-1) for m in (other, model))
    expected = (p.exp() * (p - q)).sum(-1)
    report = kl_to(model, other, windows)
    assert report.kl == pytest.approx(expected.mean().item(), abs=1e-12) and report.kl > 0.1
    assert report.window_losses == pytest.approx(expected.mean(1).tolist(), abs=1e-12)
    assert report.standard_error == pytest.approx(expected.mean(1).std().item() / math.sqrt(6))
    assert report.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 2e-4)])
def test_kept_log_probabilities_give_the_same_distance(model, other, windows, dtype, tolerance):
    cached = reference_logprobs(other, windows, dtype=dtype, batch_size=4)
    assert cached.shape == (6, 11, 259) and cached.dtype == dtype
    direct, kept = kl_to(model, other, windows), kl_from_logprobs(model, windows, cached, batch_size=5)
    assert kept.kl == pytest.approx(direct.kl, abs=tolerance)
    assert kept.protocol == direct.protocol


def test_a_model_is_at_no_distance_from_itself(model, windows):
    report = kl_to(model, model, windows)
    assert (report.kl, report.top1_agreement) == (0.0, 1.0)
    cached = reference_logprobs(model, windows)
    assert kl_from_logprobs(model, windows, cached).kl == pytest.approx(0, abs=1e-5)


def test_impossible_tokens_of_the_reference_count_nothing(windows):
    reference = tiny_model(tie_word_embeddings=False)
    reference.lm_head.weight.data *= 1e6  # probabilities of exactly zero and one
    report = kl_to(tiny_model(seed=3), reference, windows)
    assert math.isfinite(report.kl) and report.kl == pytest.approx(math.log(259), rel=0.1)
    assert kl_to(reference, reference, windows).kl == 0
    cached = reference_logprobs(reference, windows)
    assert cached.isinf().any(), "the smallest do not fit into 16 bits"
    assert kl_from_logprobs(tiny_model(seed=3), windows, cached).kl == pytest.approx(report.kl, abs=1e-3)


def test_kept_log_probabilities_of_other_windows(model, windows):
    with pytest.raises(ValueError, match="are not of these 6 windows of 12"):
        kl_from_logprobs(model, windows, torch.zeros(5, 11, 259))


def test_a_paired_difference_cancels_what_both_find_hard(other, windows):
    model, near = other, copy.deepcopy(other)
    near.lm_head.weight.data += 0.01 * torch.randn(259, 16, generator=torch.Generator().manual_seed(0))
    a, b = evaluate_loss(model, windows), evaluate_loss(near, windows)
    mean, error = paired_difference(a, b)
    differences = by_hand(model, windows).mean(1) - by_hand(near, windows).mean(1)
    assert mean == pytest.approx(a.loss - b.loss, abs=1e-12)
    assert error == pytest.approx(differences.std().item() / math.sqrt(6)) and error < a.standard_error / 2
    assert paired_difference(a, a) == (0, 0)
    elsewhere = evaluate_loss(model, dataclasses.replace(windows, ids=windows.ids.flip(0)))
    with pytest.raises(ValueError, match="no paired difference"):
        paired_difference(a, elsewhere)


# --- trained models --------------------------------------------------------------------------------------------------


def test_the_bundled_model_by_its_cards_protocol():
    source = inspect_source("bundled")
    model, tokenizer, corpus = load_model(source), load_tokenizer(source), bundled_corpus("evaluation")
    plain = lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = [i for document in corpus.documents[:2] for i in [*plain(document), tokenizer.eos_token_id]]
    rows = torch.tensor([[tokenizer.bos_token_id, *ids[511 * i : 511 * (i + 1)]] for i in range(3)])
    with torch.no_grad():
        expected = F.cross_entropy(model(rows).logits[:, :-1].flatten(0, 1).double(), rows[:, 1:].flatten())
    report = evaluate_loss(model, token_windows(corpus, tokenizer, length=512, n_windows=3))
    assert report.loss == pytest.approx(expected.item(), abs=1e-4)
    assert report.loss < 4, "it has learned something"


@pytest.mark.shared
@pytest.mark.parametrize("text, loss, bits_per_byte", [("tinyshakespeare/input.txt", 4.6800, 4.171)])
def test_the_shared_model_has_the_loss_on_its_card(text, loss, bits_per_byte):
    if not SHARED.is_dir():
        pytest.skip("the shared models are not beside this checkout")
    source = inspect_source(SHARED / "models" / "stories260K")
    corpus = read_corpus(SHARED / "data" / text, "evaluation")
    report = evaluate_loss(load_model(source), token_windows(corpus, load_tokenizer(source), length=512, n_windows=39))
    assert report.n_tokens == 19_929
    assert report.loss == pytest.approx(loss, abs=1e-4)
    assert report.bits_per_byte == pytest.approx(bits_per_byte, abs=1e-3)


# --- speed and memory ------------------------------------------------------------------------------------------------


def test_a_fresh_process_measures_a_saved_model(tmp_path):
    model = tiny_model(hidden_size=256, intermediate_size=4096, head_dim=4)
    report = speed.measure_in_fresh_process(save(model, tmp_path / "m"), threads=1)
    parameters = 4 * sum(p.numel() for p in model.parameters())
    assert parameters <= report.tensor_bytes <= parameters + 1024  # rotary tables
    assert 0.5 * parameters < report.resident_bytes < 2 * parameters + 2**23
    assert report.peak_bytes > report.tensor_bytes
    assert (report.threads, report.prompt_tokens, report.new_tokens, report.dtype) == (1, 32, 32, "float32")
    assert report.prefill_tokens_per_second > 0 and report.decode_tokens_per_second > 0
    assert report.seconds_to_first_token == pytest.approx(32 / report.prefill_tokens_per_second, rel=0.5)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


@pytest.mark.parametrize("context, prompt, new", [(1, 1, 0), (4, 2, 2), (40, 20, 20), (500, 128, 32)])
def test_a_prompt_fits_the_context(context, prompt, new, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "SECONDS", 0.01)
    folder = save(tiny_model(max_position_embeddings=context), tmp_path / "m")
    report = speed.measure(folder, torch.float32)
    assert (report.prompt_tokens, report.new_tokens) == (prompt, new)
    assert (report.decode_tokens_per_second is None) == (new == 0)


def test_models_are_timed_in_turn(monkeypatch, tmp_path):
    """The machine loses a tenth of its speed with every measurement; ratios within a round hardly see that."""
    seen, speeds = [], {"a": 200.0, "b": 100.0}

    def slower(folder, **how):
        name = folder.name
        rate = speeds[name] * 0.9 ** len(seen)
        seen.append(name)
        return speed.SpeedReport("float32", 1, 1.0, 10, 10, 10, 8, 4, rate, None, 8 / rate)

    monkeypatch.setattr(turns, "measure_in_fresh_process", slower)
    found = turns.in_turn({name: tmp_path / name for name in "ab"}, rounds=4)
    assert "".join(seen) == "abbaabba" and found.rounds == 4
    ratio = found.ratios("a", "b")
    assert ratio["prefill_tokens_per_second"].ratio == pytest.approx(2, rel=0.02)
    assert ratio["prefill_tokens_per_second"].low < 2 < ratio["prefill_tokens_per_second"].high
    assert "decode_tokens_per_second" not in ratio, "there is none"
    typical = found.typical("a")
    assert typical["prefill_tokens_per_second_standard_error"] > 0
    assert typical["decode_tokens_per_second_standard_error"] is None and typical["dtype"] == "float32"


def test_shared_storage_counts_once():
    tied, untied = tiny_model(), tiny_model(tie_word_embeddings=False)
    assert speed.tensor_bytes(untied) - speed.tensor_bytes(tied) == 4 * 259 * 16
    views, whole = torch.nn.Module(), torch.zeros(8)
    views.register_buffer("whole", whole)
    views.register_buffer("part", whole[:3])
    assert speed.tensor_bytes(views) == 32


def test_a_measurement_that_fails_says_why(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'out of luck' >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(speed.sys, "executable", str(python))
    with pytest.raises(RuntimeError, match="failed with status 3:\nout of luck"):
        speed.measure_in_fresh_process(tmp_path)
