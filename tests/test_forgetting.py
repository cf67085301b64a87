"""The estimators of forgetting against closed forms and counting by hand."""

import collections
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from forgetting import adjusted_thresholds, conditional_entropy, forgetting, label_patterns

HALF = torch.tensor([0.5], dtype=torch.float64)
MANY = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)


def random_predictions(examples=300, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(examples, classes, generator=generator, dtype=torch.float64)
    shifted = (
        clean + 0.4 * torch.rand(examples, classes, generator=generator, dtype=torch.float64)
    ) / 1.5
    return clean, shifted, torch.arange(examples) % classes


def counted_entropy(predictions, target, threshold):
    """H(pattern | class) in bits, by counting tuples."""
    total = 0.0
    for label in set(target.tolist()):
        rows = (predictions[target == label] > threshold).tolist()
        counts = collections.Counter(map(tuple, rows)).values()
        total += sum(-c / len(target) * math.log2(c / len(rows)) for c in counts)
    return total


def estimates(predictions, target, thresholds=HALF, **options):
    """I(X; Y_tau | Y) and I(Y; Y_tau)."""
    result = forgetting([(predictions, predictions, target)], thresholds, **options)
    return result["information"], result["relevant"]


def test_patterns_are_equal_exactly_where_sets_are():
    predictions, _, _ = random_predictions()
    patterns = label_patterns(predictions, MANY)
    for column, threshold in enumerate(MANY):
        sets = [tuple(row) for row in (predictions > threshold).tolist()]
        numbers = dict(zip(sets, patterns[:, column].tolist()))
        assert [numbers[s] for s in sets] == patterns[:, column].tolist()
        assert len(set(numbers.values())) == len(set(sets))


def test_a_prediction_at_the_threshold_does_not_count():
    first, second = label_patterns(torch.tensor([[0.5, 0.2], [0.4, 0.2]]), torch.tensor([0.5]))
    assert first == second


def test_predictions_that_follow_the_class_alone_hold_no_information_besides():
    target = torch.arange(40) % 4
    predictions = torch.eye(4, dtype=torch.float64)[target] * 0.74 + 0.13
    information, relevant = estimates(predictions, target, MANY)
    torch.testing.assert_close(information, torch.zeros_like(information))
    between = (MANY > 0.13) & (MANY < 0.87)  # elsewhere all patterns are alike
    torch.testing.assert_close(
        relevant, torch.where(between, 2.0, 0.0).double()
    )  # log2 of 4 equally frequent classes


@pytest.mark.parametrize("patterns", [2, 4, 8])
def test_n_equally_frequent_patterns_in_each_class_hold_log2_n_bits(patterns):
    target = torch.arange(3 * patterns * 5) % 3
    number = torch.arange(len(target)) // 3 % patterns
    predictions = torch.stack([number >> bit & 1 for bit in range(3)], -1).double()
    information, relevant = estimates(predictions, target)
    torch.testing.assert_close(
        information, torch.tensor([math.log2(patterns)], dtype=torch.float64)
    )
    torch.testing.assert_close(
        relevant, torch.zeros(1, dtype=torch.float64)
    )  # the classes show the same patterns


def test_a_known_joint_table():
    # Class 0 shows pattern a 6 times and b twice; class 1 shows a twice and c 6 times.
    a, b, c = [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]
    predictions = torch.tensor([a] * 6 + [b] * 2 + [a] * 2 + [c] * 6, dtype=torch.float64)
    target = torch.tensor([0] * 8 + [1] * 8)
    quarter = -0.25 * math.log2(0.25) - 0.75 * math.log2(0.75)
    marginal = -0.5 * math.log2(0.5) - 0.125 * math.log2(0.125) - 0.375 * math.log2(0.375)
    information, relevant = estimates(predictions, target)
    assert information.item() == pytest.approx(quarter, abs=1e-12)
    assert relevant.item() == pytest.approx(marginal - quarter, abs=1e-12)
    information, relevant = estimates(predictions, target, miller_madow=True)
    # One pattern beyond the first in each class of 8, and two beyond the first in all 16.
    corrected = quarter + 1 / (2 * 8 * math.log(2))
    assert information.item() == pytest.approx(corrected, abs=1e-12)
    assert relevant.item() == pytest.approx(
        marginal + 2 / (2 * 16 * math.log(2)) - corrected, abs=1e-12
    )


def test_conditional_entropy_is_that_of_counting():
    predictions, _, target = random_predictions()
    entropy = conditional_entropy(label_patterns(predictions, MANY), target)
    expected = [counted_entropy(predictions, target, threshold) for threshold in MANY]
    torch.testing.assert_close(entropy, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    "probabilities", [[1 / 16] * 16, [0.5, 0.25, 0.125, 0.0625, 0.0625], [0.9, 0.05, 0.05]]
)
def test_miller_madow_is_less_biased_than_the_plug_in(probabilities):
    generator = torch.Generator().manual_seed(0)
    true = -sum(p * math.log2(p) for p in probabilities)
    patterns = torch.multinomial(
        torch.tensor(probabilities), 30 * 500, replacement=True, generator=generator
    )
    patterns, alike = (
        patterns.reshape(30, 500),
        torch.zeros(30, dtype=torch.long),
    )  # 500 samples of 30 examples
    plug_in = conditional_entropy(patterns, alike).mean() - true
    corrected = conditional_entropy(patterns, alike, miller_madow=True).mean() - true
    assert plug_in < 0
    assert abs(corrected) < 0.6 * abs(plug_in)


def test_no_order_matters():
    clean, perturbed, target = random_predictions()
    expected = forgetting([(clean, perturbed, target)], MANY)
    examples, classes = torch.randperm(len(clean)), torch.randperm(clean.shape[1])
    shuffled = [part[examples] for part in (clean, perturbed, target)]
    renamed = (clean[:, classes], perturbed[:, classes], classes.argsort()[target])
    batches = list(zip(*(part.split(7) for part in (clean, perturbed, target))))
    for other in ([shuffled], [renamed], batches, batches[::-1]):
        for key, value in forgetting(other, MANY).items():
            torch.testing.assert_close(value, expected[key])


def test_adjusted_thresholds_predict_as_many_labels():
    clean, perturbed, _ = random_predictions()
    labels = (clean.flatten() > MANY[:, None]).sum(-1)
    adjusted = adjusted_thresholds(labels, perturbed)
    found = (perturbed.flatten() > adjusted[:, None]).sum(-1)
    torch.testing.assert_close(found, labels)
    assert not torch.equal(
        (perturbed.flatten() > MANY[:, None]).sum(-1), labels
    )  # without them it would not
    for none_or_all in (0, perturbed.numel()):
        (threshold,) = adjusted_thresholds(torch.tensor([none_or_all]), perturbed)
        assert (perturbed > threshold).sum() == none_or_all


def test_a_shift_in_confidence_alone_is_no_forgetting():
    clean, _, target = random_predictions()
    result = forgetting([(clean, clean**3 / 2, target)], MANY)
    torch.testing.assert_close(result["information_perturbed"], result["information"])
    assert result["information"].min() > 0.1
    assert result["forgetting"].abs() < 1e-12


def test_predictions_at_the_thresholds_are_counted_as_everywhere():
    """A perturbation that changes nothing makes nothing forgotten, ties included."""
    levels = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    clean = levels[torch.randint(3, (60, 4), generator=generator)]
    target = torch.arange(60) % 4
    result = forgetting([(clean, clean, target)], levels)
    assert result["information"][0] > 0.1
    for key in ("information", "relevant"):
        torch.testing.assert_close(result[f"{key}_perturbed"], result[key])


def test_forgetting_is_the_information_that_a_perturbation_removes():
    # Besides its class, an example shows one bit through the third output, at the same confidence
    # everywhere; the perturbation makes this output follow the class.
    target, bit = torch.arange(80) % 2, torch.arange(80) // 2 % 2
    clean = torch.stack([target == 0, target == 1, bit == 1], -1).double() * 0.8 + 0.1
    perturbed = torch.stack([target == 0, target == 1, target == 1], -1).double() * 0.8 + 0.1
    labels = torch.cat([target, torch.tensor([2])])
    alone = torch.tensor([[0.1, 0.1, 0.9]], dtype=torch.float64)  # an example of the third class
    batch = (torch.cat([clean, alone]), torch.cat([perturbed, alone]), labels)
    result = forgetting([batch], HALF)
    share = 80 / 81  # of the examples have the bit
    assert result["forgetting"].item() == pytest.approx(share, abs=1e-12)
    assert result["information_perturbed"].item() == pytest.approx(0, abs=1e-12)
    assert forgetting([(batch[1], batch[0], labels)], HALF)["forgetting"].item() == pytest.approx(
        -share, abs=1e-12
    )
    torch.testing.assert_close(
        result["relevant_perturbed"], result["relevant"]
    )  # what is left is about the class


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_memory_does_not_grow_with_thresholds_times_examples_times_classes():
    clean, perturbed, target = random_predictions(examples=400, classes=50)
    batches = list(zip(*(part.split(100) for part in (clean, perturbed, target))))
    with Largest() as largest:
        forgetting(batches, torch.linspace(0.01, 0.99, 60, dtype=torch.float64))
    assert largest.numel < 2 * 400 * 60  # of 400 * 60 * 50


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_thresholds_must_lie_inside(threshold):
    with pytest.raises(ValueError, match=r"does not lie inside \(0, 1\)"):
        forgetting([random_predictions()], torch.tensor([0.5, threshold]))


def test_predictions_must_be_finite_and_every_class_be_there():
    clean, perturbed, target = random_predictions()
    for broken in (clean.clone(), perturbed.clone()):
        broken[3, 1] = math.nan
        batch = (
            (broken, perturbed, target) if broken[0, 0] == clean[0, 0] else (clean, broken, target)
        )
        with pytest.raises(ValueError, match="not finite"):
            forgetting([batch], HALF)
    with pytest.raises(ValueError, match="class 2 has no example"):
        forgetting([(clean, perturbed, torch.where(target == 2, 1, target))], HALF)
