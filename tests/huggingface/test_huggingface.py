"""Models of Hugging Face's `transformers` and `peft` train as they are: small ones with random weights, no download."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_checks import DOUBLE, Case, check_agreement, check_bound, flat
from torch import Tensor, nn

import sfumato as sf
from sfumato.errors import UnsupportedModelError
from sfumato.gradients.clipping import Clipping

os.environ.setdefault("HF_HUB_OFFLINE", "1")
MISSING = "not installed; `pip install sfumato[huggingface]` adds it"
transformers = pytest.importorskip("transformers", reason=f"transformers is {MISSING}")
peft = pytest.importorskip("peft", reason=f"peft is {MISSING}")

WORDS, TOKENS, RECORDS, CLASSES, PADDING = 30, 6, 5, 3, 0


def encoder(dropout: float) -> dict[str, Any]:
    return {
        "vocab_size": WORDS, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
        "max_position_embeddings": 16, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout,
        "num_labels": CLASSES, "pad_token_id": PADDING,
    }  # fmt: skip


def bert(dropout: float) -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**encoder(dropout)))


def roberta(dropout: float) -> nn.Module:
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**encoder(dropout)))


def distilbert(dropout: float) -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=WORDS, dim=8, n_layers=2, n_heads=2, hidden_dim=12, max_position_embeddings=16, num_labels=CLASSES,
        dropout=dropout, attention_dropout=dropout, seq_classif_dropout=dropout, pad_token_id=PADDING,
    )  # fmt: skip
    return transformers.DistilBertForSequenceClassification(config)


def gpt2_config(dropout: float) -> Any:
    return transformers.GPT2Config(
        vocab_size=WORDS, n_embd=8, n_layer=2, n_head=2, n_positions=16, num_labels=CLASSES, pad_token_id=PADDING,
        bos_token_id=1, eos_token_id=1, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip


def gpt2(dropout: float) -> nn.Module:
    return transformers.GPT2ForSequenceClassification(gpt2_config(dropout))


def vit(dropout: float) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4,
        num_channels=1, num_labels=CLASSES, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def adapted(base: Callable[[float], nn.Module], targets: list[str]) -> Callable[[float], nn.Module]:
    def make(dropout: float) -> nn.Module:
        config = peft.LoraConfig(
            task_type=peft.TaskType.SEQ_CLS, r=2, lora_alpha=4, lora_dropout=dropout, target_modules=targets,
            fan_in_fan_out=base is gpt2,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the one library calls what the other has deprecated
            model: nn.Module = peft.get_peft_model(base(dropout), config)
        return model

    return make


class Masked(nn.Module):
    """What makes a model of token ids alone from one that also wants to know which of them are padding."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Any:
        return self.inner(input_ids=tokens, attention_mask=(tokens != PADDING).long())


def masked(base: Callable[[float], nn.Module]) -> Callable[[float], nn.Module]:
    return lambda dropout: Masked(base(dropout))


MODELS: dict[str, Callable[[float], nn.Module]] = {
    "BERT": bert,
    "BERT with a mask": masked(bert),
    "RoBERTa": roberta,
    "DistilBERT": distilbert,
    "DistilBERT with a mask": masked(distilbert),
    "GPT-2": gpt2,
    "GPT-2 with a mask": masked(gpt2),
    "ViT": vit,
    "BERT with LoRA": adapted(bert, ["query", "value"]),
    "GPT-2 with LoRA": adapted(gpt2, ["c_attn"]),
}


