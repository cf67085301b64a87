"""The device of a run."""

import torch


def use_fast_kernels(device: torch.device) -> None:
    """On a GPU, use TF32 for float32 matrices and cuDNN's fastest convolutions, as timm does."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
