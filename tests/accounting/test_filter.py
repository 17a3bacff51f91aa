"""The Rényi filter spends its budget and no more, whatever is chosen on the way."""

import math

import numpy as np
import pytest

from sfumato.accounting import Budget, Event, Filter, compose, renyi
from sfumato.errors import ConfigurationError

REFERENCE = Event("poisson-gaussian", 1.0, 0.01, "add-remove", adaptive=True)


def with_noise(sigma: float) -> Event:
    return Event("poisson-gaussian", sigma, 0.01, "add-remove", adaptive=True)


@pytest.mark.parametrize("budget", [Budget(0.5, 1e-5), Budget(2.0, 1e-5), Budget(20.0, 1e-9)])
def test_reference_is_repeated_as_often_as_any_order_allows(budget):
    event = with_noise(2.0)
    found = Filter(budget, event)
    n = found.remaining({}, event)
    assert found.allows({event: n - 1}, event)
    assert not found.allows({event: n}, event)
    assert found.epsilon({event: n}) <= budget.epsilon < found.epsilon({event: n + 1})
    # with one kind of event nothing is adaptive, so this is plain Rényi accounting
    planned = Event("poisson-gaussian", 2.0, 0.01, "add-remove")
    assert renyi.compose_renyi({planned: n}, budget.delta) <= budget.epsilon
    assert renyi.compose_renyi({planned: n + 1}, budget.delta) > budget.epsilon
    assert compose({event: n}, delta=budget.delta) >= budget.epsilon


def test_adaptive_choices_never_pass_the_budget_and_use_it():
    rng = np.random.default_rng(3)
    budget = Budget(3.0, 1e-6)
    found = Filter(budget, REFERENCE)
    for _ in range(20):
        spent: dict[Event, int] = {}
        running, sigma = 0.0, 1.0
        while True:
            sigma = float(np.clip(round(sigma * math.exp(rng.normal(0, 0.3)), 1), 0.9, 3.0))
            event = with_noise(sigma)
            assert found.allowed(running, event) == found.allows(spent, event)
            if not found.allows(spent, event):
                break
            running += found.cost(event)
            spent[event] = spent.get(event, 0) + 1
        curve = sum(n * renyi.divergence(e, found.order) for e, n in spent.items())
        assert curve <= found.limit
        total = curve + math.log1p(-1 / found.order) - math.log(1e-6 * found.order) / (found.order - 1)
        assert total <= budget.epsilon
        assert found.epsilon(spent) == pytest.approx(total, rel=1e-9)
        assert found.spent(spent) + found.cost(with_noise(0.9)) > found.limit


def test_the_order_does_not_depend_on_what_was_spent():
    found = Filter(Budget(2.0, 1e-5), REFERENCE)
    order, limit = found.order, found.limit
    found.allows({with_noise(0.7): 3}, with_noise(5.0))
    found.epsilon({with_noise(0.7): 3})
    assert (found.order, found.limit) == (order, limit)
    assert order in renyi.ORDERS


def test_remaining_is_capped_and_validates():
    found = Filter(Budget(1.0, 1e-5), REFERENCE)
    assert found.remaining({}, with_noise(1e6)) == 10**9
    assert found.remaining({with_noise(0.5): 10**6}, REFERENCE) == 0
    assert found.remaining({}, with_noise(0.0)) == 0
    assert not found.allows({}, with_noise(0.0))
    assert found.epsilon({}) == 0.0
    with pytest.raises(ConfigurationError, match="different units"):
        found.remaining({REFERENCE: 1}, Event("gaussian", 1.0, 1.0, "add-remove", unit="user"))


def test_budget_out_of_reach_is_refused():
    with pytest.raises(ConfigurationError, match="no Rényi order"):
        Filter(Budget(1e-9, 1e-12), REFERENCE)
    with pytest.raises(ConfigurationError, match="several records"):
        Filter(Budget(1.0, 1e-5), Event("poisson-gaussian", 1.0, 0.1, "replace-one", records=2))
