"""Quality: the bound must hold what it promises, and the judgement must follow the bound."""

import numpy as np
import pytest
from scipy.stats import binom

from suanli.base.errors import BadInputError
from suanli.measure.quality import (
    accuracy_ok,
    cosine,
    paired_quality,
    ranking_agreement_ok,
    samples_needed,
    upper_bound,
)


def test_figures_that_can_be_had_by_hand():
    # No harmed answer in n: the p at which (1 - p)^n = 0.05.
    bound, method = upper_bound(0, 0, 598)
    assert bound == pytest.approx(1 - 0.05 ** (1 / 598))
    assert method == "exact"
    # All harmed: nothing better than 1 can be said.
    assert upper_bound(5, 0, 5)[0] == 1.0
    # One harmed in 10, from tables of the binomial: 0.3942.
    assert upper_bound(1, 0, 10)[0] == pytest.approx(0.3942, abs=1e-4)
    assert upper_bound(0, 0, 0)[0] == 1.0


def test_the_exact_bound_shares_its_error_when_samples_were_helped():
    bound, method = upper_bound(2, 1, 1000)
    assert method == "exact"
    upper = next(p for p in np.arange(0.002, 0.01, 1e-6) if binom.cdf(2, 1000, p) <= 0.045)
    lower = next(p for p in np.arange(1e-7, 0.01, 1e-8) if binom.sf(0, 1000, p) >= 0.005)
    assert bound == pytest.approx(upper - lower, abs=2e-6)


def test_the_method_changes_with_the_discordant_samples():
    assert upper_bound(15, 4, 2000)[1] == "exact"
    assert upper_bound(15, 5, 2000)[1] == "score"


def test_the_score_bound_solves_its_equation():
    """Against a search over the likelihood itself, with no closed form."""
    harmed, helped, n = 30, 12, 1000
    bound, _ = upper_bound(harmed, helped, n)
    q = np.linspace(1e-6, 0.2, 200_001)
    log_likelihood = (
        harmed * np.log(q + bound) + helped * np.log(q) + (n - 42) * np.log(1 - 2 * q - bound)
    )
    p_helped = q[log_likelihood.argmax()]
    variance = n * (2 * p_helped + bound - bound**2)
    statistic = (harmed - helped - n * bound + 0.5) / np.sqrt(variance)
    assert statistic == pytest.approx(-1.6449, abs=2e-3)


def test_never_wald():
    """With no discordant sample a Wald interval has no width; this one must have."""
    assert upper_bound(0, 0, 100)[0] > 0.029
    assert upper_bound(0, 30, 100)[0] > -0.30


