"""The device of a program."""

import torch
from accelerate.utils import parse_flag_from_env


def use_fast_kernels(device: torch.device) -> None:
    """On a GPU, use TF32 for float32 matrices and cuDNN's fastest convolutions, as timm does."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def announce(accelerator) -> None:
    """Say what a program runs on: its first line."""
    accelerator.print(description(accelerator))


def description(accelerator) -> str:
    """Device, precision and processes; on a CPU that nobody asked for, why it is that."""
    device, processes = str(accelerator.device), accelerator.num_processes
    if accelerator.device.type == "cuda":
        device = f"{accelerator.device} ({torch.cuda.get_device_name(accelerator.device)})"
    elif accelerator.device.type == "cpu" and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        without = torch.version.cuda is None and torch.version.hip is None
        device = f"cpu ({'this torch is without CUDA' if without else 'no GPU is visible'})"
    precision = accelerator.mixed_precision
    precision = "float32" if precision == "no" else f"{precision} (mixed)"
    return f"device: {device}, precision: {precision}, processes: {processes}"
