"""The rank of features, of features made with one."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from robustness import features


def made(shares, examples=50, dimensions=6):
    """Features whose principal components have these shares of the variance, off the origin."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(dimensions, dimensions, generator=generator))[0]
    scores = torch.randn(examples, len(shares), generator=generator)
    scores = torch.linalg.qr(scores - scores.mean(0))[0]
    return (scores * torch.tensor(shares).sqrt()) @ basis[: len(shares)] + 5.0


@pytest.mark.parametrize("share, rank", [(0.99, 3), (0.7, 2), (0.5, 1)])
def test_rank_counts_components_up_to_a_share_of_variance(share, rank):
    assert features.rank(made([0.6, 0.3, 0.1]), share) == rank


def test_rank_is_that_of_scikit_learns_principal_components():
    torch.manual_seed(0)
    values = torch.randn(40, 60) * torch.linspace(0, 3, 60)  # fewer examples than dimensions
    ratios = PCA().fit(values.double().numpy()).explained_variance_ratio_
    assert features.rank(values) == np.searchsorted(ratios.cumsum(), 0.99) + 1


def test_features_that_are_all_alike_have_no_rank_and_one_dimension_has_one():
    assert features.rank(torch.full((4, 3), 0.1)) == 0
    assert features.rank(torch.tensor([[1.0], [2.0]])) == 1


def test_what_the_classifier_sees_is_recorded_in_the_block_alone():
    classifier = torch.nn.Linear(3, 2)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), classifier)
    x = torch.randn(5, 4)
    with features.recorded(classifier) as seen:
        model(x)
        model(x[:2])
    model(x)
    (first, other) = seen
    assert torch.equal(first, model[:2](x)) and torch.equal(other, first[:2])
    assert not first.requires_grad