def made(name: str, dropout: float = 0.0, dtype: torch.dtype = DOUBLE) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name](dropout).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # some start at zero, and what they adapt would not be seen
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(name: str, count: int, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    classes = torch.randint(CLASSES, (count,))
    if name == "ViT":
        return torch.randn(count, 1, 8, 8, dtype=dtype), classes
    tokens = torch.randint(2, WORDS, (count, TOKENS))
    tokens[0, 3:] = PADDING  # the first record ends early, the second a little, the others not at all
    tokens[1, 5:] = PADDING
    return tokens, classes


def classification(out: Any, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(out.logits, target)


def next_token(out: Any, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), target[:, 1:].flatten(), ignore_index=PADDING)


def medium(case: Case) -> Clipping:
    """Return a clip norm that some records are over and some are under."""
    huge = Clipping(1e6)
    singles = [
        Case(case.model, case.features[i : i + 1], case.targets[i : i + 1], case.loss)
        for i in range(len(case.features))
    ]
    norms = sorted(float(flat(single.loop(huge)).norm()) for single in singles)
    assert norms[0] > 0
    return Clipping((norms[1] + norms[2]) / 2)


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the questions that change nothing out of transformers, for the reference, which runs under plain vmap."""
    kind = transformers.PreTrainedModel
    monkeypatch.setattr(kind, "warn_if_padding_and_no_attention_mask", lambda *args: None)
    for function in ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa"):
        monkeypatch.setattr(transformers.masking_utils, function, lambda *args, **kwargs: False)


@pytest.mark.parametrize("name", MODELS)
def test_the_sum_is_that_of_a_loop_over_the_records(name: str) -> None:
    case = Case(made(name).eval(), *inputs(name, RECORDS), classification)
    clipping = medium(case)
    check_agreement(case.fast(clipping), case.loop(clipping), 1e-10)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("unasked")
def test_the_sum_is_that_of_the_reference(name: str) -> None:
    case = Case(made(name).eval(), *inputs(name, RECORDS), classification)
    clipping = medium(case)
    check_agreement(case.fast(clipping), case.reference(clipping), 1e-10)


def language_model(count: int) -> Case:
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(gpt2_config(0.0)).to(DOUBLE).eval()
    tokens, _ = inputs("GPT-2", count)
    return Case(model, tokens, tokens, next_token)


def test_a_causal_language_model_with_tied_embeddings_is_clipped_by_all_its_tokens() -> None:
    case = language_model(RECORDS)
    assert case.model.lm_head.weight is case.model.transformer.wte.weight
    clipping = medium(case)
    check_agreement(case.fast(clipping), case.loop(clipping), 1e-10)


@pytest.mark.usefixtures("unasked")
def test_a_causal_language_model_agrees_with_the_reference() -> None:
    case = language_model(RECORDS)
    clipping = medium(case)
    check_agreement(case.fast(clipping), case.reference(clipping), 1e-10)


@pytest.mark.parametrize("name", ["GPT-2", "BERT with a mask", "GPT-2 with LoRA"])
def test_one_record_moves_the_sum_by_at_most_the_clip_norm(name: str) -> None:
    # Record 0 alone holds much padding: with it and without it the models ask their questions of another batch.
    case = Case(made(name).eval(), *inputs(name, RECORDS), classification)
    check_bound(case, medium(case), range(RECORDS))


def plan(count: int, steps: int) -> sf.Plan:
    return sf.Plan.calibrate(sf.Budget(8.0, 1e-3), population=count, batch_size=count, steps=steps)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_dropout_trains_and_is_left_as_it_was(name: str) -> None:
    model = made(name, dropout=0.1, dtype=torch.float32).train()
    features, targets = inputs(name, 12, torch.float32)
    model(features)  # some keep notes from the first time they run
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    kind, attributes = type(model), [set(module.__dict__) for module in model.modules()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    records = sf.Records.from_arrays(features, targets)
    result = sf.train(model, records, plan(12, 3), loss=classification, optimizer=optimizer)
    assert len(result.steps) == 3
    assert result.nonfinite == 0
    assert result.privacy.epsilon <= 8.0
    assert type(model) is kind
    assert model.training
    assert [set(module.__dict__) for module in model.modules()] == attributes
    after = model.state_dict()
    assert list(after) == list(before)
    assert trained == {key for key, _ in model.named_parameters() if not torch.equal(before[key], after[key])}
    if "LoRA" in name:
        assert all("lora_" in key or "classifier" in key or "score" in key for key in trained)


def test_each_record_draws_its_own_dropout() -> None:
    model = made("BERT", dropout=0.5).train()
    tokens, _ = inputs("BERT", 3)
    losses: list[Tensor] = []

    def loss(out: Any, target: Tensor) -> Tensor:
        values = classification(out, target)
        losses.append(torch._C._functorch.get_unwrapped(values).detach())
        return values

    Case(model, tokens[2:].expand(4, -1), torch.zeros(4, dtype=torch.int64), loss).fast(Clipping(1.0))
    assert len({float(value) for value in torch.cat([value.flatten() for value in losses])}) >= 4


class OwnLoss(nn.Module):
    """A language model that returns the loss of its own tokens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Any:
        return self.inner(input_ids=tokens, labels=tokens).loss


def test_a_language_model_learns_from_its_own_loss() -> None:
    torch.manual_seed(0)
    model = OwnLoss(transformers.GPT2LMHeadModel(gpt2_config(0.1))).train()
    tokens = torch.arange(2, 2 + TOKENS).expand(300, -1)  # everybody writes the same
    records = sf.Records.from_arrays(tokens, torch.zeros(300, dtype=torch.int64))
    before = float(model(tokens[:1]).detach())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    sf.train(model, records, plan(300, 25), loss=lambda out, _: out, optimizer=optimizer)
    assert float(model(tokens[:1]).detach()) < before / 2


def test_nothing_is_printed_about_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(transformers.modeling_utils.logger, "warning_once", said.append)
    case = Case(made("GPT-2").eval(), *inputs("GPT-2", RECORDS), classification)
    with torch.no_grad():
        case.model(case.features)
    assert len(said) == 1  # transformers looks for padding and says so
    case.fast(Clipping(1.0))
    assert len(said) == 1


class Asking(nn.Module):
    """Does something else if a record of the batch holds what is asked for."""

    def __init__(self, ask: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.table, self.ask = nn.Embedding(WORDS, CLASSES), ask

    def forward(self, tokens: Tensor) -> Tensor:
        sign = -1.0 if self.ask(tokens) else 1.0
        return sign * self.table(tokens).mean(1)


def warn_if_padding_and_no_attention_mask(tokens: Tensor) -> bool:
    return PADDING in tokens


@pytest.mark.parametrize(
    "ask",
    [
        warn_if_padding_and_no_attention_mask,  # the name alone is not enough
        lambda tokens: 3 in tokens,
        lambda tokens: bool((tokens == PADDING).any()),
        lambda tokens: int(tokens.max()) > 3,
    ],
)
def test_a_model_that_decides_on_the_values_of_records_is_refused(ask: Callable[[Tensor], bool]) -> None:
    tokens, classes = inputs("BERT", RECORDS)
    with pytest.raises(UnsupportedModelError, match="decision on a tensor's value"):
        Case(Asking(ask), tokens, classes, nn.functional.cross_entropy).fast(Clipping(1.0))


def test_a_model_that_compares_the_records_of_a_batch_is_refused() -> None:
    config = transformers.T5Config(
        vocab_size=WORDS, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, num_labels=CLASSES, dropout_rate=0.0,
        pad_token_id=PADDING, eos_token_id=1, decoder_start_token_id=PADDING,
    )  # fmt: skip
    tokens, classes = inputs("BERT", RECORDS)
    tokens[:, -1] = 1
    model = transformers.T5ForSequenceClassification(config).to(DOUBLE)
    assert math.isfinite(float(classification(model(tokens), classes).detach()))
    with pytest.raises(UnsupportedModelError, match=r"one record at a time|in place"):
        Case(model, tokens, classes, classification).fast(Clipping(1.0))