@pytest.mark.parametrize("counts", [(-1, 0, 5), (0, -1, 5), (3, 3, 5), (0, 0, -1)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueError, match="do not fit"):
        upper_bound(*counts)


def test_the_bound_grows_with_harm_and_shrinks_with_help_and_samples():
    for n in (100, 700, 5000):
        for helped in (0, 1, 5, 30):
            bounds = [upper_bound(harmed, helped, n)[0] for harmed in range(40)]
            assert all(np.diff(bounds[: 20 - min(helped, 20)]) > 0)
        assert upper_bound(3, 4, n)[0] < upper_bound(3, 1, n)[0]
        assert upper_bound(3, 1, 2 * n)[0] < upper_bound(3, 1, n)[0]


def _worst_error(n: int, most: int, helped_rates: list[float], critical: int) -> float:
    """Largest probability that the true drop exceeds the bound, by summing over all outcomes.

    For a fixed rate of help the error falls as the rate of harm grows, but for jumps where a
    further outcome's bound is passed: it is enough to look just above the bounds.
    """
    bound = np.array([[upper_bound(h, k, n)[0] for k in range(most)] for h in range(most)])
    harmed = np.arange(most)
    worst = 0.0
    for helped_rate in helped_rates:
        help_probability = binom.pmf(harmed, n, helped_rate)
        likely = np.flatnonzero(help_probability > 1e-10)
        drops = np.unique(bound[:, likely])
        drops = drops[(drops > 0) & ((drops + helped_rate) * n < most / 2)] + 1e-12
        for drop in drops[:: max(1, len(drops) // critical)]:
            rate = (drop + helped_rate) / (1 - helped_rate)
            error = sum(
                help_probability[k] * binom.pmf(harmed, n - k, rate)[bound[:, k] < drop].sum()
                for k in likely
            )
            worst = max(worst, error)
    return worst


def test_coverage_by_enumeration():
    """At n = 200, with and without help, across the change of method."""
    assert _worst_error(200, 70, [x / 200 for x in (0, 0.004, 0.05, 0.5, 4)], 25) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("n", [45, 100, 300, 1000, 4000])
def test_coverage_by_enumeration_everywhere(n):
    means = (0, 0.001, 0.004, 0.0051, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.5, 3, 6, 10, 15, 20)
    most = min(n // 2, 110)
    assert _worst_error(n, most, [x / n for x in means if x < n / 4], 120) <= 0.05


def test_samples_needed_as_the_design_says():
    assert samples_needed(0.005) == 598
    assert samples_needed(0.005, harmed=1) == 947
    assert upper_bound(0, 0, 598)[0] <= 0.005 < upper_bound(0, 0, 597)[0]
    assert upper_bound(1, 0, 947)[0] <= 0.005 < upper_bound(1, 0, 946)[0]


def test_samples_needed_at_a_rate():
    needed = samples_needed(0.005, harmed=1, n=500)
    assert needed is not None
    assert needed > 947
    assert upper_bound(-(-needed // 500), 0, needed)[0] <= 0.005
    assert samples_needed(0.005, harmed=5, n=500) is None
    assert samples_needed(0.0) is None
    mended = samples_needed(0.005, harmed=1, helped=1, n=500)
    assert mended is not None
    assert mended < needed


def _flags(n: int, wrong: list[int]) -> np.ndarray:
    flags = np.ones(n, dtype=bool)
    flags[wrong] = False
    return flags


def test_accepted_with_enough_samples():
    found = paired_quality(_flags(700, [1, 2]), _flags(700, [1, 2]), budget=0.005)
    assert found.accepted
    assert found.needed is None
    assert (found.harmed, found.helped, found.n) == (0, 0, 700)
    assert found.value == found.reference == pytest.approx(698 / 700)
    assert found.drop_upper95 < 0.005


def test_too_few_samples_are_not_accepted_and_the_need_is_said():
    found = paired_quality(_flags(300, []), _flags(300, []), budget=0.005)
    assert not found.accepted
    assert found.needed == 598


def test_harm_over_the_budget_is_not_a_matter_of_samples():
    found = paired_quality(_flags(1000, []), _flags(1000, list(range(20))), budget=0.005)
    assert not found.accepted
    assert found.needed is None
    assert found.harmed == 20
    assert found.drop_upper95 > 0.02


def test_harm_and_help_are_paired_not_netted():
    """Equal accuracies hide ten changed answers; the bound must be wider than with none."""
    moved = paired_quality(
        _flags(1000, list(range(5))), _flags(1000, [7, 8, 9, 10, 11]), budget=0.1
    )
    still = paired_quality(_flags(1000, list(range(5))), _flags(1000, list(range(5))), budget=0.1)
    assert moved.value == still.value
    assert (moved.harmed, moved.helped) == (5, 5)
    assert moved.drop_upper95 > still.drop_upper95


def test_recall_per_class_and_its_alarm():
    labels = np.repeat([0, 1, 2], [900, 90, 10])
    after = _flags(1000, [899, 905, 999])
    found = paired_quality(
        _flags(1000, [0]), after, budget=0.01, labels=labels, class_names=["cat", "dog", "eel"]
    )
    assert [c.label for c in found.per_class] == ["cat", "dog", "eel"]
    assert [c.n for c in found.per_class] == [900, 90, 10]
    assert found.per_class[2].recall == pytest.approx(0.9)
    assert found.per_class[2].drop == pytest.approx(0.1)
    assert found.alarms == ("eel",)  # dog loses 1.1 points, under three times the budget
    unnamed = paired_quality(_flags(1000, []), after, budget=0.01, labels=labels)
    assert unnamed.alarms == ("2",)


def test_a_loss_of_exactly_three_budgets_is_no_alarm():
    labels = np.zeros(100, dtype=int)
    found = paired_quality(_flags(100, []), _flags(100, [1, 2, 3]), budget=0.01, labels=labels)
    assert found.alarms == ()


def test_no_samples_certify_nothing():
    found = paired_quality([], [], budget=1.0)
    assert not found.accepted
    assert found.n == 0


def test_flags_that_do_not_fit_are_refused():
    with pytest.raises(BadInputError, match="reference flags"):
        paired_quality([True], [True, False], budget=0.1)
    with pytest.raises(BadInputError, match="true or false"):
        paired_quality([0.5], [0.5], budget=0.1)
    with pytest.raises(BadInputError, match="labels must be"):
        paired_quality([True], [True], budget=0.1, labels=[0.5])


def test_accuracy_of_scores_and_of_classes():
    scores = np.array([[1.0, 2.0], [3.0, 0.0], [np.nan, 9.0], [np.inf, 0.0]])
    assert accuracy_ok(scores, [1, 1, 1, 0]).tolist() == [True, False, False, False]
    assert accuracy_ok(np.array([2, 1]), [2, 2]).tolist() == [True, False]
    for bad in (np.zeros((3, 1)), np.zeros(3), np.zeros((3, 4, 5))):
        with pytest.raises(BadInputError, match="accuracy needs"):
            accuracy_ok(bad, [0, 0, 0])
    with pytest.raises(BadInputError, match="labels must be"):
        accuracy_ok(np.zeros((3, 2)), [0, 0])


def test_cosine():
    found = cosine([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [np.nan, 1.0]], [[6.0, 8.0], [0, 1]] * 2)
    assert found.tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0])
    with pytest.raises(BadInputError, match="shapes"):
        cosine(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(BadInputError, match=r"\[n, d\]"):
        cosine(np.zeros(3), np.zeros(3))


def test_ranking_agreement():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(2500, 16))  # more rows than one block
    assert ranking_agreement_ok(reference, reference).all()
    assert ranking_agreement_ok(reference * 3.7, reference).all()
    rounded = reference + rng.normal(size=reference.shape) * 1e-4
    assert ranking_agreement_ok(rounded, reference).mean() > 0.999
    assert ranking_agreement_ok(rng.normal(size=reference.shape), reference).mean() < 0.02
    broken = reference.copy()
    broken[7] = np.nan
    assert not ranking_agreement_ok(broken, reference)[7]
    with pytest.raises(BadInputError, match="shapes"):
        ranking_agreement_ok(reference[:1], reference[:1])


def test_a_swap_within_the_tie_is_no_disagreement():
    reference = np.array([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1001]])
    swapped = np.array([[1.0, 0.0], [1.0, 0.1001], [1.0, -0.1]])
    assert ranking_agreement_ok(swapped, reference)[0]
    assert not ranking_agreement_ok(swapped, reference, tie=0.0)[0]
