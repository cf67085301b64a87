"""A dozen of the models and of the optimizers that benchmarks/timm_coverage.py tries."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import timm_coverage

MODELS = [
    "convnext_atto", "deit_tiny_patch16_224", "efficientnet_b0", "ghostnet_050", "mixer_s32_224",
    "mobilenetv3_small_050", "regnetx_002", "resnet18", "test_byobnet", "test_resnet", "test_vit",
    "xcit_nano_12_p16_224",
]  # fmt: skip
OPTIMIZERS = [
    "adafactor", "adamw", "adan", "adopt", "lamb", "lars", "lion", "madgrad", "muon", "nadamw",
    "rmsproptf", "sgdw",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_update_of_a_model_is_that_by_hand(name):
    torch.manual_seed(0)
    model = timm_coverage.build(name)
    restored, gradients, weights = timm_coverage.try_update(
        model, "sgd", *timm_coverage.batch_for(model)
    )
    assert restored
    assert max(gradients, weights) < timm_coverage.TOLERANCE


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_by_an_optimizer_is_that_by_hand(name):
    torch.manual_seed(0)
    model = timm_coverage.build("test_vit")
    restored, gradients, weights = timm_coverage.try_update(
        model, name, *timm_coverage.batch_for(model)
    )
    assert restored
    assert max(gradients, weights) < timm_coverage.TOLERANCE
