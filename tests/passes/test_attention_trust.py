"""What is measured of a head agrees with its definition, and budgets are kept."""

import pytest
import torch

from sparsify.passes.attention_trust import AttentionTrust, BudgetError


def example(batch=2, heads=4, kv_heads=2, queries=5, keys=7, head_dim=3):
    torch.manual_seed(0)
    q = torch.randn(batch, heads, queries, head_dim)
    k, v = (torch.randn(batch, kv_heads, keys, head_dim) for _ in range(2))
    kept = torch.rand(batch, heads, queries, keys) < 0.5
    visible = torch.rand(batch, 1, queries, keys) < 0.8
    return q, k, v, kept, visible


@pytest.mark.parametrize("queries", [1, 255, 256, 257])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_figures_are_those_of_their_definition(queries: int, softcap: float) -> None:
    q, k, v, kept, visible = example(queries=queries)
    trust = AttentionTrust()
    trust.observe("site", q, k, v, kept, visible, scale=0.7, softcap=softcap)
    assert trust.sites == ("site",)
    for found in trust.heads():
        h, pairs, computed, mass, change, norm, rows = found.head, 0, 0, 0.0, 0.0, 0.0, 0
        for b in range(2):
            for i in range(queries):
                score = q[b, h, i].double() @ k[b, h // 2].double().T * 0.7
                score = score if not softcap else softcap * torch.tanh(score / softcap)
                seen = visible[b, 0, i]
                both = seen & kept[b, h, i]
                pairs, computed = pairs + int(seen.sum()), computed + int(both.sum())
                if not seen.any():
                    continue
                e = score.exp()
                rows += 1
                mass += float(e[both].sum() / e[seen].sum())
                expected = (e * seen / e[seen].sum()) @ v[b, h // 2].double()
                least = torch.zeros(3, dtype=torch.float64)
                got = (e * both / e[both].sum()) @ v[b, h // 2].double() if both.any() else least
                change += float((got - expected).square().sum())
                norm += float(expected.square().sum())
        assert found.density == computed / pairs
        assert found.mass == pytest.approx(mass / rows, rel=1e-5)
        assert found.error == pytest.approx((change / norm) ** 0.5, rel=1e-4)


def test_calls_add_up() -> None:
    q, k, v, kept, visible = example()
    together, apart = AttentionTrust(), AttentionTrust()
    together.observe("a", q, k, v, kept, visible)
    for b in range(2):
        apart.observe("a", q[b], k[b], v[b], kept[b], visible[b])
    for one, other in zip(together.heads(), apart.heads(), strict=True):
        assert one.mass == pytest.approx(other.mass) and one.density == other.density
        assert one.error == pytest.approx(other.error)


def test_keeping_all_costs_nothing() -> None:
    q, k, v, _, visible = example()
    trust = AttentionTrust()
    trust.observe("a", q, k, v, torch.tensor(True), visible, bias=torch.randn(5, 7))
    for head in trust.heads():
        assert (head.density, head.error) == (1.0, 0.0)
        assert head.mass == pytest.approx(1.0)
    trust.check("recipe", 0.0)


def test_a_broken_budget_names_site_and_head() -> None:
    q, k, v, _, _ = example()
    kept = torch.ones(4, 5, 7, dtype=torch.bool)
    kept[2, :, 3:] = False
    trust = AttentionTrust()
    trust.observe("layers.0", q, k, v, torch.tensor(True))
    trust.observe("layers.1", q, k, v, kept)
    trust.check("window", None)
    with pytest.raises(BudgetError, match=r"window: head 2 of layers\.1 .* 1 of 8 heads"):
        trust.check("window", 0.01)


def test_every_site_and_head_is_reported() -> None:
    q, k, v, kept, visible = example()
    trust = AttentionTrust()
    trust.observe("layers.0", q, k, v, kept, visible)
    first, *rest = trust.decisions("window", "a window of 3 keys")
    assert first.site == "layers.0" and first.error == max(h.error for h in trust.heads())
    assert [d.site for d in rest] == [f"layers.0.head{h}" for h in range(4)]
    assert all(d.mass is not None and d.density is not None for d in (first, *rest))
