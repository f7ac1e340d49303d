"""Choosing tokens, against the definition spelled out for one row."""

from __future__ import annotations

import math
import random

import torch

from teacher_cache.generate.sampling import choose_tokens


def obvious(logits: list[float], uniform: float, temperature: float, top_p: float) -> tuple[int, float]:
    """Sort, truncate, renormalise, accumulate up to the uniform: the id and its log-prob."""
    weights = [math.exp(value / temperature) for value in logits]
    order = sorted(range(len(logits)), key=lambda number: (-weights[number], number))
    kept: list[int] = []
    mass = 0.0
    for number in order:
        if mass < top_p * sum(weights) or not kept:
            kept.append(number)
            mass += weights[number]
    reached = 0.0
    for number in kept:
        reached += weights[number]
        if uniform * mass < reached:
            break
    return number, math.log(weights[number] / mass)


def test_a_choice_is_that_of_the_definition() -> None:
    rng = random.Random(0)
    for _ in range(300):
        logits = [rng.gauss(0, 3) for _ in range(rng.randint(1, 12))]
        logits += logits[: rng.randint(0, 3)]  # with ties
        uniform, temperature, top_p = rng.random(), rng.choice([0.3, 1.0, 2.5]), rng.choice([1e-6, 0.5, 0.9, 1.0])
        ids_B, log_probs_B = choose_tokens(
            torch.tensor([logits]), torch.tensor([uniform]), temperature=temperature, top_p=top_p
        )
        number, log_prob = obvious(torch.tensor(logits).tolist(), uniform, temperature, top_p)
        assert ids_B.tolist() == [number]
        assert math.isclose(float(log_probs_B), log_prob, rel_tol=1e-9, abs_tol=1e-9)


def test_greedy_takes_the_likeliest_and_of_equal_ones_the_first() -> None:
    logits_BV = torch.tensor([[0.0, 2.0, 2.0], [5.0, -1.0, 4.9], [-torch.inf, -3.0, -torch.inf]])
    ids_B, log_probs_B = choose_tokens(logits_BV, torch.zeros(3), temperature=0.0, top_p=1.0)
    assert ids_B.tolist() == [1, 0, 1]
    expected_B = logits_BV.double().log_softmax(-1).gather(1, ids_B[:, None])[:, 0]
    torch.testing.assert_close(log_probs_B, expected_B)


def test_no_uniform_leads_to_an_id_without_probability() -> None:
    logits_BV = torch.full((2, 5), -torch.inf)
    logits_BV[:, 2], logits_BV[:, 4] = 0.0, -1.0
    uniforms_B = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    assert choose_tokens(logits_BV, uniforms_B, temperature=1.0, top_p=1.0)[0].tolist() == [2, 4]


def test_many_choices_have_the_distribution() -> None:
    """Evenly spaced uniforms choose each id in proportion, to within one."""
    logits_V = torch.tensor([0.3, -1.0, 2.0, 0.0])
    count = 4096
    uniforms_B = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    ids_B, _ = choose_tokens(logits_V.expand(count, 4), uniforms_B, temperature=0.7, top_p=1.0)
    shares = torch.bincount(ids_B, minlength=4) / count
    torch.testing.assert_close(shares, torch.softmax(logits_V / 0.7, -1), rtol=0, atol=1.5 / count)
