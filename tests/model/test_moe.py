"""The mixture of experts against a plain loop over tokens, and its balancing loss."""

import pytest
import torch

from hf_hyla import HylaConfig, HylaForSequenceClassification
from hf_hyla.model.layers_hyla import HylaMoE


SMALL = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 7,
    "ffn_type": "moe",
}


def make(**settings):
    torch.manual_seed(0)
    return HylaForSequenceClassification(HylaConfig(**{**SMALL, **settings}))


@pytest.mark.parametrize(("experts", "per_token"), [(4, 2), (3, 1), (5, 5)])
def test_output_and_gradients_equal_a_loop_over_tokens_and_their_experts(experts, per_token):
    torch.manual_seed(0)
    moe = HylaMoE(HylaConfig(**{**SMALL, "num_experts": experts, "num_experts_per_tok": per_token})).double()
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)

    rows = []
    for token in x.reshape(-1, 12):
        logits = moe.router.gate.weight @ token
        best = logits.argsort(descending=True)[:per_token]
        shares = logits[best].softmax(0)  # of the chosen alone: the same as renormalising their probabilities
        out = torch.zeros(12, dtype=torch.float64)
        for share, expert in zip(shares, best, strict=True):
            hidden = torch.nn.functional.gelu(moe.up_proj[expert] @ token, approximate="tanh")
            out = out + share * (moe.down_proj[expert] @ hidden)
        rows.append(out)
    expected = torch.stack(rows).view(2, 5, 12)

    leaves = [x, *moe.parameters()]
    output = moe(x)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    cotangent = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad((output * cotangent).sum(), leaves),
        torch.autograd.grad((expected * cotangent).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_balancing_loss_is_returned_on_request_and_added_to_the_loss():
    ids, labels = torch.randint(0, 9, (3, 10)), torch.randint(0, 8, (3, 4))
    model = make(attention_dropout=0.0)
    plain = model(ids, labels=labels)
    assert plain.aux_loss is None and plain.router_logits is None
    out = model(ids, labels=labels, output_router_logits=True)
    assert [logits.shape for logits in out.router_logits] == [(30, 4)] * 2
    torch.testing.assert_close(out.loss, plain.loss + 0.01 * out.aux_loss)

    # Switch Transformer, equations 4 to 6: experts × Σ fraction of tokens sent × mean probability, here with two each.
    probabilities = torch.cat(out.router_logits).softmax(-1)
    sent = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(2, -1).indices, 1.0)
    torch.testing.assert_close(out.aux_loss, 4 * (sent.mean(0) * probabilities.mean(0)).sum())


def test_a_quarter_of_an_update_adds_a_quarter_of_the_balancing_loss():
    ids, labels = torch.randint(0, 9, (3, 10)), torch.randint(0, 8, (3, 4))
    model = make(attention_dropout=0.0, output_router_logits=True).eval()
    whole = model(ids, labels=labels).loss
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=4 * 12).loss, whole / 4)


def test_padding_does_not_count_for_the_balancing_loss():
    model = make(output_router_logits=True).eval()
    ids = torch.randint(0, 8, (2, 6))
    padded = torch.cat([ids, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones(2, 6), torch.zeros(2, 3)], dim=1).long()
    torch.testing.assert_close(model(padded, attention_mask=mask).aux_loss, model(ids).aux_loss, rtol=1e-4, atol=1e-5)


def test_experts_are_initialised_like_kernels_and_decayed():
    model = HylaForSequenceClassification(HylaConfig(**{**SMALL, "hidden_size": 200, "intermediate_size": 300}))
    moe = model.model.layers[0].mlp
    assert moe.up_proj.std().item() == pytest.approx(200**-0.5, rel=0.03)
    assert moe.down_proj.std().item() == pytest.approx(300**-0.5, rel=0.03)


def test_more_experts_per_token_than_experts_are_refused():
    with pytest.raises(Exception, match="num_experts_per_tok=3 is more than num_experts=2"):
        HylaConfig(num_experts=2, num_experts_per_tok=3)


def test_a_model_without_experts_has_no_router_logits():
    out = HylaForSequenceClassification(HylaConfig(**{**SMALL, "ffn_type": "mlp"}))(
        torch.randint(0, 9, (2, 6)), labels=torch.zeros(2, 4, dtype=torch.long), output_router_logits=True
    )
    assert out.router_logits is None and out.aux_loss is None
