"""The choice of the next token: greedy, filters, seeds."""

import pytest
import torch

from sparsify.generation import Sampling

LOGITS = torch.tensor([[0.1, 3.0, 2.0, -1.0], [5.0, 4.9, -9.0, 4.8]])


def draws(sampling: Sampling, count: int = 300) -> list[set[int]]:
    source = sampling.generator()
    chosen = torch.stack([sampling.choose(LOGITS, source) for _ in range(count)])
    return [set(column.tolist()) for column in chosen.T]


def test_greedy_takes_the_likeliest() -> None:
    sampling = Sampling()
    assert sampling.choose(LOGITS, sampling.generator()).tolist() == [1, 0]


def test_top_k_keeps_k_tokens() -> None:
    assert draws(Sampling(True, top_k=1)) == [{1}, {0}]
    assert draws(Sampling(True, top_k=2, seed=0)) == [{1, 2}, {0, 1}]


def test_top_p_keeps_the_fewest_tokens_that_reach_p() -> None:
    # softmax: row 0 about .04, .69, .25, .01; row 1 about .37, .33, 0, .30
    assert draws(Sampling(True, top_p=0.6, seed=0)) == [{1}, {0, 1}]
    assert draws(Sampling(True, top_p=0.9, seed=0)) == [{1, 2}, {0, 1, 3}]
    assert draws(Sampling(True, top_p=1e-9)) == [{1}, {0}]


def test_draws_follow_the_probabilities() -> None:
    sampling = Sampling(True, temperature=2.0, seed=1)
    source = sampling.generator()
    many = LOGITS[:1].expand(20_000, -1)
    found = torch.bincount(sampling.choose(many, source), minlength=4) / 20_000
    torch.testing.assert_close(found, (LOGITS[0] / 2).softmax(-1), atol=0.02, rtol=0)


def test_a_seed_repeats_the_draws() -> None:
    sampling = Sampling(True, seed=3)
    first, second = (sampling.choose(LOGITS, sampling.generator()) for _ in range(2))
    assert torch.equal(first, second)


def test_options_of_draws_need_draws() -> None:
    with pytest.raises(ValueError, match=r"top_k=3.*set do_sample=True"):
        Sampling(top_k=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1 must not be negative"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(True, **options)
