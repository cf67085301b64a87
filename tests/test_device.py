"""What a program says of the machine that it runs on, and that its kernels are those for it."""

from argparse import Namespace

import pytest
import torch
from helpers import train

import train_imagenet
from common import device


def a_machine(kind="cpu", precision="no", processes=1):
    names = {"mixed_precision": precision, "num_processes": processes}
    return Namespace(device=torch.device(kind), **names)


@pytest.mark.parametrize(
    "machine, asked, cuda, line",
    [
        (a_machine(), True, None, "device: cpu, precision: float32, processes: 1"),
        (
            a_machine(precision="bf16", processes=8), False, "12.8",
            "device: cpu (no GPU is visible), precision: bf16 (mixed), processes: 8",
        ),
        (
            a_machine(precision="fp16"), False, None,
            "device: cpu (this torch is without CUDA), precision: fp16 (mixed), processes: 1",
        ),
    ],
)  # fmt: skip
def test_the_line_says_device_precision_and_processes(monkeypatch, machine, asked, cuda, line):
    monkeypatch.setenv("ACCELERATE_USE_CPU", str(asked))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    assert device.description(machine) == line


def test_it_is_the_first_line_of_a_run(tmp_path, images, capsys):
    train(train_imagenet, tmp_path, "--dry-run", dataset=images)
    assert capsys.readouterr().out.startswith("device: cpu")


def test_fast_kernels_are_for_a_gpu(monkeypatch):
    matmul, cudnn = Namespace(allow_tf32=False), Namespace(benchmark=False)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    device.use_fast_kernels(torch.device("cpu"))
    assert not matmul.allow_tf32 and not cudnn.benchmark
    device.use_fast_kernels(torch.device("cuda"))
    assert matmul.allow_tf32 and cudnn.benchmark
